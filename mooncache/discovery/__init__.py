"""Discovery finds peers: the handshake with a known address, and stores that turn names into addresses."""
