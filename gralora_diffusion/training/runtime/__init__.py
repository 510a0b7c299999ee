"""The processes of a run: accelerate, what they agree on, whose a folder is, bytes."""
