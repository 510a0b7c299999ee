"""``--verify``: the export fails unless its output generates the same latents as the adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

from gralora_diffusion.adapters.adapter_file import Adapter
from gralora_diffusion.adapters.compatibility import component_of
from gralora_diffusion.base_models.loading import find_pipeline_class, load_base
from gralora_diffusion.base_models.options import BaseModelOptions
from gralora_diffusion.base_models.single_file_header import OriginalFileError
from gralora_diffusion.families import ControlCount, ModelFamily
from gralora_diffusion.io.cleanup_on_exit import cleanup_on_exit
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.process import print_safely
from gralora_diffusion.io.tensor_files import read_header
from gralora_diffusion.pipelines.editing import generating_pipeline
from gralora_diffusion.pipelines.placement import place

from .bases import Base, BaseError, FileBase, FolderBase, open_base
from .choices import parity_path
from .loaders import ArtifactLoader, fused_folder, fused_in_place, lora_file
from .lora import export_lora, read_by_diffusers
from .parity import COMPUTED_BOUNDS, STORED_BOUNDS, compare

_FUSED, _LORA = "fused weights", "LoRA by load_lora_weights"


@dataclass
class Verification:
    """Generates latents with the base, the adapter and the exported files, and compares them.

    It writes ``<output>.parity.json`` beside the output.

    Args:
        base: as for ``export_fused``.
        base_config: folder or Hub id of a pipeline that completes a base in a single file.
        bound: see ``parity.compare``.
    """

    adapter: Adapter
    base: str | os.PathLike[str]
    output: Path
    scale: float = 1.0
    prompts: Sequence[str] = ("a photo",)
    seed: int = 0
    steps: int = 4
    size: int | None = None
    bound: float | None = None
    base_config: str | None = None
    open_options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def opened(self) -> Base:
        """The whole base.

        Raises:
            BaseError: it cannot generate.
        """
        try:
            return open_base(self.base, **self.open_options)
        except (BaseError, OriginalFileError) as error:
            raise BaseError(
                f"--verify needs the whole base to generate with. {error}. Or leave out --verify"
            ) from error

    def check_fused(self, exported: Path, denoiser_only: bool = False) -> None:
        """Compare a fused file or folder, and the exact LoRA, with the attached adapter.

        Raises:
            ParityError: their latents differ.
        """
        opened = self.opened
        if exported.is_dir():
            loader = fused_folder(exported)
        else:
            file = _as_base(exported, opened, denoiser_only)
            adapted = self._components(opened.family)
            names = [name for name in adapted if name in file.key_maps] or [opened.family.denoiser]
            loader = fused_in_place(lambda pipe: _set_weights(pipe, file, names), names)
        self._compare(opened, exported, {_FUSED: loader})

    def check_lora(self, exported: Path, style: str, dtype: str, **options: Any) -> None:
        """Compare a LoRA file with the attached adapter.

        A file with other names than diffusers' is written again with those, from the same factors.

        Raises:
            ParityError: its latents differ.
        """
        opened = self.opened
        self._compare(
            opened,
            exported,
            {},
            exported if style == "diffusers" else None,
            dtype=dtype,
            **options,
        )

    def _is_lora(self, family: ModelFamily) -> bool:
        """Whether diffusers can load all of the adapter as a LoRA."""
        keys = [key for part in self.adapter.components.values() for key in part.tensors]
        read = set(read_by_diffusers(family))
        return self._components(family) <= read and all(".gralora_" in key for key in keys)

    def _components(self, family: ModelFamily) -> set[str]:
        """Return the components that the adapter changes."""
        parts = self.adapter.components
        return {component_of(name, self.adapter, family.components) for name in parts}

    def _compare(
        self,
        opened: Base,
        exported: Path,
        loaders: dict[str, ArtifactLoader],
        lora: Path | None = None,
        **options: Any,
    ) -> None:
        with ExitStack() as stack:
            if self._is_lora(opened.family):
                if lora is None:
                    folder = TemporaryDirectory()
                    stack.enter_context(cleanup_on_exit(folder.cleanup))
                    lora = Path(folder.name) / "lora.safetensors"
                    export_lora(
                        self.adapter,
                        lora,
                        style="diffusers",
                        scale=self.scale,
                        family=opened.family.name,
                        **options,
                    )
                loaders = {**loaders, _LORA: lora_file(lora)}
            if not loaders:
                raise ValueError(
                    "--verify: diffusers cannot load all of this adapter as a LoRA, so there is "
                    "nothing to compare. Leave out --verify, or export a checkpoint"
                )
            pipe, controls = self._pipeline(opened)
            report = compare(
                pipe,
                self.adapter,
                loaders,
                prompts=self.prompts,
                scale=self.scale,
                seed=self.seed,
                steps=self.steps,
                size=self.size,
                controls=controls,
                stored=_coarsest_dtype(exported),
                bound=self.bound,
            )
        report.check()
        path = parity_path(self.output)
        names = {"base": Path(self.base).name, "adapter": Path(self.adapter.source).name}
        report.write(path, exported, file=self.output.name, **names)
        print_safely(report)
        print_safely(path)

    def _pipeline(self, opened: Base) -> tuple[Any, list[Image.Image]]:
        """Return the pipeline that generates with this base, and images for it to edit or fill.

        Raises:
            ValueError: it cannot be loaded, or none of the family's pipelines generates with it.
        """
        on_gpu = torch.cuda.is_available()
        dtype = _computed_in(opened.denoiser_dtype) if on_gpu else torch.float32
        options = BaseModelOptions(
            pretrained_model_name_or_path=str(opened.path),
            base_config=self.base_config,
            variant=self.open_options.get("variant") if isinstance(opened, FolderBase) else None,
        )
        try:
            declared = find_pipeline_class(options, opened.family)
            pipe = load_base(options, opened.family, dtype, dtype)
        except ConfigError as error:
            problem = str(error.problems[0]).replace("--pretrained_model_name_or_path", "--base")
            raise ValueError(f"--verify cannot generate with the base. {problem}") from error
        pipe, count = generating_pipeline(pipe, opened.family, declared)
        place(pipe, torch.device("cuda" if on_gpu else "cpu"))
        side = self.size or opened.family.native_resolution(pipe)
        return pipe, _made_images(side, count)


#: Pixels per side that every edit pipeline takes; FLUX.2's take no smaller images.
_SMALLEST = 64


def _made_images(side: int, count: ControlCount | None) -> list[Image.Image]:
    """Return an image to edit, or an image and the mask of what to fill; none from text alone.

    It has slopes and edges of every color. All loaders are given the same.

    Args:
        count: as in :func:`generating_pipeline`.
    """
    if count is not None and count.most == 0:
        return []
    size = (max(side, _SMALLEST),) * 2
    slope = Image.linear_gradient("L").resize(size)
    image = Image.merge(
        "RGB",
        (
            slope,
            slope.transpose(Image.Transpose.ROTATE_90),
            Image.radial_gradient("L").resize(size),
        ),
    )
    if count is not None:
        return [image]
    # its middle, between two edges
    return [image, slope.point(lambda level: 255 if 64 <= level < 192 else 0)]


def _computed_in(stored: torch.dtype) -> torch.dtype:
    """Return the dtype that a base stored in this dtype computes in: bf16 if stored in fp8."""
    if stored in COMPUTED_BOUNDS:
        return stored
    return torch.bfloat16 if stored.itemsize == 1 else torch.float32


def _coarsest_dtype(exported: Path) -> torch.dtype:
    """Return the coarsest dtype of the weights in a file or folder."""
    files = exported.rglob("*.safetensors") if exported.is_dir() else [exported]
    dtypes = {tensor.dtype for file in files for tensor in read_header(file)[0].values()}
    return max(dtypes & STORED_BOUNDS.keys(), key=lambda dtype: torch.finfo(dtype).eps)


def _as_base(exported: Path, base: Base, denoiser_only: bool) -> FileBase:
    """Return the exported file with the key maps that it was written with."""
    family = base.family
    tensors, metadata = read_header(exported)
    # the tensors for fp8 are not in the key maps
    tensors = {k: t for k, t in tensors.items() if not k.endswith(("scale_weight", "scaled_fp8"))}
    if isinstance(base, FileBase):
        key_maps, prefixes = base.key_maps, base.prefixes
    else:
        found = {
            name: family.find_key_map(name, base.canonical_shapes(name)) for name in base.tensors
        }
        key_maps = {name: key_map for name, key_map in found.items() if key_map}
        prefixes = {name: key_map.prefixes[0] for name, key_map in key_maps.items()}
    if denoiser_only:
        key_maps, prefixes = {family.denoiser: key_maps[family.denoiser]}, {family.denoiser: ""}
    return FileBase(exported, family, tensors, metadata, key_maps, prefixes)


def _set_weights(pipe: Any, file: FileBase, components: Sequence[str]) -> None:
    """Copy the weights of an original file into the models of a pipeline."""
    family: ModelFamily = file.family
    with safe_open(file.path, framework="pt") as held, torch.no_grad():
        keys = set(held.keys())
        for component in components:
            state = getattr(pipe, component).state_dict()
            own = {family.canonical(component, key): tensor for key, tensor in state.items()}
            prefix = file.prefixes[component]
            for tensor, _ in file.read(component):
                value, first = held.get_tensor(prefix + tensor.key).float(), 0
                scale = prefix + tensor.key.removesuffix("weight") + "scale_weight"
                if scale in keys:
                    value = value * held.get_tensor(scale)
                for part in tensor.parts:
                    rows = value[first : first + part.stop - part.start]
                    first += part.stop - part.start
                    if part.key in own:
                        target = own[part.key]
                        rows = rows.mT if part.transposed else rows
                        target = target if part.transposed else target[part.start : part.stop]
                        target.copy_(rows.reshape(target.shape))
