"""A report as Markdown: sentences and tables; plots and pictures are in the page. Pure."""

from __future__ import annotations

import html

import yaml

from gralora_diffusion.io.safe_text import for_code_block, for_markdown, for_markdown_item

from . import tables
from .report_data import ProtocolData, ReportData
from .summary import cautions, headlines, method_note
from .tables import Cell, Number, Table


def as_markdown(content: ReportData) -> str:
    """Return the report as Markdown (GitHub's, for its tables)."""
    blocks = [f"# {for_markdown(content.title)}", table(tables.overview(content))]
    for protocol in content.protocols:
        if found := headlines(protocol):
            blocks.append(f"## Protocol {for_markdown(protocol.name)}")
            blocks += [f"- {for_markdown_item(headline)}" for headline in found]
    if kept := cautions(content):
        blocks += [
            "## To be kept in mind",
            *(f"- {for_markdown_item(caution)}" for caution in kept),
        ]
    for protocol in content.protocols:
        if not protocol.methods:
            continue
        blocks += [f"## Numbers of {for_markdown(protocol.name)}", table(tables.scores(protocol))]
        for reference in content.references:
            against = tables.comparisons(protocol, reference)
            blocks += [table(against)] if against.rows else []
        blocks += [table(tables.costs(protocol)), table(tables.meanings(protocol))]
        if protocol.mechanism:
            blocks += [f"## The mechanism of {for_markdown(protocol.name)}", *_mechanism(protocol)]
    blocks += ["## How it was computed", for_markdown_item(method_note(content))]
    blocks += [table(t) for t in tables.settings(content)]
    if content.settings:
        text = yaml.safe_dump(content.settings, sort_keys=False, allow_unicode=True)
        blocks += ["**The settings, as given**", for_code_block(text, "yaml")]
    listed = (tables.missing(content), tables.unreadable(content))
    blocks += [table(t) for t in listed if t.rows]
    return "\n\n".join(blocks) + "\n"


def _mechanism(protocol: ProtocolData) -> list[str]:
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
    rows = [[for_markdown(name) for name in content.head], rule]
    rows += [[_cell(cell) for cell in row] for row in content.rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = ["", for_markdown_item(content.note)] if content.note else []
    return "\n".join([f"**{for_markdown(content.title)}**", "", *lines, *note])


def _cell(cell: Cell) -> str:
    return for_markdown("".join(part.text if isinstance(part, Number) else part for part in cell))
