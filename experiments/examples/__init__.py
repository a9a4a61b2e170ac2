"""Selections in other trainers: one script each."""
