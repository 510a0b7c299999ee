"""Checks of the options, made before any expensive work."""
