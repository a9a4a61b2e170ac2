"""Gradients of single examples, and features made of them."""
