"""A report as Markdown: sentences and tables; plots and pictures are in the page. Pure."""

from __future__ import annotations

import html
import re

import yaml

from . import tables
from .content import Content, ProtocolContent
from .sentences import cautions, headlines, method_note
from .tables import Cell, Number, Table


def as_markdown(content: Content) -> str:
    """Return the report as Markdown (GitHub's, for its tables)."""
    blocks = [f"# {escaped(content.title)}", table(tables.overview(content))]
    for protocol in content.protocols:
        if found := headlines(protocol):
            blocks.append(f"## Protocol {escaped(protocol.name)}")
            blocks += [f"- {escaped(str(headline))}" for headline in found]
    if kept := cautions(content):
        blocks += ["## To be kept in mind", *(f"- {escaped(caution)}" for caution in kept)]
    for protocol in content.protocols:
        if not protocol.methods:
            continue
        blocks += [f"## Numbers of {escaped(protocol.name)}", table(tables.scores(protocol))]
        for reference in content.references:
            against = tables.comparisons(protocol, reference)
            blocks += [table(against)] if against.rows else []
        blocks += [table(tables.costs(protocol)), table(tables.meanings(protocol))]
        if protocol.mechanism:
            blocks += [f"## The mechanism of {escaped(protocol.name)}", *_mechanism(protocol)]
    blocks += ["## How it was computed", escaped(method_note(content))]
    blocks += [table(t) for t in tables.settings(content)]
    if content.settings:
        text = yaml.safe_dump(content.settings, sort_keys=False, allow_unicode=True)
        blocks += ["**The settings, as given**", fenced(text)]
    listed = (tables.missing(content), tables.unreadable(content))
    blocks += [table(t) for t in listed if t.rows]
    return "\n\n".join(blocks) + "\n"


def _mechanism(protocol: ProtocolContent) -> list[str]:
    blocks = [table(tables.mechanisms(protocol))]
    for method, found in protocol.mechanism.items():
        blocks += [table(tables.shares(method, k, found)) for k in found.mean_share]
        layers = table(tables.mechanism(method, found))
        summary = f"<summary>{html.escape(method)}, layer by layer</summary>"
        blocks += [f"<details>{summary}", layers, "</details>"]
    return blocks


def table(content: Table) -> str:
    """A table of GitHub's Markdown, its title above, its note below."""
    rule = ["---" if i < content.labels else "--:" for i in range(len(content.head))]
    rows = [[escaped(name) for name in content.head], rule]
    rows += [[_cell(cell) for cell in row] for row in content.rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = ["", escaped(content.note)] if content.note else []
    return "\n".join([f"**{escaped(content.title)}**", "", *lines, *note])


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", plain)


def fenced(text: str) -> str:
    """A block of code, with a fence that is not in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


def _cell(cell: Cell) -> str:
    return escaped("".join(part.text if isinstance(part, Number) else part for part in cell))
