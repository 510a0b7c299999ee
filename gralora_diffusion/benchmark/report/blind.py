"""A blind comparison by eye: pairs of images without names, people's choices, and what they show.

The page has two images of one subject, prompt and seed, one by each method of a declared
comparison. Where a method has several learning rates, the two are those whose drift is nearest. The
order of the pairs and their sides are random. Which side is which method is in a key beside the
page, never in it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from gralora_diffusion.benchmark.evaluation.choices import BlindChoices, analyse
from gralora_diffusion.benchmark.evaluation.endpoint import (
    Declared,
    usual_comparisons,
    without_rate,
)
from gralora_diffusion.benchmark.evaluation.results import TrialResult, is_measured
from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.staging import staged
from gralora_diffusion.io.templates import render

from .images import data_uri

PAGE_NAME, KEY_NAME = "blind.html", "blind_key.json"
#: A person can judge about so many pairs; they are spread over comparisons and subjects.
MOST_PAIRS = 200
#: Pixels of the longer side.
_SIDE = 384
_FORMAT = 1
_CHOICES = ("left", "right", "none")


@dataclass(frozen=True)
class Pair:
    """Two images that differ in the method alone.

    Attributes:
        comparison: (method, reference) as they were declared.
        methods: of the left and the right image, with their learning rates.
        drifts: theirs; None if no drift was measured.
    """

    comparison: tuple[str, str]
    protocol: str
    subject: str
    seed: int
    prompt: str
    methods: tuple[str, str]
    images: tuple[Path, Path]
    drifts: tuple[float, float] | None


def blind_pairs(results: Sequence[TrialResult], declared: Declared | None) -> list[Pair]:
    """Return the pairs in the order in which they are shown, the same for the same results.

    Without a declaration, the comparisons are every GraLoRA against every LoRA.
    """
    names = [without_rate(r.method) for r in sorted(results, key=lambda r: r.key)]
    comparisons = declared.comparisons if declared else ()
    if not comparisons:
        usual = (text.split(":") for text in usual_comparisons(names))
        comparisons = tuple((method, reference) for method, reference in usual)
    random = np.random.default_rng(0)
    places = sorted({(r.protocol, r.subject, r.seed) for r in results})
    groups = []
    for comparison in comparisons:
        for place in places:
            here = [r for r in results if (r.protocol, r.subject, r.seed) == place]
            found = _nearest(here, comparison, declared)
            if found is not None:
                pairs = _pairs(*found, comparison, random)
                groups.append([pairs[i] for i in random.permutation(len(pairs))])
    chosen: list[Pair] = []
    while any(groups) and len(chosen) < MOST_PAIRS:
        chosen += [group.pop() for group in groups if group]
    chosen = chosen[:MOST_PAIRS]
    return [chosen[i] for i in random.permutation(len(chosen))]


def _nearest(
    results: Sequence[TrialResult], comparison: tuple[str, str], declared: Declared | None
) -> tuple[TrialResult, TrialResult, str | None] | None:
    """Return the trials of both methods whose drifts are nearest, and the name of the drift."""
    of = [
        [r for r in results if name in (r.method, without_rate(r.method)) and r.folder is not None]
        for name in comparison
    ]
    names = {score for r in results for score in r.scores if score.startswith("drift_")}
    along = declared.endpoint.along if declared else None
    drift = along if along in names else min(names, default=None)
    both = [
        (abs(a.scores[drift] - b.scores[drift]) if drift else 0.0, a.method, b.method, a, b)
        for a in of[0]
        for b in of[1]
        if drift is None or (drift in a.scores and drift in b.scores)
    ]
    if not both:
        return None
    *_, method, reference = min(both, key=lambda one: one[:3])
    return method, reference, drift


def _pairs(
    method: TrialResult,
    reference: TrialResult,
    drift: str | None,
    comparison: tuple[str, str],
    random: np.random.Generator,
) -> list[Pair]:
    """One for each prompt that both have, by the first image of each, which share their noise."""
    assert method.folder is not None
    assert reference.folder is not None
    theirs = {p.prompt: p.images[0] for p in reference.prompts if p.images}
    found = []
    for prompt in method.prompts:
        # images of drift and class are not of the subject
        if not prompt.images or not Path(prompt.images[0]).name[0].isdigit():
            continue
        if prompt.prompt not in theirs:
            continue
        sides = [
            (method.method, method.folder / prompt.images[0], method.scores.get(drift or "")),
            (
                reference.method,
                reference.folder / theirs[prompt.prompt],
                reference.scores.get(drift or ""),
            ),
        ]
        if random.integers(2):
            sides.reverse()
        (left, left_image, x), (right, right_image, y) = sides
        drifts = None if x is None or y is None else (x, y)
        found.append(
            Pair(
                comparison,
                *(method.protocol, method.subject, method.seed, prompt.prompt),
                (left, right),
                (left_image, right_image),
                drifts,
            )
        )
    return found


def write_blind_page(
    results: Sequence[TrialResult],
    folder: Path,
    *,
    declared: Declared | None,
    real_images: Mapping[str, Sequence[Path]] | None = None,
) -> Path:
    """Write blind.html, which names no method, and blind_key.json, which does; return the page.

    Raises:
        DataError: there are no pairs, or none whose images can be read.
        OutputError: the folder cannot be written to.
    """
    pairs, shown = [], []
    references: dict[str, str] = {}
    for pair in blind_pairs(results, declared):
        left, right = (data_uri(path, _SIDE) for path in pair.images)
        if left is None or right is None:
            continue
        real = _reference(pair, results, real_images or {})
        name = ""
        if real is not None and (uri := data_uri(real, _SIDE)) is not None:
            name = hashlib.sha256(uri.encode()).hexdigest()[:12]
            references[name] = uri
        pairs.append(pair)
        shown.append({"prompt": pair.prompt, "left": left, "right": right, "reference": name})
    if not pairs:
        raise DataError(
            "--blind",
            [
                "there are no two images to compare. It needs finished trials of both methods of a "
                "declared comparison on the same subject and seed, with their images"
            ],
        )
    key = [
        {
            "comparison": list(pair.comparison),
            "protocol": pair.protocol,
            "subject": pair.subject,
            "seed": pair.seed,
            "prompt": pair.prompt,
            "left": pair.methods[0],
            "right": pair.methods[1],
            "drifts": None if pair.drifts is None else list(pair.drifts),
        }
        for pair in pairs
    ]
    page = hashlib.sha256(json.dumps([key, shown]).encode()).hexdigest()[:16]
    script = Path(__file__).with_name("templates").joinpath("blind.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps({"page": page, "pairs": shown, "references": references})
    html = render(
        __package__,
        "blind.html.jinja",
        count=len(pairs),
        # nothing in a data block ends it
        data=Markup(data.replace("<", "\\u003c")),
        script=Markup(script),
        digest=digest,
    )
    text = json.dumps({"format": _FORMAT, "page": page, "pairs": key}, indent=1) + "\n"
    for name, content in ((KEY_NAME, text), (PAGE_NAME, html)):
        with staged(folder / name) as path:
            path.write_text(content, encoding="utf-8", newline="\n")
    return folder / PAGE_NAME


def _reference(
    pair: Pair, results: Sequence[TrialResult], real_images: Mapping[str, Sequence[Path]]
) -> Path | None:
    """Return the real image of the prompt, or the subject's first."""
    for trial in results:
        place = (trial.protocol, trial.subject, trial.seed, trial.method)
        if place == (pair.protocol, pair.subject, pair.seed, pair.methods[0]) and trial.folder:
            for prompt in trial.prompts:
                if prompt.prompt == pair.prompt and prompt.real:
                    return trial.folder / prompt.real
    return next(iter(real_images.get(pair.subject, ())), None)


# -- the answers -----------------------------------------------------------------------------------


def blind_choices(files: Sequence[Path], folder: Path) -> list[BlindChoices]:
    """Read people's answers, a file each, and the key of their page in ``folder``.

    Raises:
        DataError: a file cannot be read, or is of another page. All problems are reported at once.
    """
    try:
        key = _key(read_object(folder / KEY_NAME))
    except (OSError, ValueError) as error:
        problem = f"{folder / KEY_NAME}: {error}. It is written with the page, by --blind"
        raise DataError("--blind_answers", [problem]) from None
    problems = []
    answers: list[dict[int, str]] = []
    for path in files:
        try:
            answers.append(_answers(read_object(path), *key))
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise DataError("--blind_answers", problems)
    return analyse(key[1], answers)


def _key(content: Mapping[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    page, pairs = content.get("page"), content.get("pairs")
    sound = isinstance(page, str) and content.get("format") == _FORMAT
    if not sound or not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise ValueError("it is not a key that --blind wrote")
    return str(page), pairs


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, dict):
        return False
    comparison, drifts = pair.get("comparison"), pair.get("drifts")
    return (
        all(isinstance(pair.get(name), str) for name in ("subject", "left", "right"))
        and _are_two(comparison, str)
        and (drifts is None or (_are_two(drifts, float) and all(map(is_measured, drifts))))
    )


def _are_two(values: object, kind: type) -> bool:
    return (
        isinstance(values, list) and len(values) == 2 and all(isinstance(v, kind) for v in values)
    )


def _answers(
    content: Mapping[str, Any], page: str, pairs: Sequence[Mapping[str, Any]]
) -> dict[int, str]:
    """Return the number of a pair, from 0 -> a choice."""
    if content.get("page") != page:
        raise ValueError(
            f"these are answers for the page {content.get('page')!r:.40}, but the key is of "
            f"{page!r}. Pages change when trials are added"
        )
    choices = content.get("choices")
    if not isinstance(choices, dict):
        raise ValueError("it has no choices")
    numbers = {str(number): number for number in range(len(pairs))}
    wrong = [n for n, value in choices.items() if n not in numbers or value not in _CHOICES]
    if wrong:
        raise ValueError(
            f"choice {wrong[0]!r:.40} must be the number of a pair, from 0 to {len(pairs) - 1}, "
            f"with one of {', '.join(_CHOICES)}"
        )
    if not choices:
        raise ValueError("it has no choices yet")
    return {numbers[n]: value for n, value in choices.items()}
