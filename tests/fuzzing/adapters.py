"""Readers of adapters and LoRAs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gralora_diffusion import GraloraConfig, inject
from gralora_diffusion.adapters.adapter_file import (
    Adapter,
    ComponentAdapter,
    config_to_dict,
    read_adapter,
    save_adapter,
    save_peft_folders,
)
from gralora_diffusion.export.lora import export_lora
from gralora_diffusion.export.names import StyleError
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.lora_import import gralora_from_lora
from gralora_diffusion.pipelines.loading import load_gralora_weights, unload_gralora_weights
from tests import models
from tests.comfyui_node import conversion

from .reader import FAMILY, SD, Reader, file_or, sample_folder, save_tensors


def _adapter() -> Adapter:
    unet = GraloraConfig(
        r=4,
        gralora_k=2,
        alpha=8,
        target_modules=["to_q"],
        rank_pattern={"a": 8},
        layers_to_transform=[1],
        layers_pattern=["blocks"],
        modules_to_save=["norm"],
    )
    text = GraloraConfig(r=4, gralora_k=2, hybrid_r=2, alpha=8, target_modules="x|y")
    parts = {
        name: ComponentAdapter(config, {f"to_q.gralora_{f}": torch.ones(2, 4, 4) for f in "AB"})
        for name, config in (("unet", unet), ("text_encoder", text))
    }
    return Adapter(parts, SD, {"modelspec.trigger_phrase": "sks dog"})


def make_adapters(folder: Path) -> None:
    save_adapter(_adapter(), sample_folder(folder, "native") / "file.safetensors")
    save_peft_folders(_adapter(), sample_folder(folder, "peft"))


def _read_adapter(folder: Path) -> None:
    file = folder / "file.safetensors"
    adapter = read_adapter(folder if (folder / "unet").exists() else file)
    json.dumps([config_to_dict(part.config) for part in adapter.components.values()])
    assert all(tensor.is_contiguous() for tensor in adapter.tensors.values())


@cache
def _pipe() -> Any:
    return models.stable_diffusion()


def make_attached(folder: Path) -> None:
    pipe = models.stable_diffusion()
    inject(
        pipe.unet, models.config("down.*(proj_in|to_q)", hybrid_r=2, rank_pattern={"to_q": 4}), "a"
    )
    pipe.save_gralora_weights(sample_folder(folder, "native"))
    pipe.save_gralora_weights(sample_folder(folder, "peft"), peft_format=True)


def _make_exported(folder: Path) -> None:
    """The same, each in a folder of its own, beside which the output is written."""
    make_attached(sample_folder(folder, "..made"))
    for made in ("native", "peft"):
        (folder / "..made" / made).rename(sample_folder(folder, made) / "adapter")
    (folder / "..made").rmdir()


def _attach(folder: Path) -> None:
    try:
        load_gralora_weights(_pipe(), folder)
    except AdapterFileError:
        assert not any("gralora" in name for name, _ in _pipe().unet.named_modules())
        raise
    unload_gralora_weights(_pipe())


def _make_for_node(folder: Path) -> None:
    """Adapters of linear layers and convolutions, hybrid in part."""
    for name, kernel in (("linear", ()), ("conv", (3, 3))):
        config = {"r": 4, "gralora_k": 2, "alpha": 4, "hybrid_r": 0, "peft_type": "GRALORA"}
        config |= {"rank_pattern": {"to_q": 4}, "alpha_pattern": {"(to_[qk])+": 2, r"x\.\d+": 8}}
        tensors = {
            "unet.x.to_q.gralora_A": torch.ones(2, 3, 4, *kernel),
            "unet.x.to_q.gralora_B": torch.ones(2, 4, 5),
        }
        if kernel:
            config["hybrid_r"] = 2
            tensors["unet.x.to_q.gralora_A_general.weight"] = torch.ones(2, 6, *kernel)
            tensors["unet.x.to_q.gralora_B_general.weight"] = torch.ones(10, 2, 1, 1)
        described = {"components": {"unet": config}, "family": SD, "format_version": 1}
        save_tensors(
            tensors, sample_folder(folder, name), **{conversion.METADATA_KEY: json.dumps(described)}
        )


def _read_for_node(folder: Path) -> None:
    file = conversion.read_gralora(str(folder / "file.safetensors"))
    conversion.check_family(file, ["SD15", "BASE"])
    shape = (10, *file.layers[0].down.shape[1:])
    targets = {"lora_unet_x_to_q": "x.to_q.weight"}
    lora = conversion.lora_for(file.layers, targets, {"x.to_q.weight": shape})
    assert all(tensor.isfinite().all() for tensor in lora.values())


def pairs(name: str, **parts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {f"{name}.{part}": torch.randn(shape) for part, shape in parts.items()}


def make_loras(folder: Path) -> None:
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_"
    shapes = {"down": (4, 32), "up": (32, 4)}
    kohya, peft, comfy = {}, {}, {}
    for letter in "qkv":
        for part, shape in shapes.items():
            side = "A" if part == "down" else "B"
            values = torch.randn(shape)
            flat = f"lora_unet_{path}{letter}".replace(".", "_")
            kohya[f"{flat}.lora_{part}.weight"] = values
            peft[f"base_model.model.{path}{letter}.lora_{side}.weight"] = values
            comfy[f"unet.{path}{letter}.lora_{side}.weight"] = values
        kohya[f"{flat}.alpha"] = torch.tensor(2.0)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"to_q": 4},
        "alpha_pattern": {"to_q": 2},
        "use_rslora": True,
        "target_modules": ["to_q"],
        "bias": "none",
    }
    described = {f"unet.{key}": value for key, value in config.items() if key != "peft_type"}
    tags = json.dumps({"1_dog": {"sks dog": 3, "grass": 1}})
    said = {"ss_network_alpha": "2", "ss_tag_frequency": tags, "ss_base_model_version": "sd_v1"}
    save_tensors(kohya, sample_folder(folder, "kohya"), **said)
    save_tensors(
        comfy, sample_folder(folder, "diffusers"), lora_adapter_metadata=json.dumps(described)
    )
    peft_folder = sample_folder(folder, "peft")
    save_tensors(peft, peft_folder).rename(peft_folder / "adapter_model.safetensors")
    (peft_folder / "adapter_config.json").write_text(json.dumps(config))


def _export(folder: Path) -> None:
    output = folder / "lora.safetensors"
    export_lora(folder / "adapter", output, family=SD)
    assert all(tensor.isfinite().all() for tensor in load_file(output).values())


ADAPTERS: dict[str, Reader] = {
    "adapter": Reader(make_adapters, _read_adapter, (AdapterFileError,)),
    "attached": Reader(make_attached, _attach, (AdapterFileError,), slow=True),
    "comfyui_node": Reader(_make_for_node, _read_for_node, (conversion.GraloraError,)),
    "lora": Reader(
        make_loras, lambda f: gralora_from_lora(file_or(f), FAMILY, 4, 2), (AdapterFileError,)
    ),
    "exported": Reader(_make_exported, _export, (AdapterFileError, StyleError), writes=True),
}
