"""The notebook, run from top to bottom as a reader runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests import ROOT
from tests.training.runs import adapter

NOTEBOOK = ROOT / "samples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    read = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(read)
    return read


def test_outputs_are_cleared(notebook: Any) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_it_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own, in an empty folder; few steps, and nothing is installed."""
    monkeypatch.setenv("GRALORA_QUICKSTART_STEPS", "2")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = {"timeout": 300, "kernel_name": "python3"}
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}, **options).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    images = [o for o in outputs if o.output_type == "execute_result" and "image/png" in o.data]
    assert len(images) == 3  # the subject, the curve and what was generated
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "125 layers of unet" in printed
    folder = tmp_path / "outputs" / "quickstart"
    assert any(tensor.any() for key, tensor in adapter(folder).items() if "_B" in key)
    assert Image.open(folder / "training_curve.png").size == (840, 480)
    assert (folder / "robot.safetensors").is_file()
