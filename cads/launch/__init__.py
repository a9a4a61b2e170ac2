"""Launchers: they start commands on this machine, on SLURM or on Ray, watch them, and start again what was lost."""
