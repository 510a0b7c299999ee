"""Python programs in processes of their own, which need not import everything again.

A new interpreter takes ten seconds for torch, diffusers and PEFT. Python's fork server takes them
once; it computes nothing and has no threads, so that what is forked from it is as good as new.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed import TCPStore

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.tiny", "gralora_diffusion.training.run", __name__])


class Forked:
    """As ``python -c program arguments``, already begun; stderr is kept with stdout."""

    needs: object = None  # what has to live as long as this

    def __init__(self, program: str, *arguments: str | Path, **variables: object) -> None:
        self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115  it lives as long as this
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        line = ["-c", *map(str, arguments)]
        self.process = _SERVER.Process(
            target=_run, args=(program, line, environment, self._output.name)
        )
        self.process.start()

    @property
    def said(self) -> str:
        """What it has written up to now."""
        return Path(self._output.name).read_bytes().decode()

    def wait(self, timeout: float = 120) -> tuple[int, str]:
        """Return exit code and output; kill what takes longer."""
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode, self.said


def start_ranks(program: str, *arguments: str | Path, machines: bool = False) -> list[Forked]:
    """Run a program in two processes of one run, as torchrun does; both are already begun.

    Args:
        machines: the processes are on a machine each, as far as they know.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: a free one
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "ACCELERATE_USE_CPU": "true"}
    processes = []
    for rank in range(2):
        local = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        if not machines:
            local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
        processes.append(Forked(program, *arguments, RANK=rank, **local, **shared))
        processes[-1].needs = store
    return processes


def fork_ranks(
    program: str, *arguments: str | Path, machines: bool = False, timeout: float = 120
) -> list[tuple[int, str]]:
    """Run a program in two processes as :func:`start_ranks`; return codes and outputs."""
    processes = start_ranks(program, *arguments, machines=machines)
    return [process.wait(timeout) for process in processes]


def _run(program: str, line: list[str], environment: dict[str, str], output: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    gc.freeze()  # what the server has imported is not collected
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = line
    exec(program, {"__name__": "__main__"})
