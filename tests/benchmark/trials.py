"""Made-up trials of a benchmark: numbers by formula and by chance, images of one colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from gralora_diffusion.benchmark.evaluation.results import (
    ALIGNMENT,
    Diagnostics,
    PromptResult,
    TrialKey,
    TrialResult,
    write_result,
)

METHODS = ("lora-r32", "gralora-r32-k2", "gralora-r32-k4", "dora-r32")
SUBJECTS = tuple(f"made-up {name}" for name in ("ant", "bee", "cat", "dog", "elk", "fox", "gnu"))
#: What a method adds to LoRA's scores.
GAINS = {"gralora-r32-k2": 0.03, "dora-r32": -0.03}


def keys(
    subjects: Sequence[str] = SUBJECTS,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1),
    protocol: str = "subject",
) -> list[TrialKey]:
    return [TrialKey(protocol, s, m, seed) for s in subjects for m in methods for seed in seeds]


def trial(key: TrialKey, mechanism: bool = False, **changes) -> TrialResult:
    """A trial whose numbers depend only on its key."""
    rng = np.random.default_rng([*key.subject.encode(), *key.method.encode(), key.seed])
    common = np.random.default_rng([*key.subject.encode(), key.seed]).normal(0.7, 0.05)
    gain = GAINS.get(key.method, 0.0)
    if key.method == "gralora-r32-k4":  # better on some subjects, worse on others
        gain = 0.02 if ord(key.subject[-1]) % 2 else -0.02
    k = 4 if "k4" in key.method else 2
    result = TrialResult(
        *key,
        parameters=1_234_567 + 1000 * len(key.method),
        update_rank=32 * (k if "gralora" in key.method else 1),
        steps=800,
        train_seconds=float(rng.uniform(100, 120)),
        generation_seconds=float(rng.uniform(20, 30)),
        peak_memory_gib=float(rng.uniform(10, 11)),
        scores={
            "dinov2": float(common + gain + rng.normal(0, 0.01)),
            "clip_t": float(0.3 + rng.normal(0, 0.01)),
            "drift": float(0.25 + gain / 2 + rng.normal(0, 0.005)),
        },
        prompts=tuple(
            PromptResult(f"a {key.subject} {where}", (f"pictures/{i:03}_0.png",), {"dinov2": 0.5})
            for i, where in enumerate(("in the snow", "on the beach", "with <b>tags</b> & more"))
        ),
        settings={"learning_rate": 1e-4, "method": {"name": key.method}, "seed": key.seed},
        versions={"torch": "2.7.0", "diffusers": "0.42.1"},
    )
    if mechanism:
        layers = [f"blocks.{i}.attn.to_{name}" for i in range(6) for name in "qv"]
        result = replace(
            result,
            mechanism=Diagnostics(
                {
                    layer: {
                        "steps": [1, 100],
                        "norms": rng.lognormal(0, 0.8, size=(2, k, k)).tolist(),
                    }
                    for layer in layers
                },
                {layer: float(rng.uniform(8, 8 + 20 * k)) for layer in layers},
                {layer: float(rng.lognormal(1, 0.7)) for layer in layers},
                {layer: float(rng.uniform(1, 4)) for layer in layers},
                {
                    layer: {"steps": [1], "norms": rng.lognormal(0, 0.8, (1, k, k)).tolist()}
                    for layer in layers
                },
                {
                    layer: {
                        name: {"steps": [1, 100], "values": rng.uniform(0, 1, 2).tolist()}
                        for name in ALIGNMENT
                    }
                    for layer in layers
                },
            ),
        )
    return replace(result, **changes)


def written(output: Path, results: Sequence[TrialResult], size: int = 64) -> list[TrialResult]:
    """Write trials with their images into a run's folder; return them with their folders."""
    found = []
    for number, result in enumerate(results):
        folder = output / result.key.path
        write_result(result, folder)
        for i, prompt in enumerate(result.prompts):
            for name in prompt.images:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                colour = (37 * number % 256, 80 * i % 256, 128)
                Image.linear_gradient("L").resize((size, size)).convert("RGB").save(path)
                with Image.open(path) as image:
                    Image.blend(
                        image.convert("RGB"), Image.new("RGB", image.size, colour), 0.6
                    ).save(path)
        found.append(replace(result, folder=folder))
    return found
