"""Libraries for quantization are imported only where they are used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gralora_diffusion.base_models.optional_libraries import LIBRARIES, leave_out_unused
from gralora_diffusion.io import process


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The modules of a command's process, which has imported none of the libraries."""
    modules = {k: v for k, v in sys.modules.items() if k.partition(".")[0] not in LIBRARIES}
    monkeypatch.setattr(sys, "modules", modules)
    monkeypatch.setattr(process, "is_a_command", True)
    return modules


def a_base(folder: Path, config: str = "{}") -> str:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/config.json").write_text(config)
    return str(folder)


def test_what_is_not_used_is_not_there(modules: dict, tmp_path: Path) -> None:
    leave_out_unused([a_base(tmp_path / "base"), None, a_base(tmp_path / "rest")])
    assert [modules[name] for name in LIBRARIES] == [None, None]


def test_what_is_used_is_there(modules: dict, tmp_path: Path) -> None:
    leave_out_unused([a_base(tmp_path / "base")], ["bitsandbytes"])
    assert "bitsandbytes" not in modules
    assert modules["torchao"] is None


@pytest.mark.parametrize("config", ['{"quantization_config": {}}', None])
def test_a_base_that_is_quantized_or_not_known_needs_all(
    modules: dict, tmp_path: Path, config: str | None
) -> None:
    leave_out_unused(["owner/not-in-the-cache" if config is None else a_base(tmp_path, config)])
    assert not {*LIBRARIES} & modules.keys()


def test_a_program_that_imports_the_package_is_left_alone(
    modules: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "is_a_command", False)
    leave_out_unused([])
    assert not {*LIBRARIES} & modules.keys()
