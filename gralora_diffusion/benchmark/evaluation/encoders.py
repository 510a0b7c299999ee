"""Image encoders that evaluate images, from the Hub or a folder, loaded through transformers.

``facebook/dino-vits16``, ``facebook/dinov2-base`` and ``openai/clip-vit-base-patch32`` are those
of the published numbers. Any model with a class token or projected embeddings can be used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.image_files import MAX_BYTES, ImageError, as_srgb, read_image
from gralora_diffusion.io.precision import exact_fp32
from gralora_diffusion.io.regular_files import read_regular

from .encoder_sources import WANTED, source_problem

logger = logging.getLogger(__name__)

#: An image, or its file.
ShownImage = str | Path | Image.Image

#: Preprocessing by DINO's authors (``eval_knn.py`` of facebookresearch/dino) and in published DINO
#: similarities (Custom Diffusion's ``customconcept101/evaluate.py``, DreamBench++): the shorter
#: edge is resized to 256 pixels, then the central 224 are cropped.
DINO_PREPROCESSING: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": Image.Resampling.BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
}


class Encoder:
    """An image encoder, with its text encoder if it has one.

    Args:
        model: with ``get_image_features`` (and ``get_text_features``), such as ``CLIPModel``, or
            with a first token that represents the image, such as ``ViTModel`` or ``Dinov2Model``.
        processor: turns images into pixel values.
        tokenizer: of the text encoder.
        preprocessing: arguments for the processor that override its settings.
        batch_size: images or texts per batch.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        tokenizer: Any = None,
        *,
        preprocessing: dict[str, Any] | None = None,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing or {}
        self.batch_size = batch_size
        self._kept: dict[str, Tensor] = {}

    @property
    def reads_text(self) -> bool:
        """Whether the encoder embeds texts in the same space."""
        return self.tokenizer is not None

    def to(self, device: torch.device | str) -> Encoder:
        """Move the model, for example off the device while others need it; return self."""
        self.model.to(device)
        return self

    def embed_images(self, images: Sequence[ShownImage], *, keep: bool = False) -> Tensor:
        """Return the embeddings of images, (images, width), fp32 on the CPU, not normalized.

        For CLIP, this is the projected embedding; for others, the class token of the last layer,
        after its norm.

        Args:
            keep: store the embeddings of files by their contents, for the real images that every
                method is compared with.

        Raises:
            DataError: a file cannot be read as an image; the message begins with its name.
            ValueError: there are no images.
        """
        keys = [_content_key(p) if keep and not isinstance(p, Image.Image) else "" for p in images]
        rows = {n: self._kept[key] for n, key in enumerate(keys) if key in self._kept}
        missing = [n for n in range(len(images)) if n not in rows]
        for batch in _batches(missing, self.batch_size):
            read = [read_image_file(images[n]) for n in batch]
            embeddings = self._embed_images(read)
            rows.update(zip(batch, embeddings, strict=True))
        self._kept |= {key: rows[n] for n, key in enumerate(keys) if key}
        return _stacked(rows[n] for n in range(len(images)))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, (texts, width), fp32 on the CPU, not normalized.

        A text that is longer than the encoder reads is cut off with a warning.

        Raises:
            ValueError: there are no texts, or no text encoder.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.model.name_or_path} has no text encoder, which CLIP-T needs")
        rows = (self._embed_texts(batch) for batch in _batches(texts, self.batch_size))
        return _stacked(row for batch in rows for row in batch)

    @contextmanager
    def _full_precision(self) -> Iterator[None]:
        """Turn off autocast and TF32 inside."""
        with exact_fp32(), torch.autocast(self.model.device.type, enabled=False):
            yield

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        inputs = self.processor(images=images, return_tensors="pt", **self.preprocessing)
        pixels = inputs["pixel_values"].to(self.model.device)
        with torch.inference_mode(), self._full_precision():
            if hasattr(self.model, "get_image_features"):
                embeddings = _pooled(self.model.get_image_features(pixel_values=pixels))
            else:
                embeddings = self.model(pixel_values=pixels).last_hidden_state[:, 0]
        return embeddings.float().cpu()

    def _embed_texts(self, texts: Sequence[str]) -> Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        limit = min(limit, self.tokenizer.model_max_length)
        for text, tokens in zip(texts, self.tokenizer(list(texts))["input_ids"], strict=True):
            if len(tokens) > limit:
                logger.warning(
                    "a text of %d tokens is cut off after %d: %s", len(tokens), limit, text
                )
        inputs = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        ).to(self.model.device)
        with torch.inference_mode(), self._full_precision():
            return _pooled(self.model.get_text_features(**inputs)).float().cpu()


def load_encoder(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    preprocessing: Literal["published", "shipped"] = "published",
    cache_dir: str | Path | None = None,
) -> Encoder:
    """Load an encoder in fp32.

    Args:
        source: Hub id or folder with a model, ``preprocessor_config.json``, and the tokenizer of a
            model that reads text.
        preprocessing: "published" for that of its authors, which is that of the image processor
            beside it, except for DINO at 224 pixels: its processor on the Hub squeezes the whole
            image into a square, so ``DINO_PREPROCESSING`` is used. "shipped" for that of the
            processor beside it in all cases.

    Images are resized by Pillow, as in the published evaluations, even if torchvision is installed,
    with which transformers' pixels would differ in rounding. An odd remainder is cropped with the
    smaller half first; torchvision's CenterCrop in the published scripts rounds half a pixel to the
    even one, so its crop may begin a pixel later.

    Raises:
        ValueError: it cannot be loaded, or weights are missing.
    """
    if preprocessing not in ("published", "shipped"):
        raise ValueError(f"preprocessing is {preprocessing!r}; it must be 'published' or 'shipped'")
    if problem := source_problem(source):
        raise ValueError(f"encoder {str(source)!r} cannot be loaded: {problem}")
    place: dict[str, Any] = {"cache_dir": cache_dir}
    try:
        config = AutoConfig.from_pretrained(source, **place)
        # DINO's files have no pooler, and transformers would initialize one at random
        without = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        model, found = AutoModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **without, **place
        )
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", **place)
        reads_text = hasattr(model, "get_text_features")
        tokenizer = AutoTokenizer.from_pretrained(source, **place) if reads_text else None
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ValueError(f"encoder {str(source)!r} cannot be loaded: {error}. {WANTED}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"encoder {str(source)!r} is incomplete: it has no weights for "
            f"{', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}"
            f". {WANTED}"
        )
    squeezed = config.model_type == "vit" and _squeezes_to_224(processor)
    return Encoder(
        model.to(device),
        processor,
        tokenizer,
        preprocessing=DINO_PREPROCESSING if squeezed and preprocessing == "published" else None,
        batch_size=batch_size,
    )


def read_image_file(image: ShownImage) -> Image.Image:
    """Return an image as the trainer reads it, see :func:`.image_files.read_image`.

    Raises:
        DataError: it cannot be read. For a file, the message begins with its name.
    """
    try:
        if isinstance(image, Image.Image):
            return as_srgb(image)
        return read_image(_read_bytes(image))
    except ImageError as error:
        raise DataError(str(image), [f"cannot be decoded: {error}"]) from error


def _read_bytes(path: str | Path) -> bytes:
    try:
        return read_regular(Path(path), MAX_BYTES)
    except OSError as error:
        raise DataError(str(path), [f"cannot be read: {error.strerror or error}"]) from error


def _content_key(path: str | Path) -> str:
    return hashlib.sha256(_read_bytes(path)).hexdigest()


def _squeezes_to_224(processor: Any) -> bool:
    side = {"height": 224, "width": 224}
    return dict(processor.size) == side and not getattr(processor, "do_center_crop", False)


def _pooled(output: Any) -> Tensor:
    """Return the projected embeddings, which transformers before version 5 returned directly."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _stacked(rows: Iterator[Tensor]) -> Tensor:
    collected = list(rows)
    if not collected:
        raise ValueError("there is nothing to embed")
    return torch.stack(collected)
