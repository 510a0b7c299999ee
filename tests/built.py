"""Wheel and sdist of the package, built as pip builds them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests import ROOT

#: In a process where neither the package nor its libraries can be imported.
_BUILD = """
import sys

sys.modules |= dict.fromkeys(["torch", "diffusers", "peft", "gralora_diffusion"])
from hatchling import build

build.build_wheel(sys.argv[1])
build.build_sdist(sys.argv[1])
"""
#: What makes an environment for a clone, which an installed package does not need.
OF_A_CLONE = {"samples/demo.sh"}


def build(folder: Path) -> Path:
    """Put the wheel and the sdist of a clean copy of what the package is made of into a folder."""
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("gralora_diffusion", "samples"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".ci/public_pages.py"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    line = [sys.executable, "-I", "-c", _BUILD, str(folder)]
    made = subprocess.run(line, cwd=source, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    shutil.rmtree(source)
    return folder


def tree(*names: str) -> dict[str, Path]:
    """Path in the repository -> the file, for the files below these folders."""
    found = (path for name in names for path in (ROOT / name).rglob("*"))
    files = [path for path in found if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix(): path for path in files}
