"""Running: files that are whole or absent, checkpoints, journals, processes, signals."""
