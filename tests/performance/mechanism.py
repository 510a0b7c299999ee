"""What an optimizer makes of outliers on the bundled base, from a benchmark's report.

    gralora benchmark --suite tiny --subjects robot owl teapot cactus \\
        --images_per_prompt 1 --drift_images 1 \\
        --methods lora-r16-lr2.1e-3 gralora-r16-k2-lr3e-3 gralora-r16-k4-lr4.2e-3 \\
        --endpoint dino --comparisons gralora-r16-k2-lr3e-3:lora-r16-lr2.1e-3 \\
        --mechanism_steps 10 --output_dir outputs/mechanism
    python -m tests.performance.mechanism outputs/mechanism

The medians over the layers are written into docs/images/mechanism.json; a test compares the
documents with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests import ROOT

#: Fields of the report -> what they say of a layer.
MEASURES = {
    "full_share": "outlier's share of the full gradient, relative to an even share",
    "gradient_share": "of the method's gradient",
    "step_share": "of AdamW's step",
    "gradient_cosine": "cosine of the method's gradient with the full gradient",
    "step_cosine": "cosine of AdamW's step with it",
    "concentration": "largest of 4 x 4 blocks in the method's gradient, relative to an even share",
    "step_concentration": "in AdamW's step",
    "stable_rank": "stable rank of the learned update",
    "effective_rank": "entropy rank of the learned update",
}


def summary(report: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    """Return median, least and largest value over the layers of each measure and method."""
    protocol = report["protocols"]["subject"]
    methods: dict[str, dict[str, Any]] = {}
    for method, logged in protocol["mechanism"].items():
        by_layer = {name: {**logged, **logged["alignment"]}[name].values() for name in MEASURES}
        methods[method] = {
            name: {"median": median(values), "least": min(values), "most": max(values)}
            for name, values in by_layer.items()
        }
        methods[method]["layers"] = len(by_layer["stable_rank"])
        methods[method]["trials"] = logged["units"]
    return {"subjects": protocol["subjects"], "versions": dict(versions), "methods": methods}


def table(found: Mapping[str, Any]) -> str:
    """Return Markdown: a column per method, with the median layer and the range of all."""
    methods = found["methods"]
    lines = [f"| | {' | '.join(methods)} |", "|" + "---|" * (len(methods) + 1)]
    for name, label in MEASURES.items():
        cells = []
        for values in methods.values():
            digits = 3 if "cosine" in name else 1
            ends = (f"{values[name][end]:.{digits}f}" for end in ("median", "least", "most"))
            cells.append("{} ({} to {})".format(*ends))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the summary of a run and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="output folder of the benchmark")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs/images")
    args = parser.parse_args(argv)
    report = json.loads((args.run / "report/report.json").read_text(encoding="utf-8"))
    some = next(args.run.glob("units/**/result.json"))
    found = summary(report, json.loads(some.read_text(encoding="utf-8"))["versions"])
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    (args.folder / "mechanism.json").write_text(text, encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
