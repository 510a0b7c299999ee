"""Durations as people say them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Return a duration in the unit that suits it, such as "3 min 20 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
