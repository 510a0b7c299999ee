"""Make text from files or users safe for the place where it is shown. These functions are pure.

Ordinary text is unchanged, including letters of all scripts, emoji and quotes.
"""

from __future__ import annotations

import argparse
import html
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

# C0 without tab and newline, DEL, C1, the line and paragraph separators, the direction controls,
# and lone surrogates, which no terminal can encode.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_STRUCTURE = re.compile(r"([\\`*_{}\[\]|~#])")
_LINE_START = re.compile(r"^([-+=:]|\d{1,9}(?=[.)]))")
#: Characters that make a spreadsheet treat a cell as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def for_terminal(text: object) -> str:
    """Return text with control characters as visible escapes; tabs and newlines are kept.

    A Windows line ending becomes a newline.
    """
    return _CONTROLS.sub(_visible, str(text).replace("\r\n", "\n"))


def for_terminal_line(text: object) -> str:
    """Return text for one line of a terminal, with tabs and newlines as visible escapes, too."""
    line = for_terminal(text).replace("\n", "\\n")
    return line.replace("\t", "\\t")


def error_line(error: Exception) -> str:
    """Return the message of a library's error on one line, or its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def json_for_terminal(value: Any, indent: int | None = None) -> str:
    """Return JSON that parses to the same value and has no control characters but newlines."""
    text = json.dumps(value, indent=indent, ensure_ascii=True)
    return text.replace("\x7f", "\\u007f")  # the one control character of ASCII that JSON allows


def for_markdown(text: object) -> str:
    """Return text on one line that Markdown shows unchanged."""
    line = for_terminal(" ".join(str(text).split()))
    return _STRUCTURE.sub(r"\\\1", html.escape(line, quote=False))


def for_markdown_item(text: object) -> str:
    """Return text that may start a block of Markdown, such as a paragraph or a list's item."""

    def escape(match: re.Match[str]) -> str:
        return match[0] + "\\" if match[0].isdigit() else "\\" + match[0]

    return _LINE_START.sub(escape, for_markdown(text))


def for_code_span(text: object) -> str:
    """Return a Markdown code span that shows the text on one line."""
    line = for_terminal(" ".join(str(text).split()))
    if not line:
        return "` `"
    if "`" in line or "<" in line:  # so that no Markdown parser finds a tag or a longer fence
        return f"<code>{for_markdown(line)}</code>"
    return f"`{line}`"


def for_code_block(text: object, language: str = "") -> str:
    """Return a fenced Markdown block whose fence is longer than any in the text."""
    shown = for_terminal(text).rstrip()
    fence = "`" * max(3, _longest_run(shown) + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def for_python(value: object) -> str:
    """Return Python for a value: text in double quotes if it has none itself."""
    if not isinstance(value, str):
        return repr(value)
    double = repr("'" + value)  # with an apostrophe, and no other quote, Python takes double ones
    return '"' + double[2:] if double.startswith('"') else repr(value)


def for_csv(value: Any) -> Any:
    """Return a cell that no spreadsheet treats as a formula; other types are unchanged."""
    if isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA):
        return "'" + value
    return value


class TerminalFormatter(logging.Formatter):
    """Formats records for a terminal, including their tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's text without control characters."""
        return for_terminal(super().format(record))


class TerminalParser(argparse.ArgumentParser):
    """A parser that prints no control characters in usage, help, ``error`` or ``exit``."""

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(for_terminal(message), file)


def first_few(items: Sequence[str], most: int = 5) -> str:
    """Return the first items for a message, and the number of further ones."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
