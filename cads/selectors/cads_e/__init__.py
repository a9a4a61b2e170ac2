"""CADS-E: probabilities of single examples."""
