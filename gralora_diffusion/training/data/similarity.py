"""Images that are the same file, or show nearly the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

#: Bits of a difference hash, and how many may differ between images that show nearly the same.
_BITS, NEAR = 64, 3


def difference_hash(image: Image.Image) -> int:
    """Return 64 bits that say where an image gets brighter from left to right.

    The image becomes gray and 9 x 8 pixels, by area. A bit is 1 if a pixel is brighter than the one
    on its left. Copies in another size, format or quality differ in few bits. The method is
    N. Krawetz's dHash (2013), as in the package ``imagehash``.
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = (small[:, 1:] > small[:, :-1]).flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def equal_groups(keys: Sequence[str]) -> list[list[int]]:
    """Return the numbers of equal keys, in a list for each key that comes more than once."""
    groups: dict[str, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def near_pairs(hashes: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return the pairs whose hashes differ in at most ``NEAR`` bits, sorted.

    Of the four quarters of two such hashes, one is equal, so only hashes with an equal quarter
    are compared.
    """
    quarter = _BITS // (NEAR + 1)
    pairs = set()
    for shift in range(0, _BITS, quarter):
        alike: dict[int, list[int]] = {}
        for number, value in hashes.items():
            alike.setdefault(value >> shift & (1 << quarter) - 1, []).append(number)
        for group in alike.values():
            for place, first in enumerate(group):
                for second in group[place + 1 :]:
                    if (hashes[first] ^ hashes[second]).bit_count() <= NEAR:
                        pairs.add((min(first, second), max(first, second)))
    return sorted(pairs)
