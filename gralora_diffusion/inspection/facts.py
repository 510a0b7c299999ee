"""The facts of a file as plain values, which ``gralora inspect`` prints as text or JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerFacts:
    """One adapted layer.

    Attributes:
        path: name of the layer in the file.
        component: the part of the pipeline that the layer belongs to.
        rank, k, hybrid_rank, alpha: None where the kind of adapter has no such number.
        scaling: the factor that multiplies the product of the layer's factors.
        inputs, outputs, kernel: sizes of the layer.
        norm: Frobenius norm of the scaled update; None if it is not computed.
        effective_rank: see ``lora_files.spectrum.effective_rank``.
        problem: Why scaling, norm and effective rank are not known: a tensor is malformed, or the
            file's statements about alpha contradict each other.
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
    """All facts of a file or folder.

    Attributes:
        families: the families that it may be for; several if the file does not distinguish them.
        family_told_by: the evidence for the families.
        dtypes: dtype -> number of tensors.
        others: keys of an adapter file that do not belong to any layer.
        problems: Why the factors are not a LoRA for the unchanged base: they belong to a changed
            base, enter another formula, or have settings that are not known here.
        norm: norm of the whole update; None if the norm of a layer is not known.
        non_finite: tensors with NaN or infinity; None if the values were not read.
        sha256: file -> hash, if requested.
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
        """Return the facts as JSON-ready values."""
        return asdict(self)
