"""Collectives as generators of waits, one algorithm a file. Nothing here knows threads."""
