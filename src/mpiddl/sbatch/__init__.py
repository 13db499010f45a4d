"""Batch scripts of Slurm: written, read, and held against the known traps."""
