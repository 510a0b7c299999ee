"""A report as one page that needs nothing beside itself. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import yaml

from . import plots, tables
from .images import Embedded, Sheet
from .report_data import ProtocolData, ReportData
from .style import POLICY, STYLE
from .summary import cautions, headlines, method_note
from .tables import Cell, Number, Table

_RULE = (
    "Chosen by rule, not by looks: of each subject the seed that most methods have (the lowest), "
    "prompts evenly over the list, the first picture of each."
)


def as_html(content: ReportData, embedded: Embedded) -> str:
    """Return the page. All text is escaped; the page forbids itself scripts and fetching."""
    colour = plots.colours(dict.fromkeys(trial.method for trial in content.trials))
    numbered = list(enumerate(content.protocols))
    sections = [("found", "What was found", _found(content))]
    for n, protocol in numbered:
        if protocol.methods:
            sections.append(
                (f"numbers{n}", f"Numbers: {protocol.name}", _numbers(content, protocol, colour))
            )
    if embedded.sheets:
        sections.append(("pictures", "Pictures", _images(embedded, len(numbered) > 1)))
    for n, protocol in numbered:
        if protocol.mechanism:
            title = f"The mechanism: {protocol.name}"
            sections.append((f"mechanism{n}", title, _mechanism(protocol, colour)))
    sections.append(("settings", "Settings and versions", _settings(content)))
    sections.append(("units", "Units", _trials(content)))
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = "".join(
        f'<section id="{name}"><h2>{escape(title)}</h2>{inner}</section>'
        for name, title, inner in sections
    )
    title = escape(content.title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{title}</h1><nav>{links}</nav>\n{body}</body></html>\n"
    )


def _found(content: ReportData) -> str:
    parts = [table(tables.overview(content))]
    for protocol in content.protocols:
        if found := headlines(protocol):
            parts.append(f"<h3>Protocol {escape(protocol.name)}</h3>")
            parts += [
                f"<p><b>{escape(headline.about)}</b></p>{_list(headline.findings)}"
                for headline in found
            ]
    if kept := cautions(content):
        parts.append(f'<div class="note"><h3>To be kept in mind</h3>{_list(kept)}</div>')
    return "".join(parts)


def _numbers(content: ReportData, protocol: ProtocolData, colour: dict[str, int]) -> str:
    parts = [table(tables.scores(protocol))]
    for reference in content.references:
        against = tables.comparisons(protocol, reference)
        if against.rows:
            drawn = (
                (score.score.label, plots.differences(score, reference, colour))
                for score in protocol.scores.values()
            )
            figures = [(label, plot) for label, plot in drawn if plot]
            parts += [f"<h3>Against {escape(reference)}</h3>", _figures(figures), table(against)]
    if protocol.pareto:
        found = [
            (plots.pareto_title(p), plots.pareto(p, protocol, colour)) for p in protocol.pareto
        ]
        parts.append("<h3>What similarity costs</h3>")
        parts.append(_figures(found))
        for plot in protocol.pareto:
            front = ", ".join(plot.front)
            title = plots.pareto_title(plot)
            parts.append(f"<p>{escape(title)}, the front: {escape(front)}.</p>")
        parts.append(
            '<p class="soft">The front, filled: methods whose means no other betters in both. '
            "Pale: the intervals of the means.</p>"
        )
    figures = [(s.score.label, plots.means(s, colour)) for s in protocol.scores.values()]
    parts += ["<h3>Means</h3>", _figures(figures)]
    parts.append(
        '<p class="soft">These intervals hold how subjects differ, which is the same for all '
        "methods: whether methods differ is told by the differences above.</p>"
    )
    parts.append(table(tables.meanings(protocol)))
    parts += ["<h3>Time and memory</h3>", table(tables.costs(protocol))]
    return "".join(parts)


def _images(embedded: Embedded, several: bool) -> str:
    if not embedded.side:
        return "<p>There are too many pictures for a page of this size; none is shown.</p>"
    parts = [f'<p class="soft">{escape(_RULE)}</p>']
    for number, sheet in enumerate(embedded.sheets):
        name = f"{sheet.protocol}: {sheet.subject}" if several else sheet.subject
        counts = f"{len(sheet.rows)} of {sheet.prompts} prompts, seed {sheet.seed}"
        summary = f'{escape(name)} <span class="soft">{escape(counts)}</span>'
        inner = _sheet(sheet, embedded.uris)
        opened = " open" if number == 0 else ""
        parts.append(f"<details{opened}><summary>{summary}</summary>{inner}</details>")
    return "".join(parts)


def _sheet(sheet: Sheet, uris: dict[Path, str]) -> str:
    parts = []
    if sheet.real:
        cells = [_image(path, uris, f"{sheet.subject}, real") for path in sheet.real]
        parts.append(f"<h3>Real pictures</h3>{_grid(cells)}")
    for row in sheet.rows:
        cells = [_image(row.real, uris, "real")] if row.real else []
        cells += [_image(path, uris, method) for method, path in row.images.items()]
        parts.append(f"<h3>{escape(row.prompt)}</h3>{_grid(cells)}")
    return "".join(parts)


def _image(path: Path | None, uris: dict[Path, str], label: str) -> str:
    text = escape(label)
    if path is None or path not in uris:
        why = "not drawn" if path is None else "not readable"
        inner = f'<div class="none">{why}</div>'
    else:
        small = ' class="small"' if uris[path].startswith("data:image/png") else ""
        inner = f'<img{small} alt="{text}" loading="lazy" decoding="async" src="{uris[path]}">'
    return f"<figure>{inner}<figcaption>{text}</figcaption></figure>"


def _mechanism(protocol: ProtocolData, colour: dict[str, int]) -> str:
    parts = [table(tables.mechanisms(protocol))]
    parts.append(_figures(plots.layer_strips(protocol.mechanism, colour)))
    for method, found in protocol.mechanism.items():
        if maps := plots.heat_maps(method, found):
            parts.append(f"<h3>{escape(method)}: where the gradient is</h3>")
            parts.append(
                '<p class="soft">Share of each block in the squared norm of the gradient of the '
                "dense update, mean of steps and units.</p>"
            )
            parts.append(_figures(maps, "plots maps"))
        inner = [table(tables.shares(method, k, found)) for k in found.mean_share]
        inner.append(table(tables.mechanism(method, found)))
        parts.append(
            f"<details><summary>{escape(method)} in numbers</summary>{''.join(inner)}</details>"
        )
    return "".join(parts)


def _settings(content: ReportData) -> str:
    parts = [f"<p>{escape(method_note(content))}</p>"]
    if content.settings:
        text = yaml.safe_dump(content.settings, sort_keys=False, allow_unicode=True)
        parts.append(f"<h3>The settings, as given</h3><pre>{escape(text)}</pre>")
    parts += [table(found) for found in tables.settings(content)]
    if names := content.provenance.by_place:
        parts.append(f"<p>Different for each subject or seed: {escape(', '.join(names))}.</p>")
    return "".join(parts)


def _trials(content: ReportData) -> str:
    parts = [table(t) for t in (tables.missing(content), tables.unreadable(content)) if t.rows]
    if content.trials:
        inner = table(tables.trials(content.trials))
        parts.append(f"<details><summary>All units with their scores</summary>{inner}</details>")
    return "".join(parts)


def table(content: Table) -> str:
    """A table; every number carries its full value in a ``data`` element."""
    head = "".join(
        f'<th scope="col"{" class=name" if i < content.labels else ""}>{escape(name)}</th>'
        for i, name in enumerate(content.head)
    )
    rows = "".join(
        "<tr>" + "".join(_td(cell, i < content.labels) for i, cell in enumerate(row)) + "</tr>"
        for row in content.rows
    )
    return (
        f'<div class="wide"><table><caption>{escape(content.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        + (f'<p class="soft">{escape(content.note)}</p>' if content.note else "")
    )


def _td(cell: Cell, name: bool) -> str:
    inner = "".join(
        f'<data value="{part.value!r}">{escape(part.text)}</data>'
        if isinstance(part, Number)
        else escape(part)
        for part in cell
    )
    long = sum(len(part) for part in cell if isinstance(part, str)) > 40
    style = f' class="name{" long" if long else ""}"' if name else ""
    return f"<td{style}>{inner}</td>"


def _list(sentences: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _grid(cells: Sequence[str]) -> str:
    return f'<div class="pictures">{"".join(cells)}</div>'


def _figures(figures: Iterable[tuple[str, str]], style: str = "plots") -> str:
    inner = "".join(
        f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, plot in figures
    )
    return f'<div class="{style}">{inner}</div>'
