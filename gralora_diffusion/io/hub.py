"""Fetch files from the Hugging Face Hub, and explain downloads that fail.

Its library is imported where it is used: that takes longer than all else that a command's help
needs.
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .file_names import looks_like_hub_id, nearby
from .regular_files import check_regular, read_regular

#: Base class of httpx's errors for them; huggingface_hub may import httpx under another name.
_OF_HTTPX = "TransportError"
#: More bytes than the name of a commit has.
_MOST_BYTES = 1000


def fetch(repository: str, patterns: Iterable[str], **options: Any) -> Path:
    """Fetch the files of a repository that match one of the patterns; return the folder.

    Args:
        options: for ``huggingface_hub.snapshot_download``: ``revision``, ``token``, ``cache_dir``,
            ``local_files_only``, ...

    Raises:
        OSError: it could not be fetched. The message says why and what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        check_cache(repository, options.get("cache_dir"))
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **options))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        revision, cache_dir = options.get("revision"), options.get("cache_dir")
        problem = offline_problem(error, repository, revision=revision, cache_dir=cache_dir) or (
            f"this is not a local path, and it could not be fetched from the Hub: {error}"
        )
        raise OSError(problem) from error


def check_cache(repository: str, cache_dir: str | os.PathLike[str] | None = None) -> None:
    """Check what the Hub's cache has of a repository, before a library opens it.

    A named pipe would block the library forever, and a device may never end.

    Raises:
        OSError: a file is not a regular one, or does not contain the name of a commit as it should.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not looks_like_hub_id(repository, bare=True) or not repository.isprintable():
        return
    folder = Path(cache_dir or constants.HF_HUB_CACHE)
    folder /= repo_folder_name(repo_id=repository, repo_type="model")
    for part in ("refs", "snapshots"):
        for inside, _, names in os.walk(folder / part):
            for path in (Path(inside, name) for name in names):
                try:
                    check_regular(path)
                    if part == "refs" and not read_regular(path, _MOST_BYTES).isalnum():
                        raise OSError("it does not contain the name of a commit")
                except FileNotFoundError:  # a link to nothing, which is downloaded again
                    continue
                except OSError as error:
                    raise OSError(f"{path} in the Hub's cache: {error}. Delete it") from error


def offline_problem(
    error: BaseException,
    repository: str | os.PathLike[str],
    is_dataset: bool = False,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str | None:
    """Return a message if the Hub could not be asked for a repository; None if it was asked.

    Args:
        error: the library's error, whose causes are checked.
        repository: the user's name for it, which may have meant a folder.
        is_dataset: it is a repository of ``datasets``, which has its own cache.
        revision, cache_dir: the options of the download.
    """
    reason = None if Path(repository).exists() else why_not_asked(error)
    if reason is None:
        return None
    options = {"--revision": revision, "--cache-dir": None if is_dataset else cache_dir}
    command = ["hf", "download", str(repository)]
    command += [text for name, value in options.items() if value for text in (name, str(value))]
    if is_dataset:
        command += ["--repo-type", "dataset", "--local-dir", "FOLDER"]
    folder = "and pass that folder" if is_dataset else "or pass a folder"
    near = nearby(Path(repository))  # of a folder whose name has a mistake
    if "Did you mean" in near:
        folder += near
    return (
        "there is no such folder, the Hub's cache does not contain all of it, and the Hub "
        f"{reason}. With network access, download it with `{shlex.join(command)}`, {folder}"
    )


def why_not_asked(error: BaseException) -> str | None:
    """Return why the Hub was not asked, to follow "the Hub"; None if it was.

    Args:
        error: the library's error, whose causes are checked.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    causes = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return "is not contacted because HF_HUB_OFFLINE is set"
    if any(_is_of_the_cache(cause) for cause in causes):
        return "is not contacted because only local files are allowed"
    if any(_is_unreachable(cause) for cause in causes):
        return "cannot be reached from this machine"
    return None


def _is_of_the_cache(error: BaseException) -> bool:
    """Whether only the cache was searched."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return isinstance(error, LocalEntryNotFoundError) and error.__cause__ is None


def _is_unreachable(error: BaseException) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError

    unreachable = (LocalEntryNotFoundError, ConnectionError, TimeoutError, socket.gaierror)
    of_httpx = any(base.__name__ == _OF_HTTPX for base in type(error).__mro__)
    return of_httpx or isinstance(error, unreachable)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, the error that it was raised from, and so on."""
    while error is not None:
        yield error
        context = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or context
