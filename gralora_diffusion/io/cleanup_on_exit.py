"""What is not finished yet, and how it is taken away, whatever ends the work on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_TIDYING: dict[object, Callable[[], None]] = {}


@contextmanager
def cleanup_on_exit(tidy: Callable[[], None]) -> Iterator[None]:
    """Call ``tidy`` at the end, however that comes about, or when the process is ended inside.

    It may be called at any moment, more than once, and when all is finished.
    """
    key = object()
    _TIDYING[key] = tidy
    try:
        yield
    finally:
        tidy()
        del _TIDYING[key]


def clean_up_all() -> None:
    """Take away whatever is unfinished, for the process is about to end."""
    for tidy in list(_TIDYING.values()):
        with suppress(Exception):
            tidy()
