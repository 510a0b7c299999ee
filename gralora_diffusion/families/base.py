"""The interface of a family of base models."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from gralora_diffusion.key_maps import KeyMap, Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from torch import Tensor, nn

#: Inputs of the denoiser besides latents and timesteps: tensors whose first axis is the batch.
Conditioning: TypeAlias = "dict[str, Tensor]"
#: An RGB image, upright -> pixels (3, height, width) in [-1, 1].
ControlPreparation: TypeAlias = "Callable[[Image], Tensor]"
#: A config that is not known.
UNKNOWN: Mapping[str, Any] = MappingProxyType({})

#: ``modelspec.implementation`` of Stability AI's original files, as sd-scripts writes it.
STABILITY_AI = "https://github.com/Stability-AI/generative-models"


class LayerMark(NamedTuple):
    """Layers of a denoiser that identify an adapter's family.

    Attributes:
        pattern: regular expression for their paths in any layout, with ``_`` in place of dots.
        inputs, outputs: their widths in the published models; any width if empty.
    """

    pattern: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class PublishedNames:
    """Other programs' names of a kind of base model in the metadata of files.

    Attributes:
        architecture: ``modelspec.architecture``, as in SwarmUI and ComfyUI.
        version: ``ss_base_model_version``, as in kohya's sd-scripts and musubi-tuner.
        implementation: ``modelspec.implementation`` of original files: the source of their keys.
        lora_module: ``ss_network_module`` of a LoRA with kohya's names.
        is_v2: ``ss_v2``, which AUTOMATIC1111 uses to distinguish Stable Diffusion 2 from 1.
    """

    architecture: str
    version: str
    implementation: str = "diffusers"
    lora_module: str = "networks.lora"
    is_v2: bool = False

    @property
    def fields(self) -> dict[str, str]:
        """Metadata of all files for such a base, following ModelSpec 1.0.1 and sd-scripts."""
        return {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": self.architecture,
            "modelspec.implementation": self.implementation,
            "ss_base_model_version": self.version,
            "ss_v2": str(self.is_v2),
        }


class ControlCount(NamedTuple):
    """How many control images a sample of an editing base may have.

    Attributes:
        most: None for any number.
        aligned: a control image lies beside its target pixel by pixel, so it has the same shape.
    """

    least: int = 0
    most: int | None = 0
    aligned: bool = False

    def __str__(self) -> str:
        if self.most is None:
            return "any number of control images" if not self.least else f"at least {self.least}"
        if self.most == 0:
            return "no control image"
        return "one control image" if self.least else "no control image or one"


class ModelFamily(ABC):
    """The properties of one family of base models that the trainer and the loaders need.

    A family has no state: its methods take the pipeline or its parts.
    """

    #: Name in files and on the command line.
    name: str
    #: diffusers classes, including their subclasses. The first one generates images from text.
    pipeline_classes: tuple[str, ...]
    #: Pipelines of bases that edit given images -> how many of them a sample has. The first one
    #: generates images from control images.
    edit_pipelines: Mapping[str, ControlCount] = MappingProxyType({})
    #: The pipeline of bases that fill a masked part of an image; None if there are none.
    inpainting_pipeline: str | None = None
    #: Attribute of the pipeline that holds the denoiser: "unet" or "transformer".
    denoiser: str
    #: Attributes of the pipeline that hold trainable text encoders.
    text_encoders: tuple[str, ...]
    #: Training objective: "ddpm" or "flow_matching".
    objective: str
    #: component -> preset name -> endings of module paths, or whole paths with ``*`` for a part of
    #: them. Entries that a model does not have are left out.
    target_presets: ClassVar[Mapping[str, Mapping[str, Sequence[str]]]]
    #: Pixels per side that the base was trained at.
    default_resolution: int

    #: The ``text_encoders`` that training adapts by default; all if empty.
    usual_text_encoders: tuple[str, ...] = ()
    #: Attributes that hold text encoders too large for the trainer. They may have adapters all the
    #: same: an adapter that is injected by hand is loaded, saved and fused like the others.
    frozen_text_encoders: tuple[str, ...] = ()
    #: Text encoders that the pipeline can do without.
    optional_text_encoders: tuple[str, ...] = ()
    #: Maximum number of tokens of a prompt in the pipeline; None: the tokenizer's own length.
    max_sequence_length: int | None = None
    #: Last layers of CLIP that the pipelines skip by default; None: they take no ``clip_skip``.
    skipped_layers: int | None = None
    #: Largest number of tokens that the family's pipelines accept; None: any number.
    longest_sequence: int | None = None
    #: Latents per side of one token of the denoiser.
    patch_size: int = 1

    #: Names that diffusers' ``infer_diffusers_model_type`` gives to this family's single files.
    single_file_types: tuple[str, ...] = ()
    #: The same for single files of bases that fill.
    inpainting_file_types: tuple[str, ...] = ()
    #: The same for single files of bases that edit.
    editing_file_types: tuple[str, ...] = ()
    #: Those of ``single_file_types`` that bases for editing have, too: their keys and shapes do not
    #: tell them from text-to-image bases.
    ambiguous_file_types: tuple[str, ...] = ()
    #: Keys of the denoiser in every single file of this family. If a file has those of several
    #: families, it belongs to the family with the most keys.
    single_file_keys: tuple[str, ...] = ()
    #: component -> its key maps in single files; the first one that fits is used. A component
    #: without an entry is left out or read from another base.
    original_key_maps: Mapping[str, Sequence[KeyMap]] = MappingProxyType({})
    #: component -> prefix of the names of its layers in LoRA files of kohya's sd-scripts.
    kohya_prefixes: Mapping[str, str] = MappingProxyType({})
    #: Whether sd-scripts uses the original layout's names of the denoiser's layers.
    kohya_original_names: bool = True
    #: Layers that ComfyUI (0.33, ``comfy/lora.py``) does not find in a LoRA with diffusers' names:
    #: component and path, with ``*`` for parts of them.
    unread_by_comfyui: tuple[str, ...] = ("text_encoder*.text_projection",)
    #: Prefixes of ``modelspec.architecture`` and ``ss_base_model_version`` in files for this
    #: family, in lower case and with ``-`` in place of dots, spaces and underscores.
    known_as: tuple[str, ...] = ()
    #: Marks of adapters for this family's denoiser, for files whose metadata does not name it.
    layer_marks: tuple[LayerMark, ...] = ()
    #: Arguments for ``lora_state_dict`` of the pipeline class besides the file: properties of the
    #: published models that the names of layers do not show in some LoRA files.
    lora_options: Mapping[str, Any] = MappingProxyType({})
    #: Whether diffusers' default pipeline for such a file is of this family.
    single_file_default: bool = True
    #: Settings in a pipeline's index with which a base cannot be trained -> why.
    refused_settings: Mapping[str, str] = MappingProxyType({})
    #: Arguments for ``from_pretrained`` that leave out parts that are not needed.
    load_options: Mapping[str, Any] = MappingProxyType({})
    #: Default precision for generating images on a GPU: "fp16" or "bf16".
    generation_precision: str = "fp16"
    #: Training options -> this family's defaults.
    training_defaults: Mapping[str, Any] = MappingProxyType({})

    @property
    def components(self) -> tuple[str, ...]:
        """Attributes of the pipeline that may have an adapter, the denoiser first."""
        return (self.denoiser, *self.all_text_encoders)

    @property
    def all_text_encoders(self) -> tuple[str, ...]:
        """Attributes of the pipeline that hold text encoders; some may be None."""
        return (*self.text_encoders, *self.frozen_text_encoders)

    def resolve_preset(self, component: str, preset: str, model: nn.Module) -> list[str]:
        """Return the targets of a preset that ``model`` has, with ``*`` replaced by its paths.

        Raises:
            ValueError: there is no such preset, or the model has none of its layers.
        """
        presets = self.target_presets.get(component, {})
        if preset not in presets:
            raise ValueError(
                f"{component} of {self.name} has no target preset {preset!r}. "
                f"Presets: {', '.join(presets) or 'none'}."
            )
        names = [name for name, _ in model.named_modules()]
        found = []
        for entry in presets[preset]:
            if "*" in entry:
                found += fnmatch.filter(names, entry)
            elif any(name == entry or name.endswith(f".{entry}") for name in names):
                found.append(entry)
        if not found:
            raise ValueError(
                f"this {type(model).__name__} has none of the layers of preset {preset!r}: "
                f"{', '.join(presets[preset])}. Name the layers with target_modules instead."
            )
        return found

    def find_key_map(self, component: str, shapes: Mapping[str, Shape]) -> KeyMap | None:
        """Return the key map for a component with tensors of these shapes.

        Args:
            shapes: shapes by key in diffusers' names; those of some layers are enough.
        """
        key_maps = self.original_key_maps.get(component, ())
        return next((key_map for key_map in key_maps if key_map.fits(shapes)), None)

    def original_marks(self, scheduler: Mapping[str, Any]) -> tuple[str, ...]:
        """Return keys of empty tensors in a single file that describe how to sample with it.

        Args:
            scheduler: config of the scheduler.
        """
        del scheduler
        return ()

    def comfyui_prefix(self, component: str, shapes: Mapping[str, Shape]) -> str | None:
        """Return ComfyUI's prefix of a text encoder's layers in LoRA files, if it reads them.

        Args:
            shapes: as for :meth:`find_key_map`.
        """
        key_map = self.find_key_map(component, shapes)
        return f"text_encoders.{key_map.comfyui_name}.transformer." if key_map else None

    def canonical(self, component: str, key: str) -> str:
        """Return a key or path of a file or model in the form of the key map's rules.

        The result is the same for all versions of a library that name a tensor differently.
        """
        key_maps = self.original_key_maps.get(component)
        return key_maps[0].canonical(key) if key_maps else key

    def sequence_problem(self, tokens: int | None) -> str | None:
        """Return why the pipelines do not accept prompts of this many tokens, or None."""
        longest = self.longest_sequence
        if tokens is None or longest is None or tokens <= longest:
            return None
        return (
            f"--max_sequence_length is {tokens}; the pipelines of {self.name} accept at most "
            f"{longest}. Give a number up to {longest}"
        )

    @abstractmethod
    def encode_prompts(
        self,
        pipe: Any,
        prompts: Sequence[str],
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
    ) -> Conditioning:
        """Encode prompts as the pipeline does, with gradients if they are enabled.

        An empty prompt gives the embedding that guidance uses without a negative prompt.

        Args:
            max_sequence_length: replaces the family's if given.
            clip_skip: number of layers to skip at the end of CLIP, for families with
                ``skipped_layers``; others ignore it.
        """

    def count_tokens(self, tokenizer: Any, prompts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each prompt in the pipeline, before it is truncated.

        Args:
            tokenizer: any tokenizer of the pipeline.
        """
        encoded = tokenizer(list(prompts), verbose=False, return_attention_mask=False)
        return [len(ids) for ids in encoded.input_ids]

    def image_conditioning(
        self,
        pipe: Any,
        original_sizes: Tensor,
        crop_top_lefts: Tensor,
        target_sizes: Tensor,
        guidance_scale: float | None,
    ) -> Conditioning:
        """Return the denoiser's inputs besides the prompt.

        By default this is the guidance scale, as ``guidance``, for a denoiser that was distilled to
        take it as an input (``guidance_embeds`` in its config). For others it is empty.

        Args:
            original_sizes: (batch, 2), height and width of the images before resizing.
            crop_top_lefts: (batch, 2), top and left of the crop in the resized image.
            target_sizes: (batch, 2), height and width of the crop.
            guidance_scale: guidance scale for such a denoiser.
        """
        import torch

        del original_sizes, crop_top_lefts
        if not getattr(getattr(pipe, self.denoiser).config, "guidance_embeds", False):
            return {}
        if guidance_scale is None:
            raise ValueError(
                f"guidance_scale is None, but this {self.name} base takes guidance as an input. "
                "Pass a number"
            )
        return {"guidance": torch.full((len(target_sizes),), float(guidance_scale))}

    def encode_images(self, vae: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the scaled latents: a sample is mean + std * noise.

        They are scaled as in the family's own pipeline, by default with ``shift_factor`` and
        ``scaling_factor`` of the VAE's config.

        ``pixel_values`` is (batch, 3, height, width) in [-1, 1], in the VAE's dtype.
        """
        posterior = vae.encode(pixel_values).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scale = vae.config.scaling_factor
        return (posterior.mean - shift) * scale, posterior.std * scale

    def control_count(self, pipe: Any) -> ControlCount:
        """Return how many control images a sample of this base may have."""
        del pipe
        return next(iter(self.edit_pipelines.values()), ControlCount())

    def control_preparation(
        self, pipe: Any, resolution: int | None = None
    ) -> ControlPreparation | None:
        """Return how the edit pipeline makes pixels of a control image, with its size rules.

        None if control images are ``aligned`` with their targets. The result can be pickled.

        Args:
            resolution: control images are :func:`reduced` to it, as
                ``pipelines.editing.control_arguments`` does; by the pipeline's own rules if None.
        """
        del pipe, resolution
        return None

    def control_problem(self, size: tuple[int, int]) -> str | None:
        """Return why the edit pipeline does not take an image of ``size`` (width, height)."""
        del size
        return None

    def encode_controls(self, vae: Any, pixel_values: Tensor) -> Tensor:
        """Return the latents of control images as the edit pipeline encodes them.

        By default this is the mean of :meth:`encode_images`.

        Args:
            pixel_values: as for :meth:`encode_images`.
        """
        return self.encode_images(vae, pixel_values)[0]

    def absent_controls(self, pipe: Any, latents: Tensor) -> list[Tensor]:
        """Return the latents that the denoiser gets in place of control images if there are none.

        By default it gets nothing.

        Args:
            latents: of the target, (batch, channels, height, width).
        """
        del pipe, latents
        return []

    def fills(self, pipe: Any) -> bool:
        """Whether this base fills a masked part of an image.

        The denoiser of such a base takes a mask and the latents of the masked image besides the
        noisy latents.
        """
        del pipe
        return False

    def fill_masks(self, pipe: Any, masks: Tensor) -> Tensor:
        """Return masks of pixels as the denoiser of such a base takes them.

        By default, each latent has the value of one of its pixels.

        Args:
            masks: (batch, 1, height, width), 1 where to fill and 0 elsewhere.

        Returns:
            (batch, channels, height, width of the latents).
        """
        from torch.nn.functional import interpolate

        height, width = masks.shape[-2:]
        scale = int(pipe.vae_scale_factor)
        return interpolate(masks, size=(height // scale, width // scale))

    @abstractmethod
    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        """Run the denoiser as the pipeline does and return its prediction, shaped as the latents.

        ``timesteps`` (batch,) are in the scheduler's units; ``conditioning`` contains the results
        of :meth:`encode_prompts` and :meth:`image_conditioning` in one dict, and the latents of
        control images under :func:`control_key`. For a base that fills, they also contain
        ``fill_mask``, from :meth:`fill_masks`, and ``masked_image``, the latents of the image
        without what is to be filled.
        """

    def shift_mu(self, pipe: Any, latent_shape: Sequence[int]) -> float:
        """Return mu of the resolution-dependent shift of sigmas, as the pipeline computes it.

        It is only called if the scheduler has ``use_dynamic_shifting``.

        Args:
            latent_shape: (..., height, width) of the latents.
        """
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = pipe.scheduler.config
        return float(
            calculate_shift(
                self.image_tokens(latent_shape),
                config.base_image_seq_len,
                config.max_image_seq_len,
                config.base_shift,
                config.max_shift,
            )
        )

    def image_tokens(self, latent_shape: Sequence[int]) -> int:
        """Return the number of tokens for latents of this shape (..., height, width)."""
        height, width = latent_shape[-2:]
        return (height // self.patch_size) * (width // self.patch_size)

    def size_divisor(self, pipe: Any) -> int:
        """Return the number of pixels that divides height and width of every image."""
        return int(pipe.vae_scale_factor) * self.patch_size

    def published_names(
        self, denoiser: Mapping[str, Any] = UNKNOWN, scheduler: Mapping[str, Any] = UNKNOWN
    ) -> PublishedNames:
        """Return other programs' names of such a base; by default the family's own name.

        Args:
            denoiser: config of the denoiser. An unknown variant gets the most general name.
            scheduler: config of the scheduler.
        """
        del denoiser, scheduler
        return PublishedNames(self.name, self.name)

    def check_base(self, pipe: Any) -> None:
        """Raise ValueError if this base cannot be trained."""
        del pipe  # by default, any base of a family can be trained

    def native_resolution(self, pipe: Any) -> int:
        """Return pixels per side of this base's images from its config, or the family's default."""
        latents = getattr(getattr(pipe, self.denoiser).config, "sample_size", None)
        if not isinstance(latents, int):
            return self.default_resolution
        return latents * int(pipe.vae_scale_factor)


def control_key(number: int) -> str:
    """Return the name of a control image's latents in a :data:`Conditioning`."""
    return f"control_{number}"


def controls_of(conditioning: Conditioning) -> list[Tensor]:
    """Return the latents of the control images, in order."""
    found: list[Tensor] = []
    while (latents := conditioning.get(control_key(len(found)))) is not None:
        found.append(latents)
    return found


def with_controls(noisy_latents: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the input of a UNet with the latents of control images as further channels."""
    import torch

    controls = controls_of(conditioning)
    return torch.cat([noisy_latents, *controls], dim=1) if controls else noisy_latents


def with_fill(noisy_latents: Tensor, conditioning: Conditioning) -> Tensor:
    """Return the input of a UNet: the latents, and what a base that fills takes besides."""
    import torch

    if "fill_mask" not in conditioning:
        return noisy_latents
    parts = [noisy_latents, conditioning["fill_mask"], conditioning["masked_image"]]
    return torch.cat(parts, dim=1)


def check_channels(taken: int, made: int) -> None:
    """Raise ValueError unless the denoiser takes exactly the channels that the VAE makes."""
    if taken != made:
        raise ValueError(
            f"the denoiser takes {taken} channels and the VAE makes {made}: this is a base for "
            "depth, editing or control. Train on the text-to-image base. The adapter "
            "can be loaded into the other pipelines if the widths agree."
        )
