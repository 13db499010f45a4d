"""Which sample goes to which rank, and in what order."""
