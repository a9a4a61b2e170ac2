"""Scripts that train on a Selection with other trainers."""
