"""Colours of profiles, code points and PNG's chunks, against the definitions of the spaces."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from gralora_diffusion.io.colour_profiles import rgb_profile
from gralora_diffusion.io.image_files import ImageError, formats, read_image
from tests.io.image_bytes import D65, PRIMARIES, cmyk_profile, lab_to_srgb, on_white, png, shown

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def with_tags(changes):
    """sRGB's profile with the contents of some tags after their eight bytes of type replaced."""
    profile = bytearray(SRGB)
    (count,) = struct.unpack_from(">I", profile, 128)
    for number in range(count):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if name in changes:
            body = changes[name]
            profile[offset + 8 : offset + 8 + len(body)] = body
    return bytes(profile)


def display_p3():
    """With the primaries that Apple's Display P3.icc has."""
    columns = {b"rXYZ": (0.51512, 0.24120, -0.00105), b"gXYZ": (0.29198, 0.69225, 0.04189),
               b"bXYZ": (0.15710, 0.06657, 0.78407)}  # fmt: skip
    return with_tags(
        {n: struct.pack(">3i", *(round(v * 65536) for v in c)) for n, c in columns.items()}
    )


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def read(data):
    warnings = []
    return np.asarray(read_image(data, warnings)).astype(int), warnings


def assert_near(got, expected, most=1.5):
    assert np.abs(got - expected).max() <= most


# -- ICC -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "AVIF", "HEIF", "JPEG2000"])
def test_display_p3_in_every_format_that_holds_profiles(file_format):
    options = {
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100, "subsampling": "4:4:4"},
        "HEIF": {"quality": -1, "chroma": 444},
    }
    if file_format not in formats():
        pytest.skip("this Pillow lacks it")
    image = Image.fromarray(COLOURS)
    if file_format == "JPEG2000":
        data = jp2_with_profile(encoded(image, file_format), display_p3())
    else:
        data = encoded(image, file_format, icc_profile=display_p3(), **options.get(file_format, {}))
    got, warnings = read(data)
    assert not warnings
    assert_near(got, shown(COLOURS, "display-p3"), 8 if file_format in ("AVIF", "HEIF") else 1.5)


def jp2_with_profile(data, profile):
    """The colour specification box of a JP2 with a profile in it (ISO/IEC 15444-1, I.5.3.3)."""
    place = data.index(b"jp2h") - 4
    (length,) = struct.unpack_from(">I", data, place)
    inside = data[place + 8 : place + length]
    colour = inside.index(b"colr") - 4
    (old,) = struct.unpack_from(">I", inside, colour)
    box = struct.pack(">I4s", 11 + len(profile), b"colr") + b"\2\0\0" + profile
    inside = inside[:colour] + box + inside[colour + old :]
    header = struct.pack(">I4s", 8 + len(inside), b"jp2h") + inside
    return data[:place] + header + data[place + length :]


def test_display_p3_in_jpeg():
    image = Image.new("RGB", (16, 16), (200, 30, 40))
    options = {"quality": 100, "subsampling": 0, "icc_profile": display_p3()}
    got, _ = read(encoded(image, "JPEG", **options))
    assert_near(got, shown((200, 30, 40), "display-p3"), 3)


def test_srgb_in_any_profile_leaves_the_pixels_alone():
    for profile in (SRGB, rgb_profile((*PRIMARIES["srgb"], *D65), None)):
        got, warnings = read(encoded(Image.fromarray(COLOURS), "PNG", icc_profile=profile))
        np.testing.assert_array_equal(got, COLOURS)
        assert not warnings


def test_transparency_is_laid_on_white_after_the_conversion():
    rgba = np.concatenate([COLOURS, RNG.integers(0, 256, (8, 8, 1)).astype(np.uint8)], axis=2)
    rgba[0, 0, 3] = 0
    got, _ = read(encoded(Image.fromarray(rgba), "PNG", icc_profile=display_p3()))
    assert_near(got, on_white(shown(COLOURS, "display-p3"), rgba[..., 3]), 2)
    np.testing.assert_array_equal(got[0, 0], 255)


def test_palettes_and_grey_with_an_rgb_profile():
    palette = Image.fromarray(COLOURS).quantize(16)
    colours = np.asarray(palette.convert("RGB"))
    got, _ = read(encoded(palette, "PNG", icc_profile=display_p3()))
    assert_near(got, shown(colours, "display-p3"))
    grey = Image.fromarray(COLOURS[..., 0])
    got, warnings = read(encoded(grey, "PNG", icc_profile=display_p3()))
    assert not warnings  # grey stays grey, as the white points agree
    assert_near(got, np.repeat(COLOURS[..., :1], 3, axis=2))


def test_grey_profile():
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(1.8 * 256)) + b"\0\0"
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    size = 128 + 4 + 24 + len(curve) + len(white)
    head = struct.pack(">I4xI4s4s4s", size, 0x02400000, b"mntr", b"GRAY", b"XYZ ") + 12 * b"\0"
    head = (head + b"acsp" + 28 * b"\0" + white[8:]).ljust(128, b"\0")
    table = struct.pack(">I4sII4sII", 2, b"kTRC", 156, len(curve), b"wtpt", 156 + len(curve), 20)
    profile = head + table + curve + white
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    got, warnings = read(encoded(Image.fromarray(grey), "PNG", icc_profile=profile))
    assert not warnings
    expected = shown(np.repeat(grey[..., None], 3, axis=2), "srgb", round(1.8 * 256) / 256)
    assert_near(got, expected)
    got, warnings = read(encoded(Image.fromarray(COLOURS), "PNG", icc_profile=profile))
    np.testing.assert_array_equal(got, COLOURS)
    assert warnings == ["its color profile is for GRAY, but its pixels are RGB"]


@pytest.mark.parametrize("file_format", ["TIFF", "JPEG"])
def test_cmyk_with_a_profile(file_format):
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1)
    # an ink takes some light, all of them take all, and some have a hue of their own
    light = 100 - inks @ [20.0, 25.0, 5.0, 50.0]
    hues = inks @ np.array([[-12.0, -16.0], [22.0, -2.0], [-2.0, 30.0], [0.0, 0.0]])
    lab = np.concatenate([light[..., None], np.rint(hues * light[..., None] / 100)], axis=-1)
    corners = np.kron(inks.reshape(4, 4, 4), np.ones((8, 8, 1))).astype(np.uint8) * 255
    bands = [Image.fromarray(np.ascontiguousarray(corners[..., ink])) for ink in range(4)]
    image = Image.merge("CMYK", bands)
    options = {"quality": 100} if file_format == "JPEG" else {}
    got, warnings = read(encoded(image, file_format, icc_profile=cmyk_profile(lab), **options))
    assert not warnings
    assert_near(got[4::8, 4::8].reshape(16, 3), lab_to_srgb(lab.reshape(16, 3)), 3)
    plain, _ = read(encoded(image, file_format, **options))
    assert_near(plain[4::8, 4::8].reshape(16, 3)[1], 0, 2)  # full black, by Pillow's formula


@pytest.mark.parametrize(
    "profile",
    [b"nonsense", SRGB[:60], SRGB[:200], b"\0" * 400, SRGB[:16] + b"NOPE" + SRGB[20:]],
    ids=["text", "cut header", "cut table", "zeros", "no colour space"],  # SRGB holds the time
)
def test_a_damaged_profile_is_reported_and_ignored(profile):
    got, warnings = read(encoded(Image.fromarray(COLOURS), "PNG", icc_profile=profile))
    np.testing.assert_array_equal(got, COLOURS)
    (warning,) = warnings
    assert warning.startswith("its color profile ")


def test_a_profile_that_is_not_compressed_as_png_wants_it():
    data = png(2, 8, COLOURS, ((b"iCCP", b"icc\0\0not deflated"),))
    got, warnings = read(data)
    np.testing.assert_array_equal(got, COLOURS)
    assert warnings


def test_a_profile_of_another_colour_space_is_reported_and_ignored():
    image = Image.fromarray(COLOURS).convert("CMYK")
    plain, _ = read(encoded(image, "TIFF"))
    got, warnings = read(encoded(image, "TIFF", icc_profile=SRGB))
    np.testing.assert_array_equal(got, plain)
    assert warnings == ["its color profile is for RGB, but its pixels are CMYK"]


# -- PNG's own chunks, and code points -------------------------------------------------------------


def gamma(value):
    return b"gAMA", struct.pack(">I", round(value * 100_000))


def chromaticities(name):
    points = (*D65, *PRIMARIES[name])
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in points))


@pytest.mark.parametrize(
    ("chunks", "primaries", "power"),
    [
        ((gamma(1.0),), "srgb", 1.0),
        ((gamma(1 / 1.8),), "srgb", 1.8),
        ((gamma(0.45470), chromaticities("adobe")), "adobe", None),  # 2.19922 of Adobe RGB
        ((gamma(1 / 1.8), chromaticities("display-p3")), "display-p3", 1.8),
        ((chromaticities("display-p3"),), "display-p3", None),
        ((gamma(0.45455),), "srgb", None),
        ((gamma(0.45455), chromaticities("srgb")), "srgb", None),
        ((gamma(1.0), (b"sRGB", b"\0")), "srgb", None),
        ((gamma(1.0), (b"cICP", bytes([1, 13, 0, 1]))), "srgb", None),
        (((b"cICP", bytes([12, 13, 0, 1])),), "display-p3", None),
        (((b"cICP", bytes([1, 8, 0, 1])),), "srgb", 1.0),
        (((b"sRGB", b"\0"), (b"cICP", bytes([12, 4, 0, 1]))), "display-p3", 2.2),
    ],
)
def test_chunks_of_png(chunks, primaries, power):
    got, warnings = read(png(2, 8, COLOURS, chunks))
    assert not warnings
    assert_near(got, shown(COLOURS, primaries, power))


def test_profile_and_code_points_count_before_gamma():
    profile = b"icc\0\0" + zlib.compress(display_p3())
    got, _ = read(png(2, 8, COLOURS, ((b"iCCP", profile), gamma(1.0))))
    assert_near(got, shown(COLOURS, "display-p3"))
    got, _ = read(png(2, 8, COLOURS, ((b"cICP", bytes([1, 13, 0, 1])), (b"iCCP", profile))))
    np.testing.assert_array_equal(got, COLOURS)


@pytest.mark.parametrize("codes", [(9, 16), (9, 18), (1, 17), (200, 13)])
def test_high_dynamic_range_and_unknown_colours_are_refused(codes):
    text = "high dynamic range" if codes[1] in (16, 18) else r"code points.*Save it as sRGB"
    with pytest.raises(ImageError, match=text):
        read_image(png(2, 8, COLOURS, ((b"cICP", bytes([*codes, 0, 1])),)))


@pytest.mark.parametrize(
    "chunk", [gamma(0), gamma(90), (b"cHRM", bytes(32)), (b"cHRM", b"\xff" * 32)]
)
def test_impossible_chunks_are_reported_and_ignored(chunk):
    got, warnings = read(png(2, 8, COLOURS, (chunk,)))
    np.testing.assert_array_equal(got, COLOURS)
    assert len(warnings) == 1


@pytest.mark.skipif("AVIF" not in formats(), reason="this Pillow lacks AVIF")
def test_code_points_of_avif():
    colour = np.full((16, 16, 3), (200, 60, 70), np.uint8)
    data = encoded(Image.fromarray(colour), "AVIF", quality=100, subsampling="4:4:4")
    place = data.index(b"colrnclx") + 8
    plain, _ = read(data)
    assert_near(plain, colour, 3)
    for codes, expected in (((12, 13), shown(colour, "display-p3")), ((2, 2), colour)):
        changed = data[:place] + struct.pack(">HH", *codes) + data[place + 4 :]
        assert_near(read(changed)[0], expected, 4)
    with pytest.raises(ImageError, match="high dynamic range"):
        read_image(data[:place] + struct.pack(">HH", 9, 16) + data[place + 4 :])
