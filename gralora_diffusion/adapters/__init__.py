"""The adapter: its mathematics, its layers, where they go in a model, and its file."""
