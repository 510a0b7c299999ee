"""LoRA files that are added to be compared."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import save_file

from gralora_diffusion.io.file_names import METADATA_KEY
from gralora_diffusion.studio.context import Studio
from gralora_diffusion.studio.engine.added_loras import keep_lora, lora_problem


def lora(path, value=0.0, **metadata):
    tensors = {"lora_unet_a.lora_down.weight": np.full((1, 2), value, np.float32)}
    save_file(tensors, path, metadata)
    return path


def test_a_file_is_kept_once_and_replaces_none(tmp_path):
    studio = Studio.at(tmp_path / "studio")
    folder = studio.workspace.loras
    first = lora(tmp_path / "My <b> LoRA.safetensors")
    assert lora_problem(first) is None
    kept = keep_lora(first, folder)
    assert (kept.name, kept.read_bytes()) == ("My-b-LoRA.safetensors", first.read_bytes())
    assert keep_lora(first, folder) == kept
    other = keep_lora(lora(first, 1.0), folder)
    assert other.name == "My-b-LoRA-2.safetensors"
    assert studio.loras() == [(path.name, str(path)) for path in (other, kept)]
    (folder / "out.safetensors").symlink_to(tmp_path / "nowhere")
    assert len(studio.loras()) == 2


def test_files_that_are_no_loras(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"damaged")
    assert (
        lora_problem(tmp_path / "a.safetensors") == "a.safetensors is not a whole .safetensors file"
    )
    problem = lora_problem(lora(tmp_path / "b.safetensors", **{METADATA_KEY: "{}"}))
    assert problem.startswith("b.safetensors is a GraLoRA adapter. Choose it among the adapters")
