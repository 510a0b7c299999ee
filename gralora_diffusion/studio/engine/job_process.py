"""The process of a job: it runs one command, and leaves its output and exit code as files.

It does not depend on the studio, which may end and start again in the meantime. It is started as
``python -m gralora_diffusion.studio.engine.job_process FOLDER``, with the log as its output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from gralora_diffusion.io.exclusive_files import create_once
from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.tensor_files import replacing

from .signatures import is_signed

JOB, STARTED, CANCELLED, ENDED = "job.json", "started.json", "cancelled.json", "ended.json"
#: Of a job's file, in bytes.
MOST_BYTES = 1 << 20


def main() -> None:
    """Run the command of the job in the folder that the command line names."""
    folder = Path(sys.argv[1])
    job = read_object(folder / JOB, MOST_BYTES)
    if not is_signed(folder, job):
        sys.exit("this job was not made by this user in this folder, so it is not run")
    if not _claim(folder):
        return  # another process has it
    if (folder / CANCELLED).exists():  # since this process was started
        write(folder / ENDED, {"code": -signal.SIGTERM})
        return
    child: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in child:
            process.send_signal(number)

    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, pass_on)
    line = [sys.executable, *map(str, job["command"])]
    child.append(subprocess.Popen(line, stdin=subprocess.DEVNULL))
    for early in asked:  # before there was a child
        child[0].send_signal(early)
    write(folder / ENDED, {"code": child[0].wait()})


def _claim(folder: Path) -> bool:
    """Become the process of the job; False if there is one already."""
    return create_once(folder / STARTED, json.dumps({"pid": os.getpid()}).encode())


def write(path: Path, content: dict[str, object]) -> None:
    """Write a JSON file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
