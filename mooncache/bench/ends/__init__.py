"""The other processes of benches: each is one end of a wire, and does what its stdin asks for."""
