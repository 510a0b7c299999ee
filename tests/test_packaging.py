"""What is installed is what is in the tree."""

import shutil
import subprocess
import sys
import zipfile

from tests import ROOT

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def test_a_wheel_holds_every_file_of_the_package(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gralora_diffusion", source / "gralora_diffusion", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)], cwd=source, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = source / "gralora_diffusion"
    files = {p.relative_to(source).as_posix() for p in package.rglob("*") if p.is_file()}
    assert "gralora_diffusion/benchmark/report/templates/report.html.jinja" in files
    assert names == files
