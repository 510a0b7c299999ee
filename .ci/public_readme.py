"""Pages of the repository as they are shown elsewhere, where their relative links lead nowhere.

Until ``project.urls`` in pyproject.toml names a ``Repository``, a link out of the page is shown as
its words, and an image is left out. From then on, both lead there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

#: A fenced block or a code span, which stay as they are; or an image or a link with its target.
_PART = re.compile(
    r"(?P<code>^```.*?^```$|(?P<ticks>`+)[^`].*?(?P=ticks))"
    r"|(?P<image>!?)\[(?P<words>[^\[\]]*)\]\((?P<target>[^()\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def shown_elsewhere(text: str, page: str, address: str | None) -> str:
    """Return Markdown in which no link or image is relative.

    Args:
        text: the page.
        page: its path in the repository, with slashes.
        address: the repository's on GitHub, without a slash at the end; None if it has none.
    """

    def replaced(part: re.Match[str]) -> str:
        target = part["target"]
        if part["code"] or target.startswith("#") or "://" in target:
            return part[0]
        if address is None:
            return "" if part["image"] else part["words"]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        kind = "raw" if part["image"] else "blob"
        return f"{part['image']}[{part['words']}]({address}/{kind}/main/{path})"

    return _PART.sub(replaced, text)


class ReadmeHook(MetadataHookInterface):
    """Gives the package's metadata the README as an index shows it."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set ``readme``, which pyproject.toml declares dynamic."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        address = metadata.get("urls", {}).get("Repository")
        shown = shown_elsewhere(text, "README.md", address and address.rstrip("/"))
        metadata["readme"] = {"content-type": "text/markdown", "text": shown}
