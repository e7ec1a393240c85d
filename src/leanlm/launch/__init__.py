"""Processes: local ones, torchrun's and SLURM's, and what waits for a run."""
