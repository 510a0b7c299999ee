"""Settings that every test needs; they must be in place before diffusers is imported."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # quiet about torchvision, which is not needed

from collections.abc import Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

torch.set_num_threads(1)  # tiny models: threads cost many times what they bring


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the settings of its first use for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
