"""A base on disk and pictures to learn, shared by the tests of the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import stable_diffusion
from tests.training.runs import make_images


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion pipeline in diffusers' folder layout."""
    folder = tmp_path_factory.mktemp("base")
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Several threads are slower on models as small as these."""
    torch.set_num_threads(1)
