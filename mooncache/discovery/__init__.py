"""Finding peers: the handshake with one whose address is known, and stores that turn names into addresses."""
