"""A part of the rehearsal in processes of its own, because the guard is loaded before torch."""

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
        "training/flux/images",
        "training/flux2/teacher",
        "training/flux2-klein/teacher",
        "training/stable-diffusion/cached",
        "training/stable-diffusion-3/teacher",
        "training/stable-diffusion-xl/encoders",
    ],
    "the rest": [
        "adapters/flux/leaf-stream",
        "adapters/stable-diffusion/sequential",
        "benchmark",
        "export",
        "overflow",
        "planted",
        "sample",
    ],
}


@pytest.mark.skipif(guard.compiler() is None, reason="needs a C++ compiler (g++, or one in CXX)")
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN)
def test_on_a_pretended_gpu(chosen: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.rehearsal", "--parts", *chosen],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    passed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("passed ")]
    assert sorted(passed) == sorted(chosen)
