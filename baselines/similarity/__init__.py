"""Spaces in which examples are compared."""
