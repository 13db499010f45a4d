"""Ranks run out of batches at different times, and those that have left follow the others."""
