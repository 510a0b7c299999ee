"""What takes seconds to import is imported by what needs it, and by nothing else."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.numpy import save_file
from transformers import utils as names_of_transformers

import gralora_diffusion
from gralora_diffusion import export, lora_import
from gralora_diffusion.benchmark.evaluation import encoder_sources
from gralora_diffusion.io import file_names
from gralora_diffusion.io.lazy import lazy_names
from tests import ROOT

HEAVY = ("torch", "peft", "diffusers", "accelerate", "transformers")


def imported_by(program: str, *heavy: str) -> str:
    """Run a program in an interpreter of its own; return what it says, and which were imported."""
    named = f"import sys; print([m for m in {heavy or HEAVY} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", f"{program}\n{named}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


COMMAND = """
from gralora_diffusion.cli import main
try:
    main({line})
except SystemExit as error:
    print("exit", error.code)
"""


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("train --help", 0),
        ("train --ranks 8", 2),
        ("train --rank 3", 2),
        ("sample --help", 0),
        ("sample --base x --prompt x --output x.text", 2),
        ("export --help", 0),
        ("export --adapter x --format lora --output x.text", 2),
        ("import --help", 0),
        ("import --lora x", 2),
        ("import --lora x --family flux --rank 6 --gralora_k 4 --output x", 2),
        ("benchmark --help", 0),
        ("benchmark --rank 4 --methods lora", 2),
        ("inspect --help", 0),
        ("inspect nowhere", 2),
        ("control --help", 0),
        ("control nowhere stop", 2),
        ("data --help", 0),
        ("caption --help", 0),
        ("studio --help", 0),
        ("demo --help", 0),
        ("samples --help", 0),
    ],
)
def test_help_and_wrong_options_take_no_time(line: str, code: int) -> None:
    heavy = (*HEAVY, "huggingface_hub", "gradio") if code == 0 else HEAVY
    lines = imported_by(COMMAND.format(line=line.split()), *heavy).splitlines()
    assert lines[-2:] == [f"exit {code}", "[]"]


@pytest.mark.parametrize("path", ["samples/tiny-base", "samples/tiny-base/unet"])
def test_a_base_is_inspected_by_its_headers_alone(path: str) -> None:
    program = f"from gralora_diffusion.cli import main\nmain(['inspect', {str(ROOT / path)!r}])"
    assert imported_by(program).splitlines()[-1] == "[]"


def test_a_checkpoint_is_inspected_by_its_header_alone(tmp_path: Path) -> None:
    shapes = {"input_blocks.0.0.weight": (4, 4, 1, 1), "out.2.weight": (4, 4, 1, 1)}
    tensors = {f"model.diffusion_model.{k}": np.zeros(v, "float32") for k, v in shapes.items()}
    save_file(tensors, tmp_path / "base.safetensors")
    line = ["inspect", str(tmp_path / "base.safetensors")]
    shown = imported_by(f"from gralora_diffusion.cli import main\nmain({line})").splitlines()
    assert "original single-file checkpoint" in shown[1]
    assert shown[-1] == "[]"


@pytest.mark.parametrize("options", [[], ["--json", "--all_layers", "--check", "--sha256"]])
def test_an_adapter_is_inspected_without_torch(options: list[str]) -> None:
    adapter = ROOT / "tests/data/version_0.1/run/pytorch_gralora_weights.safetensors"
    line = ["inspect", str(adapter), *options]
    shown = imported_by(f"from gralora_diffusion.cli import main\nmain({line})")
    assert shown.splitlines()[-1] == "[]"


def test_values_of_a_checkpoint_are_checked_without_torch() -> None:
    line = ["inspect", str(ROOT / "samples/tiny-base"), "--check"]
    shown = imported_by(f"from gralora_diffusion.cli import main\nmain({line})").splitlines()
    assert shown[-2:] == ["values: all finite", "[]"]


# -- the package's names ---------------------------------------------------------------------------


@pytest.mark.parametrize("package", [gralora_diffusion, export, lora_import])
def test_names_are_those_that_type_checkers_see(package) -> None:
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (branch,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(seen) == set(package.__all__) <= set(dir(package))
    for name, home in seen.items():
        module = __import__(f"{package.__name__}.{home}", fromlist=[name])
        assert getattr(package, name) is getattr(module, name)


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match=r"module 'gralora_diffusion' has no attribute 'x'"):
        getattr(gralora_diffusion, "x")  # noqa: B009  # as a type checker would refuse it
    with pytest.raises(ImportError):
        exec("from gralora_diffusion.export import x")


def test_a_name_is_imported_once() -> None:
    get, names = lazy_names("gralora_diffusion.export", {"choices": ["STYLES"]})
    try:
        assert "STYLES" in names()
        assert get("STYLES") is vars(export)["STYLES"]
    finally:
        vars(export).pop("STYLES", None)


def test_names_of_files_are_those_of_peft() -> None:
    assert file_names.PEFT_CONFIG_NAME == CONFIG_NAME
    assert file_names.PEFT_WEIGHTS_NAME == SAFETENSORS_WEIGHTS_NAME


def test_names_of_files_are_those_of_transformers() -> None:
    theirs = names_of_transformers
    assert theirs.CONFIG_NAME == encoder_sources.CONFIG_NAME
    assert (
        *(theirs.SAFE_WEIGHTS_NAME, theirs.SAFE_WEIGHTS_INDEX_NAME),
        *(theirs.WEIGHTS_NAME, theirs.WEIGHTS_INDEX_NAME),
    ) == encoder_sources.WEIGHTS
    assert encoder_sources.PROCESSORS == (theirs.IMAGE_PROCESSOR_NAME, theirs.PROCESSOR_NAME)
