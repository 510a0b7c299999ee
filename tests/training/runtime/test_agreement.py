"""A decision of one process holds for all, and an error in one is reported by all."""

from __future__ import annotations

import pytest
from accelerate import Accelerator

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.runtime.agreement import (
    check_alike,
    from_first,
    together,
    wait_for_all,
)
from tests.forked import fork_ranks

PROGRAM = """
import os
from accelerate import Accelerator
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.runtime.agreement import (
    OtherProcessFailed, check_alike, from_first, together, wait_for_all
)
accelerator = Accelerator()
rank = accelerator.process_index

def told(work):
    try:
        print(work(), flush=True)
    except (ConfigError, ValueError, OtherProcessFailed) as error:
        print(type(error).__name__, str(error).replace(chr(10), " "), flush=True)

def fail(there):
    if rank == there:
        raise ValueError(f"wrong in {rank}")
    return f"right in {rank}"

told(lambda: from_first(accelerator, lambda: f"of {rank}"))
told(lambda: from_first(accelerator, lambda: fail(0)))
told(lambda: from_first(accelerator, lambda: fail(1)))
told(lambda: together(accelerator, lambda: fail(None)))
told(lambda: together(accelerator, lambda: fail(1)))
told(lambda: check_alike(accelerator, {"a is": 1, "b is": "x"}, "Do."))
told(lambda: check_alike(accelerator, {"a is": 1, "b is": rank, "c is": [rank]}, "Do this"))
wait_for_all(accelerator)
if rank == 1:
    os._exit(7)
told(lambda: wait_for_all(accelerator))
"""


def test_two_processes() -> None:
    (code, first), (other_code, second) = fork_ranks(PROGRAM, machines=True)
    assert (code, other_code) == (0, 7), first + second

    def lines(text: str) -> list[str]:
        known = ("of ", "right", "None", "ValueError", "Other", "Config")
        return [line for line in text.splitlines() if line.startswith(known)]

    ours, theirs = lines(first), lines(second)
    assert ours[0] == theirs[0] == "of 0"
    assert ours[1] == "ValueError wrong in 0"
    assert theirs[1].startswith("OtherProcessFailed process 0 on ")
    assert theirs[1].endswith("failed. ValueError: wrong in 0")
    assert ours[2] == theirs[2] == "right in 0"
    assert (ours[3], theirs[3]) == ("right in 0", "right in 1")
    assert ours[4].endswith("failed. ValueError: wrong in 1")
    assert theirs[4] == "ValueError wrong in 1"
    assert ours[5] == theirs[5] == "None"
    assert ours[6] == theirs[6]
    assert ours[6].startswith("ConfigError 2 problems with the options:   b is 0 in process 0 on ")
    assert ", but 1 in process 1 on " in ours[6]
    assert "c is [0] in process 0" in ours[6]
    assert "Do this" in ours[6]
    assert ours[7].startswith("OtherProcessFailed another process ended")  # at once, not in hours


def test_one_process_asks_nobody() -> None:
    accelerator = Accelerator(cpu=True)
    assert from_first(accelerator, lambda: 1) == together(accelerator, lambda: 1) == 1
    wait_for_all(accelerator)
    check_alike(accelerator, {"a is": 1}, "")
    with pytest.raises(ConfigError, match="wrong"):
        together(accelerator, lambda: (_ for _ in ()).throw(ConfigError(["wrong"])))
