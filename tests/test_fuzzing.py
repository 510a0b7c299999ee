"""Damaged files are read, or refused with the error that the reader documents, and nothing else.

``python -m tests.fuzzing`` reads as many as one likes; these are the first of each reader.
"""

from collections.abc import Iterator

import pytest

from .fuzzing.readers import READERS
from .fuzzing.worker import Worker

COUNT, SLOW_COUNT, SEED = 100, 20, 0
#: What is damaged here is passed over or made again.
FORGIVING = {"records", "cache", "history"}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as started:
        yield started


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name: str, worker: Worker) -> None:
    count = SLOW_COUNT if READERS[name].slow else COUNT
    outcomes = [worker.read(name, SEED, number) for number in range(count)]
    faults = [outcome for outcome in outcomes if outcome.fault]
    told = "\n".join(
        f"{f.fault}: python -m tests.fuzzing --reader {name} --seed {SEED} --only {f.number}\n"
        f"{f.details}"
        for f in faults
    )
    assert not faults, told
    # not all damage is found out, nor does all of it end at the first look
    assert any(outcome.error is None for outcome in outcomes)
    refuses = READERS[name].errors and name not in FORGIVING
    assert not refuses or any(outcome.error for outcome in outcomes)
