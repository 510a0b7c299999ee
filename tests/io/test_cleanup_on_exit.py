"""What is unfinished is taken away once it is over, however it ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gralora_diffusion.io.cleanup_on_exit import _CLEANUPS, clean_up_all, cleanup_on_exit
from gralora_diffusion.io.staging import staged
from gralora_diffusion.io.tensor_files import replacing


def test_tidied_at_the_end() -> None:
    calls: list[str] = []
    with (
        cleanup_on_exit(lambda: calls.append("outer")),
        cleanup_on_exit(lambda: calls.append("inner")),
    ):
        assert calls == []
    assert calls == ["inner", "outer"]
    with pytest.raises(KeyError), cleanup_on_exit(lambda: calls.append("failed")):
        {}["x"]
    assert calls == ["inner", "outer", "failed"]
    clean_up_all()
    assert calls == ["inner", "outer", "failed"]
    assert _CLEANUPS == {}


def test_all_is_tidied_though_one_fails(tmp_path: Path) -> None:
    calls: list[str] = []

    def fail() -> None:
        if not calls:
            raise OSError("no")

    with cleanup_on_exit(fail), cleanup_on_exit(lambda: calls.append("other")):
        clean_up_all()
        assert calls == ["other"]


def test_what_is_staged_when_the_process_ends(tmp_path: Path) -> None:
    """At any of the steps; the folder that was there comes back, too."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    with staged(output) as made:
        made.mkdir()
        (made / "new").touch()
        clean_up_all()
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
        made.parent.mkdir()
        os.replace(output, made.parent / ".out")  # half of what is done in the end
        clean_up_all()
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
        made.mkdir(parents=True)
        (made / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_what_is_replaced_when_the_process_ends(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("half")
        clean_up_all()
        assert list(tmp_path.iterdir()) == []
        temporary.write_text("whole")
    clean_up_all()
    assert (tmp_path / "x").read_text() == "whole"
