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
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from ..compatibility import component_models
from ..sampling import drawing_mode
from ..state import DENOISER, Adapter
from ..tensor_files import replacing

#: Puts a pipeline into a state, and back; gives the pipeline that is to draw.
Way = Callable[[Any], AbstractContextManager[Any]]

#: The coarser dtype of those computed in and stored in -> the largest difference that passes, in
#: units of the adapter's effect.
BOUNDS = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
#: Dtype computed in -> differences of latents, relative to their mean, that rounding alone makes.
NOISE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_ADAPTER_NAME = "gralora_parity"
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
    ways: dict[str, Difference]
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
        return [name for name, difference in self.ways.items() if not self._passes(difference)]

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
            path: of the JSON, by custom ``<exported>.parity.json``.
            exported: a file, or a folder of them.
            about: more to tell, such as base and adapter; of local paths tell only the names.
        """
        told = {
            "verdict": self.verdict,
            **about,
            "sha256": _sha256_of(exported),
            "bound": self.bound,
            "effect": {"largest": self.effect.largest, "mean": self.effect.mean},
            "ways": {name: asdict(difference) for name, difference in self.ways.items()},
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
        for name, way in self.ways.items():
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
    ways: Mapping[str, Way],
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
        pipe: the base, without adapters, on the device and in the dtype to compute in.
        adapter: what ``load_gralora_weights`` takes.
        ways: name -> way; see :func:`lora_file`, :func:`fused_folder`, :func:`fused_file`,
            :func:`fused_in_place`.
        scale: of the attached adapter; that which is folded into the file.
        size: pixels per side, the pipeline's own if None.
        stored: dtype of the exported weights, if it is coarser than the pipeline's.
        bound: in units of the adapter's effect; by default one of ``BOUNDS``.

    Raises:
        ValueError: the pipeline has adapters.
        AdapterFileError: the adapter does not fit it.
    """
    if names := sorted({n for m in component_models(pipe).values() for n in _adapters(m)}):
        raise ValueError(f"the pipeline has adapters ({', '.join(names)}); give the base alone")
    options: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent"}
    if size is not None:
        options.update(height=size, width=size)
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale

    def draw(drawing: Any) -> Tensor:
        with drawing_mode(drawing), _own_scheduler(drawing):
            latents = [
                drawing(
                    prompt=prompt, generator=torch.Generator().manual_seed(seed + i), **options
                ).images
                for i, prompt in enumerate(prompts)
            ]
        return torch.cat(latents).double().cpu()

    base = draw(pipe)
    with _attached(pipe, adapter, scale):
        truth = draw(pipe)
    drawn = {}
    for name, way in ways.items():
        with way(pipe) as drawing:
            drawn[name] = draw(drawing)
    computing = next(iter(component_models(pipe).values())).dtype
    coarsest = max((computing, stored or computing), key=lambda dtype: torch.finfo(dtype).eps)
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
        BOUNDS[coarsest] if bound is None else bound,
        noise,
        {
            "prompts": list(prompts),
            "seed": seed,
            "steps": steps,
            "size": size,
            "guidance_scale": guidance_scale,
            "scale": scale,
            "pipeline": type(pipe).__name__,
            "dtype": str(computing).removeprefix("torch."),
            "stored_dtype": str(stored or computing).removeprefix("torch."),
            "device": str(pipe.device),
        },
    )


# -- ways ------------------------------------------------------------------------------------------


def lora_file(path: Path) -> Way:
    """A LoRA file, by diffusers' own ``load_lora_weights``; its name may be any."""

    @contextmanager
    def way(pipe: Any) -> Iterator[Any]:
        # as tensors: diffusers tells a file that is not yet in place by no ending
        pipe.load_lora_weights(load_file(path), adapter_name=_ADAPTER_NAME)
        try:
            yield pipe
        finally:
            pipe.unload_lora_weights()

    return way


def fused_folder(path: Path) -> Way:
    """A fused pipeline in diffusers' layout."""

    @contextmanager
    def way(pipe: Any) -> Iterator[Any]:
        fused = type(pipe).from_pretrained(path, dtype=pipe.dtype)
        yield fused.to(pipe.device)

    return way


def fused_file(path: Path, config: str | os.PathLike[str], **given: Any) -> Way:
    """A fused original single file, by diffusers' ``from_single_file``; its name may be any.

    Args:
        config: folder or Hub id of a pipeline of the same kind.
        given: components that the file does not hold; those of the base, if it is a name alone.
    """

    @contextmanager
    def way(pipe: Any) -> Iterator[Any]:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / "fused.safetensors"  # the ending that diffusers goes by
            link.symlink_to(path.resolve())
            fused = type(pipe).from_single_file(
                str(link), config=str(config), torch_dtype=pipe.dtype, **given
            )
        yield fused.to(pipe.device)

    return way


def fused_in_place(load: Callable[[Any], None], components: Sequence[str]) -> Way:
    """Fused weights that ``load`` sets in the components of the pipeline, which get theirs back."""

    @contextmanager
    def way(pipe: Any) -> Iterator[Any]:
        models = [getattr(pipe, name) for name in components]
        kept = [{key: t.clone() for key, t in model.state_dict().items()} for model in models]
        try:
            load(pipe)
            yield pipe
        finally:
            for model, state in zip(models, kept, strict=True):
                model.load_state_dict(state)

    return way


@contextmanager
def _attached(
    pipe: DiffusionPipeline, adapter: Adapter | str | os.PathLike[str], scale: float
) -> Iterator[None]:
    source: Any = adapter
    options: dict[str, Any] = {}
    if isinstance(adapter, Adapter):
        denoiser = next(iter(component_models(pipe)))
        parts = {denoiser if n == DENOISER else n: part for n, part in adapter.components.items()}
        source = Adapter(parts).tensors
        options["config"] = {name: part.config for name, part in parts.items()}
    pipe.load_gralora_weights(source, _ADAPTER_NAME, **options)
    try:
        pipe.set_adapters(_ADAPTER_NAME, scale)
        yield
    finally:
        pipe.unload_gralora_weights()


@contextmanager
def _own_scheduler(pipe: Any) -> Iterator[None]:
    """Inside, the pipeline has a fresh scheduler, for drawing leaves traces in it."""
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    try:
        yield
    finally:
        pipe.scheduler = scheduler


def _adapters(model: Any) -> list[str]:
    return list(getattr(model, "peft_config", None) or {})


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
