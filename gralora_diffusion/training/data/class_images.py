"""Prior preservation: keep what the base knows about the subject's class.

The prior has two sources. One is images of the class that the base generates before it is adapted
(DreamBooth, arXiv 2208.12242). The other is the frozen base as a teacher: its prediction for the
class prompt on the same noisy latents is the target, which needs no class images or extra encoding.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory
from torch import nn
from tqdm.auto import tqdm

from gralora_diffusion.base_models.loading import existing_models, load_base
from gralora_diffusion.base_models.streaming import computing_on
from gralora_diffusion.base_models.unread_weights import UnreadModels, unread_models
from gralora_diffusion.families import ModelFamily, mend_clip_skip
from gralora_diffusion.io.dtypes import torch_dtype
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.tensor_files import replacing
from gralora_diffusion.pipelines.editing import editing_pipeline, noise_alone, whole_fill
from gralora_diffusion.pipelines.placement import place
from gralora_diffusion.training.config.data_options import PriorOptions
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.runtime.agreement import from_first, together
from gralora_diffusion.training.runtime.folder_lock import OWNER_NAME, owned_by_run
from gralora_diffusion.training.runtime.sharding import Sharding

from .captions import count_images
from .seeds import generator

#: Seconds within which all processes see a file that one wrote to a shared folder.
_SEEN_WITHIN = 20.0


def _drawn_prior(options: PriorOptions) -> bool:
    return options.with_prior_preservation and options.prior_source == "images"


def existing_class_images(options: PriorOptions) -> int:
    """Return the number of images in ``class_data_dir``, from any source; 0 if none are needed."""
    folder = Path(options.class_data_dir or "")
    return count_images(folder) if _drawn_prior(options) and folder.is_dir() else 0


def missing_class_images(options: PriorOptions) -> int:
    """Return how many are still to be generated; 0 if none are needed."""
    there = existing_class_images(options)
    return max(0, options.num_class_images - there) if _drawn_prior(options) else 0


def generate_class_images(
    config: TrainingConfig,
    family: ModelFamily,
    accelerator: Accelerator,
    *,
    streamed: bool = False,
    sharding: Sharding | None = None,
) -> bool:
    """Generate the missing class images into ``class_data_dir``, divided among the processes.

    Each image has its own seed and a name with its number, and appears under that name only when it
    is complete. Rounding depends on the batch, so images are generated in the same batches
    whichever of them are missing. After an interruption, generation continues where it stopped and
    makes the same images.

    A separate base is loaded for it, since the base that is trained must not pass through the lower
    precision that is good enough here.

    Meanwhile this run owns the folder, which must be the same one for all of its processes.

    Args:
        streamed: have only the blocks that compute on the device.
        sharding: how the base is shared out over the processes, if it is.

    Returns:
        Whether any were missing.

    Raises:
        ConfigError: another run uses the folder, or the processes do not share it.
    """
    if not from_first(accelerator, lambda: missing_class_images(config)):
        return False
    with owned_by_run(accelerator, Path(config.class_data_dir or ""), _label(config)):
        # only now, since another run may just have generated them
        numbers, owner = from_first(accelerator, lambda: _missing_numbers(config))
        if numbers:
            together(accelerator, lambda: _check_shared(config, owner))
            together(
                accelerator,
                lambda: _draw(config, family, accelerator, numbers, streamed, sharding),
            )
    return bool(numbers)


def _missing_numbers(options: PriorOptions) -> tuple[set[int], str]:
    """Return which images are missing, and the content of the file of the folder's owner."""
    folder = Path(options.class_data_dir or "")
    missing = (n for n in itertools.count() if not (folder / _class_image_name(n)).exists())
    owner = folder / OWNER_NAME
    numbers = set(itertools.islice(missing, missing_class_images(options)))
    return numbers, owner.read_text() if owner.exists() else ""


def _label(options: PriorOptions) -> str:
    return f"--class_data_dir {options.class_data_dir!r}"


def _check_shared(options: PriorOptions, owner: str) -> None:
    """Check that this process sees the first one's file; some networks take a while."""
    path = Path(options.class_data_dir or "") / OWNER_NAME
    end = time.monotonic() + _SEEN_WITHIN
    while owner and not (path.exists() and path.read_text() == owner):
        if time.monotonic() > end:
            raise ConfigError(
                [
                    f"{_label(options)} is not the same folder for all processes, so each would "
                    "train on its own share of the class images. Give a folder that all machines "
                    "share, or generate them on one machine and copy the folder to the others"
                ]
            )
        time.sleep(0.2)


def _draw(
    config: TrainingConfig,
    family: ModelFamily,
    accelerator: Accelerator,
    numbers: set[int],
    streamed: bool,
    sharding: Sharding | None,
) -> None:
    """Generate this process's share of the images with these numbers."""
    folder, size = Path(config.class_data_dir or ""), config.sample_batch_size
    batches = sorted({number // size for number in numbers})
    own = batches[accelerator.process_index :: accelerator.num_processes]
    dtype = _generation_dtype(config, family, accelerator.device)
    unread, idle = UnreadModels(), 0
    if sharding is not None:
        names = (family.denoiser, *family.all_text_encoders)
        unread = unread_models(config, family, names, dtype)
        # all processes compute together, so one that is done generates images for nothing
        idle = -(-len(batches) // accelerator.num_processes) - len(own)
    pipe = load_base(config, family, dtype, vae_dtype=dtype, models=unread.models)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = (
        {} if family.skipped_layers is None else {"clip_skip": config.clip_skip}
    )
    mend_clip_skip(pipe)
    if family.fills(pipe):
        pipe = editing_pipeline(pipe, family)
        pipe.set_progress_bar_config(disable=True)
        side = family.native_resolution(pipe)
        image, mask = whole_fill(side, side)
        options |= {"image": [image] * size, "mask_image": [mask] * size}
        options |= noise_alone(pipe, mask)
    with _placed(pipe, family, accelerator.device, streamed, sharding, unread):
        for batch in tqdm(
            [*own, *batches[:1] * idle],
            desc=f"Generating {len(numbers)} class images",
            disable=not accelerator.is_local_main_process,
        ):
            drawn = range(batch * size, (batch + 1) * size)
            rngs = [generator(config.seed, "class image", number) for number in drawn]
            prompts = [config.class_prompt] * size
            images = pipe(prompt=prompts, generator=rngs, **options).images
            for number, image in zip(drawn, images, strict=True):
                if number in numbers and batch in own:
                    with replacing(folder / _class_image_name(number)) as temporary:
                        image.save(temporary, format="PNG")
    del pipe
    free_memory()


@contextmanager
def _placed(
    pipe: Any,
    family: ModelFamily,
    device: torch.device,
    streamed: bool,
    sharding: Sharding | None,
    unread: UnreadModels,
) -> Iterator[None]:
    if sharding is not None:
        _share_out(pipe, family, device, sharding, unread)
        yield
        return
    if not streamed:
        place(pipe, device)
        yield
        return
    names = {family.denoiser, *family.all_text_encoders}
    # a pipeline may convert its VAE to another dtype, so that one is whole
    others = [m for n, m in pipe.components.items() if isinstance(m, nn.Module) and n not in names]
    with (
        computing_on(device, existing_models(pipe, names), streamed=True),
        computing_on(device, others),
    ):
        yield


def _share_out(
    pipe: Any, family: ModelFamily, device: torch.device, sharding: Sharding, unread: UnreadModels
) -> None:
    """Have a part of the denoiser and of each text encoder on the device, and the VAE."""
    sharding.shard_encoders(pipe, family, device, unread)
    denoiser = getattr(pipe, family.denoiser)
    sharding.shard(denoiser, device, unread.weights.get(family.denoiser))
    for model in pipe.components.values():
        if isinstance(model, nn.Module) and model is not denoiser:
            model.to(device)


def _class_image_name(number: int) -> str:
    return f"class-{number:05d}.png"


def _generation_dtype(
    options: PriorOptions, family: ModelFamily, device: torch.device
) -> torch.dtype:
    usual = family.generation_precision if device.type == "cuda" else "fp32"
    return torch_dtype(options.prior_generation_precision or usual)
