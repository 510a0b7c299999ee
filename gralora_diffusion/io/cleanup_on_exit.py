"""Clean up partial outputs on any exit, including signals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_CLEANUPS: dict[object, Callable[[], None]] = {}


@contextmanager
def cleanup_on_exit(clean_up: Callable[[], None]) -> Iterator[None]:
    """Call ``clean_up`` when the body ends in any way, and when the process is ended inside it.

    ``clean_up`` may be called at any moment, more than once, and after the work is finished.
    """
    key = object()
    _CLEANUPS[key] = clean_up
    try:
        yield
    finally:
        clean_up()
        del _CLEANUPS[key]


def clean_up_all() -> None:
    """Remove all partial outputs before the process ends, the last first, as they are nested."""
    for clean_up in reversed(list(_CLEANUPS.values())):
        with suppress(Exception):
            clean_up()
