"""Find the colors that the numbers of an image stand for, and convert them to sRGB.

A file states them by an ICC profile, by code points (CICP, ITU-T H.273: the ``cICP`` chunk of PNG,
the ``nclx`` box of AVIF and HEIF), or by the ``gAMA`` and ``cHRM`` chunks of PNG. Otherwise it is
sRGB.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from .safe_text import error_line

#: x and y of red, green, blue and white, by H.273's code of the primaries (table 2).
_PRIMARIES = {
    1: (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290),  # sRGB and BT.709
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, 0.3127, 0.3290),  # BT.601, 625 lines
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, 0.3127, 0.3290),  # BT.601, 525 lines
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, 0.3127, 0.3290),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290),  # BT.2020
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),  # DCI-P3
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290),  # Display P3
}
_SRGB_PRIMARIES = _PRIMARIES[1]
#: Powers by H.273's code of the transfer function (table 3). The codes in ``_AS_SRGB`` are read as
#: sRGB, because viewers show images that were encoded for television in this way.
_POWERS = {4: 2.2, 5: 2.8, 8: 1.0}
_AS_SRGB = (1, 2, 6, 13, 14, 15)
_HDR = {16: "PQ", 18: "HLG"}
#: ``gAMA`` that encoders write for sRGB (PNG, third edition, section 11.3.2.5), and the largest
#: difference from it that still counts as sRGB.
_SRGB_GAMMA, _NEAR = 0.45455, 0.005
#: Parameters g, a, b, c, d of sRGB's curve as ICC's parametric curve of type 3.
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
#: Color space of a profile -> the modes of images that can have it.
_SPACES = {"RGB": ("RGB", "L"), "GRAY": ("L",), "CMYK": ("CMYK",)}
#: A profile that changes no color by more levels than this counts as sRGB.
_ROUNDING = 1


class UnknownColours(ValueError):
    """The file states its colors, but they cannot be converted."""


def to_srgb(image: Image.Image, profile: bytes | None, warnings: list[str]) -> Image.Image:
    """Return an image without transparency in RGB, with the colors of ``profile`` in sRGB.

    The rendering intent is perceptual. Without a profile, or if it is sRGB, Pillow's own conversion
    is used. As in viewers, the same holds if the profile is damaged or has another color space than
    the pixels.

    Args:
        image: an image of mode L, RGB, CMYK, YCbCr, HSV or LAB.
        profile: ICC; None for sRGB, empty for one that cannot be read.
        warnings: problems with the profile are appended.
    """
    if image.mode in ("YCbCr", "HSV"):
        image = image.convert("RGB")
    if profile is None or image.mode == "LAB":  # L*a*b* is defined without a profile
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if image.mode not in _SPACES.get(space, ()):
            shown = space if space.isalnum() else repr(space)
            warnings.append(f"its color profile is for {shown}, but its pixels are {image.mode}")
            return image.convert("RGB")
        if space == "RGB":
            image = image.convert("RGB")
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, image.mode, "RGB")
        if image.mode != "CMYK" and _is_identity(transform, image.mode):
            return image.convert("RGB")
        return _applied(transform, image)
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError) as error:
        warnings.append(f"its color profile cannot be used ({error_line(error)})")
        return image.convert("RGB")


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is only None if it replaces the image
    return converted


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    if mode == "L":
        probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        levels = np.linspace(0, 255, 18).round().astype(np.uint8)  # all multiples of 15
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
        probe = Image.fromarray(grid.reshape(18, -1, 3))
    before = np.asarray(probe.convert("RGB")).astype(int)
    after = np.asarray(_applied(transform, probe)).astype(int)
    return bool(np.abs(after - before).max() <= _ROUNDING)


def find_profile(
    file_format: str | None, info: Mapping[Any, Any], data: bytes, warnings: list[str]
) -> bytes | None:
    """Return the ICC profile of a file, or one with the same meaning; None for sRGB.

    Args:
        file_format: Pillow's name of the format.
        info: Pillow's ``info`` of the file.
        data: the content of the file.
        warnings: problems with the profile are appended.

    Raises:
        UnknownColours: the colors have high dynamic range (PQ, HLG), or are of an unknown kind.
    """
    codes = None
    if file_format == "PNG":
        codes = next((body[:2] for name, body in _chunks(data) if name == b"cICP"), None)
    elif file_format in ("AVIF", "HEIF") and not info.get("icc_profile"):
        box = next(_boxes(data, (b"meta", b"iprp", b"ipco", b"colr"), b"nclx"), b"")
        codes = box[1:4:2]  # the lower bytes of two-byte numbers
    if codes and len(codes) == 2:
        return _coded_profile(*codes)
    if "icc_profile" in info:
        return info["icc_profile"] or b""
    if file_format == "JPEG2000":  # method 2: an ICC profile follows
        return next((body[2:] for body in _boxes(data, (b"jp2h", b"colr"), b"\2")), None)
    if file_format == "PNG" and "srgb" not in info:
        return _png_profile(info, warnings)
    return None


def _coded_profile(primaries: int, transfer: int) -> bytes | None:
    if transfer in _HDR:
        raise UnknownColours(
            f"it is an image of high dynamic range ({_HDR[transfer]}), which has no fixed "
            "appearance in sRGB. Save it as sRGB"
        )
    points = _PRIMARIES.get(1 if primaries == 2 else primaries)  # 2: unspecified
    power = _POWERS.get(transfer)
    if points is None or (power is None and transfer not in _AS_SRGB):
        raise UnknownColours(
            f"its colors have the code points {primaries}/{transfer} (CICP), which are not "
            "supported. Save it as sRGB"
        )
    if points == _SRGB_PRIMARIES and power is None:
        return None
    return rgb_profile(points, power)


def _png_profile(info: Mapping[Any, Any], warnings: list[str]) -> bytes | None:
    gamma, points = info.get("gamma"), info.get("chromaticity")
    if gamma is None and points is None:
        return None
    power = None
    if gamma is not None and abs(gamma - _SRGB_GAMMA) > _NEAR:
        if not 0.05 <= gamma <= 5:
            warnings.append(f"its gAMA chunk has the impossible value {gamma}")
            return None
        power = 1 / gamma
    # PNG begins with the white point
    points = _SRGB_PRIMARIES if points is None else (*points[2:8], *points[:2])
    if power is None and np.allclose(points, _SRGB_PRIMARIES, atol=2e-3):
        return None
    try:
        return rgb_profile(points, power)
    except (np.linalg.LinAlgError, struct.error, OverflowError, ValueError, ZeroDivisionError):
        warnings.append("its cHRM chunk describes impossible colors")
        return None


def rgb_profile(points: tuple[float, ...], power: float | None) -> bytes:
    """Return an ICC profile (version 4) for RGB numbers.

    Args:
        points: x and y of red, green, blue and white.
        power: the power of a number that gives the light; None for sRGB's curve.

    Raises:
        ValueError, ArithmeticError, numpy.linalg.LinAlgError, struct.error: the colors are
            impossible.
    """
    xyz = [
        np.array([x / y, 1.0, (1 - x - y) / y]) for x, y in zip(*[iter(points)] * 2, strict=True)
    ]
    primaries, white = np.stack(xyz[:3], axis=1), xyz[3]
    matrix = primaries * np.linalg.solve(primaries, white)
    cones = (_BRADFORD @ np.array(_D50)) / (_BRADFORD @ white)  # the profile's white is D50
    matrix = np.linalg.inv(_BRADFORD) @ np.diag(cones) @ _BRADFORD @ matrix
    if not np.isfinite(matrix).all():
        raise ValueError("the colors are impossible")
    parameters = _SRGB_CURVE if power is None else (power,)
    curve = b"para" + struct.pack(">IHH", 0, 0 if power else 3, 0) + _fixed(parameters)
    tags = {b"wtpt": b"XYZ \0\0\0\0" + _fixed(_D50)}
    for name, column in zip((b"r", b"g", b"b"), matrix.T, strict=True):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(column)
        tags[name + b"TRC"] = curve
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = struct.pack(
        ">I4xI4s4s4s12s4s28x12s", offset + len(body), 0x04300000, b"mntr", b"RGB ", b"XYZ ",
        b"", b"acsp", _fixed(_D50),
    )  # fmt: skip
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _fixed(values: Any) -> bytes:
    """Return numbers as ICC's s15Fixed16Number."""
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield names and contents of a PNG's chunks before its pixels."""
    place = 8
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if name == b"IDAT":
            return
        yield name, data[place + 8 : place + 8 + length]
        place += 12 + length


def _boxes(data: bytes, path: tuple[bytes, ...], start: bytes) -> Iterator[bytes]:
    """Yield contents of boxes at a path in an ISO base media or JPEG 2000 file.

    Only contents with the prefix ``start`` are returned, without the prefix.
    """
    place = 0
    while place + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        if length < 8:  # it extends to the end of the file, or beyond 4 GiB: no such box follows
            length = len(data) - place
        if name == path[0]:
            body = data[place + 8 : place + length]
            if len(path) > 1:
                yield from _boxes(body[4:] if name == b"meta" else body, path[1:], start)
            elif body.startswith(start):
                yield body[len(start) :]
        place += length
