"""Runs collectives beside the computation. Nothing here knows algorithms."""
