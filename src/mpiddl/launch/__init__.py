"""How a process came to be a rank, and how it ends."""
