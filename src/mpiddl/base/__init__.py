"""What every room may use, and what needs none: waits, segments, units, settings, the log."""
