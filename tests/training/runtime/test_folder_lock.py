"""A folder belongs to one process, and to none once that is gone."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.runtime import folder_lock
from gralora_diffusion.training.runtime.folder_lock import LOCK_NAME, OWNER_NAME, is_owned, owned

HOLDER = """
import sys
from pathlib import Path
from gralora_diffusion.training.runtime.folder_lock import owned
with owned(Path(sys.argv[1]), "--output_dir"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that owns ``tmp_path/out``."""
    (tmp_path / "out").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path: Path, holder) -> None:
    folder = tmp_path / "out"
    (folder / "of the run").touch()
    with pytest.raises(ConfigError) as caught, owned(folder, "--output_dir 'out'"):
        raise AssertionError("owned twice")
    said = f"--output_dir 'out' is in use by process {holder.pid} on {socket.gethostname()} since 2"
    assert said in str(caught.value)
    assert "another folder" in str(caught.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder / LOCK_NAME).exists()  # of a dead process, which holds nothing
    with owned(folder, "--output_dir"):
        assert json.loads((folder / OWNER_NAME).read_text())["pid"] == os.getpid()
    assert [path.name for path in folder.iterdir()] == ["of the run"]


def test_within_one_process_too(tmp_path: Path) -> None:
    with owned(tmp_path, "--output_dir"):
        with pytest.raises(ConfigError, match="is in use by process"), owned(tmp_path, "again"):
            raise AssertionError("owned twice")
        assert (tmp_path / OWNER_NAME).exists()  # who was refused took nothing away
    with owned(tmp_path, "--output_dir"):
        pass


def test_nothing_is_left_of_a_folder_into_which_nothing_was_put(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with owned(folder, "--output_dir"):
        assert (folder / LOCK_NAME).is_file()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "[]",
            '{"pid": "x"}',
            '{"pid": 1, "host": "a", "since": 1e99}',
            "\ud800",
            "[" * 10**6,
        ),
        '{"pid": ' + "9" * 300 + ', "host": "a", "since": 1}',
    ],
)
def test_any_owner_file_is_told_safely(tmp_path: Path, text: str) -> None:
    lock = FileLock(tmp_path / LOCK_NAME)
    with lock:
        (tmp_path / OWNER_NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ConfigError, match="is in use by another process;"), owned(tmp_path, ""):
            pass


def test_a_host_cannot_write_into_the_terminal(tmp_path: Path) -> None:
    facts = {"pid": 7, "host": "a\x1b[2Jb\n", "since": 0}
    with FileLock(tmp_path / LOCK_NAME):
        (tmp_path / OWNER_NAME).write_text(json.dumps(facts))
        with (
            pytest.raises(ConfigError, match=r"process 7 on a\?\?2Jb\? since 19"),
            owned(tmp_path, "--output_dir"),
        ):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    class NoLocks(FileLock):  # as NFS without its lock service
        def acquire(self, *arguments: Any, **named: Any) -> Any:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_lock, "FileLock", NoLocks)
    with owned(tmp_path / "out", "--output_dir 'out'"):
        (tmp_path / "out" / "result").touch()
    assert "--output_dir 'out' is on a file system without locks" in caplog.text
    assert (tmp_path / "out" / "result").exists()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    """filelock 3.12, the oldest allowed, would empty the other file."""
    (other := tmp_path / "other").write_text("content")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).symlink_to(other)
    assert is_owned(tmp_path / "run") is None
    with (
        pytest.raises(ConfigError, match="it is a link or no file, delete it"),
        owned(tmp_path / "run", "--output_dir"),
    ):
        pass
    assert other.read_text() == "content"


def test_what_cannot_be_made_is_an_error_of_the_options(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="--output_dir cannot be written to"),
        owned(tmp_path / "file" / "out", "--output_dir"),
    ):
        pass
