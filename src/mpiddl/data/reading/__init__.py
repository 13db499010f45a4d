"""Readers of common file formats. What they return is read-only where it is mapped from a file."""
