"""An adapter sent to the Hub: what is wrong before, and errors in plain words.

The token stays in this process: it is written to no file and no command line, and no message
contains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import create_repo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from gralora_diffusion.io.hub import why_not_asked
from gralora_diffusion.io.safe_text import error_line
from gralora_diffusion.training.outputs.published import to_be_shown
from gralora_diffusion.training.outputs.upload import upload


class PublishError(Exception):
    """An adapter was not sent, or not all of it. The message says why and what to do."""


def problems_before(
    folder: Path, names: Sequence[str], repository: str, token: str | None
) -> list[str]:
    """Return why an upload cannot begin.

    Args:
        names: the files that the user has seen in the list.
        token: None for that of ``hf auth login``.
    """
    found = []
    if not repository:
        found.append("the repository is missing. Give owner/name")
    else:
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            found.append(f"the repository is {repository!r}: {error_line(error)}")
    if not (token or get_token()):
        found.append(
            "there is no token. Log in with `hf auth login`, or give a token that may write "
            "(https://huggingface.co/settings/tokens)"
        )
    there = to_be_shown(folder)
    if not there:
        found.append(f"{folder} has no files to send")
    elif sorted(names) != sorted(there):
        found.append("the files have changed since the list was made. Read the list again")
    return found


def publish(
    folder: Path, names: Sequence[str], repository: str, token: str | None, private: bool
) -> str:
    """Create the repository unless it exists, and send the files; return the commit's address.

    Raises:
        PublishError: it was not sent.
    """
    try:
        made = create_repo(repository, token=token, private=private, exist_ok=True)
        return upload(folder, made.repo_id, token, names)
    except (OSError, ValueError) as error:
        text = _in_plain_words(error, repository)
        if token:
            text = text.replace(token, "[token]")
        raise PublishError(text) from None  # a traceback may show the token


def _in_plain_words(error: Exception, repository: str) -> str:
    if reason := why_not_asked(error):
        hint = ". Start the studio without it to upload" if "OFFLINE" in reason else ""
        return f"nothing was sent: the Hub {reason}{hint}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "nothing was sent, because the Hub does not accept the token"
    if status == 403:
        return f"nothing was sent, because the token may not write to {repository}"
    return f"not everything was sent: {error_line(error)}"
