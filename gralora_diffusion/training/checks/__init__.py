"""What can be wrong with the options, found before any expensive work."""
