"""Frames over connected sockets: TCP, and the connections beside shared memory."""
