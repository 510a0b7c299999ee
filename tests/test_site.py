"""The site as a browser gets it: every link leads to a page and a heading, and search works."""

from __future__ import annotations

import json
import posixpath
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from tests import ROOT


class Names(HTMLParser):
    """What a page links to, and the names of its parts."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.parts: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.parts |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag in ("img", "script", "link"):
            self.fetched |= {given[name] for name in ("src", "href") if name in given}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Any warning of mkdocs is an error, because the config is strict."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / ".mkdocs.yml"), site_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Names]:
    """Address on the site -> what is on the page, without the page of errors."""
    found = (path for path in site.rglob("*.html") if path.name != "404.html")
    return {path.relative_to(site).as_posix(): Names(path) for path in found}


def test_every_document_is_a_page(pages: dict[str, Names]) -> None:
    documents = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    expected = {(path.with_suffix("") / "index.html").as_posix() for path in documents}
    expected -= {"README/index.html"}
    others = {
        "contents",
        "comfyui_nodes",
        "contributing",
        "security",
        "tiny_base",
        "tiny_edit_base",
        "tiny_flux_base",
        "tiny_kontext_base",
    }
    others |= {"tiny_encoders"}
    assert pages.keys() == expected | {f"{name}/index.html" for name in others} | {"index.html"}


def test_links_lead_somewhere(site: Path, pages: dict[str, Names]) -> None:
    broken = []
    for address, page in pages.items():
        for link in page.links | page.fetched:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            path = posixpath.normpath(posixpath.join(posixpath.dirname(address), parts.path))
            target = path if parts.path else address
            if (site / unquote(target)).is_dir():
                target = posixpath.normpath(f"{target}/index.html")
            anchor = unquote(parts.fragment)
            whole = (site / unquote(target)).is_file()
            if not whole or (anchor and anchor not in pages[unquote(target)].parts):
                broken.append(f"{address}: {link}")
    assert not broken


def test_a_page_fetches_nothing_from_elsewhere(pages: dict[str, Names]) -> None:
    for page in pages.values():
        assert not {link for link in page.fetched if urlsplit(link).netloc}


def test_search_finds_an_option_and_another_trainers_name(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    for words, address in (("--gralora_k", "options/"), ("network_dim", "training/coming_from/")):
        found = {entry["location"] for entry in index["docs"] if words in entry["text"]}
        assert any(location.startswith(address) for location in found), words


def test_code_is_shown_as_code(site: Path) -> None:
    """Fences that say more than a language, too."""
    home = (site / "index.html").read_text(encoding="utf-8")
    assert "language-python" in home
    assert "runnable" not in home
