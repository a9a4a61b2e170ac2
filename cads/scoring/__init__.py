"""Scoring a pool: one forward pass over it, files of scores, rankings."""
