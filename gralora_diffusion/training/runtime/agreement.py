"""How the processes of a run agree on facts before they rely on them.

Processes may be on machines that share no folder. A decision on which collectives depend is either
made by the first process and sent to the others, or made by all and compared. An error in one
process stops all of them, so that none waits for a call that another will never make.
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

#: How long a process waits while one works for all, such as when generating validation images.
_PATIENCE = timedelta(hours=6)


class OtherProcessFailed(RuntimeError):
    """Another process of the run failed; the message says which, where and why."""


def together(accelerator: Accelerator, work: Callable[[], Value]) -> Value:
    """Return the result of ``work`` here, once it succeeded in every process. All must call it.

    Raises:
        Exception: ``work`` failed here with it.
        OtherProcessFailed: ``work`` only failed in another process.
    """
    results: list[Value] = []
    _done_by_all(accelerator, lambda: results.append(work()))
    return results[0]


def from_first(accelerator: Accelerator, work: Callable[[], Value]) -> Value:
    """Have the first process do ``work`` and return its result, which must be picklable, in all.

    Every process must call it, and continues when the first one is done.

    Raises:
        Exception: ``work`` failed with it; raised in the first process.
        OtherProcessFailed: ``work`` failed; raised in the others.
    """
    done: list[Value | None] = _done_by_all(
        accelerator, lambda: work() if accelerator.is_main_process else None
    )
    first: Any = done[0]
    return first


def from_all(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return the values of all processes, by rank; all must call it with a picklable value.

    Raises:
        OtherProcessFailed: another process ended.
    """
    if accelerator.num_processes == 1:
        return [value]
    gathered: list[Any] = [None] * accelerator.num_processes
    try:
        dist.all_gather_object(gathered, value, group=_patient_group(dist.group.WORLD))
    except RuntimeError as error:  # gloo raises it when a connection is closed
        # a broken group would abort the program when it exits
        dist.destroy_process_group(_patient_group(dist.group.WORLD))
        _patient_group.cache_clear()
        raise OtherProcessFailed(
            f"another process ended, and this one cannot continue alone ({error}). The output of "
            "the other process says why"
        ) from error
    return gathered


def wait_for_all(accelerator: Accelerator) -> None:
    """Wait until every process is here, which may take hours."""
    from_all(accelerator, None)


def check_alike(accelerator: Accelerator, facts: Mapping[str, Any], advice: str) -> None:
    """Check that every process has the same facts; all must call it.

    Args:
        facts: the beginning of a sentence, such as "--rank is" -> a picklable value. The keys are
            the same in every process.
        advice: what to do if they differ.

    Raises:
        ConfigError: facts differ. It is raised in every process and lists all of them.
    """
    gathered = from_all(accelerator, (socket.gethostname(), dict(facts)))
    first_host, first = gathered[0]
    problems = []
    for rank, (host, theirs) in enumerate(gathered):
        problems += [
            f"{name} {first[name]} in process 0 on {first_host}, but {theirs[name]} in process "
            f"{rank} on {host}. {advice}"
            for name in first
            if theirs[name] != first[name]
        ]
    if problems:
        raise ConfigError(problems)


def _done_by_all(accelerator: Accelerator, work: Callable[[], Value]) -> list[Value]:
    """Return the results of ``work`` in all processes; an error in one is an error in all."""
    failure: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as error:
        failure = error
    text = None if failure is None else f"{type(failure).__name__}: {failure}"
    gathered = from_all(accelerator, (socket.gethostname(), text, result))
    if failure is not None:
        raise failure
    for rank, (host, text, _) in enumerate(gathered):
        if text is not None:
            raise OtherProcessFailed(f"process {rank} on {host} failed. {text}")
    return [result for _, _, result in gathered]


@lru_cache(maxsize=1)  # another run in this program has another group
def _patient_group(world: Any) -> Any:
    """Return a gloo group of all processes. gloo notices at once when one ends; NCCL waits."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
