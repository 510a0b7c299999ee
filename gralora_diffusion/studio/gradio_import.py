"""Gradio imported without the type stubs that it writes for editors.

For each of its components, Gradio reads the component's source, and writes a stub beside it, at
every import. That takes more than a third of the import, and a studio needs none of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def import_gradio() -> None:
    """Import Gradio; only the first import is any faster."""
    with _without_sources():
        import_module("gradio")


@contextmanager
def _without_sources() -> Iterator[None]:
    """Inside, Gradio's classes have no file, for which it writes no stubs."""
    original = inspect.getfile

    def getfile(found: Any) -> str:
        if isinstance(found, type) and found.__module__.partition(".")[0] == "gradio":
            raise OSError(f"the source of {found.__name__} is not read")
        return original(found)

    inspect.getfile = getfile  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = original
