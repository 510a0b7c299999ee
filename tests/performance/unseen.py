"""Paths that need hardware, and whether a machine has run them: a table of the documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.performance.measuring import table

#: Path -> the part of the GPU day that runs it, and what else has run it.
PATHS: dict[str, tuple[str | None, str]] = {
    "training, bf16 and fp16, on CUDA": ("steps", "a simulated GPU"),
    "gradient checkpointing on CUDA": ("checkpointing", "a simulated GPU"),
    "model, layer and group offloading on CUDA": ("gpu-tests", "a simulated GPU, without streams"),
    "`export --verify` and the benchmark's encoders on CUDA": ("suite", "a simulated GPU"),
    "bitsandbytes, 8 and 4 bits": ("quantized", "CPU, where it has kernels"),
    "torchao on CUDA": ("quantized", "CPU"),
    "streaming of a frozen base between host and GPU": ("streaming", ""),
    "`--torch_compile` with Triton": ("compile", "CPU, with C++"),
    "fused attention kernels (Flash, xformers)": (None, ""),
    "peak memory against the plan": ("steps", ""),
    "several GPUs, over NCCL": (None, "two processes on a CPU, over gloo"),
    "a base sharded by FSDP2, over NCCL": (None, "two processes on a CPU, over gloo"),
    "AMD and Apple GPUs": (None, ""),
}


def as_table(results: Mapping[str, Any]) -> str:
    """Return the table in Markdown, with the machine of each part of the GPU day in ``results``."""
    rows = []
    for path, (part, instead) in PATHS.items():
        there = part is not None and part in results and not results[part]["quick"]
        run = results[part]["machine"].partition(",")[0] if there else "no machine yet"
        how = "-" if part is None else f"`python -m tests.performance.gpu --parts {part}`"
        rows.append([path, run, how, instead or "-"])
    return table(["path", "run on", "command", "otherwise run on"], rows, markdown=True)
