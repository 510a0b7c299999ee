"""Requests that are not meant for the studio, or that ask for what it does not show."""

from __future__ import annotations

import asyncio
import re

import pytest

pytest.importorskip("gradio")
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from gralora_diffusion.studio.context import Studio
from gralora_diffusion.studio.guard import Guard, address_of
from gralora_diffusion.studio.server import application
from tests.training.runs import copy_robot

TOKEN = "the-token"
HERE = "http://127.0.0.1:7860"
HEADERS = Headers({"host": "127.0.0.1:7860"})


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return Studio.at(tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="module")
def app(studio):
    return application(studio, TOKEN)


@pytest.fixture
def client(app):
    return TestClient(app, HERE, follow_redirects=False)


@pytest.fixture
def known(client):
    answer = client.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    return client


@pytest.fixture
def folder(studio, tmp_path):
    folder = copy_robot(tmp_path)
    studio.opened.open_folder(folder)
    return folder


def test_the_page_and_what_it_needs(known):
    page = known.get("/")
    assert page.status_code == 200
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert page.headers["referrer-policy"] == "same-origin"
    for path in ("/config", "/theme.css", "/studio/page.js", "/gradio_api/startup-events"):
        assert known.get(path).status_code == 200, path


@pytest.mark.parametrize("path", ["/config", "/gradio_api/info", "/studio/page.js", "/theme.css"])
def test_without_the_token(client, path):
    assert client.get(path).status_code == 401
    for cookie in ("", "x", TOKEN, "\xff"):
        answer = client.get(
            path, headers={"Cookie": f"gralora_studio_7860={cookie}".encode("latin-1")}
        )
        assert answer.status_code == 401


def test_the_cookies_of_two_ports_are_two(app):
    """A browser sends the cookies of all ports of a machine to each."""
    client = TestClient(app, HERE, follow_redirects=False)
    client.get("/", params={"token": TOKEN})
    other = TestClient(Guard(app.app, "other"), "http://127.0.0.1:7861", cookies=client.cookies)
    assert other.get("/", params={"token": "other"}, follow_redirects=False).status_code == 303
    client.cookies.update(other.cookies)
    assert sorted(client.cookies) == ["gralora_studio_7860", "gralora_studio_7861"]
    assert client.get("/theme.css").status_code == other.get("/theme.css").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("192.168.0.7:7860", 200),
        ("[2001:db8::7]:7860", 200),
        ("evil.example:7860", 403),
        ("192.168.0.7.evil.example:7860", 403),
        ("192.168.0.7:x", 403),
    ],
)
def test_other_machines_ask_by_address(app, host, status):
    guard = Guard(app.app, TOKEN, listens=True)
    client = TestClient(guard, "http://192.168.0.7:7860", follow_redirects=False)
    assert client.get("/config").status_code == 401
    assert client.post("/studio/login", data={"token": TOKEN}).status_code == 303
    assert client.get("/theme.css", headers={"Host": host}).status_code == status


def test_other_machines_ask_by_the_name_that_it_listens_at(studio):
    client = TestClient(application(studio, TOKEN, listens=True, names={"my-pc.lan"}), HERE)
    for host, status in (("my-pc.lan:7860", 401), ("MY-PC.lan:7860", 401), ("other.lan", 403)):
        assert client.get("/", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("host", "address"), [("a.lan", "http://a.lan:1/"), ("::1", "http://[::1]:1/")]
)
def test_addresses(host, address):
    assert address_of(host, 1) == address


def test_a_page_asks_whether_its_studio_is_there(client, app):
    assert client.get("/studio/alive").status_code == 401
    client.get("/", params={"token": TOKEN})
    assert client.get("/studio/alive").status_code == 204
    # another start does not know the page
    again = TestClient(Guard(app.app, "another token"), HERE, cookies=client.cookies)
    assert again.get("/studio/alive").status_code == 401


@pytest.mark.parametrize("tab", ["runs", "compare", "share", "benchmark"])
def test_what_changes_is_sent_once(client, tab):
    assert client.get(f"/studio/live/{tab}").status_code == 401
    client.get("/", params={"token": TOKEN})
    query = {"run": "<script>", "beside": "../x", "comparison": "<script>", "gone": "1"}
    first = client.get(f"/studio/live/{tab}", params=query)
    assert (first.status_code, first.headers["content-type"]) == (200, "application/json")
    assert "<script>" not in first.text
    known = {"If-None-Match": first.headers["etag"]}
    assert client.get(f"/studio/live/{tab}", params=query, headers=known).status_code == 304
    assert client.get("/studio/live/other").status_code == 404


def test_a_wrong_token_and_the_form(client):
    assert client.get("/", params={"token": "wrong"}).status_code == 401
    assert client.get("/").status_code == 401
    assert client.post("/studio/login", data={"token": "wrong"}).status_code == 401
    assert client.get("/config").status_code == 401
    assert client.post("/studio/login", data={"token": TOKEN}).status_code == 303
    assert client.get("/config").status_code == 200


def test_a_token_that_is_valid_once(studio):
    app = application(studio, TOKEN, once="once")
    first, second = (TestClient(app, HERE, follow_redirects=False) for _ in range(2))
    assert first.get("/", params={"token": "once"}).status_code == 303
    assert second.get("/", params={"token": "once"}).status_code == 401
    assert second.get("/", params={"token": TOKEN}).status_code == 303
    assert first.get("/config").status_code == second.get("/config").status_code == 200


def test_few_passwords_are_tried_at_the_same_time():
    guard = Guard(None, "a password", listens=True)

    async def guess():
        wrong = [guard._checked(f"{number}", HEADERS) for number in range(40)]
        given = await asyncio.gather(*wrong, guard._checked("a password", HEADERS))
        return [
            answer.status_code for answer in (*given, await guard._checked("a password", HEADERS))
        ]

    # while so many are wrong, not even the right one is compared
    assert asyncio.run(guess()) == [401] * 5 + [429] * 36 + [303]


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:7860", "192.168.0.7:7860", "", "[::", "a b"]
)
def test_another_host(known, host):
    answer = known.get("/config", headers={"Host": host})
    assert answer.status_code == 403
    assert "Host" in answer.text


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1:9000", "[::1]:7860"])
def test_hosts_of_this_machine(app, host):
    client = TestClient(app, f"http://{host}", follow_redirects=False)
    assert client.get("/", params={"token": TOKEN}).status_code == 303


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost:7860"]
)
def test_another_origin(known, origin):
    for method, path in (("POST", "/gradio_api/queue/join"), ("GET", "/config")):
        answer = known.request(method, path, headers={"Origin": origin})
        assert answer.status_code == 403, path
        assert "Origin" in answer.text
    assert known.get("/config", headers={"Origin": HERE}).status_code == 200
    crossing = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert known.get("/config", headers=crossing).status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=pyproject.toml",
        "/file=/etc/passwd",
        "/gradio_api/proxy=http://example.org/",
        "/gradio_api/run/predict",
        "/gradio_api/call/show",
        "/gradio_api/deep_link",
        "/gradio_api/component_server",
        "/gradio_api/vibe-code/",
        "/monitoring",
        "/runs",
        "/studio/../config/../../etc/passwd",
        "/static/../../../../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/routes.py",
        "/studio/file/..%2f..%2fetc%2fpasswd",
        "/studio/view//etc/passwd",
    ],
)
def test_addresses_that_are_not_served(known, path):
    for method in ("GET", "POST"):
        answer = known.request(method, path)
        assert answer.status_code in (403, 404, 405), answer.text[:200]
        assert "root:" not in answer.text
    assert known.put("/config").status_code == 404


def test_bodies_are_bounded(known):
    join = "/gradio_api/queue/join"
    answer = known.post(join, headers={"Content-Length": str(1 << 30)})
    assert answer.status_code == 413
    assert known.post("/gradio_api/upload", headers={"Content-Length": "9" * 12}).status_code == 413
    assert known.post(join, content=iter([b"x"])).status_code == 411  # chunks without a length


def test_images_by_their_ids(known, studio, folder, tmp_path):
    image = folder / "00.png"
    for kind, media in (("thumbnail", "image/webp"), ("view", "image/png")):
        answer = known.get(studio.address(image, kind))
        assert (answer.status_code, answer.headers["content-type"]) == (200, media)
        assert answer.headers["x-content-type-options"] == "nosniff"
    address = studio.address(image)
    (tmp_path / "secret.png").write_bytes(image.read_bytes())
    image.unlink()
    assert known.get(address).status_code == 404
    image.symlink_to(tmp_path / "secret.png")
    assert known.get(address).status_code == 404
    (folder / "01.png").write_bytes(b"damaged")
    assert known.get(studio.address(folder / "01.png", "thumbnail")).status_code == 422
    # only these kinds of files are sent as they are
    assert known.get(studio.address(folder / "02.txt", "file")).status_code == 404


def test_images_are_kept_once(known, studio, folder):
    name = studio.opened.add(folder / "00.png")
    kept = {known.post(f"/studio/keep/{name}").text for _ in range(2)}
    (copy,) = studio.workspace.kept.iterdir()
    assert kept == {copy.name}
    assert copy.read_bytes() == (folder / "00.png").read_bytes()
    assert known.post("/studio/keep/nothing").status_code == 404
    text = studio.opened.add(folder / "00.txt")
    assert known.post(f"/studio/keep/{text}").status_code == 404


def test_a_report_has_no_rights(known, studio):
    page = studio.workspace.folder / "index.html"
    page.write_text("<script>alert(1)</script>")
    answer = known.get(studio.address(page, "file"))
    assert answer.headers["content-type"].startswith("text/html")
    assert "sandbox" in answer.headers["content-security-policy"]
    assert "script-src" not in answer.headers["content-security-policy"]


def test_captions_are_text(known, studio, folder):
    name = studio.opened.add(folder / "00.png")
    text = "<script>alert(1)</script>"
    answer = known.post(f"/studio/caption/{name}", json={"caption": text})
    assert (answer.status_code, answer.text) == (200, text)
    assert answer.headers["content-type"].startswith("text/plain")
    assert (folder / "00.txt").read_text() == f"{text}\n"
    for content in (b"[]", b"{}", b'{"caption": 1}', b"\xff"):
        assert known.post(f"/studio/caption/{name}", content=content).status_code == 422
    assert known.post("/studio/caption/unknown", json={"caption": "x"}).status_code == 404


def test_who_listens_asks_for_a_password(studio):
    listening = application(studio, "a password", listens=True)
    client = TestClient(listening, "http://192.168.0.7:7860", follow_redirects=False)
    page = client.get("/")
    assert page.status_code == 401
    assert re.search("password", page.text)
    assert client.post("/studio/login", data={"token": "a password"}).status_code == 303
    assert client.get("/config").status_code == 200
    assert client.get("/config", headers={"Host": "evil.example"}).status_code == 403
