"""Collectives within a node, where ranks meet in shared memory."""
