"""Selection inside other trainers."""
