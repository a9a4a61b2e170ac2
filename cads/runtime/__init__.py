"""Running: atomic writes, checkpoints, journals, processes, signals."""
