"""Random masks: all kinds of them, at any size, by the generator alone."""

from __future__ import annotations

import pytest
import torch

from gralora_diffusion.training.data.random_masks import random_mask
from gralora_diffusion.training.data.seeds import generator


@pytest.mark.parametrize("size", [(64, 64), (512, 768), (16, 40)])
def test_random_masks(size: tuple[int, int]) -> None:
    masks = [random_mask(*size, generator(3, "fill mask", position)) for position in range(200)]
    again = [random_mask(*size, generator(3, "fill mask", position)) for position in range(200)]
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
    areas = torch.stack([mask.mean() for mask in masks])
    assert all(mask.shape == (1, *size) and set(mask.unique().tolist()) <= {0, 1} for mask in masks)
    assert (areas > 0).all()
    whole = float((areas == 1).float().mean())
    assert 0.17 < whole < 0.33  # a quarter
    others = areas[areas < 1]
    assert others.min() < 0.05
    assert others.max() > 0.5
    assert 0.15 < float(others.mean()) < 0.5
    rectangular = [m for m in masks if m.mean() < 1 and _is_rectangle(m[0])]
    assert 5 < len(rectangular) < 60  # those of one rectangle
    # no part of an image is always kept, or always filled
    mean = torch.stack([mask for mask in masks if mask.mean() < 1]).mean(0)
    assert mean.max() < 0.75
    assert mean.min() > 0


def _is_rectangle(mask: torch.Tensor) -> bool:
    rows, columns = mask.any(1), mask.any(0)
    return bool((mask == rows[:, None] * columns[None]).all())
