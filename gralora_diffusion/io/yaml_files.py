"""Read YAML from untrusted files, in bounded time, without making anything of what it names.

``yaml.safe_load`` multiplies mappings that are merged (``<<: [*a, *a]``) until no memory is left,
and reads some 50 kB a second.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

#: No file of options or prompts has as many values, names included, or is nested as deeply.
MOST_VALUES, MOST_LEVELS = 50_000, 20
_HALVES = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._values += 1
        self._level += 1
        if self._values > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
        if self._level > MOST_LEVELS:
            raise ValueError("it is nested too deeply")
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.ScalarNode) and _HALVES.search(node.value):
            node.value = _joined(node)
        self._level -= 1
        return node

    def scan_flow_scalar_non_spaces(self, double: bool, start_mark: Any) -> Any:
        try:
            return super().scan_flow_scalar_non_spaces(double, start_mark)
        except (ValueError, OverflowError):  # of chr
            raise yaml.scanner.ScannerError(
                "while scanning a double-quoted scalar",
                start_mark,
                "found an escape that is no character",
                self.get_mark(),
            ) from None

    def scan_yaml_directive_number(self, start_mark: Any) -> Any:
        try:
            return super().scan_yaml_directive_number(start_mark)
        except ValueError:  # of int, for thousands of digits
            raise yaml.scanner.ScannerError(
                "while scanning a directive", start_mark, "found no version", self.get_mark()
            ) from None


def _joined(node: yaml.ScalarNode) -> str:
    """Return a text whose escapes are halves of characters, as JSON writes them."""
    try:
        return str(node.value.encode("utf-16", "surrogatepass").decode("utf-16"))
    except UnicodeDecodeError:
        raise yaml.composer.ComposerError(
            None, None, "found half of a character", node.start_mark
        ) from None


def compose(text: str) -> yaml.Node | None:
    """Return the root of a YAML text; None if it is empty. An alias is the node that it names.

    Raises:
        yaml.YAMLError: the text is not YAML.
        ValueError: it is nested too deeply, or has too many values.
    """
    root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return root
