"""Encoders and images, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmark import judges, runs
from tests.models import stable_diffusion


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judges.save_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="session")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judges.save_vit(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judges.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return judges.draw(tmp_path_factory.mktemp("drawn"), 6, seed=1)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return judges.draw(tmp_path_factory.mktemp("real"), 3, seed=2)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, dinov2: Path, clip: Path) -> Path:
    """A base, encoders and a small DreamBooth benchmark, for ``runs``."""
    folder = tmp_path_factory.mktemp("world")
    stable_diffusion().save_pretrained(folder / "base")
    (folder / "dinov2").symlink_to(dinov2)
    (folder / "clip").symlink_to(clip)
    runs.clone(folder / "dreambooth")
    return folder
