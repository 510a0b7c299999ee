"""The two commands of the README on a fresh clone, with a Python that only notes what it is asked.

What is checked is the shell's part: extras, folders and arguments. Nothing is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

FILES = (".ci/environment.sh", ".ci/constraints.txt", "pyproject.toml")
#: Notes its arguments, a line for each call, and makes virtual environments of itself.
STUB = """#!/usr/bin/env bash
printf '%s' "${0##*/}" >> "$CALLS"; printf '|%s' "$@" >> "$CALLS"; echo >> "$CALLS"
if [ "${1:-} ${2:-}" = "-m venv" ]; then
    mkdir -p "$3/bin"
    for name in python accelerate gralora; do cp "$0" "$3/bin/$name"; done
    echo "PATH=\\"$PWD/$3/bin:\\$PATH\\"" > "$3/bin/activate"
fi
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def call(tmp_path: Path, script: str, *arguments: str, **variables: str) -> list[list[str]]:
    """Run a script in a fresh clone from ``tmp_path/here``; return the commands that it gave."""
    clone, here, calls = tmp_path / "a clone", tmp_path / "here", tmp_path / "calls"
    for name in (*FILES, script):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    here.mkdir(exist_ok=True)
    python = tmp_path / "python"
    python.write_text(STUB, encoding="utf-8")
    python.chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("GRALORA_")}
    done = subprocess.run(
        ["bash", str(clone / script), *arguments],
        cwd=here,
        env={**inherited, "PYTHON": str(python), "CALLS": str(calls), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line.split("|") for line in calls.read_text(encoding="utf-8").splitlines()]


def installed(calls: list[list[str]]) -> str:
    (line,) = [call for call in calls if "pip" in call]
    return line[-1]


def test_other_versions(tmp_path: Path) -> None:
    for constraints in (".ci/constraints.txt", "/dev/null"):
        calls = call(tmp_path, "tests/run.sh", GRALORA_CONSTRAINTS=constraints)
        (line,) = [call for call in calls if "pip" in call][-1:]
        assert line[line.index("-c") + 1] == constraints


@pytest.mark.parametrize(
    "given", [(), ("/some/folder",), ("a folder",), ("-odd/x",), ("",), ("x", "--rank", "4")]
)
def test_demo(tmp_path: Path, given: tuple[str, ...]) -> None:
    calls = call(tmp_path, "samples/demo.sh", *given)
    assert installed(calls) == "."  # no extras, whatever the folder is called
    folder, *rest = given or ("",)
    if folder and not folder.startswith("/"):
        folder = str(tmp_path / "here" / folder)
    if not folder:  # the same folder again and again
        folder, rest = "outputs/demo", ["--overwrite_output_dir", *rest]
    assert calls[-1] == ["gralora", "demo", folder, *rest]


def test_tests(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "test_x.py").touch()
    given = ("-q", "test_x.py::test_a b", "/abs/y.py", "tests/no_such.py", "-k", "here or x")
    calls = call(tmp_path, "tests/run.sh", *given)
    assert installed(calls) == ".[dev]"
    there = f"{tmp_path / 'here'}/test_x.py::test_a b"
    assert calls[-1] == ["python", "-m", "pytest", *(given[0], there, *given[2:])]


def test_all_tests_take_all_cores(tmp_path: Path) -> None:
    line = ["python", "-m", "pytest", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    assert call(tmp_path, "tests/run.sh")[-1] == line
