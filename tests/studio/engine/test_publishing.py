"""Uploads to the Hub: what is refused before, and what is said when the Hub is not asked."""

from __future__ import annotations

import huggingface_hub.constants
import pytest

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME
from gralora_diffusion.studio.engine.publishing import PublishError, problems_before, publish
from gralora_diffusion.training.outputs.published import to_be_shown

TOKEN = "hf_secret"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (WEIGHTS_NAME, "README.md", "training_config.yaml", "notes.txt"):
        (folder / name).write_bytes(b"content")
    return folder


@pytest.fixture
def login(tmp_path, monkeypatch):
    """The file of the login, which is not there yet."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return tmp_path / "token"


def test_what_is_refused_before(run, login):
    names = to_be_shown(run)
    assert sorted(names) == ["README.md", WEIGHTS_NAME]
    assert problems_before(run, names, "me/robot", TOKEN) == []
    (missing,) = problems_before(run, names, "me/robot", None)
    assert missing.startswith("there is no token. Log in with `hf auth login`")
    login.write_text(TOKEN)
    assert problems_before(run, names, "me/robot", None) == []
    (run / "metrics.jsonl").write_text("{}")
    found = problems_before(run, names, "a b/<c>", None)
    assert found[0].startswith("the repository is 'a b/<c>': ")
    assert found[1] == "the files have changed since the list was made. Read the list again"
    (run / "empty").mkdir()
    found = problems_before(run / "empty", [], "", None)
    assert found[0] == "the repository is missing. Give owner/name"
    assert found[1].endswith("has no files to send")


def test_the_hub_is_not_asked(run):
    with pytest.raises(PublishError) as caught:
        publish(run, to_be_shown(run), "me/robot", TOKEN, private=True)
    assert "the Hub is not contacted because HF_HUB_OFFLINE is set" in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None
