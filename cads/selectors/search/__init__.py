"""A search before the training: a policy over sources, learned from trials."""
