"""What the processes of a run tell each other before they rely on it.

Processes may be on machines that share no folder. What decides which collectives a process takes
part in is decided by the first and sent, or compared, and an error of one stops all: none waits for
what another will never do.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator

from gralora_diffusion.io.errors import ConfigError

Value = TypeVar("Value")

#: How long a process waits for what one does for all, such as to generate validation images.
_PATIENCE = timedelta(hours=6)


class OtherProcessFailed(RuntimeError):
    """Another process of the run failed; the text says which, where and why."""


def together(accelerator: Accelerator, work: Callable[[], Value]) -> Value:
    """Return what ``work`` returns here, once it went well in every process. All must call it.

    Raises:
        Exception: what ``work`` raised here.
        OtherProcessFailed: it failed in another process only.
    """
    results: list[Value] = []
    _done_by_all(accelerator, lambda: results.append(work()))
    return results[0]


def from_first(accelerator: Accelerator, work: Callable[[], Value]) -> Value:
    """Have the first process do ``work``; return what it returned, which pickle must take.

    Every process must call it, and goes on when the first one is done.

    Raises:
        Exception: what ``work`` raised, in the first process.
        OtherProcessFailed: the same in the others.
    """
    done: list[Value | None] = _done_by_all(
        accelerator, lambda: work() if accelerator.is_main_process else None
    )
    first: Any = done[0]
    return first


def wait_for_all(accelerator: Accelerator) -> None:
    """Go on once every process is here, which may take hours."""
    _common_to_all(accelerator, None)


def check_alike(accelerator: Accelerator, facts: Mapping[str, Any], advice: str) -> None:
    """Check that every process has the same facts; all must call it.

    Args:
        facts: what it is about, such as "--rank is" -> a value that pickle takes; of the same
            things in every process.
        advice: what to do if they differ.

    Raises:
        ConfigError: in every process, with all facts that differ.
    """
    told = _common_to_all(accelerator, (socket.gethostname(), dict(facts)))
    first_host, first = told[0]
    problems = []
    for rank, (host, theirs) in enumerate(told):
        problems += [
            f"{name} {first[name]} in process 0 on {first_host}, but {theirs[name]} in process "
            f"{rank} on {host}. {advice}"
            for name in first
            if theirs[name] != first[name]
        ]
    if problems:
        raise ConfigError(problems)


def _done_by_all(accelerator: Accelerator, work: Callable[[], Value]) -> list[Value]:
    """What ``work`` returned in each process; an error in one is an error in all."""
    failure: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as error:
        failure = error
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    told = _common_to_all(accelerator, (socket.gethostname(), text, result))
    if failure is not None:
        raise failure
    for rank, (host, text, _) in enumerate(told):
        if text is not None:
            raise OtherProcessFailed(f"process {rank} on {host} failed. {text}")
    return [result for _, _, result in told]


def _common_to_all(accelerator: Accelerator, value: Any) -> list[Any]:
    """What each process tells, by rank."""
    if accelerator.num_processes == 1:
        return [value]
    told: list[Any] = [None] * accelerator.num_processes
    try:
        dist.all_gather_object(told, value, group=_patient_group(dist.group.WORLD))
    except RuntimeError as error:  # gloo's, once a connection is closed
        dist.destroy_process_group(_patient_group(dist.group.WORLD))  # broken, it aborts at the end
        _patient_group.cache_clear()
        raise OtherProcessFailed(
            f"another process ended, and this one cannot go on alone ({error}). What the other "
            "wrote says why"
        ) from error
    return told


@lru_cache(maxsize=1)  # of the present processes; another run in this program has others
def _patient_group(world: Any) -> Any:
    """The processes over gloo, which notices at once when one ends, where NCCL waits."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
