"""The simulator: the product's own kernels, turned in virtual time."""
