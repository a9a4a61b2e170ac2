"""Distributions over what is trained on, p(m; s), and their scores."""
