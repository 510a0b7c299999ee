"""The command ``gralora studio``: what it refuses, and how it ends."""

from __future__ import annotations

import inspect
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio")
from gralora_diffusion.studio.engine.signatures import STATE
from gralora_diffusion.studio.gradio_import import _without_sources
from gralora_diffusion.studio.main import main


@pytest.mark.parametrize("name", [".studio", ".studio/jobs", ".studio/uploads"])
def test_links_in_a_folder_from_somebody_else(tmp_path, capsys, name):
    theirs, folder = tmp_path / "theirs", tmp_path / "folder"
    (theirs / "uploads").mkdir(parents=True)
    (theirs / "uploads/kept").touch()
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(theirs)
    with pytest.raises(SystemExit):
        main([str(folder), "--no_browser"])
    assert f"{folder / name}', which is a link" in capsys.readouterr().err
    assert (theirs / "uploads/kept").exists()


def test_a_key_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv(STATE, str(tmp_path / "file"))
    with pytest.raises(SystemExit):
        main([str(tmp_path / "folder"), "--no_browser"])
    assert STATE in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_gradio_finds_no_sources_to_write_stubs_of():
    theirs, ours = (type("A", (), {"__module__": name}) for name in ("gradio.a", __name__))
    before = inspect.getfile
    with _without_sources():
        with pytest.raises(OSError, match="the source of A is not read"):
            inspect.getfile(theirs)
        assert inspect.getfile(ours) == __file__
    assert inspect.getfile is before


def test_it_ends_while_a_page_is_open(tmp_path):
    line = [sys.executable, "-m", "gralora_diffusion", "studio", str(tmp_path), "--no_browser"]
    with subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # the tests themselves may be in a shell's background, where it is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        told = (next(process.stdout) for _ in range(3))
        address = urlsplit(next(text.strip() for text in told if text.startswith("http")))

        def ask(path, cookie=""):
            asked = socket.create_connection((address.hostname, address.port), timeout=60)
            head = f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\nCookie: {cookie}\r\n\r\n"
            asked.sendall(head.encode())
            return asked, asked.recv(1 << 16).decode()

        first, answer = ask(f"/?{address.query}")
        first.close()
        cookie = answer.partition("set-cookie: ")[2].partition(";")[0]
        page, answer = ask("/gradio_api/heartbeat/abc", cookie)
        assert answer.startswith("HTTP/1.1 200")
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        finally:
            process.kill()
            page.close()
        assert time.monotonic() - start < 10
        assert process.stderr.read().strip() == "gralora studio: interrupted"
