"""Check that an exported file generates the same latents as the adapter, for a prompt and a seed.

The attached adapter is the reference. Each artifact, such as fused weights or a LoRA, is compared
with it. Differences are given in units of the adapter's effect, the change when it is attached: 0
means the same image, and 1 is the difference of a file without the adapter.
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
from PIL import Image
from torch import Tensor

from gralora_diffusion.adapters.adapter_file import Adapter
from gralora_diffusion.adapters.compatibility import component_models
from gralora_diffusion.io.precision import exact_fp32
from gralora_diffusion.io.tensor_files import replacing
from gralora_diffusion.pipelines.editing import control_arguments
from gralora_diffusion.pipelines.generation import generation_mode

from .loaders import ArtifactLoader, attached_adapter, computing_dtype

#: Dtype of the exported weights -> the largest difference that passes, in units of the adapter's
#: effect. Measured in fp32 on tiny pipelines of every family and, with trained adapters, on the
#: bundled base, down to updates of 0.2% of the weights: fp32 7e-5, fp16 0.012, bf16 0.17. With a
#: single layer of an fp32 LoRA left out, it is 0.004 or more, and 0.03 in the median. fp8 only has
#: to be closer to the adapter than to the base, because it loses most of such an update.
STORED_BOUNDS = {
    torch.float32: 1e-3,
    torch.float16: 0.02,
    torch.bfloat16: 0.2,
    torch.float8_e4m3fn: 1.0,
}
#: Dtype of the computation -> the bound for its own rounding; measured: fp16 0.14, bf16 0.49.
COMPUTED_BOUNDS = {torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 0.6}
#: Dtype of the computation -> mean difference, relative to the mean of the latents, that counts as
#: rounding. If an adapter changes less, the latents do not show whether it is attached.
NOISE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


class ParityError(RuntimeError):
    """An exported file does not generate the adapter's latents. ``report`` has the numbers."""

    def __init__(self, message: str, report: ParityReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Difference:
    """The largest and the mean absolute difference between two sets of latents.

    ``relative`` is the larger of both in units of the adapter's effect; None without an effect.
    """

    largest: float
    mean: float
    relative: float | None = None


@dataclass(frozen=True)
class ParityReport:
    """How much the results of exported artifacts differ from those of the attached adapter.

    Attributes:
        effect: difference of the attached adapter from the base alone.
        loaders: difference of each artifact from the attached adapter.
        latents: mean of the absolute values of the base's latents.
        bound: the largest ``relative`` that passes.
        noise: differences up to this are rounding.
        settings: settings of the generation.
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
        """The artifacts that differ too much from the attached adapter."""
        return [name for name, difference in self.loaders.items() if not self._passes(difference)]

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.failed:
            return f"failed: {', '.join(self.failed)}"
        if self.without_effect:
            return "passed, but the adapter has no effect on these latents, so this shows little"
        return "passed"

    def check(self) -> None:
        """Raise unless every artifact is within the bound.

        Raises:
            ParityError: the latents of an artifact are not.
        """
        if self.failed:
            raise ParityError(
                f"the exported file does not generate the same latents as the adapter.\n{self}\n"
                "If its dtype is coarse, export to a finer dtype or with stochastic rounding. If "
                "the difference is intended (a truncated LoRA), pass a higher bound.",
                self,
            )

    def write(self, path: Path, exported: Path, **about: Any) -> None:
        """Write JSON with all numbers, versions, and the sha256 of the exported files.

        Args:
            path: path of the JSON, by convention ``<exported>.parity.json``.
            exported: a file, or a folder of files.
            about: further entries, such as base and adapter; local paths should only be names.
        """
        content = {
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
            text = json.dumps(content, indent=2, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [
            f"adapter's effect on the latents: mean {self.effect.mean:.3g}, largest "
            f"{self.effect.largest:.3g} (the base's latents: mean {self.latents:.3g})"
        ]
        for name, found in self.loaders.items():
            line = f"{name}: mean difference {found.mean:.3g}, largest {found.largest:.3g}"
            if found.relative is not None:
                line += f"; {found.relative:.2g} of the effect, bound {self.bound:g}"
            lines.append(line)
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
    controls: Sequence[Image.Image] = (),
    stored: torch.dtype | None = None,
    bound: float | None = None,
) -> ParityReport:
    """Generate latents with the base, the attached adapter and each artifact, and compare them.

    Latents i start from noise of ``seed + i``, sampled on the CPU. The pipeline is unchanged.

    Args:
        pipe: the base without adapters, on the device and in the dtype of the computation. In fp32
            (without TF32) only the exported weights count; half precision adds its own rounding.
        adapter: a source for ``load_gralora_weights``.
        loaders: name -> loader of an artifact.
        scale: scale of the attached adapter: the scale that is folded into the file.
        size: pixels per side; the pipeline's own if None.
        controls: images that an edit pipeline is given with every prompt, or an image and its mask
            for one that fills.
        stored: dtype of the exported weights; the pipeline's if None.
        bound: in units of the adapter's effect; by default the larger one of ``STORED_BOUNDS`` and
            ``COMPUTED_BOUNDS``.

    Raises:
        ValueError: the pipeline has adapters, or computes in a dtype without a bound.
        AdapterFileError: the adapter does not fit it.
    """
    if names := sorted({n for m in component_models(pipe).values() for n in _adapters(m)}):
        raise ValueError(f"the pipeline has adapters ({', '.join(names)}); pass the base alone")
    computing = computing_dtype(pipe)
    if computing not in COMPUTED_BOUNDS:
        known = ", ".join(_short(dtype) for dtype in COMPUTED_BOUNDS)
        raise ValueError(f"the pipeline is in {_short(computing)}; load it in one of {known}")
    options: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent"}
    if controls:
        sides = None if size is None else (size, size)
        options.update(control_arguments(pipe, controls, sides))
    elif size is not None:
        options.update(height=size, width=size)
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale

    def generate(loaded: Any) -> Tensor:
        with generation_mode(loaded), _own_scheduler(loaded):
            latents = [
                loaded(
                    prompt=prompt, generator=torch.Generator().manual_seed(seed + i), **options
                ).images
                for i, prompt in enumerate(prompts)
            ]
        return torch.cat(latents).double().cpu()

    generated = {}
    with _trainable_as_it_was(pipe), exact_fp32():
        base = generate(pipe)
        with attached_adapter(adapter, scale)(pipe):
            truth = generate(pipe)
        for name, loader in loaders.items():
            with loader(pipe) as loaded:
                generated[name] = generate(loaded)
    if bound is None:
        bound = max(STORED_BOUNDS[stored or computing], COMPUTED_BOUNDS[computing])
    latents = float(base.abs().mean())
    noise = NOISE[computing] * latents
    effect = _difference(truth, base)
    return ParityReport(
        effect,
        {
            name: _difference(found, truth, effect if effect.mean > noise else None)
            for name, found in generated.items()
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
            **({"images": len(controls)} if controls else {}),
            "dtype": _short(computing),
            "stored_dtype": _short(stored or computing),
            "device": str(pipe._execution_device),
        },
    )


@contextmanager
def _own_scheduler(pipe: Any) -> Iterator[None]:
    """Inside, the pipeline has a fresh scheduler, because generating changes the scheduler."""
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    try:
        yield
    finally:
        pipe.scheduler = scheduler


@contextmanager
def _trainable_as_it_was(pipe: Any) -> Iterator[None]:
    """Restore ``requires_grad`` afterwards, because attaching an adapter freezes the model."""
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
