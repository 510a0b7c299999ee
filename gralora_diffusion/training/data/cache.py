"""Latents and encoded prompts, computed once, looked up by what they were computed from.

Latents are found by the hash of the picture's bytes and everything else they depend on, never by a
place in some order: a caption cannot meet another picture's latents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.image_files import DECODER_VERSION

from .image_folder import Example
from .tensor_store import TensorStore
from .transforms import CropPlan, Variant

#: Raised when the same pixels get other latents of the same VAE.
_ENCODING_VERSION = 2
#: What is encoded to tell text encoders apart.
_PROBE = "a photo of a sks dog, wearing 2 red hats"

#: (batch, 3, height, width) in [-1, 1], fp32, CPU -> mean and std of the scaled latents
ImageEncoder = Callable[[Tensor], tuple[Tensor, Tensor]]
#: prompts -> tensors whose first axis is the prompt
PromptEncoder = Callable[[list[str]], dict[str, Tensor]]


def vae_fingerprint(vae: Any) -> str:
    """Hash what a VAE's latents depend on: its config, parameters and buffers, with their dtype."""
    # what begins with _ tells where the VAE came from and which diffusers wrote it
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    return _hash_of(config, vae.state_dict())


@torch.no_grad()
def prompt_fingerprint(encode: PromptEncoder, encoders: Iterable[Any]) -> str:
    """Hash what encoded prompts depend on, as far as it can show in reasonable time.

    That is what the encoders, with all their settings, make of a prompt and of none; and the
    embeddings of all tokens, for one that was added or trained shows in no other's prompts.

    Args:
        encode: with its encoders on the device.
        encoders: the same, for their embeddings.
    """
    made = [encode([prompt]) for prompt in (_PROBE, "")]
    embeddings = [encoder.get_input_embeddings().weight for encoder in encoders]
    tensors = {f"{name} {i}": t for i, part in enumerate(made) for name, t in part.items()}
    return _hash_of({}, tensors | {f"embeddings {i}": t for i, t in enumerate(embeddings)})


def _hash_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


class LatentCache:
    """Mean and standard deviation of the latents of picture variants, on the CPU.

    Args:
        plan: how pictures were made into pixels.
        fingerprint: of the encoder, see :func:`vae_fingerprint`.
        folder: of a :class:`TensorStore`.
    """

    def __init__(self, plan: CropPlan, fingerprint: str, folder: str | Path | None = None) -> None:
        self.plan = plan
        self.fingerprint = fingerprint
        self.store = TensorStore(folder)

    def key(self, content_key: str, variant: Variant) -> str:
        """Hash all that the latents depend on."""
        parts = [
            content_key,
            [variant.left, variant.top, variant.height, variant.width, variant.flip],
            self.plan.interpolation,
            self.fingerprint,
            [DECODER_VERSION, _ENCODING_VERSION],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def get(self, content_key: str, variant: Variant) -> tuple[Tensor, Tensor]:
        """Return mean and std, each (channels, height, width), as the encoder made them.

        Raises:
            KeyError: they were never filled in.
            DataError: their file was removed or damaged since.
        """
        tensors = self.store[self.key(content_key, variant)]
        return tensors["mean"], tensors["std"]

    @torch.no_grad()
    def fill(
        self,
        wanted: Iterable[tuple[Example, Sequence[Variant]]],
        encode: ImageEncoder,
        batch_size: int = 4,
        progress: bool = True,
    ) -> int:
        """Encode what is missing; returns how many variants that were.

        A batch holds variants of one picture, so all have one shape, and it is always the same
        batch whatever else is missing: rounding depends on the batch, and a run whose filling was
        interrupted must train on the very latents of the run that was not.

        Several processes with one folder can share the work: each fills its part, and after a
        barrier all of it, which then only checks the files.

        Raises:
            DataError: latents are not finite, or the folder cannot be written.
        """
        done = 0
        wanted = list(wanted)
        bar = tqdm(wanted, desc="Encoding pictures", unit="", disable=None if progress else True)
        for example, variants in bar:
            image = None
            for start in range(0, len(variants), batch_size):
                chunk = variants[start : start + batch_size]
                keys = [self.key(example.content_key, variant) for variant in chunk]
                missing = [key not in self.store for key in keys]
                if not any(missing):
                    continue
                image = image or example.load()
                pixels = torch.stack([self.plan.pixel_values(image, v) for v in chunk])
                # contiguous, as encoders in channels-last layout give what cannot be written
                mean, std = (part.detach().cpu().contiguous() for part in encode(pixels))
                if not (mean.isfinite().all() and std.isfinite().all()):
                    problem = (
                        "the VAE made NaN or infinity. Give --mixed_precision no or bf16, or "
                        "another VAE with --pretrained_vae_model_name_or_path"
                    )
                    raise DataError(f"latents of {example.source}", [problem])
                for i, key in enumerate(keys):
                    if missing[i]:
                        self.store[key] = {"mean": mean[i].clone(), "std": std[i].clone()}
                        done += 1
        self.store.tell_damaged()
        return done


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
        """Hash all that the encoded prompt depends on."""
        parts = ["prompt", prompt, self.fingerprint]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @torch.no_grad()
    def fill(
        self,
        prompts: Iterable[str],
        encode: PromptEncoder,
        batch_size: int = 16,
        progress: bool = False,
    ) -> int:
        """Encode each prompt that is missing, once; returns how many those were.

        For a folder each is encoded by itself: rounding depends on the batch, and what a run finds
        there must not depend on which others lacked.

        Raises:
            DataError: the folder cannot be written.
        """
        missing = [
            prompt for prompt in dict.fromkeys(prompts) if self.key(prompt) not in self.store
        ]
        self.store.tell_damaged()
        size = batch_size if self.store.folder is None else 1
        starts = range(0, len(missing), size)
        for start in tqdm(starts, "Encoding prompts", unit="", disable=None if progress else True):
            batch = missing[start : start + size]
            encoded = {name: t.detach().cpu().contiguous() for name, t in encode(batch).items()}
            for i, prompt in enumerate(batch):
                self.store[self.key(prompt)] = {name: t[i].clone() for name, t in encoded.items()}
        return len(missing)

    def batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditioning of ``prompts``; the first axis is the prompt.

        Raises:
            KeyError: a prompt was never filled in.
            DataError: the file of one was removed or damaged since.
        """
        rows = [self._row(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, prompt: str) -> dict[str, Tensor]:
        try:
            return self.store[self.key(prompt)]
        except KeyError:
            raise KeyError(prompt) from None
