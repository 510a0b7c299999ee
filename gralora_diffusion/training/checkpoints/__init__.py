"""Checkpoints: complete or not there, their content, and whether one belongs to a run."""
