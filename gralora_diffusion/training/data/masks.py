"""Masks of images: white where the loss counts the image, black where it does not.

The mask of an image is the first of these: what a metadata file or a column says, the file of its
name in the folder of masks, a file beside it, its own opacity. It has the size of its image, goes
through the same crop and flip, and is reduced to the latents by area: a latent counts as much as
the part of its pixels that is white.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gralora_diffusion.io.file_names import real_path
from gralora_diffusion.io.image_files import is_image, read_mask, read_opacity
from gralora_diffusion.io.regular_files import is_regular

from .captions import ListedImage, place_problem
from .checked_files import CheckedFiles
from .sources import Source, shared_files, unchanged_bytes

#: The brightest value of a mask is at least this; those of maps of classes are not.
_FAINTEST = 16


class MaskError(ValueError):
    """A mask cannot be used with its image."""


@dataclass(frozen=True)
class MaskPlaces:
    """Where the masks of images are, besides the files beside them.

    Attributes:
        folder: of masks, with the names of their images.
        column: of a metadata file or dataset; None for the first of ``MASK_COLUMNS``.
        from_alpha: images without another mask are masked by their own opacity.
    """

    folder: Path | None = None
    column: str | None = None
    from_alpha: bool = False


class FoundMask(NamedTuple):
    """A mask that has not been opened yet; ``name`` is for messages.

    Attributes:
        of_alpha: the source is the image itself, whose opacity is the mask.
    """

    name: str
    source: Source
    of_alpha: bool = False

    def __str__(self) -> str:
        return "the mask of its opacity" if self.of_alpha else f"its mask {self.name}"


@dataclass(frozen=True)
class Mask:
    """A mask that fits its image. It stays where it is until it is loaded.

    Attributes:
        content_key: SHA-256 of the bytes of its file.
        box: left, top, right and bottom of the part outside of which all pixels are black.
        of_alpha: the source is the image itself, whose opacity is the mask.
    """

    source: Source
    content_key: str
    box: tuple[int, int, int, int]
    of_alpha: bool = False

    @property
    def cache_key(self) -> str:
        """What identifies its pixels."""
        return f"{self.content_key} {'opacity' if self.of_alpha else 'mask'}"

    def load(self) -> Image.Image:
        """Return the mask, upright and of mode L.

        Raises:
            DataError: it no longer exists, or has changed since it was found.
        """
        data = unchanged_bytes(self.source, self.content_key)
        mask = read_opacity(data) if self.of_alpha else read_mask(data)
        assert mask is not None  # it was not opaque when it was found
        return mask


def check_mask(found: FoundMask, size: tuple[int, int], checked: CheckedFiles) -> Mask | None:
    """Decode the mask of an image of ``size`` (width, height); None if the image is opaque.

    Raises:
        MaskError: it does not fit the image, or masks everything.
        OSError, ValueError: it cannot be decoded.
    """
    seen = checked.decode("opacity" if found.of_alpha else "mask", found.source)
    if seen.opaque:
        return None
    if seen.size != size:
        raise MaskError(
            f"has {seen.size[0]} x {seen.size[1]} pixels, but the image has {size[0]} x {size[1]}. "
            "Give a mask of the image's size"
        )
    box, highest = seen.box, seen.highest
    if box is None:
        raise MaskError(
            "is all black, so nothing of the image would be trained. Paint the part to train "
            "white, or remove the mask to train on the whole image"
        )
    if highest == 1:
        raise MaskError("has only the values 0 and 1 on a scale of 255. Multiply its values by 255")
    if highest < _FAINTEST:
        raise MaskError(
            f"has no value above {highest} on a scale of 255, so nearly nothing of the image would "
            "be trained. Paint the part to train white, also if the values number classes"
        )
    return Mask(found.source, seen.content_key, box, found.of_alpha)


def find_masks(
    part: Path,
    listed: Mapping[str, ListedImage],
    beside: Mapping[str, Sequence[str]],
    places: MaskPlaces,
    folder: Path | None,
    problems: list[str],
) -> tuple[dict[str, FoundMask], list[str]]:
    """Return image -> its mask, for the images of a folder that have one; and unused masks.

    Args:
        part: the folder of the images.
        listed: image -> its entry in the folder's metadata file.
        beside: image -> paths of masks beside it, relative to ``part``; one entry for each image.
        folder: the one of ``places``, or its sub-folder for this part; its unused files are named.
        problems: problems are appended to it.
    """
    masks: dict[str, FoundMask] = {}
    images_of: dict[str, list[str]] = defaultdict(list)  # by their names
    used: set[Path] = set()
    in_folder = _files_by_stem(folder, {Path(name).parent for name in beside})
    for image, names in beside.items():
        given: dict[str, Path] = {}
        if (entry := listed.get(image)) and entry.mask:
            if problem := place_problem(part, entry.mask):
                problems.append(
                    f"{image}: its mask in the metadata file is {entry.mask}, {problem}"
                )
                continue
            given[entry.mask] = part / entry.mask
        of_name = _named_like(image, in_folder)
        used |= {*of_name.values()}
        given |= of_name
        given |= {name: part / name for name in names}
        different = {real_path(path): name for name, path in reversed(given.items())}
        if len(different) > 1:
            problems.append(f"{image} has several masks: {', '.join(given)}. Keep one of them")
        elif given:
            name, path = next(iter(given.items()))
            masks[image] = FoundMask(name, path)
            if not (entry and entry.mask):
                images_of[name].append(image)
        elif places.from_alpha:
            masks[image] = FoundMask(image, part / image, of_alpha=True)
    if shared := shared_files(images_of):
        problems.append(
            f"masks belong to several images by their names: {shared}. Rename the images, or name "
            "the mask of each in the metadata file"
        )
    return masks, sorted(str(path) for paths in in_folder.values() for path in {*paths} - used)


def _files_by_stem(
    folder: Path | None, parents: Iterable[Path]
) -> dict[tuple[Path, str], list[Path]]:
    """Return (sub-folder, name without extension in lower case) -> images of that name."""
    found: dict[tuple[Path, str], list[Path]] = {}
    for parent in parents:
        place = folder / parent if folder else None
        for path in sorted(place.iterdir()) if place and place.is_dir() else ():
            if is_image(path) and is_regular(path):
                found.setdefault((parent, path.stem.lower()), []).append(path)
    return found


def _named_like(image: str, files: Mapping[tuple[Path, str], Sequence[Path]]) -> dict[str, Path]:
    """Return the files in a folder of masks that belong to an image: that of its name, or all of
    its stem."""
    path = Path(image)
    there = files.get((path.parent, path.stem.lower()), ())
    exact = [file for file in there if file.name == path.name]
    return {str(file): file for file in exact or there}


def latent_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Reduce masks (..., height, width) to latents of ``size`` (height, width) by area."""
    height, width = size
    return adaptive_avg_pool2d(mask, (height, width))
