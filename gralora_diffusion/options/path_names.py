"""Texts that are the names of files and folders: whether a file system can be asked for them."""

from __future__ import annotations

import os

#: Bytes of a file's name, and of a path, on common file systems.
_LONGEST_NAME, _LONGEST_PATH = 255, 4095


def file_or_id(text: str) -> str:
    """Return a text as it is: the type of an argument that is a file, a folder or a Hub id.

    ``CommandParser`` checks such an argument with :func:`path_problem`, as it does a ``Path``.
    """
    return text


def path_problem(text: str) -> str | None:
    """Return the end of a sentence that says why no file can have this name; None if one can."""
    try:
        longest = max(len(os.fsencode(part)) for part in text.split("/"))
        size = len(os.fsencode(os.path.abspath(from_home(text))))  # it is resolved somewhere
    except UnicodeEncodeError:
        return "is not valid Unicode, so it cannot be the name of a file"
    if "\0" in text or longest > _LONGEST_NAME or max(size, len(text)) > _LONGEST_PATH:
        return (
            f"cannot be the name of a file: names have at most {_LONGEST_NAME} bytes, paths have "
            f"at most {_LONGEST_PATH}, and neither contains the character 0"
        )
    if from_home(text).startswith("~"):
        user = text.partition("/")[0]
        return (
            f"begins with the home folder of a user that this machine does not have. Give "
            f"./{user} if {user} itself is the name of a file"
        )
    return None


def from_home(text: str) -> str:
    """Replace ``~`` by the user's home folder; a path of an unknown user stays as it is."""
    return os.path.expanduser(text)
