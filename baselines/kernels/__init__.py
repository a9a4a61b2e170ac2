"""Faster forms of torch operations, for per-example gradients."""
