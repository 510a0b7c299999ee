"""A report as Markdown: sentences and tables, without plots and images. Pure."""

from __future__ import annotations

from gralora_diffusion.io.templates import render

from . import summary, tables
from .report_data import ReportData


def as_markdown(content: ReportData) -> str:
    """Return the report as Markdown in GitHub's dialect, which has tables."""
    text = render(__package__, "report.md.jinja", report=content, summary=summary, tables=tables)
    return text.rstrip() + "\n"
