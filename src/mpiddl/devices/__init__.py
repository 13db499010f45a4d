"""All that differs between CPU and GPU memory, behind one protocol."""
