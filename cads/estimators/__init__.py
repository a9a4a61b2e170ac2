"""Gradients of an expected objective in the policy's parameters, and the loss that a budget can reach."""
