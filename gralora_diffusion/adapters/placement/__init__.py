"""The layers of a model that an adapter adapts, and their rank, k and alpha."""
