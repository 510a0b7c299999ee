"""What is said where the Hub cannot be asked, and only there."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from gralora_diffusion.adapters.adapter_file import read_adapter
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.hub import check_cache, fetch, offline_problem

SET = (
    "and the Hub is not contacted because HF_HUB_OFFLINE is set. With network access, download it "
    "with "
)
UNREACHABLE = (
    "and the Hub cannot be reached from this machine. With network access, download it with "
)
CALLS: dict[str, Callable[[str], object]] = {
    "snapshot": snapshot_download,
    "index": DiffusionPipeline.load_config,
    "pipeline": DiffusionPipeline.from_pretrained,
    "model": AutoencoderKL.load_config,
}


@pytest.fixture
def error_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Exception]:
    """Call -> what it raises, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def error(call: str) -> Exception:
        with pytest.raises((OSError, ValueError)) as caught:
            CALLS[call]("owner/absent")
        return caught.value

    return error


@pytest.mark.parametrize("call", CALLS)
def test_offline_mode(call: str, error_of: Callable[[str], Exception]) -> None:
    text = offline_problem(error_of(call), "owner/absent")
    assert text is not None
    assert text.startswith("there is no such folder, the Hub's cache does not contain all of it, ")
    assert text.endswith(f"{SET}`hf download owner/absent`, or pass a folder")


@pytest.mark.parametrize("call", CALLS)
def test_no_network(
    call: str, error_of: Callable[[str], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_address(*args: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between huggingface_hub's attempts
    text = offline_problem(error_of(call), "owner/absent", revision="v 1", cache_dir="/c")
    assert text is not None
    command = "`hf download owner/absent --revision 'v 1' --cache-dir /c`, or pass a folder"
    assert text.endswith(UNREACHABLE + command)


def test_local_files_only(error_of: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(AdapterFileError) as caught:
        read_adapter("owner/absent", local_files_only=True, revision="v1")
    reason = (
        "and the Hub is not contacted because only local files are allowed. With network access, "
    )
    assert reason in str(caught.value)
    assert "`hf download owner/absent --revision v1`" in str(caught.value)


def test_a_dataset() -> None:
    text = offline_problem(ConnectionError("x"), "owner/set", is_dataset=True, cache_dir="/c")
    assert text is not None
    command = "hf download owner/set --repo-type dataset --local-dir FOLDER"
    assert text.endswith(f"{UNREACHABLE}`{command}`, and pass that folder")


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    assert offline_problem(ValueError("x"), "owner/name") is None
    assert offline_problem(FileNotFoundError("x"), "owner/name") is None
    assert offline_problem(RepositoryNotFoundError.__new__(RepositoryNotFoundError), "x") is None
    # of a folder that is there the Hub was not asked
    assert offline_problem(LocalEntryNotFoundError("x"), tmp_path) is None
    # and an error that was dealt with is not the cause
    error = ValueError("y")
    error.__context__, error.__suppress_context__ = LocalEntryNotFoundError("x"), True
    assert offline_problem(error, "owner/name") is None


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path) -> Path:
    """A repository with one file in a cache as the Hub's client arranges it; return its folder."""
    folder = cache / "models--owner--name"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (folder / part).mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    (folder / "blobs/abc").write_text("{}")
    (folder / f"snapshots/{COMMIT}/config.json").symlink_to("../../blobs/abc")
    return folder


def test_a_cache_is_read(tmp_path: Path) -> None:
    folder = cached(tmp_path)
    (folder / f"snapshots/{COMMIT}/gone.json").symlink_to("../../blobs/gone")
    snapshot = fetch("owner/name", ["config.json"], cache_dir=tmp_path)
    assert snapshot == folder / "snapshots" / COMMIT
    check_cache("owner/name", tmp_path)
    check_cache("owner/other", tmp_path)
    check_cache("no id\0at/all", tmp_path)


@pytest.mark.parametrize(
    ("place", "kind", "text"),
    [
        ("refs/main", "pipe", "it is a named pipe"),
        ("refs/main", "device", "it is a device"),
        ("refs/main", b"\xff\xfe", "it does not contain the name of a commit"),
        ("refs/main", b"../../elsewhere", "it does not contain the name of a commit"),
        ("refs/main", b"a" * 1001, "it has 1,001 bytes"),
        ("blobs/abc", "pipe", "it is a named pipe"),
        ("blobs/abc", "device", "it is a device"),
    ],
)
def test_a_cache_that_would_block_or_mislead(
    place: str, kind: str | bytes, text: str, tmp_path: Path
) -> None:
    path = cached(tmp_path) / place
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(bytes(kind))
    with pytest.raises(OSError, match=rf"in the Hub's cache: {text}"):
        fetch("owner/name", ["config.json"], cache_dir=tmp_path)
