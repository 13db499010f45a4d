"""Other libraries that are timed beside mpiddl, each in a process next to every rank."""
