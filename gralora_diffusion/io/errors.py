"""The errors that callers of the package may want to catch. Commands print no traceback."""

from __future__ import annotations

from collections.abc import Sequence


class AdapterFileError(ValueError):
    """An adapter file cannot be used. The message says where, what was found and what to do."""


class ConfigError(ValueError):
    """Options cannot be used. ``problems`` has one text for each problem."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([f"{head} with the options:", *(f"  {p}" for p in problems)]))


class DataError(ValueError):
    """Images or captions cannot be used. ``problems`` has one text for each problem."""

    def __init__(self, place: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([f"{place}:", *(f"  {problem}" for problem in problems)]))


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or a run cannot be resumed from it."""
