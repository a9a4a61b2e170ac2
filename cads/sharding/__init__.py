"""A pool in shards: its files are scored apart, on any machines, and merged into one selection."""
