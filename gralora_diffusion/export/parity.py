"""Whether an exported file draws what the adapter draws: latents of the same prompt and seed.

The attached adapter is the truth. Each *way*, such as fused weights or a LoRA, is compared with it,
and the difference is told in units of the adapter's effect: what attaching it changes. So 0 is the
same picture, and 1 what a file without the adapter would give.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gralora_diffusion.adapters.adapter_file import Adapter
from gralora_diffusion.adapters.compatibility import component_models
from gralora_diffusion.io.tensor_files import replacing
from gralora_diffusion.pipelines.generation import generation_mode

from .loaders import ArtifactLoader, attached_adapter, computing_dtype

#: Dtype of the exported weights -> the largest difference that passes, in units of the adapter's
#: effect. Measured in fp32 on tiny pipelines of every family and, with trained adapters, on the
#: bundled base, down to updates of 0.2% of the weights: fp32 7e-5, fp16 0.012, bf16 0.17; with a
#: single layer of an fp32 LoRA left out 0.004 or more, 0.03 in the median. Of fp8 it is only asked
#: to be nearer to the adapter than to the base: most of such an update is lost.
STORED_BOUNDS = {
    torch.float32: 1e-3,
    torch.float16: 0.02,
    torch.bfloat16: 0.2,
    torch.float8_e4m3fn: 1.0,
}
#: Dtype computed in -> the same for what its rounding adds; measured there: fp16 0.14, bf16 0.49.
COMPUTED_BOUNDS = {torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 0.6}
#: Dtype computed in -> mean difference, relative to the mean of the latents, that is taken for
#: rounding. Of an adapter that changes less, the latents do not show whether it is there.
NOISE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


class ParityError(RuntimeError):
    """An exported file that does not draw what the adapter draws. ``report`` has the numbers."""

    def __init__(self, message: str, report: ParityReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Difference:
    """Between two sets of latents: the largest and the mean of the absolute differences.

    ``relative`` is the larger of both in units of the adapter's effect; None if it has none.
    """

    largest: float
    mean: float
    relative: float | None = None


@dataclass(frozen=True)
class ParityReport:
    """How far each way of using an adapter is from attaching it.

    Attributes:
        effect: of the attached adapter, against the base alone.
        ways: against the attached adapter.
        latents: mean of the absolute values of the base's latents.
        bound: the largest ``relative`` that passes.
        noise: differences up to this are rounding.
        settings: what was drawn, and how.
    """

    effect: Difference
    loaders: dict[str, Difference]
    latents: float
    bound: float
    noise: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def without_effect(self) -> bool:
        """Whether the adapter changes these latents by no more than rounding does."""
        return self.effect.mean <= self.noise

    @property
    def failed(self) -> list[str]:
        """The ways that are too far from the attached adapter."""
        return [name for name, difference in self.loaders.items() if not self._passes(difference)]

    @property
    def verdict(self) -> str:
        """In words."""
        if self.failed:
            return f"failed: {', '.join(self.failed)}"
        if self.without_effect:
            return "passed, but the adapter has no effect on these latents, so this shows little"
        return "passed"

    def check(self) -> None:
        """Raise unless every way is within the bound.

        Raises:
            ParityError: the latents of some are not.
        """
        if self.failed:
            raise ParityError(
                f"the exported file does not draw what the adapter draws.\n{self}\nIf its dtype "
                "is a coarse one, export to a finer one or with stochastic rounding; if this is "
                "meant (a truncated LoRA), give a higher bound.",
                self,
            )

    def write(self, path: Path, exported: Path, **about: Any) -> None:
        """Write JSON: all numbers, versions, and the sha256 of what was exported.

        Args:
            path: of the JSON: by custom ``<exported>.parity.json``.
            exported: a file, or a folder of them.
            about: more to tell, such as base and adapter; of local paths tell only the names.
        """
        told = {
            "verdict": self.verdict,
            **about,
            "sha256": _sha256_of(exported),
            "bound": self.bound,
            "effect": {"largest": self.effect.largest, "mean": self.effect.mean},
            "ways": {name: asdict(difference) for name, difference in self.loaders.items()},
            "latents": self.latents,
            "noise": self.noise,
            **self.settings,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in _PACKAGES},
            },
        }
        with replacing(path) as temporary:
            text = json.dumps(told, indent=2, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [
            f"adapter's effect on the latents: mean {self.effect.mean:.3g}, largest "
            f"{self.effect.largest:.3g} (the base's latents: mean {self.latents:.3g})"
        ]
        for name, way in self.loaders.items():
            told = f"{name}: mean difference {way.mean:.3g}, largest {way.largest:.3g}"
            if way.relative is not None:
                told += f"; {way.relative:.2g} of the effect, bound {self.bound:g}"
            lines.append(told)
        return "\n".join([*lines, self.verdict])

    def _passes(self, difference: Difference) -> bool:
        if difference.mean <= self.noise:
            return True
        return difference.relative is not None and difference.relative <= self.bound


def compare(
    pipe: Any,
    adapter: Adapter | str | os.PathLike[str],
    loaders: Mapping[str, ArtifactLoader],
    *,
    prompts: Sequence[str],
    scale: float = 1.0,
    seed: int = 0,
    steps: int = 4,
    size: int | None = None,
    guidance_scale: float | None = None,
    stored: torch.dtype | None = None,
    bound: float | None = None,
) -> ParityReport:
    """Draw latents with the base, with the attached adapter, and in each way; compare them.

    Latents i start from noise of ``seed + i``, drawn on the CPU. The pipeline is left as it was.

    Args:
        pipe: the base, without adapters, on the device and in the dtype to compute in. In fp32 the
            exported weights alone count; half precision adds rounding of its own.
        adapter: what ``load_gralora_weights`` takes.
        ways: name -> way, of those in ``loaders`` or others.
        scale: of the attached adapter; that which is folded into the file.
        size: pixels per side, the pipeline's own if None.
        stored: dtype of the exported weights, the pipeline's if None.
        bound: in units of the adapter's effect; by default the larger one of ``STORED_BOUNDS`` and
            ``COMPUTED_BOUNDS``.

    Raises:
        ValueError: the pipeline has adapters, or computes in another dtype than the above.
        AdapterFileError: the adapter does not fit it.
    """
    if names := sorted({n for m in component_models(pipe).values() for n in _adapters(m)}):
        raise ValueError(f"the pipeline has adapters ({', '.join(names)}); give the base alone")
    computing = computing_dtype(pipe)
    if computing not in COMPUTED_BOUNDS:
        known = ", ".join(_short(dtype) for dtype in COMPUTED_BOUNDS)
        raise ValueError(f"the pipeline is in {_short(computing)}; load it in one of {known}")
    options: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent"}
    if size is not None:
        options.update(height=size, width=size)
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale

    def draw(drawing: Any) -> Tensor:
        with generation_mode(drawing), _own_scheduler(drawing):
            latents = [
                drawing(
                    prompt=prompt, generator=torch.Generator().manual_seed(seed + i), **options
                ).images
                for i, prompt in enumerate(prompts)
            ]
        return torch.cat(latents).double().cpu()

    drawn = {}
    with _trainable_as_it_was(pipe):
        base = draw(pipe)
        with attached_adapter(adapter, scale)(pipe):
            truth = draw(pipe)
        for name, way in loaders.items():
            with way(pipe) as drawing:
                drawn[name] = draw(drawing)
    if bound is None:
        bound = max(STORED_BOUNDS[stored or computing], COMPUTED_BOUNDS[computing])
    latents = float(base.abs().mean())
    noise = NOISE[computing] * latents
    effect = _difference(truth, base)
    return ParityReport(
        effect,
        {
            name: _difference(found, truth, effect if effect.mean > noise else None)
            for name, found in drawn.items()
        },
        latents,
        bound,
        noise,
        {
            "prompts": list(prompts),
            "seed": seed,
            "steps": steps,
            "size": size,
            "guidance_scale": guidance_scale,
            "scale": scale,
            "pipeline": type(pipe).__name__,
            "dtype": _short(computing),
            "stored_dtype": _short(stored or computing),
            "device": str(pipe.device),
        },
    )


@contextmanager
def _own_scheduler(pipe: Any) -> Iterator[None]:
    """Inside, the pipeline has a fresh scheduler, for drawing leaves traces in it."""
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    try:
        yield
    finally:
        pipe.scheduler = scheduler


@contextmanager
def _trainable_as_it_was(pipe: Any) -> Iterator[None]:
    """Attaching an adapter freezes the model that it is attached to."""
    parameters = [p for model in component_models(pipe).values() for p in model.parameters()]
    trainable = [parameter.requires_grad for parameter in parameters]
    try:
        yield
    finally:
        for parameter, wanted in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(wanted)


def _adapters(model: Any) -> list[str]:
    return list(getattr(model, "peft_config", None) or {})


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _difference(a: Tensor, b: Tensor, effect: Difference | None = None) -> Difference:
    apart = (a - b).abs()
    largest, mean = float(apart.max()), float(apart.mean())
    if effect is None:
        return Difference(largest, mean)
    return Difference(largest, mean, max(largest / effect.largest, mean / effect.mean))


def _sha256_of(exported: Path) -> str | dict[str, str]:
    if exported.is_dir():
        files = sorted(exported.rglob("*.safetensors"))
        return {str(file.relative_to(exported)): str(_sha256_of(file)) for file in files}
    whole = hashlib.sha256()
    with open(exported, "rb") as file:
        while chunk := file.read(1 << 20):
            whole.update(chunk)
    return whole.hexdigest()
