"""Per-example gradients, and features computed from them."""
