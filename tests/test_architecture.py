"""The layers of the package: a module imports only from the rows above its own."""

import ast
import warnings

import pytest

from gralora_diffusion import get_family, list_families
from tests import ROOT

PACKAGE = ROOT / "gralora_diffusion"
ROWS = """
errors lazy unfinished safe_text path_patterns command_line blockwise fused_linear low_rank factors
config_values config fused_projections targets file_names hub regular_files json_files
colour_profiles image_files tensor_files staging lora_keys lora_config lora_scaling layers
injection state layouts families empty_models original_file model_folder compatibility bookkeeping
offloading pipelines pipeline_methods sampling export,inspection,warm_start training benchmark cli
__init__
"""
ROW = {name: number for number, names in enumerate(ROWS.split()) for name in names.split(",")}
FAMILIES = [get_family(name) for name in list_families()]
FAMILY_NAMES = {name for f in FAMILIES for name in (f.name, type(f).__name__, *f.pipeline_classes)}


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: "/".join(p.parts[-2:])
)
def test_file(path):
    package = path.relative_to(PACKAGE.parent).parts[:-1]
    part = [*package[1:], path.stem][0]
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) > 600:
        warnings.warn(f"{path.name} has {len(lines)} lines: is it one idea?", stacklevel=1)
    for node in ast.walk(ast.parse("\n".join(lines))):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += (node.module,) if node.module else ()
            imported = [".".join((*base, alias.name)) for alias in node.names]
        for name in imported:
            other = name.split(".")[1] if name.startswith("gralora_diffusion.") else part
            assert other == part or ROW[other] < ROW[part], f"line {node.lineno} imports {name}"
        if part != "families":
            words = {getattr(node, field, None) for field in ("id", "attr", "value")}
            named = {word for word in words if isinstance(word, str)} & FAMILY_NAMES
            assert not named, f"line {node.lineno} knows {named}"
