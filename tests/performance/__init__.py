"""Timings, run by hand: ``python -m tests.performance.<name>``."""
