"""Names of version 0.1 go on working, and say what they are called now."""

import importlib
import subprocess
import sys
from typing import Any

import pytest

from gralora_diffusion.io.deprecated_paths import MODULES, NAMES


@pytest.mark.parametrize("old", sorted(MODULES))
def test_module(old):
    """Every public name of the new module is found in the old one, but for those that left it."""
    new = importlib.import_module(f"gralora_diffusion.{MODULES[old]}")
    module = importlib.import_module(f"gralora_diffusion.{old}")
    for name, value in vars(new).items():
        if getattr(value, "__module__", None) == new.__name__ and f"{old}.{name}" not in NAMES:
            with pytest.warns(DeprecationWarning, match=rf"{MODULES[old]}\.{name}"):
                assert getattr(module, name) is value


@pytest.mark.parametrize("old", sorted(NAMES))
def test_name(old):
    module, _, name = old.rpartition(".")
    home, _, new_name = NAMES[old].rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"{home}\.{new_name}"):
        value = getattr(importlib.import_module(f"gralora_diffusion.{module}"), name)
    assert value is getattr(importlib.import_module(f"gralora_diffusion.{home}"), new_name)


def test_the_warning_is_of_the_line_that_imports():
    program = (
        "import gralora_diffusion.warm_start.files\n"
        "from gralora_diffusion import blockwise\n"
        "from gralora_diffusion.training.config import TrainingConfig, parse_config\n"
        "from gralora_diffusion.adapters.layers import functional\n"
        "assert blockwise.init_factors is functional.init_factors\n"
    )
    line = [sys.executable, "-W", "default::DeprecationWarning:__main__", "-c", program]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    told = [
        text.split(":")[1]
        for text in done.stderr.splitlines()
        if "is now gralora_diffusion" in text
    ]
    assert told == ["3", "3", "5"]


def test_what_is_no_name():
    with pytest.raises(ImportError):
        exec("from gralora_diffusion.warm_start import nothing")
    with pytest.raises(ImportError):
        exec("from gralora_diffusion.training.loop import nothing")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("gralora_diffusion.nothing")


def test_what_is_set_in_an_old_module_is_set_in_the_new_one(monkeypatch):
    old: Any = importlib.import_module("gralora_diffusion.training.outcome")
    new = importlib.import_module("gralora_diffusion.training.outputs.output_dir")
    monkeypatch.setattr(new, "create_repo", None)  # taken back at the end
    old.create_repo = print
    assert new.create_repo is print
