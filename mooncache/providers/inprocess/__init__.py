"""Wires within a process: loopback copies, emulated models a NIC."""
