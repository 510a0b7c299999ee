"""The five methods are there after the import, in whatever order, and diffusers is not."""

from __future__ import annotations

import inspect
import sys

import pytest
from diffusers import DiffusionPipeline, FluxPipeline

import gralora_diffusion
from gralora_diffusion.pipelines import loading, methods
from tests.io.test_lazy import imported_by

OURS, THEIRS = "import gralora_diffusion", "from diffusers import FluxPipeline"
SAME = """
from gralora_diffusion import pipelines
assert FluxPipeline.fuse_gralora is pipelines.fuse_gralora
assert object.__new__(FluxPipeline).load_gralora_weights.__func__ is pipelines.load_gralora_weights
"""


def test_nothing_is_imported_for_them() -> None:
    assert imported_by(OURS) == "[]\n"


def test_imported_before_diffusers() -> None:
    """And before the pipelines of FLUX, of whose module our families take a function."""
    untouched = """
import importlib.util, inspect, sys
from diffusers.pipelines import pipeline_utils as module
assert "gralora_diffusion.pipelines.loading" not in sys.modules
assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
assert "class DiffusionPipeline" in inspect.getsource(module)
"""
    imported_by("\n".join([OURS, OURS, THEIRS, untouched, SAME]))


def test_imported_after_diffusers() -> None:
    imported_by("\n".join([THEIRS, OURS, SAME]))


@pytest.mark.parametrize("name", methods.METHODS)
def test_they_are_the_functions_of_pipelines(name: str) -> None:
    function = getattr(loading, name)
    assert getattr(FluxPipeline, name) is function
    assert vars(DiffusionPipeline)[name] is function  # from the first look on
    assert next(iter(inspect.signature(function).parameters)) == "pipe"


def test_installing_again_changes_nothing() -> None:
    finders = list(sys.meta_path)
    methods.install()
    assert sys.meta_path == finders
    assert DiffusionPipeline.load_gralora_weights is loading.load_gralora_weights
    assert gralora_diffusion.__version__
