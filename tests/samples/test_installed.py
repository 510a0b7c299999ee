"""The package from its wheel and sdist, in an environment that knows nothing of the clone."""

import hashlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import gralora_diffusion
from tests.built import OF_A_CLONE, build, tree


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("built"))


def install(archive, folder):
    """Make an environment outside the clone with the package from an archive; return its programs.

    It sees the libraries of this one, but not this one's package: ``.pth`` files that a ``.pth``
    file leads to are not read.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.check_output([str(python), "-c", query], text=True).strip()
    ours = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (Path(packages) / "libraries.pth").write_text("\n".join(sorted(ours)), encoding="utf-8")
    line = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    line += ["--no-deps", "--no-index", "--no-build-isolation", "--no-compile"]
    line += ["--disable-pip-version-check", str(archive)]
    done = subprocess.run(line, cwd=folder, env=clean(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python.parent


def clean():
    """This process's environment without what leads to the clone."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.fixture(scope="module")
def from_wheel(built, tmp_path_factory):
    (archive,) = built.glob("*.whl")
    return install(archive, tmp_path_factory.mktemp("environment") / "from wheel")


def said(line, folder, code=0):
    """Run a command elsewhere; return what it prints, errors included."""
    done = subprocess.run(
        [str(word) for word in line], cwd=folder, env=clean(), capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stderr + done.stdout


def test_commands_of_a_fresh_environment(from_wheel, tmp_path):
    version = f"gralora {gralora_diffusion.__version__}\n"
    assert said([from_wheel / "gralora", "--version"], tmp_path) == version
    module = [from_wheel / "python", "-m", "gralora_diffusion"]
    assert said([*module, "--version"], tmp_path) == version
    problem = said([*module, "train", "--config", "sdxl"], tmp_path, code=2)
    assert "--instance_data_dir is missing" in problem
    assert "pretrained_model_name_or_path is missing" not in problem
    said([*module, "samples", "--output", "copied"], tmp_path)
    copied = {path.relative_to(tmp_path / "copied") for path in (tmp_path / "copied").rglob("*.*")}
    ours = {Path(name).relative_to("samples") for name in tree("samples").keys() - OF_A_CLONE}
    assert {path for path in copied if (tmp_path / "copied" / path).is_file()} == ours


#: Both in one process, because importing torch and diffusers takes seconds. One step of everything.
DEMO_AND_BENCHMARK = """
import sys

from gralora_diffusion import demo
from gralora_diffusion.cli import main

demo.PROMPTS = demo.PROMPTS[:1]

steps = "--max_train_steps 1 --lr_warmup_steps 0 --train_batch_size 1".split()
main(["demo", "shown", *steps])
one = "--methods lora-r16 --subjects robot --seeds 0 --images_per_prompt 1 --inference_steps 1"
few = "--protocols subject --max_prompts 1 --output_dir compared"
main(["benchmark", "--suite", "tiny", *one.split(), *few.split(), *steps])
print(sys.modules["gralora_diffusion"].__file__)
"""


def test_demo_and_benchmark_of_a_fresh_environment(from_wheel, tmp_path):
    """From the wheel, in an empty folder, without the clone."""
    printed = said([from_wheel / "python", "-c", DEMO_AND_BENCHMARK], tmp_path)
    assert Path(printed.splitlines()[-1]).is_relative_to(from_wheel.parent)
    assert Image.open(tmp_path / "shown/grid.png").size == (112 + 5 * 200, 3 * 200 + 52)
    assert (tmp_path / "shown/pytorch_gralora_weights.safetensors").is_file()
    assert (tmp_path / "compared/report/index.html").is_file()


def test_the_sdist_installs_the_same(built, tmp_path):
    (archive,) = built.glob("*.tar.gz")
    programs = install(archive, tmp_path / "from sdist")
    (folder,) = (tmp_path / "from sdist").rglob("site-packages")
    installed = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / "gralora_diffusion").rglob("*")
        if path.is_file()
    }
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert installed == {name: hashlib.sha256(wheel.read(name)).hexdigest() for name in names}
    version = f"gralora {gralora_diffusion.__version__}\n"
    assert said([programs / "gralora", "--version"], tmp_path) == version
