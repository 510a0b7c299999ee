"""The diagnostics of a method, averaged over its trials."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gralora_diffusion.benchmark.evaluation.results import ALIGNMENT, TrialResult

Map = list[list[float]]


@dataclass(frozen=True)
class DiagnosticsData:
    """Means over trials (and steps).

    Attributes:
        trials: how many have diagnostics.
        gradient_share: layer -> k x k, each block's share of the squared norm of the gradient. The
            shares of a layer sum to one. Row: output block, column: input block.
        mean_share: k -> the mean over the layers with this k.
        effective_rank, input_outliers, stable_rank: layer -> value.
        step_share: as ``gradient_share``, of what the optimizer's steps take from the update.
        alignment: name in ``ALIGNMENT`` -> layer -> value.
    """

    trials: int
    gradient_share: dict[str, Map]
    mean_share: dict[int, Map]
    effective_rank: dict[str, float]
    input_outliers: dict[str, float]
    stable_rank: dict[str, float]
    step_share: dict[str, Map] = field(default_factory=dict)
    alignment: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """All layers with any diagnostics."""
        kinds = (self.gradient_share, self.effective_rank, self.input_outliers)
        return sorted({layer for kind in kinds for layer in kind})

    def concentration(self, layer: str, of_steps: bool = False) -> float | None:
        """The largest share over an even one: 1 if all blocks are equal, k² if one has all."""
        share = (self.step_share if of_steps else self.gradient_share).get(layer)
        return None if share is None else float(np.max(share)) * np.size(share)


def diagnostics_of(results: Sequence[TrialResult]) -> DiagnosticsData | None:
    """Average the diagnostics of a method's trials; None if no trial has any."""
    logged = [result.mechanism for result in results if result.mechanism]
    if not logged:
        return None
    ranks: dict[str, list[float]] = defaultdict(list)
    outliers: dict[str, list[float]] = defaultdict(list)
    stable: dict[str, list[float]] = defaultdict(list)
    alignment: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for mechanism in logged:
        for layer, measures in mechanism.alignment.items():
            for name, by_step in measures.items():
                alignment[name][layer] += by_step["values"]
        for layer, rank in mechanism.effective_rank.items():
            ranks[layer].append(rank)
        for layer, outlier in mechanism.input_outliers.items():
            outliers[layer].append(outlier)
        for layer, rank in mechanism.stable_rank.items():
            stable[layer].append(rank)
    means = _mean_shares([mechanism.gradient_norms for mechanism in logged])
    steps = _mean_shares([mechanism.step_norms for mechanism in logged])
    sizes = sorted({len(share) for share in means.values()})
    return DiagnosticsData(
        trials=len(logged),
        gradient_share={layer: share.tolist() for layer, share in means.items()},
        mean_share={
            k: np.mean([share for share in means.values() if len(share) == k], axis=0).tolist()
            for k in sizes
        },
        effective_rank={layer: float(np.mean(values)) for layer, values in sorted(ranks.items())},
        input_outliers={
            layer: float(np.mean(values)) for layer, values in sorted(outliers.items())
        },
        stable_rank={layer: float(np.mean(values)) for layer, values in sorted(stable.items())},
        step_share={layer: share.tolist() for layer, share in steps.items()},
        alignment={
            name: {layer: float(np.mean(values)) for layer, values in sorted(found.items())}
            for name in ALIGNMENT
            if (found := alignment.get(name))
        },
    )


def _mean_shares(logs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, np.ndarray]:
    """Return layer -> each block's mean share of the squared norms that trials have logged."""
    shares: dict[str, list[np.ndarray]] = defaultdict(list)
    for norms in logs:
        for layer, log in norms.items():
            squares = np.square(np.array(log["norms"], dtype=np.float64))
            shares[layer] += [step / step.sum() for step in squares if step.sum()]
    return {
        layer: np.mean(maps, axis=0)
        for layer, maps in sorted(shares.items())
        if len({len(blocks) for blocks in maps}) == 1  # trials that differ in k are not averaged
    }
