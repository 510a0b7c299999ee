"""Checkpoints: whole or not there, what they hold, and whether one is of this run."""
