"""Code shared by the searches over sources."""
