"""A report as one self-contained page. Pure."""

from __future__ import annotations

from gralora_diffusion.io.templates import render

from . import plots, summary, tables
from .images import Embedded
from .report_data import ReportData
from .svg import COLOURS


def as_html(content: ReportData, images: Embedded) -> str:
    """Return the page. All text is escaped, and the page forbids scripts and fetching."""
    return render(
        __package__,
        "report.html.jinja",
        report=content,
        images=images,
        colour=plots.colours(dict.fromkeys(trial.method for trial in content.trials)),
        colours=COLOURS,
        plots=plots,
        summary=summary,
        tables=tables,
    )
