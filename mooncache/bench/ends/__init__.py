"""The other processes of benches: one end of a wire each, which does what its stdin asks for."""
