"""Hostile text is shown and does nothing; ordinary text stays."""

import csv
import io
import json
import logging
import sys

import pytest

from gralora_diffusion.io.safe_text import (
    TerminalFormatter,
    TerminalParser,
    for_code_block,
    for_code_span,
    for_csv,
    for_markdown,
    for_markdown_item,
    for_terminal,
    for_terminal_line,
    json_for_terminal,
)

ORDINARY = "Grüße, 猫の写真, שלום, 👩‍🚀 \"quoted\" 'text' of C:/a-b.c"
CONTROLS = [
    *(chr(code) for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n"),
    *(chr(code) for code in (0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F))),
    *(chr(code) for code in range(0x2066, 0x206A)),
    "\udc9b",
]


def test_ordinary_text_is_unchanged():
    for show in (for_terminal, for_terminal_line, for_markdown, for_markdown_item, for_csv):
        assert show(ORDINARY) == ORDINARY
    assert for_code_span(ORDINARY) == f"`{ORDINARY}`"
    assert for_code_block(ORDINARY) == f"```\n{ORDINARY}\n```"


@pytest.mark.parametrize("control", CONTROLS, ids=lambda c: f"{ord(c):04x}")
def test_no_control_character_is_left(control):
    text = f"a{control}b"
    code = ord(control)
    visible = f"a\\x{code:02x}b" if code < 256 else f"a\\u{code:04x}b"
    assert for_terminal(text) == for_terminal_line(text) == visible
    for show in (for_markdown, for_code_span, for_code_block, json_for_terminal):
        assert control not in show(text)
    assert json.loads(json_for_terminal(text)) == text


def test_layout_stays_where_it_is_layout():
    assert for_terminal("a\tb\r\nc") == "a\tb\nc"
    assert for_terminal_line("a\tb\nc") == "a\\tb\\nc"


def test_markdown_shows_its_structure_as_text():
    assert for_markdown("x\n# y\n<img src=x>") == "x \\# y &lt;img src=x&gt;"
    assert for_markdown("a|b [c](d) `e` *f*") == "a\\|b \\[c\\](d) \\`e\\` \\*f\\*"


@pytest.mark.parametrize(
    ("text", "shown"), [("- a", "\\- a"), ("+ a", "\\+ a"), ("12. a", "12\\. a"), ("=", "\\=")]
)
def test_a_block_starts_as_text(text, shown):
    assert for_markdown_item(text) == shown


def test_fences_are_longer_than_any_in_the_text():
    assert for_code_span("a``b\n`") == "<code>a\\`\\`b \\`</code>"
    assert for_code_block("a\n````\nb", "yaml") == "`````yaml\na\n````\nb\n`````"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "\t=1", " =1"])
def test_a_formula_is_text_for_a_spreadsheet(text):
    file = io.StringIO()
    csv.writer(file).writerow([for_csv(text), for_csv(-1.5)])
    assert next(csv.reader(io.StringIO(file.getvalue()))) == ["'" + text, "-1.5"]


def test_logs_and_their_tracebacks_are_escaped():
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        record = logging.LogRecord("n", 30, "f", 1, "%s", ("\x9b1m",), sys.exc_info())
    text = TerminalFormatter("%(message)s").format(record)
    assert text.startswith("\\x9b1m\n")
    assert text.endswith("ValueError: \\x1b[2J")


def test_a_parser_escapes_its_errors(capsys):
    parser = TerminalParser(prog="p")
    for end in (lambda: parser.parse_args(["\x1b[31m"]), lambda: parser.exit(2, "\x1b[31m")):
        with pytest.raises(SystemExit, match="2"):
            end()
        shown = capsys.readouterr().err
        assert "\\x1b[31m" in shown
        assert "\x1b" not in shown
