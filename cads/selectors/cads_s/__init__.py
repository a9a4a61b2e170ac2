"""CADS-S: probabilities of sources."""
