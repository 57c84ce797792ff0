"""The rows of an engine's state: one file a record, a NumPy structured dtype with one line a field.

Kernels get a record from an address, `batch = batch_at(rows, slot)`, and read and write its fields by name; Python sees
the same row through the same dtype. All memory is preallocated arrays; see `kernels/state.py`.
"""
