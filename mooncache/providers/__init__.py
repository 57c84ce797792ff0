"""The wires: each a verbs provider, reached by two function pointers. They do not know each other."""
