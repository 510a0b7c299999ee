"""TF32 is off or on where it is asked for, and afterwards everything is set as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch

from gralora_diffusion.io.precision import exact_fp32, tf32_products

BACKENDS: Any = torch.backends
Change = Callable[[], AbstractContextManager[None]]
NEW = hasattr(BACKENDS.cudnn, "conv")
#: What a program may have done before, by name.
SETTINGS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "old products": lambda: setattr(BACKENDS.cuda.matmul, "allow_tf32", True),
    "old convolutions": lambda: setattr(BACKENDS.cudnn, "allow_tf32", False),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}
if NEW:
    SETTINGS |= {
        "new products": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
        "new convolutions": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
        "all of torch": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    }


def readable() -> dict[str, Any]:
    """The switches whose values torch reports: not old ones that differ from the new ones."""
    switches: dict[str, Callable[[], Any]] = {
        "products": lambda: BACKENDS.cuda.matmul.allow_tf32,
        "cuDNN": lambda: BACKENDS.cudnn.allow_tf32,
        "precision": torch.get_float32_matmul_precision,
    }
    if NEW:
        switches |= {
            "new products": lambda: BACKENDS.cuda.matmul.fp32_precision.replace("ieee", "none"),
            "new convolutions": lambda: BACKENDS.cudnn.conv.fp32_precision,
        }
    found = {}
    for name, switch in switches.items():
        try:
            found[name] = switch()
        except RuntimeError:
            continue
    return found


@pytest.fixture(autouse=True)
def _as_torch_begins() -> Iterator[None]:
    yield
    if NEW:
        BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    "change", [exact_fp32, partial(tf32_products, True), partial(tf32_products, False)]
)
def test_as_before_afterwards(
    name: str, change: Callable[[], AbstractContextManager[None]]
) -> None:
    SETTINGS[name]()
    before = readable()
    with pytest.raises(OSError, match="inside"), change():
        raise OSError("inside")
    after = readable()
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("name", SETTINGS)
def test_exact(name: str) -> None:
    SETTINGS[name]()
    with exact_fp32():
        if NEW:
            assert BACKENDS.cuda.matmul.fp32_precision == "ieee"
            assert BACKENDS.cudnn.conv.fp32_precision == "ieee"
        else:
            assert not BACKENDS.cuda.matmul.allow_tf32
            assert not BACKENDS.cudnn.allow_tf32


@pytest.mark.parametrize("name", SETTINGS)
def test_products(name: str) -> None:
    SETTINGS[name]()
    before = readable()
    with tf32_products(False):
        assert readable() == before
    with tf32_products(True):
        # torch.compile reads all of them
        assert torch.get_float32_matmul_precision() == ("medium" if name == "medium" else "high")
        assert readable()["products"]
        assert not NEW or readable()["new products"] == "tf32"
