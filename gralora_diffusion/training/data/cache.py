"""Latents and encoded prompts, computed once and looked up by their inputs.

Latents are found by a hash of the image's bytes and everything else that they depend on, never by
their position, so that a caption cannot be paired with another image's latents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.image_files import DECODER_VERSION

from .control_crops import ControlPlan, Size
from .controls import ControlImage
from .image_folder import Example
from .masks import latent_mask
from .tensor_store import TensorStore, hash_of
from .transforms import CropPlan, Variant

#: Increased when the same VAE gives the same pixels other latents than before.
_ENCODING_VERSION = 3
#: A prompt that is encoded to tell text encoders apart.
_PROBE = "a photo of a sks dog, wearing 2 red hats"

#: (batch, 3, height, width) in [-1, 1], fp32, CPU -> mean and std of the scaled latents
ImageEncoder = Callable[[Tensor], tuple[Tensor, Tensor]]
#: (batch, 3, height, width) in [-1, 1], fp32, CPU -> latents of control images
ControlEncoder = Callable[[Tensor], Tensor]
#: prompts -> tensors whose first axis is the prompt
PromptEncoder = Callable[[list[str]], dict[str, Tensor]]


def vae_fingerprint(vae: Any) -> str:
    """Hash everything a VAE's latents depend on: its config, parameters, buffers and dtypes."""
    # keys with a leading _ only say where the VAE came from and which diffusers wrote it
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    return hash_of(config, vae.state_dict())


@torch.no_grad()
def prompt_fingerprint(encode: PromptEncoder, encoders: Iterable[Any]) -> str:
    """Hash everything encoded prompts depend on, as far as that is possible in reasonable time.

    The hash covers the encodings of a prompt and of the empty prompt, with all settings, and the
    embeddings of all tokens, since an added or trained token changes no other token's prompts.

    Args:
        encode: with its encoders on the device.
        encoders: the same encoders, for their embeddings.
    """
    made = [encode([prompt]) for prompt in (_PROBE, "")]
    embeddings = [_embeddings(encoder) for encoder in encoders]
    tensors = {f"{name} {i}": t for i, part in enumerate(made) for name, t in part.items()}
    return hash_of({}, tensors | {f"embeddings {i}": t for i, t in enumerate(embeddings)})


def _embeddings(encoder: Any) -> Tensor:
    """Return the embeddings of all tokens of an encoder, which several processes may share out."""
    if hasattr(encoder, "reshard"):  # memory that FSDP has gathered must not be shown to numpy
        encoder.reshard()
    weight: Any = encoder.get_input_embeddings().weight
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole


class LatentCache:
    """Mean and standard deviation of the latents of image variants, and masks, on the CPU.

    Args:
        plan: how images are turned into pixel values.
        fingerprint: of the encoder, see :func:`vae_fingerprint`.
        folder: of a :class:`TensorStore`.
    """

    def __init__(self, plan: CropPlan, fingerprint: str, folder: str | Path | None = None) -> None:
        self.plan = plan
        self.fingerprint = fingerprint
        self.store = TensorStore(folder)

    def key(self, cache_key: str, variant: Variant) -> str:
        """Hash everything that the tensors of a variant depend on.

        Args:
            cache_key: of the example.
        """
        parts = [
            cache_key,
            [variant.left, variant.top, variant.height, variant.width, variant.flip],
            self.plan.interpolation,
            self.fingerprint,
            [DECODER_VERSION, _ENCODING_VERSION],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def get(self, cache_key: str, variant: Variant) -> dict[str, Tensor]:
        """Return what was made of a variant.

        These are ``mean`` and ``std`` of the latents, (channels, height, width), as the encoder
        made them, and for an example with a mask ``mask``, (1, height, width).

        Args:
            cache_key: of the example.

        Raises:
            KeyError: the cache was never filled with them.
            DataError: their file has been removed or damaged.
        """
        return self.store[self.key(cache_key, variant)]

    @torch.no_grad()
    def fill(
        self,
        wanted: Iterable[tuple[Example, Sequence[Variant]]],
        encode: ImageEncoder,
        batch_size: int = 1,
        progress: bool = True,
        count: int | None = None,
    ) -> int:
        """Encode the missing variants and return their number.

        A batch contains variants of one image, so all have the same shape. It is always the same
        batch, whatever else is missing: rounding depends on the batch, and a run that was
        interrupted here must train on the same latents as one that was not. It is one variant by
        default, because an fp32 VAE may need more memory for several than all the steps do.

        Several processes with one folder can share the work. Each fills its part and, after a
        barrier, all of it, which then only checks the files.

        Args:
            count: how many images are ``wanted``, for the progress bar.

        Raises:
            DataError: latents are not finite, or the folder cannot be written.
        """
        done = 0
        quiet = None if progress else True
        bar = tqdm(wanted, "Encoding images", count, unit="", disable=quiet)
        for example, variants in bar:
            image, mask = None, None
            for start in range(0, len(variants), batch_size):
                chunk = variants[start : start + batch_size]
                keys = [self.key(example.cache_key, variant) for variant in chunk]
                missing = [key not in self.store for key in keys]
                if not any(missing):
                    continue
                image = image or example.load()
                pixels = torch.stack([self.plan.pixel_values(image, v) for v in chunk])
                mean, std = (_storable(part, example) for part in encode(pixels))
                if example.mask is not None:
                    mask = mask or example.mask.load()
                for i, key in enumerate(keys):
                    if missing[i]:
                        tensors = {"mean": mean[i].clone(), "std": std[i].clone()}
                        if mask is not None:
                            values = self.plan.mask_values(mask, chunk[i])
                            tensors["mask"] = latent_mask(values, mean.shape[-2:])
                        self.store[key] = tensors
                        done += 1
        self.store.finish_looking()
        return done


class ControlCache:
    """Latents of control images, on the CPU; arguments as for :class:`LatentCache`."""

    def __init__(
        self, plan: ControlPlan, fingerprint: str, folder: str | Path | None = None
    ) -> None:
        self.plan = plan
        self.fingerprint = fingerprint
        self.store = TensorStore(folder)

    def key(self, control: ControlImage, target: Size, variant: Variant) -> str:
        """Hash everything that the latents depend on."""
        parts = [
            "control",
            control.content_key,
            self.plan.facts(control.size, target, variant),
            self.fingerprint,
            [DECODER_VERSION, _ENCODING_VERSION],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def get(self, control: ControlImage, target: Size, variant: Variant) -> Tensor:
        """Return the latents (channels, height, width) beside this variant of a target.

        Raises:
            KeyError: the cache was never filled with them.
            DataError: their file has been removed or damaged.
        """
        return self.store[self.key(control, target, variant)]["latents"]

    @torch.no_grad()
    def fill(
        self,
        wanted: Iterable[tuple[Example, Sequence[Variant]]],
        encode: ControlEncoder,
        progress: bool = True,
    ) -> int:
        """Encode what is missing for these variants of targets, one by one; return the number.

        Raises:
            DataError: as for :meth:`LatentCache.fill`.
        """
        done = 0
        pairs = [(control, e, some) for e, some in wanted for control in e.controls]
        bar = tqdm(
            pairs, desc="Encoding control images", unit="", disable=None if progress else True
        )
        for control, example, variants in bar:
            image = None
            for variant in variants:
                key = self.key(control, example.size, variant)
                if key in self.store:
                    continue
                image = image or control.load()
                pixels = self.plan.pixel_values(image, example.size, variant)
                self.store[key] = {"latents": _storable(encode(pixels[None]), control)[0].clone()}
                done += 1
        self.store.finish_looking()
        return done


def _storable(latents: Tensor, image: Example | ControlImage) -> Tensor:
    """Return an encoder's output on the CPU, as it can be written to a file.

    Raises:
        DataError: it is not finite.
    """
    latents = latents.detach().cpu().contiguous()  # it may be in channels-last layout
    if not latents.isfinite().all():
        problem = (
            "the VAE returned NaN or infinity. Give --mixed_precision no or bf16, or another VAE "
            "with --pretrained_vae_model_name_or_path"
        )
        raise DataError(f"latents of {image.source}", [problem])
    return latents


class PromptCache:
    """Encoded prompts, on the CPU and in the encoder's dtype.

    Args:
        fingerprint: of the encoders, see :func:`prompt_fingerprint`; needed with a folder.
        folder: of a :class:`TensorStore`.
    """

    def __init__(self, fingerprint: str = "", folder: str | Path | None = None) -> None:
        self.fingerprint = fingerprint
        self.store = TensorStore(folder)

    def key(self, prompt: str) -> str:
        """Hash everything that the encoded prompt depends on."""
        parts = ["prompt", prompt, self.fingerprint]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @torch.no_grad()
    def fill(
        self,
        prompts: Iterable[str],
        encode: PromptEncoder,
        batch_size: int = 16,
        progress: bool = False,
        agree: Callable[[list[str]], list[str]] = list,
    ) -> int:
        """Encode each missing prompt once and return their number.

        For a folder, each is encoded by itself: rounding depends on the batch, and the encodings
        in the folder must not depend on which others were missing.

        Args:
            agree: takes the missing prompts and returns those to encode, such as those that are
                missing in any process.

        Raises:
            DataError: the folder cannot be written.
        """
        missing = [
            prompt for prompt in dict.fromkeys(prompts) if self.key(prompt) not in self.store
        ]
        self.store.finish_looking()
        missing = agree(missing)
        size = batch_size if self.store.folder is None else 1
        starts = range(0, len(missing), size)
        for start in tqdm(starts, "Encoding prompts", unit="", disable=None if progress else True):
            batch = missing[start : start + size]
            encoded = {name: t.detach().cpu().contiguous() for name, t in encode(batch).items()}
            for i, prompt in enumerate(batch):
                if (key := self.key(prompt)) in self.store:
                    continue  # another process has just stored it
                self.store[key] = {name: t[i].clone() for name, t in encoded.items()}
        if missing:
            self.store.finish_looking()
        return len(missing)

    def batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditioning of ``prompts``; the first axis is the prompt.

        Raises:
            KeyError: the cache was never filled with a prompt.
            DataError: the file of a prompt has been removed or damaged.
        """
        rows = [self._row(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, prompt: str) -> dict[str, Tensor]:
        try:
            return self.store[self.key(prompt)]
        except KeyError:
            raise KeyError(prompt) from None
