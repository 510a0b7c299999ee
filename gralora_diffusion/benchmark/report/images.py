"""The images of a report, chosen and shrunk to fit a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gralora_diffusion.benchmark.evaluation.curves import growing
from gralora_diffusion.benchmark.evaluation.endpoint import without_rate
from gralora_diffusion.benchmark.evaluation.results import TrialResult
from gralora_diffusion.io.image_files import ImageError, read_image

from .report_data import ProtocolData, ReportData

#: Pixels of the longer side and prompts per subject, from the best to the least.
SIZES = ((256, 6), (192, 6), (128, 6), (128, 3), (96, 2), (96, 1), (64, 1))
_REAL = 6
_QUALITY = 85
#: Images whose sides have at most so many pixels stay as they are.
_SMALL = 128


@dataclass(frozen=True)
class SheetRow:
    """Images of one prompt by method, None if a method has none; ``real``: the prompt's own."""

    prompt: str
    real: Path | None
    images: dict[str, Path | None]


@dataclass(frozen=True)
class Sheet:
    """The images of a subject: the same prompts and seed for every method."""

    protocol: str
    subject: str
    seed: int
    real: list[Path]
    rows: list[SheetRow]
    prompts: int

    @property
    def paths(self) -> list[Path]:
        found = [row.real for row in self.rows]
        found += [path for row in self.rows for path in row.images.values()]
        return [*self.real, *(path for path in found if path)]


@dataclass(frozen=True)
class StripRow:
    """A subject, and what the compared methods make of one prompt from the same noise.

    ``images``: heading -> image, or None if there is none. ``difference``: the declared one of this
    subject, if there is one.
    """

    subject: str
    prompt: str
    difference: float | None
    images: dict[str, Path | None]

    @property
    def paths(self) -> list[Path]:
        return [path for path in self.images.values() if path]


@dataclass(frozen=True)
class Embedded:
    """Sheets and their images as data URIs.

    Attributes:
        strip: a few images that stand for all, for the top of the page.
        uris: those of the images that could be read.
        side: at most so many pixels on the longer side; 0 if no size fits the budget.
    """

    sheets: list[Sheet]
    uris: dict[Path, str]
    side: int
    strip: list[StripRow]


def embedded(
    content: ReportData, real_images: Mapping[str, Sequence[Path]], budget: int
) -> Embedded:
    """Choose the sheets, with images as large and prompts as many as fit.

    Args:
        budget: at most so many bytes of data URIs in all.
    """
    rows = strip(content, real_images)
    first = [path for row in rows for path in row.paths]
    for side, prompts in SIZES:
        chosen = sheets(content, real_images, prompts)
        paths = [path for sheet in chosen for path in sheet.paths]
        uris = _uris([*first, *paths], side, budget)
        if uris is not None:
            return Embedded(chosen, uris, side, rows)
    return Embedded(chosen, {}, 0, [])


def strip(content: ReportData, real_images: Mapping[str, Sequence[Path]]) -> list[StripRow]:
    """Choose the images at the top of the page by rule.

    The methods are those of the first declared comparison, or the first LoRA and the first other
    method. Of a curve, it is the rate at which the costs of both are closest. The subjects are
    those whose difference is the least, the middle and the greatest.
    """
    for protocol in content.protocols:
        pair = _compared(protocol)
        if pair is None:
            continue
        method, reference = _at_equal_cost(protocol, *pair)
        found: dict[tuple[str, int], dict[str, TrialResult]] = {}
        for trial in content.trials:
            if trial.protocol == protocol.name and trial.method in ("base", reference, method):
                found.setdefault((trial.subject, trial.seed), {})[trial.method] = trial
        places: dict[str, tuple[str, int]] = {}
        for place, trials in sorted(found.items()):
            if {method, reference} <= trials.keys():
                places.setdefault(place[0], place)
        difference = protocol.decisions[0].by_subject if protocol.decisions else {}
        subjects = sorted(places, key=lambda name: (difference.get(name, 0.0), name))
        rows = []
        for number in dict.fromkeys((len(subjects) - 1, (len(subjects) - 1) // 2, 0)):
            if subjects:
                subject = subjects[number]
                trials = found[places[subject]]
                shown = {"bare base": "base", reference: reference, method: method}
                real = list(real_images.get(subject, ()))
                rows.append(_strip_row(subject, difference.get(subject), shown, trials, real))
        if rows:
            return rows
    return []


def _compared(protocol: ProtocolData) -> tuple[str, str] | None:
    """Return the first declared (method, reference), or the first other method and LoRA."""
    if protocol.decisions:
        return protocol.decisions[0].method, protocol.decisions[0].reference
    names = [name for name in protocol.methods if name != "base"]
    reference = next((name for name in names if name.startswith("lora-")), None)
    others = [name for name in names if not name.startswith("lora-")]
    method = next((n for n in others if n.startswith("gralora")), others[0] if others else None)
    return None if method is None or reference is None else (method, reference)


def _at_equal_cost(protocol: ProtocolData, method: str, reference: str) -> tuple[str, str]:
    """Return those methods on two curves whose mean costs are closest, while the costs grow."""

    def costs(name: str) -> dict[str, float]:
        points = protocol.curves[0].points.get(without_rate(name), {})
        names = [n for n in points if name in (n, without_rate(n))]
        kept = growing([points[n] for n in names])
        return {n: point[0] for n, point in zip(names, kept, strict=False)}

    if not protocol.curves:
        return method, reference
    ours, theirs = costs(method), costs(reference)
    pairs = [(abs(ours[a] - theirs[b]), a, b) for a in ours for b in theirs]
    return min(pairs)[1:] if pairs else (method, reference)


def _strip_row(
    subject: str,
    difference: float | None,
    shown: Mapping[str, str],
    trials: Mapping[str, TrialResult],
    real: Sequence[Path],
) -> StripRow:
    last = trials[list(shown.values())[-1]]
    prompt = last.prompts[0].prompt if last.prompts else ""
    images: dict[str, Path | None] = {"subject": real[0] if real else None}
    for heading, method in shown.items():
        row = _row(prompt, [method], {m: t for m, t in trials.items() if m == method})
        images[heading] = row.images[method]
        if row.real and not real:
            images["subject"] = row.real
    return StripRow(subject, prompt, difference, images)


def sheets(
    content: ReportData, real_images: Mapping[str, Sequence[Path]], prompts: int
) -> list[Sheet]:
    """Choose images by rule, not by looks.

    For each subject: the seed that most methods have, or the lowest of several; prompts spread
    evenly over the list; and the first image of each prompt.
    """
    found = []
    for protocol in content.protocols:
        for subject in protocol.subjects:
            trials = [
                trial
                for trial in content.trials
                if (trial.protocol, trial.subject) == (protocol.name, subject)
            ]
            seeds = [trial.seed for trial in trials]
            seed = min(seeds, key=lambda s: (-seeds.count(s), s))
            chosen = {trial.method: trial for trial in trials if trial.seed == seed}
            names = list(dict.fromkeys(p.prompt for u in chosen.values() for p in u.prompts))
            shown = [names[i * len(names) // prompts] for i in range(min(prompts, len(names)))]
            if prompts > len(names):
                shown = names
            rows = [_row(name, list(protocol.methods), chosen) for name in shown]
            real = list(real_images.get(subject, ()))[:_REAL]
            if rows:
                found.append(Sheet(protocol.name, subject, seed, real, rows, len(names)))
    return found


def _row(prompt: str, methods: Sequence[str], trials: Mapping[str, TrialResult]) -> SheetRow:
    images: dict[str, Path | None] = dict.fromkeys(methods)
    real = None
    for method, trial in trials.items():
        for entry in trial.prompts:
            if entry.prompt == prompt and trial.folder is not None:
                if entry.images:
                    images[method] = trial.folder / entry.images[0]
                if entry.real and real is None:
                    real = trial.folder / entry.real
    return SheetRow(prompt, real, images)


def _uris(paths: Sequence[Path], side: int, budget: int) -> dict[Path, str] | None:
    """Data URIs of the readable ones; None if they exceed the budget."""
    uris: dict[Path, str] = {}
    for path in dict.fromkeys(paths):
        uri = data_uri(path, side)
        if uri is not None:
            budget -= len(uri)
            uris[path] = uri
        if budget < 0:
            return None
    return uris


def data_uri(path: Path, side: int) -> str | None:
    """Return an image, its longer side at most ``side`` pixels, as a data URI; None if unreadable.

    Small images stay as they are, as PNG, because there every pixel is visible; others are JPEG.
    """
    try:
        image = read_image(path, at_least=2 * side)
    except ImageError:
        return None
    kept = max(image.size) <= min(side, _SMALL)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    if kept:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    kind = "png" if kept else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
