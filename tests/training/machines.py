"""Two processes of one run as on two machines: a folder each, and the network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.training.runs import environment


def on_two_machines(program: str, *arguments: str | Path) -> list[tuple[int, str]]:
    """Run Python code in both, with these arguments and the rank; return exit codes and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        launched = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", program, *map(str, arguments), str(rank)],
                env={**environment(), **{k: str(v) for k, v in launched.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=os.getcwd(),
            )
        )
    try:
        texts = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, text) for p, text in zip(processes, texts, strict=True)]
