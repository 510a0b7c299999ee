"""An export that is killed leaves no half file; its memory does not grow with the file."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gralora_diffusion.adapters.layers import functional
from gralora_diffusion.export import streaming
from gralora_diffusion.export.rounding import Rounding
from gralora_diffusion.export.streaming import OutputTensor, Piece, write_streamed
from gralora_diffusion.io.tensor_files import read_header


class Update:
    """Of any weight of one shape."""

    def __init__(self, out_features: int, in_features: int) -> None:
        A, B = functional.init_factors(in_features, out_features, 8, 4, zero_update=False)
        self.factors = functional.row_factors(A, B)

    def add_to(self, target: torch.Tensor, start: int) -> None:
        functional.add_delta_rows(target, *self.factors, start, 0.3)


def outputs_in(folder: Path, tensors: int, rows: int, columns: int) -> list[OutputTensor]:
    """Tensors of a new ``base.safetensors``; three quarters are changed."""
    base = folder / "base.safetensors"
    names = [f"{number:02d}.weight" for number in range(tensors)]
    save_file({name: torch.randn(rows, columns).bfloat16() for name in names}, base)
    update, stored = Update(rows, columns), read_header(base)[0]
    return [
        OutputTensor(
            name,
            (rows, columns),
            torch.bfloat16,
            (Piece(stored[name], 0, rows, update=(lambda: update) if number % 4 else None),),
        )
        for number, name in enumerate(names)
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_BLOCK", 1 << 14)
    outputs, base = outputs_in(tmp_path, 20, 256, 512), tmp_path / "base.safetensors"
    before, path = base.read_bytes(), tmp_path / "out.safetensors"
    processes = multiprocessing.get_context("fork")
    started, killed = processes.Event(), 0

    def run() -> None:
        started.set()
        write_streamed(path, outputs, {}, Rounding(), progress=False)

    begin = time.perf_counter()
    run()
    seconds, whole = time.perf_counter() - begin, path.read_bytes()
    for attempt in range(30):
        path.unlink(missing_ok=True)
        there = b"before" if attempt % 2 else None
        if there:
            path.write_bytes(there)
        started.clear()
        process = processes.Process(target=run)
        process.start()
        started.wait()
        time.sleep(seconds * random.random())
        process.kill()
        process.join()
        killed += process.exitcode != 0
        assert (path.read_bytes() if path.exists() else None) in (there, whole)
        assert base.read_bytes() == before
        if killed == 8:
            break
    assert killed > 2
    run()
    assert path.read_bytes() == whole


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    def anonymous() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    outputs = outputs_in(tmp_path, 16, 2048, 2048)
    samples, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            samples.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    path = tmp_path / "out.safetensors"
    write_streamed(path, outputs, {}, Rounding(), progress=False, workers=2)
    done.set()
    watcher.join()
    assert len(samples) > 10
    assert max(samples) - samples[0] < 64  # MiB; the file has 128, its values in fp32 256
