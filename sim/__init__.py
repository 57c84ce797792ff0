"""The simulator runs the product's own kernels in virtual time."""
