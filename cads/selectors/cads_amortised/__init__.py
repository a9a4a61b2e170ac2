"""Amortised CADS: a function of features gives the probabilities."""
