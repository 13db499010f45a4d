"""GPU memory, its streams, and arithmetic on it; the only home of CuPy."""
