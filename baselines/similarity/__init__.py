"""Encoders, queries and losses by which examples are compared."""
