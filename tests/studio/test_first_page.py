"""The page that is made once, and what it is asked for as."""

from __future__ import annotations

import gzip

from starlette.applications import Starlette
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from gralora_diffusion.studio.first_page import FirstPage


def asked(made, status=200):
    """A client of a page that counts how often it is made, in ``made``."""

    def page(request):
        made.append(request.headers["host"])
        return HTMLResponse(f"<head></head>{request.url}", status)

    routes = [Route("/", page), Route("/other", lambda _: PlainTextResponse("other"))]
    return TestClient(FirstPage(Starlette(routes=routes), "<i>"), "http://a")


def test_it_is_made_once_for_each_address_of_this_machine():
    client = asked(made := [])
    for host in ("a", "a", "b", "a"):
        answer = client.get("/", headers={"Host": host})
        assert answer.text == f"<head><i></head>http://{host}/"
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert made == ["a", "b"]
    for number in range(20):
        client.get("/", headers={"Host": f"c{number}"})
    assert len(client.app._kept) == 8


def test_it_is_compressed_for_browsers_that_read_it():
    client = asked([])
    with client.stream("GET", "/", headers={"Accept-Encoding": "gzip"}) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert gzip.decompress(b"".join(answer.iter_raw())) == b"<head><i></head>http://a/"
    assert "content-encoding" not in client.get("/", headers={"Accept-Encoding": "br"}).headers


def test_a_browser_that_has_it_gets_nothing():
    client = asked([])
    etag = client.get("/").headers["etag"]
    answer = client.get("/", headers={"If-None-Match": etag})
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_others_are_not_kept():
    client = asked(made := [])
    assert client.get("/other").text == "other"
    for _ in range(2):
        assert client.get("/", params={"a": "1"}).text == "<head></head>http://a/?a=1"
        assert client.post("/").status_code == 405
    assert len(made) == 2
    failing = asked(made := [], 500)
    assert [failing.get("/").status_code for _ in range(2)] == [500, 500]
    assert len(made) == 2
