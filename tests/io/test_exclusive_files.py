"""Files that only one of several processes creates, with and without hard links."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from gralora_diffusion.io.exclusive_files import create_once


def no_links(*paths):
    raise OSError(errno.EPERM, "Operation not permitted")  # as exFAT says on Linux


@pytest.mark.parametrize("has_links", [True, False])
def test_one_of_many_creates_it(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "claim"
    contents = [f"process {number}\n".encode() for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda content: create_once(path, content, 0o600), contents))
    assert sum(created) == 1
    assert path.read_bytes() == contents[created.index(True)]
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["claim"]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_folder_that_is_not_there(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(FileNotFoundError):
        create_once(tmp_path / "no/claim", b"")
