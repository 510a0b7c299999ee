"""What callers of the package may want to catch; a command prints it without a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class AdapterFileError(ValueError):
    """An adapter file that cannot be used; says where, what was found and what to do."""


class ConfigError(ValueError):
    """Options that cannot be used. ``problems`` holds one text for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([f"{head} with the options:", *(f"  {p}" for p in problems)]))


class DataError(ValueError):
    """Pictures or captions that cannot be trained on. ``problems`` holds one text for each."""

    def __init__(self, place: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([f"{place}:", *(f"  {problem}" for problem in problems)]))


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or is not one to resume from."""
