"""Shared memory: the peer's pages are mapped and copied."""
