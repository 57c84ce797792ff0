"""The wires: each is a verbs provider, reached by two function pointers. They do not know each other."""
