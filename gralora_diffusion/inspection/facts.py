"""The facts of a file, as plain values: what ``gralora inspect`` prints and gives as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerFacts:
    """One adapted layer.

    Attributes:
        path: its name in the file.
        component: the part of the pipeline that it is in.
        rank, k, hybrid_rank, alpha: those that it has.
        scaling: by which its factors' product is multiplied.
        inputs, outputs, kernel: of the layer.
        norm: Frobenius norm of its update, scaled; None if it is not computed.
        effective_rank: see ``low_rank.effective_rank``.
        problem: Why scaling, norm and effective rank are not known, if a tensor is odd or what the
            file says of alpha contradicts itself.
    """

    path: str
    component: str
    kind: str
    parameters: int
    rank: int | None = None
    k: int | None = None
    hybrid_rank: int | None = None
    alpha: float | None = None
    scaling: float | None = None
    inputs: int | None = None
    outputs: int | None = None
    kernel: list[int] = field(default_factory=list)
    norm: float | None = None
    effective_rank: float | None = None
    problem: str | None = None


@dataclass
class ComponentFacts:
    """One part of a pipeline: how many layers an adapter has there, tensors and parameters."""

    layers: int = 0
    tensors: int = 0
    parameters: int = 0


@dataclass
class Inspection:
    """What a file or folder is.

    Attributes:
        families: those it may be for; more than one where nothing tells which.
        family_told_by: by what they were told.
        dtypes: dtype -> number of tensors.
        others: keys of an adapter file that belong to no layer.
        problems: What the file says of how its factors are to be read, so that they are no LoRA
            for its base as it is: a changed base, another formula, or what is not known here.
        norm: of the whole update; None if a layer's is not known.
        non_finite: tensors with NaN or infinity; None if the values were not read.
        sha256: file -> hash, if asked for.
    """

    path: str
    title: str
    families: list[str]
    family_told_by: str
    style: str | None
    bytes: int
    files: list[str]
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    components: dict[str, ComponentFacts]
    layers: list[LayerFacts] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    norm: float | None = None
    median_effective_rank: float | None = None
    trigger: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    non_finite: list[str] | None = None
    sha256: dict[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As values that JSON has."""
        return asdict(self)
