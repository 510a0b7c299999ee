"""The interface of a family of base models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

#: What the denoiser needs besides latents and timesteps; tensors whose first axis is the batch.
Conditioning = dict[str, Tensor]


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
    #: component -> preset name -> endings of module paths. Endings that a model lacks are left out.
    target_presets: ClassVar[Mapping[str, Mapping[str, Sequence[str]]]]
    #: Pixels per side that the base was trained at.
    default_resolution: int

    #: Names that diffusers' ``infer_diffusers_model_type`` gives to this family's single files.
    single_file_types: tuple[str, ...] = ()
    #: Arguments for ``from_pretrained`` that leave out what neither training nor sampling needs.
    load_options: Mapping[str, Any] = MappingProxyType({})
    #: Training options -> values that suit this family, where the user leaves them open.
    training_defaults: Mapping[str, Any] = MappingProxyType({})

    @property
    def components(self) -> tuple[str, ...]:
        """Attributes of the pipeline that an adapter may live in, the denoiser first."""
        return (self.denoiser, *self.text_encoders)

    def resolve_preset(self, component: str, preset: str, model: nn.Module) -> list[str]:
        """Return the target endings of a preset that ``model`` has.

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
        found = [
            ending
            for ending in presets[preset]
            if any(name == ending or name.endswith(f".{ending}") for name in names)
        ]
        if not found:
            raise ValueError(
                f"this {type(model).__name__} has none of the layers of preset {preset!r}: "
                f"{', '.join(presets[preset])}. Name its layers with target_modules."
            )
        return found

    @abstractmethod
    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts as the pipeline does, with gradients if they are enabled."""

    def encode_images(self, vae: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the scaled latents: a sample is mean + std * noise.

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

        ``timesteps`` (batch,) are in the scheduler's units.
        """

    def check_base(self, pipe: Any) -> None:
        """Raise ValueError if this base cannot be trained, before anything is done with it."""
        del pipe  # unless a family says otherwise, any of its bases will do

    def native_resolution(self, pipe: Any) -> int:
        """Pixels per side that this base draws, as its config says, or the family's default."""
        latents = getattr(getattr(pipe, self.denoiser).config, "sample_size", None)
        if not isinstance(latents, int):
            return self.default_resolution
        return latents * int(pipe.vae_scale_factor)
