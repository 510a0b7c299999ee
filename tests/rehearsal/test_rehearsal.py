"""A part of the rehearsal in a process of its own, because the guard is loaded before torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.rehearsal import guard

#: Every family, every setting, and the commands; ``python -m tests.rehearsal``
#: has all of their combinations.
CHOSEN = {
    "training": [
        "device",
        "training/edits/pix2pix",
        "training/flux/images",
        "training/flux2/teacher",
        "training/flux2-klein/teacher",
        "training/stable-diffusion-3/cached",
        "training/stable-diffusion-xl/encoders",
    ],
    "the rest": [
        "adapters/flux/leaf-stream",
        "adapters/stable-diffusion/sequential",
        "benchmark",
        "export",
        "overflow",
        "planted/step/cpu",
        "planted/step/generator",
        "planted/step/number",
        "planted/step/unpinned",
        "sample",
    ],
}


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """All chosen parts in one process: a second one would import everything again."""
    parts = [part for chosen in CHOSEN.values() for part in chosen]
    return subprocess.run(
        [sys.executable, "-m", "tests.rehearsal", "--parts", *parts],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


@pytest.mark.skipif(guard.compiler() is None, reason="needs a C++ compiler (g++, or one in CXX)")
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_on_a_pretended_gpu(chosen: list[str], done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    passed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("passed ")]
    assert sorted(part for part in passed if part in chosen) == sorted(chosen)
