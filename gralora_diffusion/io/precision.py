"""How exactly fp32 numbers are multiplied: TF32 keeps 10 of the 23 bits of a factor's mantissa.

By default, cuDNN's convolutions use TF32 on NVIDIA GPUs since Ampere, and matrix products do not.
``torch.set_float32_matmul_precision`` allows TF32 there, and bf16 on CPUs that compute in it.
torch 2.9 has new switches (``fp32_precision``) beside the old ones (``allow_tf32``). Setting an old
one sets both. Reading an old one raises an error while its new one is set to something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Turn TF32 and bf16 off inside, for numbers in fp32 that are compared with each other."""
    import torch

    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    exact: Any
    if hasattr(cudnn, "conv"):  # torch >= 2.9
        cpu: Any = torch.backends.mkldnn
        name, exact = "fp32_precision", "ieee"
        switches = [matmul, cudnn.conv, cpu.matmul, cpu.conv]
    else:
        name, exact, switches = "allow_tf32", False, [matmul, cudnn]
    with ExitStack() as stack:
        if name == "allow_tf32":  # the one switch for the CPU
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        for switch in switches:
            stack.callback(setattr, switch, name, getattr(switch, name))
            setattr(switch, name, exact)
        yield


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Let matrix products use TF32 inside if ``allowed``; else leave them as they are."""
    import torch

    matmul: Any = torch.backends.cuda.matmul
    try:
        already = bool(matmul.allow_tf32)
    except RuntimeError:  # the new switch alone was set
        already = False
    if not allowed or already:
        yield
        return
    new = getattr(matmul, "fp32_precision", None)
    matmul.allow_tf32 = True  # the old switch, because torch.compile reads both
    try:
        yield
    finally:
        matmul.allow_tf32 = False
        if new is not None and matmul.fp32_precision != new:
            matmul.fp32_precision = new
