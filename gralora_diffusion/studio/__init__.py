"""``gralora studio``: a local page over the package's functions and commands."""
