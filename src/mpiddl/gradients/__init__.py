"""Gradients grouped into buckets: the plan, the memory, and that all ranks have the same."""
