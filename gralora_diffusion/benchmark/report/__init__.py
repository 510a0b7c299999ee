"""One page, Markdown, CSV and JSON from the results of a benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gralora_diffusion.benchmark.evaluation.choices import BlindChoices
from gralora_diffusion.benchmark.evaluation.endpoint import Declared
from gralora_diffusion.benchmark.evaluation.results import TrialKey, TrialResult, Unreadable
from gralora_diffusion.io.staging import staged

from .blind import blind_choices, write_blind_page
from .data_files import as_csv, as_json
from .html import as_html
from .images import embedded
from .markdown import as_markdown
from .report_data import report_data_of

__all__ = ["blind_choices", "write_blind_page", "write_report"]

PAGE_NAME, MARKDOWN_NAME = "index.html", "report.md"
CSV_NAME, JSON_NAME = "scores.csv", "report.json"


def write_report(
    results: Sequence[TrialResult],
    folder: Path,
    *,
    title: str = "GraLoRA benchmark",
    references: Sequence[str] | None = None,
    expected: Sequence[TrialKey] = (),
    unreadable: Sequence[Unreadable] = (),
    real_images: Mapping[str, Sequence[Path]] | None = None,
    settings: Mapping[str, Any] | None = None,
    declared: Declared | None = None,
    blind: Sequence[BlindChoices] = (),
    image_mib: float = 12.0,
) -> Path:
    """Write index.html, report.md, scores.csv and report.json; return the page.

    Everything is computed before the first file is written, and each file appears when it is
    complete. The same results give the same bytes.

    Args:
        results: those of finished trials, each once; there may be none.
        folder: created if it does not exist; other files in it stay.
        references: methods that all others are compared with, trial by trial, as exploration. By
            default the declared ones, or those whose name begins with "lora-".
        expected: all trials of the run. Those without a result are listed as missing, and methods
            are shown in their order.
        unreadable: result files that could not be used; they are listed.
        real_images: subject -> images to show beside the generated ones.
        settings: those of the run, shown as given.
        declared: what was declared before the run; only this gets a verdict.
        blind: what people chose on the blind page, see ``blind_choices``.
        image_mib: how much of the page the images may take, in MiB. They are made smaller, then
            fewer, until they fit.

    Raises:
        ValueError: more than one result of a trial, or a reference without trials.
        OutputError: the folder cannot be written to.
    """
    content = report_data_of(
        results,
        title=title,
        references=references,
        expected=expected,
        unreadable=unreadable,
        # as JSON and YAML can hold it
        settings=json.loads(json.dumps(settings or {}, default=str), parse_constant=str),
        declared=declared,
        blind=blind,
    )
    images = embedded(content, real_images or {}, int(image_mib * 2**20))
    texts = {
        CSV_NAME: as_csv(content.trials),
        JSON_NAME: as_json(content),
        MARKDOWN_NAME: as_markdown(content),
        PAGE_NAME: as_html(content, images),
    }
    for name, text in texts.items():
        with staged(folder / name) as path:
            path.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return folder / PAGE_NAME
