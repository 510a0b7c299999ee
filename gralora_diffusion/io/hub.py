"""Files fetched from the Hugging Face Hub, and why they could not be."""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

_UNREACHABLE = (LocalEntryNotFoundError, ConnectionError, TimeoutError, socket.gaierror)
#: What httpx raises for them, under whatever name huggingface_hub has it.
_OF_HTTPX = "TransportError"


def fetch(repository: str, patterns: Iterable[str], **options: Any) -> Path:
    """Fetch the files of a repository that match one of the patterns; return the folder.

    Args:
        options: for ``huggingface_hub.snapshot_download``: ``revision``, ``token``, ``cache_dir``,
            ``local_files_only``, ...

    Raises:
        OSError: it could not be fetched; says why and what to do.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **options))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        revision, cache_dir = options.get("revision"), options.get("cache_dir")
        problem = offline_problem(error, repository, revision=revision, cache_dir=cache_dir) or (
            f"neither a local path nor a repository on the Hub that could be fetched: {error}"
        )
        raise OSError(problem) from error


def offline_problem(
    error: BaseException,
    repository: str | os.PathLike[str],
    is_dataset: bool = False,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str | None:
    """Say that the Hub could not be asked for a repository, and what to do; None if it was.

    Args:
        error: what the library raised, whose causes are looked at.
        repository: as the user named it, who may have meant a folder.
        is_dataset: it is one of ``datasets``, which has a cache of its own.
        revision, cache_dir: as given for the download.
    """
    causes = [] if Path(repository).exists() else list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        reason = "is not asked, for HF_HUB_OFFLINE is set"
    elif any(_is_of_the_cache(cause) for cause in causes):
        reason = "is not asked, for only local files are wanted"
    elif any(_is_unreachable(cause) for cause in causes):
        reason = "cannot be reached from here"
    else:
        return None
    options = {"--revision": revision, "--cache-dir": None if is_dataset else cache_dir}
    command = ["hf", "download", str(repository)]
    command += [text for name, value in options.items() if value for text in (name, str(value))]
    if is_dataset:
        command += ["--repo-type", "dataset", "--local-dir", "FOLDER"]
    there = "and give that folder" if is_dataset else "or give a folder"
    return (
        "there is no such folder, the Hub's cache lacks it or a part of it, and the Hub "
        f"{reason}. Fetch it where there is a network, by `{shlex.join(command)}`, {there}"
    )


def _is_of_the_cache(error: BaseException) -> bool:
    """Whether nothing but the cache was looked at."""
    return isinstance(error, LocalEntryNotFoundError) and error.__cause__ is None


def _is_unreachable(error: BaseException) -> bool:
    of_httpx = any(base.__name__ == _OF_HTTPX for base in type(error).__mro__)
    return of_httpx or isinstance(error, _UNREACHABLE)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        context = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or context
