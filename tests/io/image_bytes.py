"""Image files written byte by byte, by the definitions of their formats."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

PRIMARIES = {
    "srgb": (0.64, 0.33, 0.30, 0.60, 0.15, 0.06),
    "display-p3": (0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    "adobe": (0.64, 0.33, 0.21, 0.71, 0.15, 0.06),
}
D65 = (0.3127, 0.3290)


def png(colour: int, bits: int, pixels: Any, chunks: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """A PNG (ISO/IEC 15948).

    Args:
        colour: 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA.
        pixels: (height, width) or (height, width, channels) of whole numbers.
        chunks: name and contents of those between header and pixels.
    """
    pixels = np.asarray(pixels)
    height, width = pixels.shape[:2]
    rows = b""
    for row in pixels.reshape(height, -1):
        if bits == 16:
            packed = row.astype(">u2").tobytes()
        else:
            digits = "".join(f"{int(value):0{bits}b}" for value in row)
            digits += "0" * (-len(digits) % 8)
            packed = int(digits, 2).to_bytes(len(digits) // 8, "big")
        rows += b"\0" + packed
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    every = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in every
    )


def grey_tiff(bits: int, pixels: Any, white_is_zero: bool) -> bytes:
    """An uncompressed little-endian TIFF 6.0 of one channel of 8, 12 or 16 bits."""
    pixels = np.asarray(pixels)
    if bits == 12:
        digits = "".join(f"{int(value):012b}" for value in pixels.ravel())
        strip = int(digits, 2).to_bytes(len(digits) // 8, "big")
    else:
        strip = pixels.astype({8: "<u1", 16: "<u2"}[bits]).tobytes()
    height, width = pixels.shape
    entries = [
        (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1),
        (262, 3, 0 if white_is_zero else 1), (273, 4, 8), (277, 3, 1), (278, 4, height),
        (279, 4, len(strip)),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    table = struct.pack("<H", len(entries)) + table + struct.pack("<I", 0)
    strip += b"\0" * (len(strip) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + table


def shown(rgb: Any, primaries: str, power: float | None = None) -> Any:
    """What sRGB numbers show the colours of RGB numbers with other primaries, white as sRGB's.

    Args:
        rgb: 0 to 255.
        power: of the number, for light; None: as in sRGB (IEC 61966-2-1).
    """
    v = np.asarray(rgb) / 255
    curve = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    light = curve if power is None else v**power
    light = light @ (np.linalg.inv(to_xyz("srgb")) @ to_xyz(primaries)).T
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def to_xyz(primaries: str) -> Any:
    """Matrix from light in red, green and blue to CIE XYZ (SMPTE RP 177)."""
    points = [*zip(*[iter(PRIMARIES[primaries])] * 2, strict=True), D65]
    columns = [np.array([x / y, 1, (1 - x - y) / y]) for x, y in points]
    matrix = np.stack(columns[:3], axis=1)
    return matrix * np.linalg.solve(matrix, columns[3])


def on_white(colour: Any, alpha: Any) -> Any:
    """Colours (..., channels) of 0 to 255 laid on white, with opacity of 0 to 255."""
    share = np.asarray(alpha)[..., None] / 255
    return np.asarray(colour) * share + 255 * (1 - share)


def lab_to_srgb(lab: Any) -> Any:
    """CIE L*a*b* with white D50 as sRGB numbers, clipped (ICC.1:2022, Bradford)."""
    lightness, a, b = np.moveaxis(np.asarray(lab, float), -1, 0)
    y = (lightness + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], axis=-1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1, 0.8249)
    # sRGB's matrix at D50, as published by the ICC with its sRGB profile
    matrix = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
    light = (xyz @ np.linalg.inv(matrix).T).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def cmyk_profile(corners: Any) -> bytes:
    """An ICC profile of CMYK with a table of its 16 corners (ICC.1:2001-04, lut8Type).

    Args:
        corners: (2, 2, 2, 2, 3), L*a*b* by whether there is no or full C, M, Y and K.
    """
    lab = np.asarray(corners, float).reshape(16, 3)
    table = np.stack([lab[:, 0] * 2.55, lab[:, 1] + 128, lab[:, 2] + 128], axis=1)
    ramp = bytes(range(256))
    identity = [1, 0, 0, 0, 1, 0, 0, 0, 1]
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0])
    lut += struct.pack(">9i", *(value * 65536 for value in identity))
    lut += 4 * ramp + table.round().astype(np.uint8).tobytes() + 3 * ramp
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"A2B0": lut + b"\0" * (-len(lut) % 4), b"wtpt": white}
    offset, directory, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        directory += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    head = struct.pack(
        ">I4sI4s4s4s", offset + len(body), b"", 0x02400000, b"prtr", b"CMYK", b"Lab "
    )
    head += 12 * b"\0" + b"acsp" + 28 * b"\0" + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + directory + body
