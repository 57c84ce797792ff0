"""Numba kernels: slices, batches, posting, completion and deletion. No I/O, clock or chance of their own."""
