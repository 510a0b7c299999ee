"""The files around the package agree with it and with each other."""

import email
import re
import shutil
import subprocess
import sys
import tomllib

import yaml

import gralora_diffusion
from tests import ROOT

#: Asks the build backend as pip does, where neither the package nor its libraries can be imported.
BUILD = """
import sys

sys.modules |= dict.fromkeys(["torch", "diffusers", "peft", "gralora_diffusion"])
from setuptools import build_meta

print(build_meta.prepare_metadata_for_build_wheel("."))
"""


def test_metadata_of_a_build_that_imports_nothing(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "gralora_diffusion", tmp_path / "gralora_diffusion")
    line = [sys.executable, "-I", "-c", BUILD]
    made = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / made.stdout.splitlines()[-1]
    metadata = email.message_from_string((folder / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Version"] == gralora_diffusion.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_version_needs_no_installation():
    """Without site-packages nothing is installed: neither the package nor torch."""
    program = "import gralora_diffusion; print(gralora_diffusion.__version__)"
    line = [sys.executable, "-S", "-E", "-c", program]
    said = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == gralora_diffusion.__version__


def test_hooks_have_the_linter_of_continuous_integration():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (rev,) = [repo["rev"] for repo in hooks["repos"] if "ruff" in repo["repo"]]
    assert f"ruff=={rev.removeprefix('v')}" in (ROOT / ".ci/constraints.txt").read_text().split()


def test_workflow_has_the_first_and_the_last_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert project["requires-python"] == f">={pythons[0]}"
    tested = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert tested == [pythons[0], pythons[-1]]
