"""What changes while somebody watches: the page asks for it here, and replaces what has changed.

Gradio's own timers would ask through its queue, and each of their answers makes Gradio go through
all components of the page. Here an answer only has the texts of one tab, or says that they are the
same as before. Gradio is only asked if the choices of a tab have changed, which are its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from urllib.parse import urlencode

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from markupsafe import Markup
from starlette.requests import Request

from .context import Studio

#: From the query of an address to id -> HTML of the parts of a tab, and what its choices depend on.
Look = Callable[[Studio, Mapping[str, str]], tuple[dict[str, str], object]]


def part(name: str) -> str:
    """Return the HTML of an empty part, which is filled in while its tab is open."""
    return f'<div id="live-{name}"></div>'


def place(tab: str, choices: object, **query: str) -> str:
    """Return HTML that tells the page what to ask for while it is visible.

    Args:
        choices: what the choices that the page has depend on.
        query: of the address.
    """
    address = f"/studio/live/{tab}?{urlencode(query)}"
    html = Markup('<div data-live="{}" data-choices="{}" data-refresh="{}-refresh"></div>')
    return str(html.format(address, _brief(choices), tab))


def routes(studio: Studio, looks: Mapping[str, Look]) -> APIRouter:
    """Return the addresses below ``/studio/live``, one for each of the tabs in ``looks``."""
    router = APIRouter(prefix="/studio/live")

    @router.get("/{tab}")
    def look(tab: str, request: Request) -> Response:
        if tab not in looks:
            return PlainTextResponse("there is no such tab", 404)
        parts, choices = looks[tab](studio, request.query_params)
        text = json.dumps({"parts": parts, "choices": _brief(choices)})
        headers = {"ETag": f'"{_brief(text)}"', "Cache-Control": "no-store"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(text, media_type="application/json", headers=headers)

    return router


def _brief(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(errors="replace"), digest_size=8).hexdigest()
