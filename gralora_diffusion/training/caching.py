"""Latents and encoded prompts, computed once, looked up by what they were computed from.

Latents are found by the hash of the picture's bytes and everything else they depend on, never by a
place in some order: a caption cannot meet another picture's latents.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor
from tqdm.auto import tqdm

from ..tensor_files import write_safetensors
from .data import DataError, Example
from .pictures import CropPlan, Variant

logger = logging.getLogger(__name__)

#: (batch, 3, height, width) in [-1, 1], fp32, CPU -> mean and std of the scaled latents
ImageEncoder = Callable[[Tensor], tuple[Tensor, Tensor]]
#: prompts -> tensors whose first axis is the prompt
PromptEncoder = Callable[[list[str]], dict[str, Tensor]]


def vae_fingerprint(vae: Any) -> str:
    """Hash what a VAE's latents depend on: its config, parameters and buffers, with their dtype."""
    # what begins with _ tells where the VAE came from and which diffusers wrote it
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class LatentCache:
    """Mean and standard deviation of the latents of picture variants, on the CPU.

    Without a folder everything is kept in memory, in each process for itself. With one, it is kept
    in a file per variant and read when asked for; several processes may fill and read one folder,
    as a file appears under its name only when it is whole.

    Args:
        plan: how pictures were made into pixels.
        fingerprint: of the encoder, see :func:`vae_fingerprint`.
        folder: made if it is not there.
    """

    def __init__(self, plan: CropPlan, fingerprint: str, folder: str | Path | None = None) -> None:
        self.plan = plan
        self.fingerprint = fingerprint
        self.folder = Path(folder) if folder else None
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}

    def key(self, content_key: str, variant: Variant) -> str:
        """Hash all that the latents depend on."""
        parts = [
            content_key,
            [variant.left, variant.top, variant.height, variant.width, variant.flip],
            self.plan.interpolation,
            self.fingerprint,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def get(self, content_key: str, variant: Variant) -> tuple[Tensor, Tensor]:
        """Return mean and std, each (channels, height, width), as the encoder made them.

        Raises:
            KeyError: they were never filled in.
            DataError: their file was removed or damaged since.
        """
        key = self.key(content_key, variant)
        if self.folder is None:
            return self._memory[key]
        try:
            tensors = load(self._path(key).read_bytes())
        except (OSError, SafetensorError) as error:
            advice = "Start again: what is missing will be encoded again"
            raise DataError(f"latent cache {self._path(key)}", [f"{error}. {advice}"]) from error
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
        damaged: list[Path] = []
        bar = tqdm(wanted, desc="Encoding pictures", unit="", disable=None if progress else True)
        for example, variants in bar:
            image = None
            for start in range(0, len(variants), batch_size):
                chunk = variants[start : start + batch_size]
                keys = [self.key(example.content_key, variant) for variant in chunk]
                missing = [not self._has(key, damaged) for key in keys]
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
                        self._put(key, mean[i].clone(), std[i].clone())
                        done += 1
        if damaged:
            logger.warning(
                "latent cache %s: %d damaged files, encoded again: %s%s",
                self.folder,
                len(damaged),
                ", ".join(path.name for path in damaged[:3]),
                ", ..." if len(damaged) > 3 else "",
            )
        return done

    def _has(self, key: str, damaged: list[Path]) -> bool:
        if self.folder is None:
            return key in self._memory
        path = self._path(key)
        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:  # compares the header with the file's length
                whole = set(file.keys()) == {"mean", "std"}
        except (OSError, SafetensorError):
            whole = False
        if not whole:
            damaged.append(path)
        return whole

    def _put(self, key: str, mean: Tensor, std: Tensor) -> None:
        if self.folder is None:
            self._memory[key] = (mean, std)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_safetensors({"mean": mean, "std": std}, self._path(key), {"format": "pt"})
        except (OSError, SafetensorError) as error:
            problem = (
                f"cannot be written: {error}. Free some space, give another folder, or leave it "
                "out to keep the latents in memory"
            )
            raise DataError(f"--latent_cache_dir {str(self.folder)!r}", [problem]) from error

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


class PromptCache:
    """Encoded prompts, on the CPU and in the encoder's dtype. Each process fills its own."""

    def __init__(self) -> None:
        self._encoded: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def fill(self, prompts: Iterable[str], encode: PromptEncoder, batch_size: int = 16) -> int:
        """Encode each prompt that is missing, once; returns how many those were."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            encoded = {name: t.detach().cpu() for name, t in encode(batch).items()}
            for i, prompt in enumerate(batch):
                self._encoded[prompt] = {name: t[i].clone() for name, t in encoded.items()}
        return len(missing)

    def batch(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditioning of ``prompts``; the first axis is the prompt.

        Raises:
            KeyError: a prompt was never filled in.
        """
        rows = [self._encoded[prompt] for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
