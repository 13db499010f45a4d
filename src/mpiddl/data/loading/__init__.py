"""Reads a rank's samples: loaders, their workers, streams, seeds."""
