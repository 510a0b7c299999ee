"""A report as JSON and as CSV. Pure."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gralora_diffusion.benchmark.evaluation.results import FILE_KEYS, TrialResult
from gralora_diffusion.benchmark.evaluation.scores import score_order
from gralora_diffusion.io.safe_text import for_csv

from .report_data import ProtocolData, ReportData
from .summary import cautions, method_note, verdicts

_TRIAL = (
    *("protocol", "subject", "method", "seed", "parameters", "update_rank", "steps"),
    *("train_seconds", "generation_seconds", "peak_memory_gib"),
)


def as_json(content: ReportData) -> str:
    """All numbers of the report. Prompts and logs of single trials stay in their own results."""
    return json.dumps(
        {
            "format": 1,
            "title": content.title,
            "cautions": cautions(content),
            "statistics": method_note(content),
            "declared": {
                "endpoint": str(content.declared.endpoint),
                "comparisons": [list(pair) for pair in content.declared.comparisons],
            }
            if content.declared
            else None,
            "references": content.references,
            **({"blind": [asdict(found) for found in content.blind]} if content.blind else {}),
            "protocols": {p.name: _protocol(p, content) for p in content.protocols},
            "units": [
                {
                    **{FILE_KEYS.get(n, n): getattr(trial, n) for n in _columns(content.trials)},
                    "scores": dict(trial.scores),
                }
                for trial in content.trials
            ],
            "missing": [key._asdict() for key in content.missing],
            "unreadable": [
                {"path": str(file.path), "reason": file.reason} for file in content.unreadable
            ],
            "settings": content.settings,
            "provenance": asdict(content.provenance),
        },
        indent=1,
        ensure_ascii=False,
        allow_nan=False,
    )


def _columns(results: Sequence[TrialResult]) -> tuple[str, ...]:
    """The fields of a trial; the norm is left out if no trial has it, as before version 0.2."""
    known = any(result.update_norm is not None for result in results)
    return (*_TRIAL, "update_norm") if known else _TRIAL


def as_csv(results: Sequence[TrialResult]) -> str:
    """A row per trial, a column per score; a value that was not measured is empty."""
    names = sorted({name for result in results for name in result.scores}, key=score_order)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = _columns(results)
    writer.writerow([for_csv(FILE_KEYS.get(name, name)) for name in (*columns, *names)])
    for result in results:
        values = [getattr(result, name) for name in columns]
        values += [result.scores.get(name) for name in names]
        writer.writerow([for_csv(value) for value in values])
    return file.getvalue()


def _protocol(protocol: ProtocolData, content: ReportData) -> dict[str, Any]:
    scores = {
        name: {
            "label": content.score.label,
            "higher_is_better": content.score.higher_is_better,
            "means": {method: asdict(mean) for method, mean in content.means.items()},
            "comparisons": {
                reference: {
                    method: {**asdict(comparison), "win_rate": comparison.win_rate}
                    for method, comparison in comparisons.items()
                }
                for reference, comparisons in content.comparisons.items()
            },
        }
        for name, content in protocol.scores.items()
    }
    return {
        "verdicts": [str(found) for found in verdicts(protocol, content)],
        "decisions": [asdict(found) for found in protocol.decisions],
        "curves": [asdict(found) for found in protocol.curves],
        "subjects": protocol.subjects,
        "seeds": protocol.seeds,
        "methods": {method: asdict(costs) for method, costs in protocol.methods.items()},
        "scores": scores,
        "pareto": [asdict(plot) for plot in protocol.pareto],
        "mechanism": {
            method: {
                "units": found.trials,
                "mean_share": found.mean_share,
                "effective_rank": found.effective_rank,
                "input_outliers": found.input_outliers,
                "stable_rank": found.stable_rank,
                "alignment": found.alignment,
                "step_concentration": {
                    layer: found.concentration(layer, of_steps=True) for layer in found.step_share
                },
                "concentration": {layer: found.concentration(layer) for layer in found.layers},
            }
            for method, found in protocol.diagnostics.items()
        },
    }
