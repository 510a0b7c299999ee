"""A LoRA is compared with its base before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gralora_diffusion import AdapterFileError
from gralora_diffusion.lora_import import conversion, gralora_from_lora
from gralora_diffusion.lora_import.base import LoraBase
from gralora_diffusion.lora_import.main import main
from tests.lora_import.loras import pairs, save
from tests.models import PIPELINES, stable_diffusion

ENDINGS = ("to_q", "to_k", "proj_in", "conv1", "conv_shortcut", "ff.linear_in", "to_add_out")
TEXT_ENDINGS = ("q_proj", "fc1", "SelfAttention.q", "wi_0")


def lora(pipe: Any, *components: str, rank: int = 2) -> dict[str, Tensor]:
    """A LoRA in diffusers' names on these parts of a pipeline."""
    tensors = {}
    for component in components:
        endings = TEXT_ENDINGS if "text" in component else ENDINGS
        for path, (down, up) in pairs(getattr(pipe, component), endings, rank).items():
            tensors[f"{component}.{path}.lora_A.weight"] = down
            tensors[f"{component}.{path}.lora_B.weight"] = up
    return tensors


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base in its configurations: it has no weights."""
    return without_weights(stable_diffusion(), tmp_path / "base")


def without_weights(pipe: Any, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "components"),
    [
        ("stable-diffusion", ("unet", "text_encoder")),
        ("stable-diffusion-xl", ("unet", "text_encoder", "text_encoder_2")),
        ("stable-diffusion-3", ("transformer", "text_encoder", "text_encoder_3")),
        ("flux", ("transformer", "text_encoder", "text_encoder_2")),
        ("flux2", ("transformer",)),
        ("flux2-klein", ("transformer",)),
    ],
)
def test_fitting(name: str, components: tuple[str, ...], tmp_path: Path) -> None:
    pipe = PIPELINES[name]()
    tensors = lora(pipe, *components)
    found = LoraBase(str(without_weights(pipe, tmp_path)))
    assert found.family.name == name
    options = {"unet_config": found.unet_config, "base": found}
    adapter, layers = gralora_from_lora(tensors, found.family, 8, 2, **options)
    assert len(layers) == len(tensors) // 2
    assert set(adapter.components) == set(components)


def test_a_matrix_for_a_convolution_of_one_pixel(base: Path) -> None:
    tensors = lora(stable_diffusion(), "unet")
    flat = {k: t.flatten(1) if ".proj_in." in k else t for k, t in tensors.items()}
    assert any(t.dim() == 4 for k, t in tensors.items() if ".proj_in." in k)
    gralora_from_lora(flat, "stable-diffusion", 8, 2, base=LoraBase(str(base)))


def test_other_widths(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Stable Diffusion 1.5's and 2.1's, whose text is of another width."""
    tensors = lora(stable_diffusion(cross_attention_dim=48), "unet")
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert tensors[f"{path}.lora_A.weight"].shape[1] == 48
    wide = sum("attn2.to_k.lora_A" in key for key in tensors)

    def work(*arguments: object) -> None:
        raise AssertionError("it was converted")

    monkeypatch.setattr(conversion, "_layer", work)
    with pytest.raises(AdapterFileError) as caught:
        gralora_from_lora(tensors, "stable-diffusion", 8, 2, base=LoraBase(str(base)))
    told = str(caught.value)
    assert (
        f"state dict does not fit --base {base}: {wide} of {len(tensors) // 2} layers differ"
        in told
    )
    assert f"{path} (48 -> 32 in the LoRA, 32 -> 32 in the base)" in told
    file = save(tensors, tmp_path / "lora.safetensors")
    line = f"--lora {file} --base {base} --rank 8 --gralora_k 2 --output {tmp_path}/new"
    with pytest.raises(SystemExit):
        main(line.split())
    assert not (tmp_path / "new").exists()


def test_layers_and_parts_that_the_base_misses(base: Path) -> None:
    tensors = lora(stable_diffusion(), "unet")
    tensors |= {
        key.replace("down_blocks.1", "down_blocks.7"): tensor for key, tensor in tensors.items()
    }
    with pytest.raises(
        AdapterFileError, match=r"down_blocks\.7\.\S+ \(.* in the LoRA, no such layer in the base"
    ):
        gralora_from_lora(tensors, "stable-diffusion", 8, 2, base=LoraBase(str(base)))
    pipe = PIPELINES["stable-diffusion-3"]()
    tensors = lora(pipe, "transformer", "text_encoder_3")
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    without_weights(pipe, base.parent / "without T5")
    found = LoraBase(str(base.parent / "without T5"))
    with pytest.raises(AdapterFileError, match=r"text_encoder_3\.\S+ .*no such layer in the base"):
        gralora_from_lora(tensors, found.family, 8, 2, base=found)


def test_another_kernel(base: Path) -> None:
    tensors = lora(stable_diffusion(), "unet")
    key = next(key for key, t in tensors.items() if t.dim() == 4 and t.shape[2] == 3)
    tensors[key] = torch.randn(*tensors[key].shape[:2], 5, 5)
    with pytest.raises(
        AdapterFileError,
        match=r"1 of \d+ layers differ: .* 5x5 in the LoRA, \d+ -> \d+ 3x3 in the base",
    ):
        gralora_from_lora(tensors, "stable-diffusion", 8, 2, base=LoraBase(str(base)))


def test_no_base(base: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--base ./nowhere: no diffusers pipeline could be loaded"
    ):
        LoraBase("./nowhere")
    (base / "text_encoder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"--base {base}: its text_encoder cannot be read: "):
        gralora_from_lora(
            lora(stable_diffusion(), "text_encoder"),
            "stable-diffusion",
            8,
            2,
            base=LoraBase(str(base)),
        )
    (base / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"--base {base}: its unet cannot be read: "):
        LoraBase(str(base))
    (base / "unet" / "config.json").write_text(
        '{"sample_size": {"a": [1]}, "layers_per_block": "x"}'
    )
    with pytest.raises(ValueError, match=f"--base {base}: its unet cannot be read: "):
        LoraBase(str(base)).check({"unet": {}}, "lora")
    index = base / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "DiTPipeline"))
    with pytest.raises(ValueError, match="DiTPipeline does not belong to a supported family"):
        LoraBase(str(base))
