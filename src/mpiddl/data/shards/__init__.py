"""Which samples a rank has, in which order, and in which global batch."""
