"""Replicated models: the wrapper that users see, and the check that replicas stay equal."""
