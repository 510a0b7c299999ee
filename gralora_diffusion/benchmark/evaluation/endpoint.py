"""What a run decides: its primary endpoint and comparisons, declared before the first trial."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .scores import is_known

#: The norm of the learned update, a cost that scores can be compared along.
UPDATE_NORM = "update_norm"
_RATE = re.compile(r"-lr\d+(\.\d+)?(e-?\d+)?$")


def without_rate(method: str) -> str:
    """Return a method's name without its learning rate: the name of its curve."""
    return _RATE.sub("", method)


def rate_of(method: str) -> float:
    """Return the learning rate in a method's name; 0 if it has none."""
    found = _RATE.search(method)
    return float(found[0].removeprefix("-lr")) if found else 0.0


@dataclass(frozen=True)
class Endpoint:
    """A score, or its mean gap between two curves.

    Attributes:
        score: whose difference counts.
        along: a cost (a drift, or ``update_norm``). The methods are then compared along it: a
            method's learning rates give a curve, and the gap is the mean over the costs that both
            curves reach. None: the trials are compared as they are.
    """

    score: str
    along: str | None = None

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read ``SCORE`` or ``SCORE@COST``, as in ``dino@drift_dino``.

        Raises:
            ValueError: it has another form, or a score is unknown.
        """
        score, at, along = text.partition("@")
        if not is_known(score) or (at and not (is_known(along) or along == UPDATE_NORM)):
            raise ValueError(
                f"{text!r} must be SCORE or SCORE@COST, as in dinov2 or dinov2@drift_dinov2"
            )
        return cls(score, along or None)

    def __str__(self) -> str:
        return self.score if self.along is None else f"{self.score}@{self.along}"


@dataclass(frozen=True)
class Declared:
    """An endpoint and the comparisons that it decides: (method, reference).

    The names are those of methods, or of curves (without a learning rate) if the endpoint is along
    a cost.
    """

    endpoint: Endpoint
    comparisons: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, endpoint: str, comparisons: Sequence[str]) -> Declared:
        """Read an endpoint, and comparisons written as ``METHOD:REFERENCE``.

        Raises:
            ValueError: one of them has another form.
        """
        return cls(Endpoint.parse(endpoint), tuple(map(parse_comparison, comparisons)))


def parse_comparison(text: str) -> tuple[str, str]:
    """Read ``METHOD:REFERENCE``.

    Raises:
        ValueError: it has another form.
    """
    method, _, reference = text.partition(":")
    if not method or not reference or method == reference:
        raise ValueError(f"{text!r} must be METHOD:REFERENCE, as in gralora-r32-k2:lora-r32")
    return method, reference


def usual_comparisons(methods: Sequence[str]) -> list[str]:
    """Return every GraLoRA against every LoRA; without GraLoRA, every other method against them."""
    names = list(dict.fromkeys(methods))
    references = [name for name in names if name.startswith("lora-")]
    others = [name for name in names if name not in references and name != "base"]
    compared = [name for name in others if name.startswith("gralora")] or others
    return [f"{method}:{reference}" for method in compared for reference in references]
