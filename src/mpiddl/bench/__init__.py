"""What ``mpiddl bench`` and ``mpiddl tune`` measure, and how it is shown."""
