"""Image files: recognize them, and read them as upright RGB pixels in sRGB; masks as gray.

All of the user's images are read here: by training, ``gralora sample``, the benchmark and its
report.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops, UnidentifiedImageError

from .colour_profiles import UnknownColours, find_profile, to_srgb
from .regular_files import read_regular
from .safe_text import error_line

#: Increased when the same file gives other pixels than before, because caches depend on them.
DECODER_VERSION = 2
#: Pillow's formats that are read, if this Pillow supports them; HEIF needs ``pillow-heif``. Left
#: out are formats that are not images (HDF5, GRIB, BUFR, MPEG, PDF), that would run programs (EPS,
#: WMF), that contain files of any format (IPTC), or whose numbers have no range (FITS, SPIDER).
#: Formats with a strong signature come first.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "GIF", "BMP", "JPEG2000", "PPM", "QOI", "PSD"),
    *("ICNS", "DDS", "BLP", "FTEX", "SGI", "PCX", "DCX", "SUN", "MSP", "GBR", "PIXAR", "XPM"),
    *("XBM", "IM", "PCD", "DIB", "ICO", "CUR", "FLI", "TGA"),
)
#: Formats with their own extensions that another format's reader opens.
_READ_WITH = {"MPO": "JPEG"}
#: Maximum number of pixels. Cameras and phones have up to 108 million; each takes 8 bytes.
MAX_PIXELS = 110_000_000
#: Maximum size of an image file: that many pixels of six bytes, and more.
MAX_BYTES = 1 << 30
#: Images with more pixels are decoded one at a time, whatever the number of threads.
_LARGE_PIXELS = 1 << 24
_large = threading.Lock()
#: Number of pixels that are converted at once.
_STRIP_PIXELS = 1 << 22
#: Endings of the names of masks beside an image: OneTrainer's, and the usual ones elsewhere.
_MASK_ENDINGS = ("-masklabel", "_masklabel", "_mask", "-mask", ".mask")
#: The ending of OneTrainer's conditioning images, which are neither masks nor images to learn.
_CONDITION_ENDING = "-condlabel"
#: The endings that no image to learn has, whether or not an image of that name is beside it.
_NEVER_IMAGES = ("-masklabel", "_masklabel", _CONDITION_ENDING)
#: Largest difference between red, green and blue of a gray pixel, in levels; JPEG rounds.
_GRAY = 8
_WHITE = (255, 255, 255, 255)
#: EXIF's orientation -> the operation that makes the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262
#: Pillow's raw mode of a gray PNG with fewer than 8 bits -> largest value, and 8-bit level of 1.
_GREY_STEPS = {"1": (1, 255), "L;2": (3, 85), "L;4": (15, 17)}


class ImageError(ValueError):
    """A file is not an image, is damaged, or cannot be shown in sRGB."""


class FolderImages(NamedTuple):
    """Sorted names of files in a folder: images, and masks of these images."""

    images: list[str]
    masks: list[str]


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here."""
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener(thumbnails=False)
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def image_extensions() -> frozenset[str]:
    """Extensions of image files, in lower case and with the dot."""
    known = formats()
    return frozenset(
        ending
        for ending, name in Image.registered_extensions().items()
        if _READ_WITH.get(name, name) in known
    )


def is_image(path: str | Path) -> bool:
    """Whether a file is an image according to its name; hidden files are not."""
    name = os.path.basename(path)  # without pathlib, which takes long for 100,000 files
    return os.path.splitext(name)[1].lower() in image_extensions() and not name.startswith(".")


def _stem(name: str) -> str:
    return os.path.splitext(name)[0].lower()


def folder_images(names: Iterable[str]) -> FolderImages:
    """Separate the images of a folder from their masks, by the names of its files.

    A mask has the name of an image of the folder, with an ending such as ``-masklabel`` or
    ``_mask`` before the extension. OneTrainer's conditioning images (``-condlabel``) are among the
    masks, although :func:`masks_beside` gives them to no image.
    """
    found = sorted(filter(is_image, names))
    stems = set(map(_stem, found))
    masks = {name for name in found if _is_mask(_stem(name), stems)}
    return FolderImages([name for name in found if name not in masks], sorted(masks))


def _is_mask(stem: str, stems: set[str]) -> bool:
    if stem.endswith(_NEVER_IMAGES):
        return True
    return any(
        stem.endswith(end) and stem.removesuffix(end) in stems
        for end in (*_MASK_ENDINGS, _CONDITION_ENDING)
    )


def masks_beside(images: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Return image -> sorted names of the masks beside it, for images that have any.

    Args:
        images: names of images in one folder.
        names: of all files there.
    """
    by_stem: dict[str, list[str]] = {}
    for name in sorted(name for name in names if is_image(name)):
        stem = Path(name).stem.lower()
        for end in _MASK_ENDINGS:
            if stem.endswith(end):
                by_stem.setdefault(stem.removesuffix(end), []).append(name)
    masks = {image: by_stem.get(Path(image).stem.lower(), []) for image in images}
    return {image: found for image, found in masks.items() if found}


def image_suffix(data: bytes) -> str:
    """Return the extension, with the dot, that fits the content of an image file.

    Raises:
        ImageError: it is not an image of a supported format.
    """
    image = _open(data)
    endings = Image.registered_extensions().items()
    return min((e for e, name in endings if name == image.format), key=len, default=".image")


def read_image(
    source: Path | bytes | BinaryIO,
    warnings: list[str] | None = None,
    *,
    at_least: int | None = None,
) -> Image.Image:
    """Return an image file as an upright image of mode RGB, in sRGB.

    - Colors of an ICC profile, of CICP, or of PNG's ``gAMA`` and ``cHRM`` are converted, see
      :func:`.colour_profiles.to_srgb`. CMYK without a profile is converted by Pillow's formula.
    - Transparent pixels are placed on white after that conversion.
    - 16 bits per channel become 8: gray by rounding, RGB by its upper 8 bits.
    - The camera's orientation (EXIF) is applied.
    - Only the first frame of an animation, or the first of several pages, is read.

    Args:
        source: a path, the bytes of a file, or a file opened for reading bytes.
        warnings: problems that do not prevent reading, such as a damaged profile, are appended.
        at_least: a JPEG may be decoded smaller, but not below this number of pixels per side.

    Raises:
        ImageError: it is not an image of a supported format, is damaged, has more than
            ``MAX_PIXELS``, or its pixels have no fixed range.
    """
    warnings = [] if warnings is None else warnings
    with _opened(source) as (image, data):
        if at_least and image.format in ("JPEG", "MPO"):
            image.draft(None, (at_least, at_least))
        return _converted(image, data, warnings)


def read_mask(source: Path | bytes) -> Image.Image:
    """Return an image file as a mask: upright, of mode L, 255 where it is white.

    The levels are those in the file, whatever its profile says about color. Transparent pixels
    count as black.

    Raises:
        ImageError: as in :func:`read_image`, or it has colors.
    """
    with _opened(source) as (image, data):
        parts = _parts(image, data)
        result = Image.new("L", image.size, 0)
        for strip, colour, alpha in parts:
            result.paste(_gray(colour, alpha), strip[:2])
        return _turned(result, _turn(image, []))


def read_opacity(source: Path | bytes) -> Image.Image | None:
    """Return the opacity of an image file, upright and of mode L; None if it is opaque everywhere.

    Raises:
        ImageError: as in :func:`read_image`.
    """
    with _opened(source) as (image, data):
        parts = _parts(image, data)
        result = Image.new("L", image.size, 0)
        for strip, _, alpha in parts:
            result.paste(255 if alpha is None else alpha, strip)
        opaque = result.getextrema() == (255, 255)
        return None if opaque else _turned(result, _turn(image, []))


def _gray(colour: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """Return colors as gray of mode L, on black.

    Raises:
        ImageError: a pixel that can be seen is not gray.
    """
    bands = [colour] if colour.mode == "L" else colour.convert("RGB").split()
    if alpha is not None:
        bands = [ImageChops.multiply(band, alpha) for band in bands]
    levels = np.stack([np.asarray(band, dtype=np.int16) for band in bands])
    if np.ptp(levels, axis=0).max(initial=0) > _GRAY:
        raise ImageError("it has colors, but a mask is white, gray and black")
    return bands[0] if len(bands) == 1 else bands[1]


def as_srgb(image: Image.Image) -> Image.Image:
    """Return an image in memory as :func:`read_image` returns its file.

    Raises:
        ImageError: as in :func:`read_image`.
    """
    with _as_image_errors():
        return _converted(image, b"", [])


@contextmanager
def _opened(source: Path | bytes | BinaryIO) -> Iterator[tuple[Image.Image, bytes]]:
    """Open an image file without decoding it; return it with its bytes. Of large ones, one at once.

    Raises:
        ImageError: it is not an image, or an error was raised inside.
    """
    with _as_image_errors():
        if isinstance(source, Path):
            source = read_regular(source, MAX_BYTES)
        data = source if isinstance(source, bytes) else source.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ImageError(f"it has more than {MAX_BYTES:,} bytes")
        with _open(data) as image:
            size = image.size
            with _large if size[0] * size[1] > _LARGE_PIXELS else nullcontext():
                yield image, data


@contextmanager
def _as_image_errors() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # Pillow raises almost any kind of error on a damaged file
        raise ImageError(error_line(error)) from error


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=formats())
    except UnidentifiedImageError:
        kinds = ", ".join(formats()[:7])
        raise ImageError(
            f"it is not an image in a format that is supported ({kinds} and others)"
            if data
            else "the file is empty"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{error}. Make it smaller") from error
    except Exception as error:
        raise ImageError(error_line(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"it has {width} x {height} pixels; at most {MAX_PIXELS:,} are allowed. Make it smaller"
        )
    return image


def _converted(image: Image.Image, data: bytes, warnings: list[str]) -> Image.Image:
    parts = _parts(image, data)
    try:
        profile = find_profile(image.format, image.info, data, warnings)
    except UnknownColours as error:
        raise ImageError(str(error)) from error
    turn = _turn(image, warnings)
    result = Image.new("RGB", image.size, _WHITE[:3])
    for strip, colour, alpha in parts:
        part = to_srgb(colour, profile, warnings)
        warnings = []  # the same for every strip
        if alpha is not None:
            part.putalpha(alpha)
            part = Image.alpha_composite(Image.new("RGBA", part.size, _WHITE), part)
        result.paste(part.convert("RGB"), strip[:2])
    return _turned(result, turn)


def _parts(
    image: Image.Image, data: bytes
) -> Iterator[tuple[tuple[int, int, int, int], Image.Image, Image.Image | None]]:
    """Decode an image; return the places of its strips with their colors and opacity.

    Pixels outside of the strips are transparent. See :func:`_separated` for the modes.
    """
    raw, box = _png_raw_mode(image), _gif_box(image)
    image.load()
    levels = _levels(image) if image.mode.startswith("I") else None
    lower = _lower_bytes(data) if raw == "RGB;16B" and "transparency" in image.info else None
    return (
        (strip, *_separated(image.crop(strip), raw, levels, lower.crop(strip) if lower else None))
        for strip in _strips(box or (0, 0, *image.size))
    )


def _strips(box: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Cut a part of an image into strips, because copies of a large image would fill the memory."""
    left, top, right, bottom = box
    rows = max(1, _STRIP_PIXELS // max(1, right - left))
    for start in range(top, bottom, rows):
        yield left, start, right, min(start + rows, bottom)


def _png_raw_mode(image: Image.Image) -> str:
    """Return Pillow's raw mode of a PNG that is not loaded yet."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if image.format == "PNG" and tiles else ""


def _gif_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Return the part that the first frame of an unloaded GIF covers, unless it covers all of it.

    The rest is transparent, but Pillow fills it with a color of the palette.
    """
    tiles = getattr(image, "tile", None)
    box = tuple(tiles[0][1]) if image.format == "GIF" and tiles else None
    return None if box == (0, 0, *image.size) else box


def _turn(image: Image.Image, warnings: list[str]) -> Image.Transpose | None:
    """Return the operation that makes a decoded image upright, or None."""
    return _UPRIGHT.get(_orientation(image, warnings))


def _turned(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image, warnings: list[str]) -> int:
    """Return EXIF's orientation. ``ImageOps.exif_transpose`` also rewrites EXIF, which may fail."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # damaged EXIF data may raise anything
        warnings.append(f"its EXIF data are damaged ({error}); it may not be upright")
        return 1
    return found if isinstance(found, int) else 1


def _separated(
    image: Image.Image,
    raw: str,
    levels: np.ndarray[Any, Any] | None,
    lower: Image.Image | None,
) -> tuple[Image.Image, Image.Image | None]:
    """Return the colors in mode L, RGB, CMYK, YCbCr, HSV or LAB, and the opacity in L, if any.

    Args:
        raw: see :func:`_png_raw_mode`.
        levels: see :func:`_levels`.
        lower: see :func:`_lower_bytes`.
    """
    mode, transparent = image.mode, image.info.get("transparency")
    if levels is not None:
        values = np.asarray(image)
        opaque = None if transparent is None else values != int(transparent)
        return Image.fromarray(levels[values]), _mask(opaque)
    if mode == "F":
        raise ImageError(
            "its pixels are floating-point numbers without a fixed range; save it as PNG"
        )
    if mode in ("RGBa", "La"):
        image = image.convert(mode.upper())
    elif mode == "1":
        image = image.convert("L")
    elif mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif mode == "RGBX":
        image = image.convert("RGB")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    if image.mode not in ("L", "RGB", "CMYK", "YCbCr", "HSV", "LAB"):
        raise ImageError(f"its pixels have the mode {image.mode}, which is not supported")
    if transparent is None or mode in ("P", "PA") or image.mode not in ("L", "RGB"):
        return image, None
    pixels = np.asarray(image)
    if image.mode == "L":
        bits, step = _GREY_STEPS.get(raw, (255, 1))
        return image, _mask(pixels != (int(transparent) & bits) * step)
    if lower is not None:
        pixels = pixels.astype(np.uint16) * 256 + np.asarray(lower)
    elif raw == "RGB;16B":
        transparent = [int(value) >> 8 for value in transparent]
    else:
        transparent = [int(value) & 255 for value in transparent]
    red, green, blue = transparent
    differs = (pixels[..., 0] != red) | (pixels[..., 1] != green) | (pixels[..., 2] != blue)
    return image, _mask(differs)


def _mask(opaque: np.ndarray[Any, Any] | None) -> Image.Image | None:
    return None if opaque is None else Image.fromarray(opaque.astype(np.uint8) * 255)


def _lower_bytes(data: bytes) -> Image.Image | None:
    """Return the lower bytes of a PNG's 16-bit channels; Pillow returns the upper bytes."""
    if not data:
        return None
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        # read as little-endian, so that the lower byte is returned as the upper one
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        image.load()
        return image


def _levels(image: Image.Image) -> np.ndarray[Any, Any]:
    """Return 8-bit levels by value for a 16-bit channel, which may be stored in 32 bits."""
    tags = getattr(image, "tag_v2", {})
    top = 0xFFF if tags.get(_TIFF_BITS) == (12,) else 0xFFFF
    arrays = (np.asarray(image.crop(strip)) for strip in _strips((0, 0, *image.size)))
    ranges = [(int(array.min()), int(array.max())) for array in arrays]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low < 0 or high > top:
        raise ImageError(
            f"its pixels range from {low} to {high}, which is neither 8 nor 16 bits; save it as PNG"
        )
    if image.mode == "I" and image.format == "TIFF" and 0 < high <= 255:
        raise ImageError(
            f"its pixels range from {low} to {high}, which may be 8 or 16 bits; save it as PNG"
        )
    # Pillow's own conversion would clip all values above 255
    levels = np.rint(np.arange(top + 1) * (255 / top)).astype(np.uint8)
    # if 0 is white, Pillow only inverts 8-bit values
    return levels[::-1] if tags.get(_TIFF_PHOTOMETRIC) == 0 else levels
