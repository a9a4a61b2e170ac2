"""Figures and one page of HTML."""
