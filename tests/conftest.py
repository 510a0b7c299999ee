"""Settings that every test needs; they must be in place before diffusers is imported.

torch, accelerate and diffusers are imported where they are used: the process that hands out the
tests to pytest-xdist's workers needs none of them, and the workers wait until it has started.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # quiet about torchvision, which is not needed

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from tqdm import tqdm

# else a forked process that is killed may hold the lock of all, for which the others wait for ever
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))
gc.set_threshold(20_000, 20, 20)  # far fewer than Python's usual collections: 6% of all the time

#: Where single tests take longest.
LONGEST = (
    *("tests/rehearsal/", "tests/studio/test_browser", "tests/training/test_stopping"),
    *("tests/samples/test_installed", "tests/samples/test_quickstart"),
    *("tests/training/test_killed", "tests/benchmark/test_ray_cluster"),
    "tests/training/runtime/test_acceleration",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several processes, none waits at the end for another's long test."""
    if hasattr(config, "workerinput"):  # pytest-xdist
        items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores, since tests wait for files, browsers and other processes."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what is imported by now out of the trainer's garbage collections."""
    import torch

    torch.set_num_threads(1)  # tiny models: threads cost many times what they bring
    _freeze(session)


def _freeze(session: pytest.Session) -> None:
    """Leave what is there out of later collections, each of which would take up to a second."""
    gc.collect()
    gc.freeze()
    session.stash[_FROZEN_MODULES] = len(sys.modules)


_FROZEN_MODULES, _FROZEN_AT = pytest.StashKey[int](), pytest.StashKey[Path]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    stash = item.session.stash
    imports_more = len(sys.modules) > stash[_FROZEN_MODULES] + 100
    if imports_more or item.path != stash.get(_FROZEN_AT, None):  # reports and fixtures add up
        _freeze(item.session)
        stash[_FROZEN_AT] = item.path
    import torch

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:  # the same without a stack trace in each test, kept for a GPU that might be found
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the settings of its first use for the whole process."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion pipeline in diffusers' folder layout."""
    from tests.models import stable_diffusion

    folder = tmp_path_factory.mktemp("base")
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's tiny pipeline in diffusers' folder layout, for tests that only read it."""
    from tests.tiny import PIPELINES

    @cache
    def saved(family: str) -> Path:
        folder = tmp_path_factory.mktemp("bases") / family
        PIPELINES[family]().save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images to learn."""
    from tests.training.runs import make_images

    return make_images(tmp_path_factory.mktemp("images"))
