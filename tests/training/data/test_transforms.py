"""Decoding, resizing, cropping: against pixels worked out by hand with Pillow and NumPy."""

from __future__ import annotations

import io
import resource

import numpy as np
import pytest
import torch
from PIL import Image

from gralora_diffusion.io.image_files import image_extensions, read_image
from gralora_diffusion.training.data.buckets import Buckets
from gralora_diffusion.training.data.seeds import generator
from gralora_diffusion.training.data.transforms import CropPlan, Variant

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)  # 9 wide, 6 high


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(data):
    image = read_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_is_left_alone():
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(NOISE), "PNG")), NOISE)


def test_transparency_is_laid_on_white():
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (255, 0, 0, 0)
    rgba[1, 0] = (0, 0, 0, 51)  # a fifth of black on white
    rgba[1, 1] = (10, 20, 30, 255)
    expected = [[(255, 0, 0), (255, 255, 255)], [(204, 204, 204), (10, 20, 30)]]
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(rgba), "PNG")), expected)


def test_transparent_palette_colour_and_transparent_grey():
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    for file_format in ("GIF", "PNG"):
        data = encoded(palette, file_format, transparency=1)
        np.testing.assert_array_equal(pixels(data), [[(9, 8, 7), (255, 255, 255)]])
    grey = Image.new("LA", (2, 1), (100, 0))
    grey.putpixel((0, 0), (100, 255))
    np.testing.assert_array_equal(pixels(encoded(grey, "PNG")), [[[100] * 3, [255] * 3]])


@pytest.mark.parametrize("mode", ["1", "L"])
def test_one_channel_is_repeated(mode):
    image = Image.fromarray(NOISE).convert(mode)
    expected = np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2)
    np.testing.assert_array_equal(pixels(encoded(image, "PNG")), expected)


def test_sixteen_bits_keep_their_range():
    deep = np.array([[0, 257, 128 * 257, 65535, 300]], dtype=np.uint16)
    for file_format in ("PNG", "TIFF", "PPM"):
        got = pixels(encoded(Image.fromarray(deep), file_format))
        np.testing.assert_array_equal(got, [[[v] * 3 for v in (0, 1, 128, 255, 1)]])


def test_pixels_without_a_fixed_range_are_refused():
    for values in (np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32)):
        with pytest.raises(ValueError, match="save it as PNG"):
            read_image(encoded(Image.fromarray(values), "TIFF"))


def test_cmyk_jpeg_has_its_colours():
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))  # cyan
    got = pixels(encoded(ink, "JPEG", quality=100))
    assert np.abs(got.astype(int) - (0, 255, 255)).max() <= 2  # JPEG's rounding


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    for file_format in ("GIF", "PNG", "WEBP"):
        data = encoded(
            frames[0], file_format, save_all=True, append_images=frames[1:], lossless=True
        )
        np.testing.assert_array_equal(pixels(data), np.full((4, 4, 3), (255, 0, 0)))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_orientation_of_the_camera_is_applied(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(NOISE), "JPEG", quality=95, subsampling=0, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(data), upright(stored))
    assert read_image(data).size == ((9, 6) if orientation == 3 else (6, 9))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_cut_off_files_are_refused(file_format):
    data = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), file_format)
    read_image(data)
    with pytest.raises(Exception):  # noqa: B017, PT011 - Pillow raises a different kind for each
        read_image(data[: len(data) // 2])


def test_extensions_are_those_of_images():
    known = image_extensions()
    assert {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tiff", ".avif", ".mpo"} <= known
    assert not known & {".pdf", ".eps", ".mpg", ".txt", ".jsonl", ".safetensors"}


def by_hand(array, left, top, side, flip):
    cut = (array[:, ::-1] if flip else array)[top : top + side, left : left + side]
    return torch.tensor(cut.transpose(2, 0, 1) / 127.5 - 1.0, dtype=torch.float32)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("left", [0, 2, 3])
def test_crop_without_resizing_is_a_slice(left, flip):
    got = CropPlan(6).pixel_values(Image.fromarray(NOISE), Variant(left, 0, 6, 6, flip))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, by_hand(NOISE, left, 0, 6, flip), rtol=0, atol=1e-6)
    assert got.min() >= -1
    assert got.max() <= 1


@pytest.mark.parametrize(
    ("size", "resized"), [((90, 60), (12, 8)), ((60, 91), (8, 12)), ((5, 4), (10, 8))]
)
@pytest.mark.parametrize("interpolation", ["lanczos", "bilinear", "nearest"])
def test_short_side_is_resized_to_the_resolution(size, resized, interpolation):
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    plan = CropPlan(8, interpolation=interpolation)
    assert plan.resized(size) == resized
    by_pillow = np.asarray(image.resize(resized, Image.Resampling[interpolation.upper()]))
    for variant in plan.kept(size, "key", 99, seed=0):
        expected = by_hand(by_pillow, variant.left, variant.top, 8, variant.flip)
        got = plan.pixel_values(image, variant)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_centre_crop_has_one_place_and_both_directions():
    plan = CropPlan(6, center_crop=True)
    assert plan.kept((10, 6), "key", 8, seed=0) == (Variant(2, 0, 6, 6, False),)
    assert plan.kept((6, 10), "key", 8, seed=0) == (Variant(0, 2, 6, 6, False),)
    mirrored = CropPlan(6, center_crop=True, random_flip=True)
    for count in (1, 8):
        kept = mirrored.kept((10, 6), "key", count, seed=0)
        assert kept == (Variant(2, 0, 6, 6, False), Variant(2, 0, 6, 6, True))


def test_a_square_image_has_one_crop():
    assert CropPlan(6).kept((30, 30), "key", 8, seed=0) == (Variant(0, 0, 6, 6, False),)
    both = CropPlan(6, random_flip=True).kept((30, 30), "key", 8, seed=0)
    assert both == (Variant(0, 0, 6, 6, False), Variant(0, 0, 6, 6, True))


def test_all_variants_are_kept_when_there_are_few():
    kept = CropPlan(6).kept((9, 6), "key", 8, seed=0)
    assert sorted(variant.left for variant in kept) == [0, 1, 2, 3]
    both = CropPlan(6, random_flip=True).kept((9, 6), "key", 99, seed=0)
    every = [(left, flip) for left in range(4) for flip in (False, True)]
    assert sorted((variant.left, variant.flip) for variant in both) == every


def test_kept_variants_are_distinct_drawn_per_image_and_grow_at_the_end():
    plan = CropPlan(64, random_flip=True)
    eight = plan.kept((200, 64), "one", 8, seed=0)
    assert len(set(eight)) == 8
    assert sum(variant.flip for variant in eight) == 4
    assert plan.kept((200, 64), "one", 16, seed=0)[:8] == eight
    assert plan.kept((200, 64), "two", 8, seed=0) != eight
    assert plan.kept((200, 64), "one", 8, seed=1) != eight


def test_drawn_variants_reach_every_place():
    plan = CropPlan(6, random_flip=True)
    drawn = {plan.draw((9, 6), generator(0, "variant", t)) for t in range(200)}
    assert drawn == set(plan.kept((9, 6), "key", 99, seed=0))
    never = {CropPlan(6).draw((6, 9), generator(0, "variant", t)) for t in range(100)}
    assert never == {Variant(0, top, 6, 6, False) for top in range(4)}


LONG = [(1, 300), (300, 1), (2, 61), (401, 13), (13, 400), (999, 100), (64, 9), (700, 90)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
)
def test_long_images_are_cut_out_as_from_the_whole_resized_image(interpolation, flip):
    """Within a level, and nearly everywhere the same; at both ends, too."""
    plan, different, all_of_them = CropPlan(32, interpolation=interpolation), 0, 0
    for width, height in LONG:
        image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
        whole = plan.resized(image.size)
        resized = np.asarray(image.resize(whole, Image.Resampling[interpolation.upper()]))
        resized = (resized[:, ::-1] if flip else resized).astype(int)
        last = max(whole) - 32
        for place in {0, 1, last // 3, last - 1, last}:
            left, top = (place, 0) if width > height else (0, place)
            got = plan.pixel_values(image, Variant(left, top, 32, 32, flip))
            levels = (got.permute(1, 2, 0).double().numpy() + 1) * 127.5
            difference = np.abs(levels - resized[top : top + 32, left : left + 32])
            assert difference.max() < 1.01
            different += (difference > 0.01).sum()
            all_of_them += difference.size
    assert different < all_of_them / 1000


def test_the_longest_images_take_no_more_memory_than_their_crops():
    plan = CropPlan(64)
    size = (1, 65_000)
    assert plan.resized(size) == (64, 4_160_000)
    image = Image.fromarray(RNG.integers(0, 256, (size[1], 1, 3), dtype=np.uint8))
    kept = plan.kept(size, "key", 8, seed=0)
    assert len(set(kept)) == 8
    assert plan.kept(size, "key", 5, seed=0) == kept[:5]
    assert plan.kept(size, "other", 8, seed=0) != kept
    assert max(variant.top for variant in kept) > 1_000_000
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for variant in kept:
        got = plan.pixel_values(image, variant)
        # 64 rows are one pixel and its neighbours; in the middle between two centres, half of each
        rows = np.asarray(image).astype(int)[variant.top // 64 - 4 :][:9].reshape(9, 3)
        low, high = rows.min(axis=0) / 127.5 - 1, rows.max(axis=0) / 127.5 - 1
        slack = 0.25  # Lanczos overshoots
        assert (got.amin((1, 2)).numpy() >= low - slack).all()
        assert (got.amax((1, 2)).numpy() <= high + slack).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000  # KiB


def test_share_that_a_crop_shows():
    assert CropPlan(64).shown((64, 64)) == 1
    assert CropPlan(64).shown((640, 64)) == 0.1
    assert CropPlan(8, buckets=Buckets(8, 1, ((10, 12),))).shown((60, 60)) == 10 / 12


# -- aspect-ratio buckets --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((2000, 2000), (512, 512)),
        ((1600, 900), (384, 680)),  # 512 / sqrt(16/9) = 384, 512 * sqrt(16/9) = 682.7
        ((900, 1600), (680, 384)),
        ((3000, 2000), (416, 624)),  # 418.0 and 627.1
        ((5000, 500), (360, 728)),  # a panorama; 2:1 is the widest: 362.04 and 724.08
        ((200, 400), (400, 200)),  # as many pixels as a square of 283: 400.2 and 200.1
        ((302, 302), (304, 304)),
        ((3, 2), (8, 8)),
    ],
)
def test_a_image_gets_the_nearest_shape_and_no_more_pixels_than_it_has(size, bucket):
    plan = CropPlan(512, buckets=Buckets(512, 8))
    assert plan.target_size(size) == bucket
    height, width = CropPlan(512, buckets=Buckets(512, 64)).target_size(size)
    assert height % 64 == width % 64 == 0


def test_listed_buckets_are_all_there_is():
    plan = CropPlan(512, buckets=Buckets(512, 8, ((512, 512), (384, 640))))
    sizes = {(900, 900): (512, 512), (1500, 900): (384, 640), (50, 90): (512, 512),
             (90, 50): (384, 640), (9000, 50): (384, 640)}  # fmt: skip
    assert {size: plan.target_size(size) for size in sizes} == sizes


@pytest.mark.parametrize(
    ("size", "resized", "places"),
    [
        ((9, 6), (15, 10), [(0, 0), (1, 0), (2, 0), (3, 0)]),  # more is left on the sides
        ((6, 6), (12, 12), [(0, 0), (0, 1), (0, 2)]),  # above and below
        ((24, 20), (12, 10), [(0, 0)]),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
def test_a_image_covers_its_bucket_and_what_is_left_over_is_cut_off(size, resized, places, flip):
    plan = CropPlan(8, random_flip=flip, buckets=Buckets(8, 1, ((10, 12),)))
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    assert plan.resized(size) == resized
    kept = plan.kept(size, "key", 99, seed=0)
    directions = (False, True) if flip else (False,)
    every = [(left, top, side) for left, top in places for side in directions]
    assert sorted((v.left, v.top, v.flip) for v in kept) == every
    drawn = {plan.draw(size, generator(0, "variant", t)) for t in range(100)}
    assert drawn == set(kept)
    whole = np.asarray(image.resize(resized, Image.Resampling.LANCZOS))
    for variant in kept:
        turned = whole[:, ::-1] if variant.flip else whole
        cut = turned[variant.top : variant.top + 10, variant.left : variant.left + 12]
        expected = torch.tensor(cut.transpose(2, 0, 1) / 127.5 - 1.0, dtype=torch.float32)
        got = plan.pixel_values(image, variant)
        assert got.shape == (3, 10, 12)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_the_middle_of_what_covers_the_bucket():
    plan = CropPlan(8, center_crop=True, buckets=Buckets(8, 1, ((10, 12),)))
    assert plan.kept((90, 60), "key", 8, seed=0) == (Variant(1, 0, 10, 12, False),)  # of 15 x 10
    assert plan.kept((60, 60), "key", 8, seed=0) == (Variant(0, 1, 10, 12, False),)  # of 12 x 12


@pytest.mark.parametrize("buckets", [None, Buckets(64, 8), Buckets(64, 8, ((64, 96), (96, 56)))])
def test_every_size_is_covered_exactly_on_one_axis(buckets):
    plan = CropPlan(64, buckets=buckets)
    for width in range(1, 140, 3):
        for height in range(1, 140, 7):
            target_height, target_width = plan.target_size((width, height))
            resized = plan.resized((width, height))
            over = resized[0] - target_width, resized[1] - target_height
            assert min(over) == 0
            # and the same factor on both axes, but for rounding to whole pixels
            factor = max(target_width / width, target_height / height)
            assert abs(resized[0] - width * factor) <= 0.5
            assert abs(resized[1] - height * factor) <= 0.5
            larger = plan.enlarges((width, height))
            assert larger == (factor > 1)
