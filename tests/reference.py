"""The definition of a GraLoRA update, written plainly. Imports nothing from the package.

Block (j, n) of the update is ``(A[n][:, j-th chunk] @ B[j][n-th chunk, :]).T``, chunks of r / k.
"""

import torch
from torch import Tensor


def dense_update(A: Tensor, B: Tensor) -> Tensor:
    """The update (out, in, *kernel) of A (k, in / k, r, *kernel) and B (k, r, out / k), float64."""
    (k, i, r), o, A, B = A.shape[:3], B.shape[2], A.double(), B.double()
    s, update = r // k, torch.zeros(k * o, k * i, *A.shape[3:], dtype=torch.float64)
    for j in range(k):
        for n in range(k):
            block = torch.einsum(
                "is...,so->oi...", A[n][:, j * s : (j + 1) * s], B[j][n * s : (n + 1) * s]
            )
            update[j * o : (j + 1) * o, n * i : (n + 1) * i] = block
    return update


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected value."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())
