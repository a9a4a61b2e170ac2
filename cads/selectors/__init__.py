"""CADS's own selectors."""
