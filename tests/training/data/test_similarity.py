"""Images that come more than once, compared with every pair."""

from __future__ import annotations

import itertools
import random

import numpy as np
from PIL import Image

from gralora_diffusion.training.data.similarity import (
    NEAR,
    difference_hash,
    equal_groups,
    near_pairs,
)


def test_a_hash_says_where_an_image_gets_brighter() -> None:
    ramp = np.tile(np.arange(0, 90, 10, dtype=np.uint8), (8, 1))
    assert difference_hash(Image.fromarray(ramp)) == 2**64 - 1
    assert difference_hash(Image.fromarray(ramp[:, ::-1])) == 0
    ramp[0, 1] = 0  # the first pixel's right neighbour is no longer brighter
    assert difference_hash(Image.fromarray(ramp)) == 2**63 - 1


def test_copies_in_another_size_and_quality_have_nearly_the_same_hash() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
    one, other = (Image.fromarray(n).resize((320, 240), Image.Resampling.BICUBIC) for n in noise)
    small = one.resize((160, 120))
    apart = [
        (difference_hash(one) ^ difference_hash(image)).bit_count() for image in (small, other)
    ]
    assert apart[0] <= NEAR < 10 < apart[1]


def test_near_pairs_are_those_of_all_pairs() -> None:
    drawn = random.Random(0)
    hashes = {}
    for number in range(0, 300, 3):
        base = drawn.getrandbits(64)
        near = base
        for bit in drawn.sample(range(64), number // 3 % 6):
            near ^= 1 << bit
        hashes |= {number: base, number + 1: near, number + 2: drawn.getrandbits(64)}
    expected = [
        (a, b)
        for a, b in itertools.combinations(sorted(hashes), 2)
        if (hashes[a] ^ hashes[b]).bit_count() <= NEAR
    ]
    assert 40 < len(expected) < 100
    assert near_pairs(hashes) == expected


def test_equal_groups() -> None:
    assert equal_groups(["a", "b", "a", "c", "b", "a"]) == [[0, 2, 5], [1, 4]]
    assert equal_groups([]) == []
