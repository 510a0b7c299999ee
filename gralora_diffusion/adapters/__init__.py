"""The adapter: its mathematics, its layers, their placement in a model, and its file."""
