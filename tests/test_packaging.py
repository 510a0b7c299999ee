"""What is installed is what is in the tree, and the files around the package agree with it."""

import email
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

import gralora_diffusion
from tests import ROOT

#: Builds as pip does, where neither the package nor its libraries can be imported.
BUILD = """
import sys

sys.modules |= dict.fromkeys(["torch", "diffusers", "peft", "gralora_diffusion"])
from setuptools import build_meta

build_meta.build_wheel(sys.argv[1])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gralora_diffusion", source / "gralora_diffusion", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    line = [sys.executable, "-I", "-c", BUILD, str(folder)]
    made = subprocess.run(line, cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_a_wheel_holds_every_file_of_the_package(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "gralora_diffusion").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert "gralora_diffusion/benchmark/report/templates/report.html.jinja" in files
    assert names == files


def test_a_wheel_has_the_version_of_the_package(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == gralora_diffusion.__version__


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
