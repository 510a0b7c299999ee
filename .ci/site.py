"""The hooks of the site: documents from all over the repository, and links between them."""

from __future__ import annotations

import posixpath
import re
import sys
from functools import partial
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from public_pages import in_repository, relinked, repository_address

ROOT = Path(__file__).resolve().parents[1]
#: Path in the repository -> path on the site. Everything else below docs/ keeps its path.
ELSEWHERE = {
    "README.md": "index.md",
    "docs/README.md": "contents.md",
    "samples/comfyui_gralora/README.md": "comfyui_nodes.md",
    "samples/tiny-base/README.md": "tiny_base.md",
    "samples/tiny-base/grid.png": "images/tiny_base_grid.png",
    "samples/tiny-base/unseen.png": "images/tiny_base_unseen.png",
    "samples/tiny-edit-base/README.md": "tiny_edit_base.md",
    "samples/tiny-edit-base/edits.png": "images/tiny_edit_base_edits.png",
    "samples/tiny-flux-base/README.md": "tiny_flux_base.md",
    "samples/tiny-flux-base/grid.png": "images/tiny_flux_base_grid.png",
    "samples/tiny-flux-base/unseen.png": "images/tiny_flux_base_unseen.png",
    "samples/tiny-kontext-base/README.md": "tiny_kontext_base.md",
    "samples/tiny-kontext-base/edits.png": "images/tiny_kontext_base_edits.png",
    "samples/tiny-encoders/README.md": "tiny_encoders.md",
    ".github/CONTRIBUTING.md": "contributing.md",
    ".github/SECURITY.md": "security.md",
}
_HERE = {there: path for path, there in ELSEWHERE.items()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link the repository if it has an address."""
    config.repo_url = config.repo_url or repository_address(ROOT)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are outside of docs/."""
    for path, there in ELSEWHERE.items():
        if path.startswith("docs/"):
            files.remove(files.src_uris[path.removeprefix("docs/")])
        files.append(File.generated(config, there, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to pages of the site, and give fences a language alone, as readers expect."""
    own = page.file.src_uri
    if own == "index.md":
        page.meta["hide"] = ["navigation"]  # it would only name the page itself
    place = partial(_place, own, files, config.repo_url)
    text = relinked(markdown, _HERE.get(own, f"docs/{own}"), place)
    return re.sub(r"^```(\w+)[^\n]*$", _language, text, flags=re.MULTILINE)


def _place(own: str, files: Files, address: str | None, path: str) -> str | None:
    there = ELSEWHERE.get(path, path.removeprefix("docs/"))
    if (path in ELSEWHERE or path.startswith("docs/")) and there in files.src_uris:
        return posixpath.relpath(there, posixpath.dirname(own))
    return in_repository(path, address)


def _language(fence: re.Match[str]) -> str:
    return "```text" if fence[1] == "tree" else f"```{fence[1]}"
