"""Who may ask the studio for what: the check of every request, before Gradio sees it.

A page of another site that is open in the same browser can send requests to this machine. It can
neither read the token nor set the cookie, its name is in ``Origin``, and a name that it has made
to lead here (DNS rebinding) is in ``Host``.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import secrets
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

#: What of Gradio the page needs. Everything else of it is refused: files by their paths, proxies,
#: functions by their names, monitoring, links to a state, its own editor.
_ALLOWED = re.compile(
    r"/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|login_check)?/?"
    r"|/(static|assets|svelte|studio)/.*"
    r"|/gradio_api/(queue/(join|data)|upload|upload_progress|heartbeat/\w+|startup-events"
    r"|reset|cancel|app_id|info/?)/?"
)
#: Bytes of an upload, and of any other request, at most.
MOST_UPLOAD, _MOST_OTHER = 2 << 30, 16 << 20
_UPLOAD = "/gradio_api/upload"
#: Wrong passwords at the same time, each of which is answered after a second; others are refused.
_MOST_FAILING = 5
_LOGIN = "/studio/login"
#: The page loads nothing from elsewhere, and is shown in no other page.
_HEADERS = {
    "Content-Security-Policy": "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' "
    "'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # with "no-referrer", browsers send the form of the login with "Origin: null"
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_LOGIN_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>gralora studio</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">
<style>body{font:16px system-ui;max-width:24em;margin:15vh auto;padding:0 1em}
input,button{font:inherit;padding:.5em;width:100%;box-sizing:border-box;margin:.4em 0}</style>
<h1>gralora studio</h1><p>MESSAGE</p><form method="post" action="/studio/login">
<input type="password" name="token" aria-label="WORD" autofocus required>
<button>Open</button></form></html>"""


@dataclass
class Guard:
    """ASGI middleware that answers only requests that are meant for this studio.

    Args:
        app: what is guarded.
        token: what a browser must show once; it then gets a cookie.
        listens: other machines may ask, too, by any IP address or the names in ``hosts``. An
            address, unlike a name, cannot be made to lead elsewhere, and the one that a container
            is reached by from outside is not known in it.
        hosts: names of this machine that ``Host`` may have, besides localhost.
        once: another token, which is valid once.
    """

    app: Any
    token: str
    listens: bool = False
    hosts: frozenset[str] = frozenset()
    once: str | None = None
    _session: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    _failing: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            return
        answer = await self._answer(scope, receive)
        if answer is not None:
            answer.headers.update(_HEADERS)
            await answer(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    async def _answer(self, scope: Any, receive: Any) -> Response | None:
        """Return the answer to a request that does not reach the application; None if it does."""
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        if problem := self._foreign(headers):
            return PlainTextResponse(problem, 403)
        limit = MOST_UPLOAD if path == _UPLOAD else _MOST_OTHER
        length = headers.get("content-length", "" if "transfer-encoding" in headers else "0")
        if not length.isdecimal():
            return PlainTextResponse("the request does not say how long it is", 411)
        if int(length) > limit:
            return PlainTextResponse(f"the request has more than {limit:,} bytes", 413)
        if path == _LOGIN and method == "POST":
            return await self._log_in(receive, headers)
        if path == "/" and method == "GET" and b"token=" in scope["query_string"]:
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])
            return await self._checked(given[0], headers)
        if not self._knows(headers):
            if path == "/" and method == "GET":
                return self._login_page("", 401)
            return PlainTextResponse("open the address that `gralora studio` printed", 401)
        if method not in ("GET", "HEAD", "POST") or not _ALLOWED.fullmatch(path):
            return PlainTextResponse("there is no such page", 404)
        return None

    def _foreign(self, headers: Headers) -> str | None:
        """Return why a request was not made for this studio, or None."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return "this studio is not at the address that the request names as its Host"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != hosts[0]:
            return "the request comes from a page of another Origin"
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") not in (
            "navigate",
            None,
        ):
            return "the request comes from a page of another site"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            name, _ = parts.hostname or "", parts.port
        except ValueError:
            return False
        if name == "localhost" or name in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.listens or address.is_loopback

    def _knows(self, headers: Headers) -> bool:
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        shown = cookies.get(_cookie_name(headers))
        return shown is not None and hmac.compare_digest(
            shown.value.encode(), self._session.encode()
        )

    async def _log_in(self, receive: Any, headers: Headers) -> Response:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > 4096 or not message.get("more_body"):
                break
        given = parse_qs(body[:4096].decode("latin-1")).get("token", [""])
        text = given[0].encode("latin-1").decode("utf-8", "replace")
        return await self._checked(text, headers)

    async def _checked(self, given: str, headers: Headers) -> Response:
        if self._failing >= _MOST_FAILING:
            return self._login_page(f"Too many wrong {self._word}s. Wait a few seconds.", 429)
        if not self._is_valid(given.encode("utf-8", "replace")):
            self._failing += 1
            try:
                await asyncio.sleep(1)  # nobody guesses many
            finally:
                self._failing -= 1
            return self._login_page(f"This is not the {self._word}.", 401)
        answer = RedirectResponse("/", 303)
        name = _cookie_name(headers)
        answer.set_cookie(name, self._session, httponly=True, samesite="strict")
        return answer

    def _is_valid(self, given: bytes) -> bool:
        if self.once is not None and hmac.compare_digest(given, self.once.encode()):
            self.once = None
            return True
        return hmac.compare_digest(given, self.token.encode())

    @property
    def _word(self) -> str:
        return "password" if self.listens else "token"

    def _login_page(self, message: str, status: int) -> Response:
        text = message or f"Enter the {self._word}" + (
            "." if self.listens else " from the address that gralora studio printed."
        )
        page = _LOGIN_PAGE.replace("MESSAGE", text).replace("WORD", self._word.capitalize())
        return HTMLResponse(page, status)


def _cookie_name(headers: Headers) -> str:
    """Return the name of this studio's cookie: a browser sends those of all ports of a machine."""
    port = urlsplit("//" + headers["host"]).port
    return f"gralora_studio_{port or 80}"


def address_of(host: str, port: int) -> str:
    """Return the studio's address, without a token."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def address_with(token: str, host: str, port: int) -> str:
    """Return the address that opens the studio."""
    return f"{address_of(host, port)}?{urlencode({'token': token})}"
