"""Facts about a node and its ranks, and the known traps in them."""
