"""Ranks, messages and what happens when a rank fails. The only folder that imports mpi4py."""
