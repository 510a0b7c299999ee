"""A part of the rehearsal in a process of its own, because the guard is loaded before torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.rehearsal import guard

FAMILIES = (
    "flux",
    "flux2",
    "flux2-klein",
    "stable-diffusion",
    "stable-diffusion-3",
    "stable-diffusion-xl",
)
SETTINGS = ("cached", "encoders", "images", "teacher")
#: Every family with every setting, every placement, and the commands; ``python -m tests.rehearsal``
#: has all of their combinations.
CHOSEN = {
    "training": [f"training/{family}/{setting}" for family in FAMILIES for setting in SETTINGS],
    "the rest": [
        "device",
        "training/edits/pix2pix",
        *(f"adapters/{family}/whole" for family in FAMILIES),
        *(f"adapters/flux/{placed}" for placed in ("leaf", "leaf-stream", "block-stream")),
        *(f"adapters/stable-diffusion/{placed}" for placed in ("model", "sequential")),
        "benchmark",
        "export",
        "overflow",
        "planted/step/cpu",
        "planted/step/generator",
        "planted/step/number",
        "planted/step/unpinned",
        "sample",
        "stopped",
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
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    passed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("passed ")]
    assert sorted(passed) == sorted(chosen)
