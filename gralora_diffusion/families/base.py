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
    from torch import Tensor, nn

#: What the denoiser needs besides latents and timesteps; tensors whose first axis is the batch.
Conditioning: TypeAlias = "dict[str, Tensor]"
#: A config that is not known.
UNKNOWN: Mapping[str, Any] = MappingProxyType({})

#: ``modelspec.implementation`` of Stability AI's original files, as sd-scripts writes it.
STABILITY_AI = "https://github.com/Stability-AI/generative-models"


class LayerMark(NamedTuple):
    """Layers of a denoiser by which an adapter's family can be told.

    Attributes:
        pattern: regular expression for their paths, in any layout, with ``_`` for every dot.
        inputs, outputs: widths that they have in the published models; any if empty.
    """

    pattern: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class PublishedNames:
    """What other programs call a kind of base model in the metadata of files.

    Attributes:
        architecture: ``modelspec.architecture``, as SwarmUI and ComfyUI have it.
        version: ``ss_base_model_version``, as kohya's sd-scripts and musubi-tuner have it.
        implementation: ``modelspec.implementation`` of original files: whose names their keys are.
        lora_module: ``ss_network_module`` of a LoRA in kohya's names.
        is_v2: ``ss_v2``, by which AUTOMATIC1111 tells Stable Diffusion 2 from 1.
    """

    architecture: str
    version: str
    implementation: str = "diffusers"
    lora_module: str = "networks.lora"
    is_v2: bool = False

    @property
    def fields(self) -> dict[str, str]:
        """What all files for such a base say, following ModelSpec 1.0.1 and sd-scripts."""
        return {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": self.architecture,
            "modelspec.implementation": self.implementation,
            "ss_base_model_version": self.version,
            "ss_v2": str(self.is_v2),
        }


class ModelFamily(ABC):
    """What the trainer and the loaders must know of one family of base models.

    A family holds no state: its methods take the pipeline or its parts.
    """

    #: Name in files and on the command line.
    name: str
    #: diffusers classes; subclasses of them count too. The first can be made for text to image.
    pipeline_classes: tuple[str, ...]
    #: Attribute of the pipeline that holds the denoiser: "unet" or "transformer".
    denoiser: str
    #: Attributes of the pipeline that hold text encoders which can be trained.
    text_encoders: tuple[str, ...]
    #: Training objective: "ddpm" or "flow_matching".
    objective: str
    #: component -> preset name -> endings of module paths, or whole paths with ``*`` for a part of
    #: them. Those that a model lacks are left out.
    target_presets: ClassVar[Mapping[str, Mapping[str, Sequence[str]]]]
    #: Pixels per side that the base was trained at.
    default_resolution: int

    #: Of ``text_encoders``, those that training adapts unless told which; all if empty.
    usual_text_encoders: tuple[str, ...] = ()
    #: Attributes that hold text encoders too large for the trainer. An adapter may lie in them all
    #: the same: injected by hand, it is loaded, saved and fused like the others.
    frozen_text_encoders: tuple[str, ...] = ()
    #: Text encoders without which the pipeline works, too.
    optional_text_encoders: tuple[str, ...] = ()
    #: Tokens of a prompt at most, as the pipeline has it; None: the tokenizer's own length.
    max_sequence_length: int | None = None
    #: Last layers of CLIP that the pipelines skip unless told; None: they take no ``clip_skip``.
    skipped_layers: int | None = None
    #: More tokens than that are refused by the family's pipelines; None: they take any number.
    longest_sequence: int | None = None
    #: Latents per side of what the denoiser takes as one token.
    patch_size: int = 1

    #: Names that diffusers' ``infer_diffusers_model_type`` gives to this family's single files.
    single_file_types: tuple[str, ...] = ()
    #: Keys that the denoiser has in every single file of this family. If those of several families
    #: are there, the one with the most of them is meant.
    single_file_keys: tuple[str, ...] = ()
    #: component -> how it is written in a single file; of several layouts the first one that fits.
    #: A component that lacks there is left out or taken from another base.
    original_key_maps: Mapping[str, Sequence[KeyMap]] = MappingProxyType({})
    #: component -> how the names of its layers begin in LoRA files of kohya's sd-scripts.
    kohya_prefixes: Mapping[str, str] = MappingProxyType({})
    #: Whether sd-scripts calls the denoiser's layers as the original layout does.
    kohya_original_names: bool = True
    #: Layers that ComfyUI (0.33, ``comfy/lora.py``) does not find in a LoRA in diffusers' names:
    #: component and path, with ``*`` for parts of them.
    unread_by_comfyui: tuple[str, ...] = ("text_encoder*.text_projection",)
    #: How ``modelspec.architecture`` and ``ss_base_model_version`` begin in files for this family,
    #: in lower case and with ``-`` for dots, spaces and underscores.
    known_as: tuple[str, ...] = ()
    #: What tells adapters for this family's denoiser, where their metadata does not.
    layer_marks: tuple[LayerMark, ...] = ()
    #: Arguments for ``lora_state_dict`` of the pipeline class besides the file: what the names of
    #: its layers do not tell in some LoRA files, as the published models have it.
    lora_options: Mapping[str, Any] = MappingProxyType({})
    #: Whether the pipeline that diffusers knows for such a file is of this family.
    single_file_default: bool = True
    #: Arguments for ``from_pretrained`` that leave out what neither training nor sampling needs.
    load_options: Mapping[str, Any] = MappingProxyType({})
    #: In which class pictures are drawn on a GPU, unless the user says: "fp16" or "bf16".
    generation_precision: str = "fp16"
    #: Training options -> values that suit this family, where the user leaves them open.
    training_defaults: Mapping[str, Any] = MappingProxyType({})

    @property
    def components(self) -> tuple[str, ...]:
        """Attributes of the pipeline that an adapter may live in, the denoiser first."""
        return (self.denoiser, *self.all_text_encoders)

    @property
    def all_text_encoders(self) -> tuple[str, ...]:
        """Attributes of the pipeline that hold text encoders; some may be None there."""
        return (*self.text_encoders, *self.frozen_text_encoders)

    def resolve_preset(self, component: str, preset: str, model: nn.Module) -> list[str]:
        """Return the targets of a preset that ``model`` has; a ``*`` is spelled out.

        Raises:
            ValueError: no such preset, or the model has none of its layers.
        """
        presets = self.target_presets.get(component, {})
        if preset not in presets:
            raise ValueError(
                f"no target preset {preset!r} for {component} of {self.name}. "
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
                f"{', '.join(presets[preset])}. Name its layers with target_modules."
            )
        return found

    def find_key_map(self, component: str, shapes: Mapping[str, Shape]) -> KeyMap | None:
        """Return how a component with tensors of these shapes is written in single files.

        Args:
            shapes: by key, in diffusers' names; of some layers is enough.
        """
        key_maps = self.original_key_maps.get(component, ())
        return next((key_map for key_map in key_maps if key_map.fits(shapes)), None)

    def original_marks(self, scheduler: Mapping[str, Any]) -> tuple[str, ...]:
        """Return keys of empty tensors by which a single file says how it is to be sampled.

        Args:
            scheduler: its config.
        """
        del scheduler
        return ()

    def comfyui_prefix(self, component: str, shapes: Mapping[str, Shape]) -> str | None:
        """Return how ComfyUI begins the names of a text encoder's layers in LoRA files, if it does.

        Args:
            shapes: as for :meth:`find_layout`.
        """
        key_map = self.find_key_map(component, shapes)
        return f"text_encoders.{key_map.comfyui_name}.transformer." if key_map else None

    def canonical(self, component: str, key: str) -> str:
        """Return a key or path, as a file or a model has it, in the form of the layout's rules.

        It is the same for all versions of a library that name the same tensor differently.
        """
        key_maps = self.original_key_maps.get(component)
        return key_maps[0].canonical(key) if key_maps else key

    @abstractmethod
    def encode_prompts(
        self,
        pipe: Any,
        prompts: Sequence[str],
        max_sequence_length: int | None = None,
        clip_skip: int | None = None,
    ) -> Conditioning:
        """Encode prompts as the pipeline does, with gradients if they are enabled.

        An empty one is what the pipeline's guidance starts from without a negative prompt.

        Args:
            max_sequence_length: in place of the family's.
            clip_skip: how many layers at the end of CLIP to skip, for families with
                ``skipped_layers``; others pass over it.
        """

    def count_tokens(self, tokenizer: Any, prompt: str) -> int:
        """Return how many tokens the pipeline makes of a prompt before it cuts them to a number.

        Args:
            tokenizer: any of the pipeline's.
        """
        return len(tokenizer(prompt, verbose=False).input_ids)

    def image_conditioning(
        self,
        pipe: Any,
        original_sizes: Tensor,
        crop_top_lefts: Tensor,
        target_sizes: Tensor,
        guidance_scale: float | None,
    ) -> Conditioning:
        """Return what the denoiser needs to know besides the prompt.

        By default the guidance scale, as ``guidance``, for a denoiser that was distilled to take it
        as an input (``guidance_embeds`` in its config); nothing for others.

        Args:
            original_sizes: (batch, 2), height and width of the pictures before resizing.
            crop_top_lefts: (batch, 2), top and left of the crop in the resized picture.
            target_sizes: (batch, 2), height and width of the crop.
            guidance_scale: for such a denoiser.
        """
        import torch

        del original_sizes, crop_top_lefts
        if not getattr(getattr(pipe, self.denoiser).config, "guidance_embeds", False):
            return {}
        if guidance_scale is None:
            raise ValueError(f"a {self.name} base that takes guidance needs a guidance scale")
        return {"guidance": torch.full((len(target_sizes),), float(guidance_scale))}

    def encode_images(self, vae: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the scaled latents: a sample is mean + std * noise.

        They are scaled as the family's own pipeline scales them; by default by ``shift_factor`` and
        ``scaling_factor`` of the VAE's config.

        ``pixel_values`` is (batch, 3, height, width) in [-1, 1], in the VAE's dtype.
        """
        posterior = vae.encode(pixel_values).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scale = vae.config.scaling_factor
        return (posterior.mean - shift) * scale, posterior.std * scale

    @abstractmethod
    def predict(
        self,
        denoiser: nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        """Run the denoiser as the pipeline does and return its prediction, shaped as the latents.

        ``timesteps`` (batch,) are in the scheduler's units; ``conditioning`` is what
        :meth:`encode_prompts` and :meth:`picture_conditioning` returned, in one dict.
        """

    def shift_mu(self, pipe: Any, latent_shape: Sequence[int]) -> float:
        """Return mu of the resolution-dependent shift of sigmas, as the pipeline computes it.

        Asked only where the scheduler has ``use_dynamic_shifting``.

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
        """Return how many tokens latents of this shape (..., height, width) are."""
        height, width = latent_shape[-2:]
        return (height // self.patch_size) * (width // self.patch_size)

    def size_divisor(self, pipe: Any) -> int:
        """Return what height and width of a picture must be multiples of, in pixels."""
        return int(pipe.vae_scale_factor) * self.patch_size

    def published_names(
        self, denoiser: Mapping[str, Any] = UNKNOWN, scheduler: Mapping[str, Any] = UNKNOWN
    ) -> PublishedNames:
        """Return what other programs call such a base; by default the family's own name.

        Args:
            denoiser: its config. What tells no known variant is called by the most general name.
            scheduler: its config.
        """
        del denoiser, scheduler
        return PublishedNames(self.name, self.name)

    def check_base(self, pipe: Any) -> None:
        """Raise ValueError if this base cannot be trained, before anything is done with it."""
        del pipe  # unless a family says otherwise, any of its bases will do

    def native_resolution(self, pipe: Any) -> int:
        """Pixels per side that this base draws, as its config says, or the family's default."""
        latents = getattr(getattr(pipe, self.denoiser).config, "sample_size", None)
        if not isinstance(latents, int):
            return self.default_resolution
        return latents * int(pipe.vae_scale_factor)


def check_channels(taken: int, made: int) -> None:
    """Raise ValueError unless the denoiser takes just the channels that the VAE makes."""
    if taken != made:
        raise ValueError(
            f"the denoiser takes {taken} channels and the VAE makes {made}: a base for inpainting, "
            "depth, editing or control. Train on the text-to-image base; the adapter can be loaded "
            "into the others' pipelines where widths agree."
        )
