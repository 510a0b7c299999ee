"""Image files against what their formats say, worked out with NumPy."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from gralora_diffusion.io import image_files
from gralora_diffusion.io.image_files import (
    ImageError,
    as_srgb,
    folder_images,
    formats,
    image_extensions,
    image_suffix,
    is_image,
    masks_beside,
    read_image,
    read_mask,
    read_opacity,
)
from tests.io.image_bytes import grey_tiff, lab_to_srgb, on_white, png

RNG = np.random.default_rng(0)


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def saved(image, file_format, **options):
    data = io.BytesIO()
    image.save(data, file_format, **options)
    return data.getvalue()


def pixels(source, **options):
    warnings = []
    image = read_image(source, warnings, **options)
    assert image.mode == "RGB"
    assert not image.info
    assert not warnings
    return np.asarray(image).astype(int)


# -- PNG, by its bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [None, 0, 1, -1])
def test_grey_png_of_every_depth_and_its_transparent_value(bits, transparent):
    top = 2**bits - 1
    values = RNG.integers(0, top + 1, (5, 7))
    values[0, :3] = 0, 1, top
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    if transparent is not None:
        transparent %= top + 1
        chunks = ((b"tRNS", struct.pack(">H", transparent)),)
    expected = np.rint(values * 255 / top)
    expected[values == transparent] = 255
    got = pixels(png(0, bits, values, chunks))
    np.testing.assert_array_equal(got, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize("bits", [8, 16])
def test_transparent_colour_of_an_rgb_png_is_compared_in_all_its_bits(bits):
    values = RNG.integers(0, 2**bits, (4, 6, 3))
    values[1, 2] = values[0, 0]
    values[2, 3] = values[0, 0] ^ [0, 0, 1]  # another colour by its lowest bit only
    chunks = ((b"tRNS", struct.pack(">3H", *values[0, 0])),)
    expected = values >> (bits - 8)
    expected[0, 0] = expected[1, 2] = 255
    np.testing.assert_array_equal(pixels(png(2, bits, values, chunks)), expected)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("colour", "channels"), [(4, 2), (6, 4)])
def test_png_with_alpha_is_laid_on_white(colour, channels, bits):
    values = RNG.integers(0, 2**bits, (4, 6, channels))
    values[0, 0, -1], values[0, 1, -1] = 0, 2**bits - 1
    levels = values >> (bits - 8)
    expected = on_white(levels[..., :-1] * np.ones(3 if colour == 6 else (1,)), levels[..., -1])
    got = pixels(png(colour, bits, values))
    assert np.abs(got - np.broadcast_to(expected, got.shape)).max() <= 1
    np.testing.assert_array_equal(got[0, 0], 255)
    np.testing.assert_array_equal(got[0, 1] * np.ones(3), levels[0, 1, :-1] * np.ones(3))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["opaque", "one index", "bytes"])
def test_palette_png(bits, kind):
    count = 2**bits
    palette, alphas = RNG.integers(0, 256, (count, 3)), np.full(count, 255)
    if kind == "one index":
        alphas[1] = 0
    elif kind == "bytes":
        alphas[: count - 1] = RNG.integers(0, 256, count - 1)  # those that lack are opaque
    chunks = [(b"PLTE", palette.astype(np.uint8).tobytes())]
    if kind != "opaque":
        chunks.append((b"tRNS", alphas[: max(2, count - 1)].astype(np.uint8).tobytes()))
    values = RNG.integers(0, count, (5, 7))
    expected = on_white(palette[values], alphas[values])
    assert np.abs(pixels(png(3, bits, values, tuple(chunks))) - expected).max() <= 1


# -- every mode and format that Pillow writes ------------------------------------------------------


def by_mode(image):
    """The RGB levels of an image as its mode defines them."""
    values, mode = np.asarray(image).astype(int), image.mode
    if mode == "1":
        values = values * 255
    if mode.startswith("I"):
        values = np.rint(values / 257)
    if mode in ("1", "L") or mode.startswith("I"):
        return np.repeat(values[..., None], 3, axis=2)
    if mode == "P":
        return np.asarray(image.getpalette()).reshape(-1, 3)[values]
    if mode == "PA":
        colours = np.asarray(image.getpalette()).reshape(-1, 3)[values[..., 0]]
        return on_white(colours, values[..., 1])
    if mode in ("LA", "RGBA"):
        return on_white(values[..., :-1], values[..., -1]) * np.ones(3)
    if mode == "CMYK":
        return (255 - values[..., :3]) * (255 - values[..., 3:]) / 255
    if mode == "YCbCr":
        y, b, r = values[..., 0], values[..., 1] - 128, values[..., 2] - 128
        rgb = [y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b]
        return np.stack(rgb, axis=-1).clip(0, 255)
    if mode == "LAB":
        # Pillow keeps L* in 255ths of 100, a* and b* as signed bytes
        signed = values[..., 1:].astype(np.uint8).view(np.int8)
        return lab_to_srgb(np.concatenate([values[..., :1] / 2.55, signed], axis=-1))
    assert mode in ("RGB", "RGBX")
    return values[..., :3]


def every_mode():
    """Images of few and soft colours, so that palettes and lossy formats can hold them."""
    ramp = np.linspace(0, 255, 32).round().astype(np.uint8)
    across, down = np.meshgrid(ramp, ramp[::-1])
    rgb = Image.fromarray(np.stack([across, down, across // 2 + 60], axis=-1))
    alpha = Image.fromarray(down)
    few = rgb.quantize(24)
    translucent = few.convert("PA")
    translucent.putalpha(alpha)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    soft = Image.fromarray((np.asarray(rgb) // 3 + 90).astype(np.uint8))
    sixteen = across.astype(np.uint16) * 256 + down
    inks = (across, down, across // 2, down // 3)
    in_lab = ImageCms.applyTransform(soft, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    del in_lab.info["icc_profile"]
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    return {
        "1": rgb.convert("1"),
        "L": rgb.convert("L"),
        "LA": rgba.convert("LA"),
        "P": few,
        "PA": translucent,
        "RGB": rgb,
        "RGBX": rgb.convert("RGBX"),
        "RGBA": rgba,
        "CMYK": Image.merge("CMYK", [Image.fromarray(ink) for ink in inks]),
        "YCbCr": soft.convert("YCbCr"),
        "LAB": in_lab,
        "I;16": Image.fromarray(sixteen),
        "I;16B": Image.fromarray(sixteen.astype(">u2")),
        "I": Image.fromarray(sixteen.astype(np.int32)),
    }


#: Formats that hold what they are given but for a few levels, or not with all its colours.
NEAR = {"JPEG": 5, "MPO": 5, "AVIF": 4, "HEIF": 4}
OPTIONS = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100, "subsampling": 0},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "HEIF": {"quality": -1, "chroma": 444},
    "WEBP": {"lossless": True, "exact": True},
}
#: What Pillow itself writes in another form than it was: colours beyond a palette, alpha dropped,
#: 16 bits clipped to 8 (GIF, WebP, AVIF), bytes the wrong way round, one size of its own.
CHANGED = {
    *(("GIF", mode) for mode in ("LA", "RGB", "RGBA", "I", "I;16", "I;16B")),
    *((f, mode) for f in ("WEBP", "AVIF", "HEIF") for mode in ("I", "I;16", "I;16B")),
    ("BMP", "RGBA"), ("DIB", "RGBA"), ("PPM", "RGBA"), ("JPEG2000", "I;16B"),
}  # fmt: skip
#: What Pillow writes and does not read back, and formats that are not read.
NOT_READ_BACK = {("TIFF", "YCbCr")} if Image.__version__ < "13" else set()  # by Pillow itself
NOT_READ = {"EPS", "PDF", "PALM", "SPIDER", "WMF", "BUFR", "GRIB", "HDF5"}


def test_every_mode_and_format_that_pillow_writes():
    Image.init()
    read, images = [], every_mode()
    for file_format in sorted(set(Image.SAVE) - {"ICNS"}):
        for mode, image in images.items():
            try:
                data = encoded(image, file_format, **OPTIONS.get(file_format, {}))
            except (OSError, ValueError, KeyError, struct.error):
                continue  # Pillow does not write it
            if (file_format, mode) in NOT_READ_BACK:
                continue
            if file_format in NOT_READ:
                with pytest.raises(ImageError, match="not an image in a format that is supported"):
                    read_image(data)
                continue
            if (file_format, mode) in CHANGED:
                read_image(data)
                continue
            difference = np.abs(pixels(data) - by_mode(image)).max()
            near = 2 if mode in ("YCbCr", "LAB") else 1
            assert difference <= max(near, NEAR.get(file_format, 0)), (file_format, mode)
            read.append((file_format, mode))
    assert len(read) >= 60
    assert {file_format for file_format, _ in read} >= {
        *("BMP", "DDS", "GIF", "ICO", "IM", "JPEG", "JPEG2000", "MSP", "PCX", "PNG", "PPM"),
        *("SGI", "TGA", "TIFF", "WEBP", "XBM"),
    }


def test_images_in_memory_of_every_mode_are_read_as_files_are():
    images = every_mode()
    rgba = np.asarray(images["RGBA"]).astype(int)
    for mode, image in images.items():
        assert np.abs(np.asarray(as_srgb(image)) - by_mode(image)).max() <= 2, mode
    for premultiplied in (images["RGBA"].convert("RGBa"), images["LA"].convert("La")):
        colours = rgba[..., :3]
        if premultiplied.mode == "La":
            colours = np.asarray(images["LA"]).astype(int)[..., :1]
        expected = on_white(colours, rgba[..., 3]) * np.ones(3)
        assert np.abs(np.asarray(as_srgb(premultiplied)) - expected).max() <= 2
    hsv = images["RGB"].convert("HSV")
    assert np.abs(np.asarray(as_srgb(hsv)).astype(int) - np.asarray(images["RGB"])).max() <= 8
    with pytest.raises(ImageError, match="floating-point"):
        as_srgb(Image.new("F", (2, 2)))


@pytest.mark.parametrize("rows", [1, 5])
def test_strips_of_large_images_make_one_image(monkeypatch, rows):
    values = RNG.integers(0, 2**16, (9, 6, 3))
    values[7, 2] = values[0, 0]
    transparent = ((b"tRNS", struct.pack(">3H", *values[0, 0])),)
    images = every_mode().items()
    files = [
        encoded(image, "TIFF") for mode, image in images if ("TIFF", mode) not in NOT_READ_BACK
    ]
    files += [png(2, 16, values, transparent), png(0, 16, values[..., 0])]
    whole = [pixels(data) for data in files]
    monkeypatch.setattr(image_files, "_STRIP_PIXELS", rows * 6)
    for data, expected in zip(files, whole, strict=True):
        np.testing.assert_array_equal(pixels(data), expected)


@pytest.mark.skipif("HEIF" not in image_files.formats(), reason="pillow-heif is not installed")
def test_heic_is_upright_and_of_its_name():
    image = Image.fromarray(RNG.integers(0, 256, (16, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(image, "HEIF", quality=-1, chroma=444, exif=exif.tobytes())
    assert {".heic", ".heif"} <= image_files.image_extensions()
    got = pixels(data)
    turned = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    assert np.abs(got - turned.astype(int)).max() <= 4


def test_icns_takes_the_largest_of_its_sizes():
    image = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    got = read_image(encoded(image, "ICNS"))
    assert got.size[0] == got.size[1] >= 64


# -- bits and ranges -------------------------------------------------------------------------------


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_grey_tiff_either_way_round(bits, white_is_zero):
    top = 2**bits - 1
    values = RNG.integers(0, top + 1, (4, 6))
    if bits == 12 and white_is_zero:
        with pytest.raises(ImageError):  # Pillow does not read it
            read_image(grey_tiff(bits, values, white_is_zero))
        return
    expected = np.rint((top - values if white_is_zero else values) * 255 / top)
    got = pixels(grey_tiff(bits, values, white_is_zero))
    np.testing.assert_array_equal(got, np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.ones((2, 2), np.float32), "floating-point"),
        (np.full((2, 2), 70000, np.int32), "from 70000 to 70000.*save it as PNG"),
        (np.full((2, 2), -1, np.int32), "from -1 to -1.*save it as PNG"),
        (np.full((2, 2), 200, np.int32), "which may be 8 or 16 bits; save it as PNG"),
    ],
)
def test_pixels_without_a_fixed_range_are_refused(values, text):
    with pytest.raises(ImageError, match=text):
        read_image(encoded(Image.fromarray(values), "TIFF"))


def test_pgm_of_any_maximum():
    values = RNG.integers(0, 1001, (3, 5))
    data = b"P5 5 3 1000\n" + values.astype(">u2").tobytes()
    expected = np.repeat(values[..., None] * 0.255, 3, axis=2)
    assert np.abs(pixels(data) - expected).max() <= 0.51


# -- several images, turned images -----------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_the_first_of_several(file_format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    if file_format not in formats():
        pytest.skip("this Pillow lacks it")
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert np.abs(pixels(data) - (255, 0, 0)).max() <= (3 if file_format == "AVIF" else 0)


@pytest.mark.parametrize("transparent", [None, 1])
def test_what_a_gif_s_first_frame_does_not_cover_is_see_through(transparent):
    """Four pixels in the middle of 4 x 4, of colour 0 of two (GIF 89a, appendix F)."""
    data = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 1, 0) + bytes([200, 0, 0, 0, 0, 200])
    if transparent is not None:
        data += b"\x21\xf9\x04" + bytes([1, 0, 0, transparent]) + b"\0"
    data += b"," + struct.pack("<HHHHB", 1, 1, 2, 2, 0)
    codes = [4, 0, 0, 0, 0, 5]  # of three bits: begin, the pixels, end; of four from the fifth on
    places = [0, 3, 6, 9, 12, 16]
    packed = sum(code << place for code, place in zip(codes, places, strict=True))
    data += b"\2\3" + packed.to_bytes(3, "little") + b"\0;"
    expected = np.full((4, 4, 3), 255)
    expected[1:3, 1:3] = 200, 0, 0
    np.testing.assert_array_equal(pixels(data), expected)


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9])
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_every_orientation(file_format, orientation):
    values = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(Image.fromarray(values), file_format, exif=exif, **options)
    turned = UPRIGHT.get(orientation, UPRIGHT[1])(values)
    np.testing.assert_array_equal(pixels(data), turned)


def damaged_exif():
    """EXIF of which the orientation can be read, but not written again."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x0132, 2, 400, 0xFFFFFF)
    good_then_bad = b"II*\0" + struct.pack("<IH", 8, 2) + entries + b"\0\0\0\0"
    return {
        "cut off": good_then_bad[:12],
        "points outside": good_then_bad,
        "no TIFF": b"nonsense of some length",
        "no directory": b"II*\0\xff\xff\xff\x7f",
        "empty": b"",
    }


@pytest.mark.parametrize("kind", damaged_exif())
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_loses_no_image(kind, file_format):
    values = np.full((8, 16, 3), (250, 10, 20), np.uint8)
    exif = damaged_exif()[kind]
    if file_format == "PNG":
        data = png(2, 8, values, ((b"eXIf", exif),))
    else:
        exif = b"Exif\0\0" + exif if file_format == "JPEG" else exif
        data = encoded(Image.fromarray(values), file_format, exif=exif)
    image = read_image(data, [])
    assert image.size == ((8, 16) if kind == "points outside" else (16, 8))
    assert np.abs(np.asarray(image).astype(int) - (250, 10, 20)).max() <= 12


# -- what is read at all ---------------------------------------------------------------------------


def test_extensions_are_those_of_images():
    known = image_extensions()
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tiff", ".mpo"} <= known
    for other in ("pdf", "eps", "ps", "mpg", "mpeg", "h5", "hdf", "grib", "bufr", "wmf", "emf",
                  "fits", "fit", "palm", "iim", "txt", "jsonl", "safetensors"):  # fmt: skip
        assert f".{other}" not in known
    assert not {"EPS", "WMF", "IPTC", "HDF5", "GRIB", "BUFR", "MPEG", "FITS"} & set(formats())


def test_no_program_is_run_for_postscript(tmp_path, monkeypatch):
    tool = tmp_path / "gs"
    tool.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    # a DOS header around it, and an IPTC record that holds it, are other ways to it
    for data in (page, b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(page)) + bytes(18) + page):
        with pytest.raises(ImageError, match="not an image in a format that is supported"):
            read_image(data)
    assert not (tmp_path / "was-run").exists()


def test_pipes_folders_and_missing_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="named pipe"):
        read_image(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="a folder"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "none.png")
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError, match="empty"):
        read_image(tmp_path / "empty.png")


def test_paths_bytes_and_files_are_read_alike(tmp_path):
    data = png(2, 8, RNG.integers(0, 256, (3, 4, 3)))
    (tmp_path / "1.png").write_bytes(data)
    expected = pixels(data)
    np.testing.assert_array_equal(pixels(tmp_path / "1.png"), expected)
    np.testing.assert_array_equal(pixels(io.BytesIO(data)), expected)


@pytest.mark.parametrize("side", [11_000, 14_000, 20_000, 100_000])
def test_images_of_too_many_pixels_are_refused_by_their_header(side):
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    )
    with pytest.raises(ImageError, match=r"pixels.*Make it smaller"):
        read_image(data)


def test_too_long_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_BYTES", 20)
    data = png(2, 8, np.zeros((2, 2, 3), int))
    (tmp_path / "1.png").write_bytes(data)
    for source in (tmp_path / "1.png", data, io.BytesIO(data)):
        with pytest.raises(ImageError, match="bytes"):
            read_image(source)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "QOI", "TGA"])
def test_damaged_files_are_refused_or_read(file_format):
    """With one seed each; every result is an image or an ImageError."""
    Image.init()
    if file_format not in Image.SAVE:
        pytest.skip("this Pillow does not write it")
    rng = np.random.default_rng(7)
    data = encoded(Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)), file_format)
    with pytest.raises(ImageError):
        read_image(data[: len(data) // 2])
    told = []
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 120), 3):
            damaged[place] = rng.integers(0, 256)
        try:
            assert read_image(bytes(damaged), []).mode == "RGB"
        except ImageError as error:
            told.append(str(error))
    assert all(told)
    assert "BytesIO" not in "".join(told)


def test_a_jpeg_may_be_decoded_smaller():
    image = Image.new("RGB", (640, 320), (200, 30, 40))
    small = pixels(encoded(image, "JPEG", quality=95), at_least=64)
    assert small.shape == (80, 160, 3)
    assert np.abs(small - (200, 30, 40)).max() <= 3


def test_endings_by_content():
    image = Image.new("RGB", (8, 8))
    for file_format in ("PNG", "JPEG", "JPEG2000", "TIFF", "GIF", "WEBP", "BMP"):
        suffix = image_suffix(encoded(image, file_format))
        assert Image.registered_extensions()[suffix] == file_format
        assert is_image(image_files.Path(f"x{suffix}"))
    with pytest.raises(ImageError):
        image_suffix(b"text")


# -- folders ---------------------------------------------------------------------------------------


def test_masks_are_told_from_images_by_their_names():
    names = [
        *("1.png", "1-masklabel.png", "2.jpg", "2_mask.png", "3.PNG", "3.Mask.png", "4.png"),
        *("4-mask.jpg", "5-condlabel.png", "gas_mask.png", "masked.png", "mask.png", "1.txt"),
        *(".hidden.png", "clip.mpg"),
    ]
    found = folder_images(names)
    assert found.images == [
        *("1.png", "2.jpg", "3.PNG", "4.png", "gas_mask.png", "mask.png", "masked.png")
    ]
    assert found.masks == [
        *("1-masklabel.png", "2_mask.png", "3.Mask.png", "4-mask.jpg", "5-condlabel.png")
    ]


def test_masks_beside_images():
    names = [
        *(
            "1.png",
            "1-masklabel.png",
            "1_mask.jpg",
            "2.JPG",
            "2.Mask.PNG",
            "3.png",
            "3-condlabel.png",
        ),
        *("1_mask.txt", "other_mask.png", ".1_mask.png"),
    ]
    assert masks_beside(["1.png", "2.JPG", "3.png"], names) == {
        "1.png": ["1-masklabel.png", "1_mask.jpg"],
        "2.JPG": ["2.Mask.PNG"],
    }


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_masks_of_every_depth(bits):
    values = RNG.integers(0, 2**bits, (4, 6))
    mask = read_mask(png(0, bits, values))
    assert mask.mode == "L"
    np.testing.assert_allclose(np.asarray(mask), values * 255 / (2**bits - 1), atol=0.5)


def test_masks_have_the_levels_of_their_file():
    """Whatever a profile says; gray may be in three channels or in a palette."""
    values = RNG.integers(0, 256, (4, 6))
    gamma = ((b"gAMA", struct.pack(">I", 100_000)),)
    np.testing.assert_array_equal(np.asarray(read_mask(png(0, 8, values, gamma))), values)
    assert not np.array_equal(pixels(png(0, 8, values, gamma))[..., 0], values)
    three = np.repeat(values[..., None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(read_mask(png(2, 8, three))), values)
    indexed = Image.fromarray(values.astype(np.uint8)).convert("P")
    np.testing.assert_array_equal(np.asarray(read_mask(saved(indexed, "PNG"))), values)
    black_and_white = Image.fromarray(values > 100)
    np.testing.assert_array_equal(
        np.asarray(read_mask(saved(black_and_white, "TIFF"))), (values > 100) * 255
    )
    smooth = Image.fromarray(np.add.outer(np.arange(32) * 4, np.arange(32) * 3).astype(np.uint8))
    jpeg = np.asarray(read_mask(saved(smooth.convert("RGB"), "JPEG", quality=80)), dtype=int)
    assert np.abs(jpeg - np.asarray(smooth)).max() < 12


def test_transparent_pixels_of_a_mask_are_black_whatever_their_color():
    values = np.zeros((2, 3, 4), int)
    values[..., :] = [255, 255, 255, 255]
    values[0, 0] = [255, 0, 0, 0]
    values[0, 1] = [255, 255, 255, 51]
    expected = [[0, 51, 255], [255, 255, 255]]
    np.testing.assert_array_equal(np.asarray(read_mask(png(6, 8, values))), expected)
    values[1, 1, :3] = [255, 200, 255]
    with pytest.raises(ImageError, match="it has colors, but a mask is white, gray and black"):
        read_mask(png(6, 8, values))


def test_masks_and_opacities_are_upright_and_whole(monkeypatch):
    monkeypatch.setattr(image_files, "_STRIP_PIXELS", 6)
    values = RNG.integers(0, 256, (4, 6)).astype(np.uint8)
    image = Image.merge("LA", [Image.fromarray(values)] * 2)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was turned
    data = saved(image, "PNG", exif=exif)
    turned = np.rot90(values, -1)
    np.testing.assert_array_equal(np.asarray(read_opacity(data)), turned)
    squares = (turned.astype(float) ** 2 / 255).round()
    np.testing.assert_allclose(np.asarray(read_mask(data)), squares, atol=1)


def test_opaque_images_have_no_opacity():
    values = np.full((4, 6, 4), 255)
    assert read_opacity(png(6, 8, values)) is None
    assert read_opacity(png(2, 8, values[..., :3])) is None
    values[1, 2, 3] = 254
    assert np.asarray(read_opacity(png(6, 8, values))).min() == 254
    with pytest.raises(ImageError):
        read_opacity(b"junk")
