"""Faster forms of operations of torch, for gradients of single examples."""
