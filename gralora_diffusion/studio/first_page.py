"""Gradio's page, made once: to make it takes long, above all while a run computes."""

from __future__ import annotations

import gzip
import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response

#: Addresses of this machine for which the page is kept.
_MOST_KEPT = 8
#: What the page's own address depends on.
_ASKED_AS = ("host", "x-forwarded-host", "x-forwarded-proto")
_BEFORE = b"</head>"


@dataclass(frozen=True)
class _Kept:
    html: bytes
    small: bytes
    etag: str


@dataclass
class FirstPage:
    """ASGI middleware that keeps the page, which is the same for everyone who may see it.

    Args:
        app: Gradio's application.
        head: HTML that is put into the page's head. Gradio itself would only add it after its own
            scripts have run.
    """

    app: Any
    head: str
    _kept: OrderedDict[tuple[str, ...], _Kept] = field(default_factory=OrderedDict)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request for the page; hand on all others."""
        is_page = scope["type"] == "http" and (scope["method"], scope["path"]) == ("GET", "/")
        if not is_page or scope["query_string"]:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key = (scope["scheme"], *(headers.get(name, "") for name in _ASKED_AS))
        kept = self._kept.get(key)
        if kept is None:
            status, html = await self._made(scope, receive)
            if status != 200:
                await Response(html, status, media_type="text/html")(scope, receive, send)
                return
            kept = self._kept[key] = _keep(html.replace(_BEFORE, self.head.encode() + _BEFORE, 1))
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        await _answer(kept, headers)(scope, receive, send)

    async def _made(self, scope: Any, receive: Any) -> tuple[int, bytes]:
        """Return the status and the body of Gradio's own answer."""
        parts, status = [], 0

        async def collect(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        plain = [pair for pair in scope["headers"] if pair[0] != b"accept-encoding"]
        await self.app({**scope, "headers": plain}, receive, collect)
        return status, b"".join(parts)


def _keep(html: bytes) -> _Kept:
    digest = hashlib.blake2b(html, digest_size=16).hexdigest()
    return _Kept(html, gzip.compress(html), f'"{digest}"')


def _answer(kept: _Kept, headers: Headers) -> Response:
    given = {"ETag": kept.etag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding"}
    if headers.get("if-none-match") == kept.etag:
        return Response(status_code=304, headers=given)
    if "gzip" not in headers.get("accept-encoding", ""):
        return Response(kept.html, media_type="text/html", headers=given)
    return Response(
        kept.small, media_type="text/html", headers={**given, "Content-Encoding": "gzip"}
    )
