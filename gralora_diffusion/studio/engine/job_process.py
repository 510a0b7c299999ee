"""The process of a job: it runs one command, and leaves its output and exit code as files.

It does not depend on the studio, which may end and start again in the meantime. It is started as
``python -m gralora_diffusion.studio.engine.job_process FOLDER``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import psutil

from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.tensor_files import replacing

JOB, STARTED, ENDED, LOG = "job.json", "started.json", "ended.json", "log.txt"
#: Of a job's file, in bytes.
MOST_BYTES = 1 << 20


def main() -> None:
    """Run the command of the job in the folder that the command line names."""
    folder = Path(sys.argv[1])
    if not _claim(folder):
        return  # another process has it
    job = read_object(folder / JOB, MOST_BYTES)
    child: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in child:
            process.send_signal(number)

    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, pass_on)
    with (folder / LOG).open("ab") as log:
        line = [sys.executable, *map(str, job["command"])]
        child.append(
            subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        )
        for early in asked:  # before there was a child
            child[0].send_signal(early)
        code = child[0].wait()
    write(folder / ENDED, {"code": code})


def _claim(folder: Path) -> bool:
    """Become the process of the job; False if there is one already."""
    mine = folder / f".{STARTED}.{os.getpid()}"
    write(mine, {"pid": os.getpid(), "since": psutil.Process().create_time()})
    try:
        os.link(mine, folder / STARTED)  # fails if it exists, and is never seen half written
    except FileExistsError:
        return False
    finally:
        mine.unlink()
    return True


def write(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
