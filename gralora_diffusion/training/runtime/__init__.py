"""The processes of a run: accelerate, agreement between them, locks on folders, memory."""
