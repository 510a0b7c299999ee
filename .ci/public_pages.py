"""Pages of the repository as they are shown elsewhere: on a package index, and on the site.

The repository's public address has one place, ``Repository`` of ``project.urls`` in pyproject.toml.
Until it is there, a link to a file that is not shown is shown as its words.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: A fenced block or a code span, which stay as they are; or an image or a link with its target.
_PART = re.compile(
    r"(?P<code>^```.*?^```$|(?P<ticks>`+)[^`].*?(?P=ticks))"
    r"|(?P<image>!?)\[(?P<words>[^\[\]]*)\]\((?P<target>[^()\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def relinked(text: str, page: str, place: Callable[[str], str | None]) -> str:
    """Return Markdown with its relative links and images where they are found.

    Args:
        text: the page.
        page: its path in the repository, with slashes.
        place: from a path in the repository to the target of a link; None if there is none. Then a
            link becomes its words, and an image is left out.
    """

    def replaced(part: re.Match[str]) -> str:
        if part["code"] or part["target"].startswith("#") or "://" in part["target"]:
            return part[0]
        path, number, anchor = part["target"].partition("#")
        target = place(posixpath.normpath(posixpath.join(posixpath.dirname(page), path)))
        if target is None:
            return "" if part["image"] else part["words"]
        return f"{part['image']}[{part['words']}]({target}{number}{anchor})"

    return _PART.sub(replaced, text)


def in_repository(path: str, address: str | None) -> str | None:
    """Return the address of a file on GitHub; None if the repository has no address."""
    if not address:
        return None
    kind = "raw" if path.endswith((".png", ".jpg", ".svg")) else "blob"
    return f"{address.rstrip('/')}/{kind}/main/{path}"


def repository_address(root: Path) -> str | None:
    """Return the address that pyproject.toml has, if it has one."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address: str | None = project["urls"].get("Repository")
    return address


class ReadmeHook(MetadataHookInterface):
    """Gives the package's metadata the README as an index shows it."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set ``readme``, which pyproject.toml declares dynamic."""
        root = Path(self.root)
        address = repository_address(root)
        text = (root / "README.md").read_text(encoding="utf-8")
        shown = relinked(text, "README.md", lambda path: in_repository(path, address))
        metadata["readme"] = {"content-type": "text/markdown", "text": shown}
