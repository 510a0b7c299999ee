"""Which layers of a model an adapter goes on, and with what rank, k and alpha."""
