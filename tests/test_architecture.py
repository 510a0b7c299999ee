"""The folders of the package: a module imports only from its own and from those above it."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from gralora_diffusion import get_family, list_families
from tests import ROOT

PACKAGE = ROOT / "gralora_diffusion"
(ORDER,) = (
    block.partition("```")[0]
    for block in (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("```text\n")[1:]
)
RANK = {room: rank for rank, line in enumerate(ORDER.splitlines()) for room in line.split(", ")}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FAMILIES = [get_family(name) for name in list_families()]
FAMILY_NAMES = {name for f in FAMILIES for name in (f.name, type(f).__name__, *f.pipeline_classes)}


def room_of(module: str) -> str:
    """The folder that a module lies in, from the package's root; "" is the root."""
    return ".".join(MODULES[module].relative_to(PACKAGE).parent.parts)


def imports_of(module: str, tree: ast.AST) -> Iterator[str]:
    """The package's own modules that a module imports, those for type checkers included."""
    package = MODULES[module].relative_to(ROOT).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*parts, node.module) if node.module else parts)
            names = {f"{base}.{alias.name}" for alias in node.names}
            yield from (names & MODULES.keys()) or ({base} & MODULES.keys())


TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
IMPORTS = {name: set(imports_of(name, tree)) - {name} for name, tree in TREES.items()}


def test_every_room_has_its_place_in_the_order():
    assert {room_of(module) for module in MODULES} == RANK.keys() - {"the root"} | {""}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_up(module):
    own = room_of(module)
    ranks = {other: RANK[room_of(other) or "the root"] for other in IMPORTS[module]}
    here = RANK[own or "the root"]
    assert [o for o, rank in ranks.items() if room_of(o) != own and rank >= here] == []


def test_no_module_imports_itself_through_others():
    left = {name: set(imports) for name, imports in IMPORTS.items()}
    while free := [name for name, imports in left.items() if not imports & left.keys()]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("module", MODULES)
def test_families_are_known_to_their_room_alone(module):
    if room_of(module) == "families":
        return
    for node in ast.walk(TREES[module]):
        words = {getattr(node, field, None) for field in ("id", "attr", "value")}
        named = {word for word in words if isinstance(word, str)} & FAMILY_NAMES
        assert not named, f"line {getattr(node, 'lineno', '?')} knows {named}"


@pytest.mark.parametrize("module", MODULES)
def test_links_are_followed_in_one_place(module):
    """``Path.resolve`` raises for a link that leads to itself; ``real_path`` does not."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and node.attr == "resolve":
            assert ast.unparse(node.value) == "Path(__file__)", f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES.values(), ids=lambda path: path.stem)
def test_length(path: Path):
    if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 600:
        warnings.warn(f"{path.name} has {lines} lines: is it one idea?", stacklevel=1)
