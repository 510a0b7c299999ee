"""What is installed is what is in the tree, and the files around the package agree with it."""

import email
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import partial

import pytest
import yaml
from markdown_it import MarkdownIt

import gralora_diffusion
from tests import ROOT
from tests.built import OF_A_CLONE, build, tree


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_a_wheel_holds_every_file_of_the_package_and_the_samples(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = {
        name if name.startswith("gralora_diffusion/") else f"gralora_diffusion/{name}": path
        for name, path in tree("gralora_diffusion", "samples").items()
        if name not in OF_A_CLONE
    }
    assert "gralora_diffusion/benchmark/report/templates/report.html.jinja" in files
    assert names == files.keys()
    for name, path in files.items():
        assert wheel.read(name) == path.read_bytes(), name


def metadata_of(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_a_wheel_has_the_version_of_the_package(wheel):
    assert metadata_of(wheel)["Version"] == gralora_diffusion.__version__


# -- the page of a package index -------------------------------------------------------------------


def targets(markdown):
    """The links and images of a page, as a parser of CommonMark finds them."""
    tokens = [t for block in MarkdownIt().parse(markdown) for t in block.children or ()]
    links = {token.attrs["href"] for token in tokens if token.type == "link_open"}
    return links, {token.attrs["src"] for token in tokens if token.type == "image"}


def test_an_index_shows_the_readme_without_broken_links(wheel):
    metadata = metadata_of(wheel)
    assert metadata["Description-Content-Type"] == "text/markdown"
    shown = metadata.get_payload(decode=True).decode()
    links, images = targets(shown)
    assert images == set()
    assert all(re.match("https://|#", link) for link in links)
    theirs, _ = targets((ROOT / "README.md").read_text(encoding="utf-8"))
    assert links == {link for link in theirs if re.match("https://|#", link)}
    assert "train SDXL, SD 3.5 or FLUX" in shown  # the words of a link


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / ".ci/public_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_with_an_address_links_lead_to_the_repository(pages):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    address = "https://example.org/owner/name"
    shown = pages.relinked(text, "README.md", partial(pages.in_repository, address=f"{address}/"))
    links, images = targets(shown)
    assert images == {f"{address}/raw/main/docs/images/demo_grid.png"}
    there = {link for link in links if link.startswith(address)}
    assert f"{address}/blob/main/docs/training/memory.md#plan-a-run" in there
    for link in there:
        assert (ROOT / link.removeprefix(f"{address}/blob/main/").partition("#")[0]).exists()
    assert all(re.match("https://|#", link) for link in links)


def test_links_are_relative_to_their_page_and_code_is_no_link(pages):
    text = "[a](../x.md#y) `[b](c)` [d](#e) [f](https://g.org/h)\n\n```\n[i](j)\n```\n![k](l.png)"
    shown = pages.relinked(text, "docs/page.md", partial(pages.in_repository, address="A"))
    expected = text.replace("(../x.md#y)", "(A/blob/main/x.md#y)")
    assert shown == expected.replace("(l.png)", "(A/raw/main/docs/l.png)")


# -- the files around the package ------------------------------------------------------------------


def test_the_version_needs_no_installation():
    """Without site-packages nothing is installed: neither the package nor torch."""
    program = "import gralora_diffusion; print(gralora_diffusion.__version__)"
    line = [sys.executable, "-S", "-E", "-c", program]
    said = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.strip() == gralora_diffusion.__version__


def test_hooks_have_the_linter_of_continuous_integration():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (rev,) = [repo["rev"] for repo in hooks["repos"] if "ruff" in repo["repo"]]
    assert f"ruff=={rev.removeprefix('v')}" in (ROOT / ".ci/constraints.txt").read_text().split()


def test_workflow_has_the_first_and_the_last_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert project["requires-python"] == f">={pythons[0]}"
    tested = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert tested == [pythons[0], pythons[-1]]
