"""The files of an output folder, sent to a repository of the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import upload_folder

from .published import to_be_shown


def upload(
    folder: Path, repository: str, token: str | None, names: Sequence[str] | None = None
) -> str:
    """Send the files that are meant for publication; return the address of the new commit.

    Args:
        repository: owner/name; it must exist.
        token: None for that of ``hf auth login``.
        names: the files, among those of :func:`to_be_shown`; all of them if None.

    Raises:
        OSError, ValueError: they cannot be sent.
    """
    shown = to_be_shown(folder)
    done = upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="GraLoRA adapter",
        allow_patterns=shown if names is None else [name for name in shown if name in names],
        token=token,
    )
    return str(done.commit_url)
