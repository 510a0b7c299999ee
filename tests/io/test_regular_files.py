"""Files are read only where they are files, and no more of them than is wanted."""

import os

import pytest

from gralora_diffusion.io.regular_files import is_regular, read_regular


def test_files_and_links_to_them_up_to_a_limit(tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"12345")
    link.symlink_to(path)
    for way in (path, link):
        assert is_regular(way)
        assert read_regular(way, 5) == b"12345"
        with pytest.raises(OSError, match="5 bytes; at most 4"):
            read_regular(way, 4)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    kinds = {"pipe": "named pipe", "to pipe": "named pipe", ".": "a folder", "nowhere": "No such"}
    for name, text in kinds.items():
        assert not is_regular(tmp_path / name)
        with pytest.raises(OSError, match=text):
            read_regular(tmp_path / name, 100)
    assert not is_regular(tmp_path / ("x" * 5000))
    assert not is_regular(tmp_path / "a\0b")
