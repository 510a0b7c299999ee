"""Damaged files for every reader of the package; ``python -m tests.fuzzing --list`` names them."""
