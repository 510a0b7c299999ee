"""The grid of images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from gralora_diffusion.pipelines.grid import labelled_grid


def test_grid_shows_every_image_in_its_cell() -> None:
    colours = [[(250, 0, 0), (0, 250, 0)], [(0, 0, 250)]]
    rows = [("row", [Image.new("RGB", (4, 4), c) for c in row]) for row in colours]
    grid = np.asarray(labelled_grid(rows, ["left", "right"], cell=20))
    for row, (_, images) in enumerate(rows):
        for column, image in enumerate(images):
            top, left = 8 + row * 28, 112 + column * 28
            cell = grid[top : top + 20, left : left + 20]
            assert (cell == np.array(image.getpixel((0, 0)))).all()
