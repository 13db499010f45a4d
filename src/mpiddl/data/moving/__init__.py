"""Samples and files that travel between ranks, or that a node's ranks share."""
