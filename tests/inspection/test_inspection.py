"""What files are said to be, on files as their programs write them."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gralora_diffusion import cli
from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME
from gralora_diffusion.inspection import inspect_file
from gralora_diffusion.inspection.main import main
from gralora_diffusion.io.errors import AdapterFileError
from tests import models
from tests.models import PIPELINES
from tests.originals import ORIGINALS, transformer_alone, write
from tests.reference import dense_update

KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def lora(name: str, width: int, height: int, rank: int = 8, style: str = "kohya") -> Any:
    ends = {"kohya": ("lora_down", "lora_up"), "peft": ("lora_A", "lora_B")}[style]
    down, up = torch.randn(rank, width), torch.randn(height, rank)
    return {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A folder with an adapter in each of our forms, and the pipeline."""
    folder = tmp_path_factory.mktemp("adapted")
    pipe = models.adapt(models.stable_diffusion(), rank_pattern={"to_q|q_proj": 4})
    pipe.save_gralora_weights(folder / "native", metadata={"modelspec.trigger_phrase": "sks dog"})
    pipe.save_gralora_weights(folder / "peft", peft_format=True)
    return folder


@pytest.mark.parametrize("form", ["native", f"native/{WEIGHTS_NAME}", "peft", "peft/unet"])
def test_gralora(adapted, form):
    facts = inspect_file(adapted / form)
    assert "GraLoRA adapter" in facts.title
    assert facts.families == (["stable-diffusion"] if "native" in form else [])
    assert facts.trigger == ("sks dog" if "native" in form else None)
    assert facts.non_finite == []
    assert facts.others == []
    whole = load_file(adapted / "native" / WEIGHTS_NAME)
    alone = form == "peft/unet"
    tensors = {k: t for k, t in whole.items() if not alone or k.startswith("unet.")}
    assert facts.parameters == sum(t.numel() for t in tensors.values())
    assert facts.tensors == len(tensors)
    assert facts.dtypes == {"F32": len(tensors)}
    layers = {layer.path: layer for layer in facts.layers}
    squares = 0.0
    for key, A in tensors.items():
        if not key.endswith("gralora_A"):
            continue
        path = key.removesuffix(".gralora_A")
        layer = layers.pop(path.removeprefix("unet.") if alone else path)
        rank = 4 if path.endswith(("to_q", "q_proj")) else 8
        update = dense_update(A, tensors[f"{path}.gralora_B"])
        hybrid = 2 if path.startswith("unet.") else 0
        if hybrid:
            down = tensors[f"{path}.gralora_A_general.weight"].double()
            up = tensors[f"{path}.gralora_B_general.weight"].double().flatten(1)
            update += torch.einsum("or,ri...->oi...", up, down)
        update *= 16 / (rank + hybrid)
        assert (layer.rank, layer.k, layer.hybrid_rank, layer.alpha) == (rank, 4, hybrid, 16)
        assert layer.scaling == 16 / (rank + hybrid)
        assert (layer.outputs, layer.inputs, *layer.kernel) == tuple(update.shape)
        check_measures(layer, update)
        squares += float(update.square().sum())
    assert layers == {}
    assert facts.norm == pytest.approx(math.sqrt(squares), rel=1e-9)
    expected = {"unet": 44} if alone else {"unet": 44, "text_encoder": 4}
    names = ["denoiser"] if alone else expected
    assert {name: part.layers for name, part in facts.components.items()} == dict(
        zip(names, expected.values(), strict=True)
    )


def check_measures(layer: Any, update: Tensor) -> None:
    values = torch.linalg.svdvals(update.double().flatten(1))
    p = values / values.sum()
    entropy = -float((p * p.clamp_min(1e-300).log()).sum())
    assert layer.norm == pytest.approx(float(update.norm()), rel=1e-9)
    assert layer.effective_rank == pytest.approx(math.exp(entropy), rel=1e-6)


@pytest.mark.parametrize("style", ["kohya", "peft"])
@pytest.mark.parametrize("alpha", [None, 4.0])
def test_lora(style, alpha, tmp_path):
    name = {"kohya": KOHYA, "peft": "transformer.transformer_blocks.0.attn.to_q"}[style]
    tensors = lora(name, 768, 320, style=style)
    down, up = tensors.values()
    if alpha:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "x.safetensors")
    facts = inspect_file(tmp_path / "x.safetensors")
    (layer,) = facts.layers
    assert facts.style == {"kohya": "kohya", "peft": "diffusers"}[style]
    assert (layer.rank, layer.k, layer.alpha, layer.kind) == (8, None, alpha, "LoRA")
    assert layer.scaling == (0.5 if alpha else 1.0)
    assert (layer.inputs, layer.outputs) == (768, 320)
    assert facts.parameters == 8 * (768 + 320)
    check_measures(layer, layer.scaling * up.double() @ down.double())


def test_alpha_in_metadata(tmp_path):
    tensors = lora("transformer.transformer_blocks.0.attn.to_q", 3072, 3072, style="peft")
    tensors |= lora("transformer.transformer_blocks.0.attn.to_k", 3072, 3072, style="peft")
    told = {"transformer.r": 8, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {}}
    told["transformer.alpha_pattern"] = {"to_k": 4}
    metadata = {"lora_adapter_metadata": json.dumps(told)}
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    layers = inspect_file(tmp_path / "x.safetensors").layers
    assert {layer.path[-4:]: layer.scaling for layer in layers} == {"to_q": 0.25, "to_k": 0.5}


def test_peft_folder_of_lora(tmp_path):
    tensors = lora("base_model.model.attn1.to_q", 16, 16, style="peft")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    facts = inspect_file(tmp_path)
    assert facts.title == "LoRA adapter, PEFT folder"
    assert [layer.scaling for layer in facts.layers] == [0.25]


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_lokr(kernel, tmp_path):
    w1, a, b = torch.randn(4, 5), torch.randn(6, 2), torch.randn(2, 7 * math.prod(kernel))
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(3.0)}
    save_file({f"lycoris_x_to_q.{k}": t for k, t in tensors.items()}, tmp_path / "x.safetensors")
    facts = inspect_file(tmp_path / "x.safetensors")
    (layer,) = facts.layers
    assert (facts.style, layer.kind, layer.rank, layer.scaling) == ("LyCORIS", "LoKr", 2, 1.5)
    check_measures(layer, 1.5 * torch.kron(w1.double(), a.double() @ b.double()))


def test_loha_and_dora_and_differences(tmp_path):
    w = {
        f"hada_w{n}_{s}": torch.randn((16, 4) if s == "a" else (4, 24)) for n in "12" for s in "ab"
    }
    tensors = {f"lycoris_a_to_q.{k}": t for k, t in w.items()}
    tensors |= lora("lycoris_b", 8, 8) | {"lycoris_b.dora_scale": torch.ones(1, 8)}
    diff = torch.randn(8, 6)
    tensors |= {"lycoris_c.diff": diff, "lycoris_c.diff_b": torch.randn(8)}
    save_file(tensors, tmp_path / "x.safetensors")
    layers = {layer.kind: layer for layer in inspect_file(tmp_path / "x.safetensors").layers}
    assert list(layers) == ["LoHa", "DoRA", "difference"]
    assert (layers["LoHa"].rank, layers["LoHa"].norm) == (4, None)
    assert (layers["LoHa"].inputs, layers["LoHa"].outputs) == (24, 16)
    assert layers["difference"].norm == pytest.approx(float(diff.double().norm()), rel=1e-9)
    # LoHa's norm is not known, so neither is the whole update's
    assert inspect_file(tmp_path / "x.safetensors").norm is None


def test_an_update_beyond_float64_has_no_norm(tmp_path):
    large = {key: tensor.double() * 1e200 for key, tensor in lora(KOHYA, 8, 4).items()}
    save_file(large, tmp_path / "x.safetensors")
    facts = inspect_file(tmp_path / "x.safetensors")
    (layer,) = facts.layers
    assert (layer.rank, layer.norm, layer.effective_rank) == (8, None, None)
    assert (facts.norm, facts.non_finite) == (None, [])


def test_tucker_convolution(tmp_path):
    down, mid, up = torch.randn(4, 6, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(8, 4, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    save_file({f"lora_unet_x.{k}": t for k, t in parts.items()}, tmp_path / "x.safetensors")
    (layer,) = inspect_file(tmp_path / "x.safetensors").layers
    # as LyCORIS rebuilds it: rebuild_tucker in lycoris/functional/general.py
    down, mid, up = (factor.double() for factor in (down, mid, up))
    update = torch.einsum("i j ..., j r, i p -> p r ...", mid, down[:, :, 0, 0], up[:, :, 0, 0].T)
    assert layer.kernel == [3, 3]
    check_measures(layer, update)


FLUX, XL = "flux", "stable-diffusion-xl"
FAMILIES = [  # a layer's name, inputs, outputs, families
    (KOHYA, 768, 320, ["stable-diffusion"]),
    (KOHYA, 1024, 320, ["stable-diffusion"]),
    (KOHYA, 2048, 640, [XL]),
    ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q", 640, 640, [XL]),
    ("unet.up_blocks.0.attentions.1.transformer_blocks.3.ff.net.2", 5120, 1280, [XL]),
    ("diffusion_model.joint_blocks.0.x_block.attn.qkv", 1536, 4608, ["stable-diffusion-3"]),
    ("transformer.transformer_blocks.3.attn.to_q", 2432, 2432, ["stable-diffusion-3"]),
    ("lora_unet_double_blocks_0_img_mlp_0", 3072, 12288, [FLUX]),
    ("transformer.single_transformer_blocks.0.proj_mlp", 3072, 12288, [FLUX]),
    ("diffusion_model.single_blocks.0.linear1", 3072, 21504, [FLUX]),
    ("transformer.transformer_blocks.0.attn.to_q", 3072, 3072, [FLUX, "flux2-klein"]),
    ("transformer.transformer_blocks.0.attn.to_q", 6144, 6144, ["flux2"]),
    ("diffusion_model.single_blocks.0.linear1", 6144, 55296, ["flux2"]),
    ("diffusion_model.single_blocks.0.linear1", 3072, 27648, ["flux2-klein"]),
    ("transformer.transformer_blocks.0.ff.linear_in", 4096, 24576, ["flux2-klein"]),
    ("diffusion_model.blocks.0.self_attn.q", 1536, 1536, []),
]


@pytest.mark.parametrize(("name", "inputs", "outputs", "families"), FAMILIES)
def test_family_by_a_layer(name, inputs, outputs, families, tmp_path):
    save_file(lora(name, inputs, outputs, rank=1), tmp_path / "x.safetensors")
    assert inspect_file(tmp_path / "x.safetensors").families == families


@pytest.mark.parametrize(
    ("field", "value", "family"),
    [
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", XL),
        ("modelspec.architecture", "stable-diffusion-v1/lora", "stable-diffusion"),
        ("modelspec.architecture", "stable-diffusion-3-medium/lora", "stable-diffusion-3"),
        ("modelspec.architecture", "flux-1-dev/lora", FLUX),
        ("ss_base_model_version", "sdxl_base_v1-0", XL),
        ("ss_base_model_version", "sd_v2", "stable-diffusion"),
        ("ss_base_model_version", "flux1", FLUX),
        ("ss_base_model_version", "flux2_klein_4b", "flux2-klein"),
        ("ss_base_model_version", "flux.2-dev", "flux2"),
    ],
)
def test_family_by_metadata(field, value, family, tmp_path):
    save_file(lora("lora_unet_x", 8, 8), tmp_path / "x.safetensors", metadata={field: value})
    facts = inspect_file(tmp_path / "x.safetensors")
    assert (facts.families, facts.family_told_by) == ([family], field)


@pytest.mark.parametrize(
    "name", [name for name in sorted(ORIGINALS) if name != "stable-diffusion-3"]
)
@pytest.mark.parametrize("alone", [False, True])
def test_original_checkpoint(name, alone, tmp_path):
    pipe = PIPELINES[name]()
    tensors = ORIGINALS[name](pipe)
    if alone:
        tensors = transformer_alone(tensors)
    facts = inspect_file(write(tensors, tmp_path / "x.safetensors"))
    # a klein is told from dev by what it lacks
    assert facts.families == [name]
    assert facts.title.startswith("original single-file checkpoint")
    assert facts.title.endswith("alone") == alone
    denoiser = getattr(pipe, next(iter(facts.components)))
    expected = sum(p.numel() for p in denoiser.parameters())
    assert next(iter(facts.components.values())).parameters == expected
    assert facts.non_finite is None


@pytest.mark.parametrize(
    ("tensors", "title"),
    [
        (
            {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3)},
            "original single-file checkpoint, which diffusers takes for 'inpainting'",
        ),
        (
            {
                f"model.diffusion_model.{key}": torch.zeros(3072, 64)
                for key in (
                    *("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"),
                    *("img_in.weight", "double_blocks.0.img_attn.qkv.scale_weight"),
                )
            },
            "original single-file checkpoint, quantized "
            "(model.diffusion_model.double_blocks.0.img_attn.qkv.scale_weight)",
        ),
    ],
)
def test_a_checkpoint_that_is_quantized_or_for_another_task(tensors, title, tmp_path):
    save_file(tensors, tmp_path / "x.safetensors")
    facts = inspect_file(tmp_path / "x.safetensors")
    assert facts.title == title
    assert facts.family_told_by == "its keys"


def test_pipeline_folder(tmp_path):
    pipe = models.stable_diffusion()
    pipe.save_pretrained(tmp_path, max_shard_size="300KB")
    facts = inspect_file(tmp_path, check=True)
    assert facts.families == ["stable-diffusion"]
    assert len(facts.files) > 3
    assert facts.non_finite == []
    assert list(facts.components) == ["unet", "text_encoder", "vae"]
    for name, part in facts.components.items():
        assert part.parameters == sum(t.numel() for t in getattr(pipe, name).state_dict().values())
    unet = inspect_file(tmp_path / "unet")
    assert unet.title == "one model in diffusers' layout (UNet2DConditionModel)"
    index = tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json"
    assert inspect_file(index).parameters == unet.parameters
    next((tmp_path / "unet").glob("*00001*")).unlink()
    with pytest.raises(AdapterFileError, match="names files that are missing"):
        inspect_file(index)


def test_nothing_but_the_header_of_a_large_checkpoint_is_read(tmp_path):
    """20 GB that lie nowhere on the disk."""
    keys = ["double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight"]
    size = 10**10
    header = {
        key: {"dtype": "BF16", "shape": [size // 2], "data_offsets": [i * size, (i + 1) * size]}
        for i, key in enumerate(keys)
    }
    text = json.dumps(header).encode()
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2 * size)
    began = time.process_time()  # other processes may keep this one waiting
    facts = inspect_file(tmp_path / "large.safetensors")
    assert time.process_time() - began < 2
    assert facts.families == ["flux"]
    assert facts.parameters == size


# -- values that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_none_are_named(value, dtype, tmp_path, capsys):
    tensors = {key: t.to(dtype) for key, t in lora(KOHYA, 8, 4).items()}
    broken = f"{KOHYA}.lora_up.weight"
    whole = tensors[broken].float()  # fp8 takes no items
    whole[1, 2] = value
    tensors[broken] = whole.to(dtype)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "x.safetensors")])
    assert caught.value.code == 1
    assert f"INFINITE VALUES in 1 tensors:\n  {broken}\n" in capsys.readouterr().out


def test_a_checkpoint_is_checked_on_request(tmp_path):
    tensors = ORIGINALS["flux"](PIPELINES["flux"]())
    broken = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
    tensors[broken] = tensors[broken].clone()
    tensors[broken][0, 0] = math.nan
    path = write(tensors, tmp_path / "x.safetensors")
    main([str(path)])
    with pytest.raises(SystemExit) as caught:
        main([str(path), "--check"])
    assert caught.value.code == 1
    assert inspect_file(path, check=True).non_finite == [broken]


@pytest.mark.parametrize(("dtype", "shape"), [("F4", [8, 4]), ("F6_E2M3", [8, 8])])
def test_numbers_that_torch_does_not_compute_with(dtype, shape, tmp_path):
    """Of 4 and 6 bits none is NaN, so that nothing has to be read to know it."""
    size = math.prod(shape) * int(dtype[1]) // 8
    kinds = {"unet": ["down_blocks.0.a"], "lora": ["x.lora_A.weight", "x.lora_B.weight"]}
    for name, keys in kinds.items():
        header = {
            key: {"dtype": dtype, "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
            for i, key in enumerate(keys)
        }
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + b"\xff" * size * len(keys)
        (tmp_path / f"{name}.safetensors").write_bytes(data)
    facts = inspect_file(tmp_path / "unet.safetensors", check=True)
    assert (facts.dtypes, facts.non_finite) == ({dtype: 1}, [])
    with pytest.raises(AdapterFileError, match=f"is stored as {dtype}, which torch cannot read"):
        inspect_file(tmp_path / "lora.safetensors")


# -- the command -----------------------------------------------------------------------------------


def test_text(adapted, capsys):
    cli.main(["inspect", str(adapted / "native")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "what     GraLoRA adapter, native file"
    assert "family   stable-diffusion (by its metadata)" in lines
    assert "trigger  sks dog" in lines
    rows = [line.split() for line in lines if line.startswith("text_encoder  GraLoRA")]
    assert sorted(rows) == [
        ["text_encoder", "GraLoRA", "2", "4", "4", "0", "16", "4"],
        ["text_encoder", "GraLoRA", "2", "8", "4", "0", "16", "2"],
    ]
    assert "... and 38 more (--all_layers)" in lines
    assert lines[-1] == "values: all finite"
    cli.main(["inspect", str(adapted / "native"), "--all_layers"])
    assert len(capsys.readouterr().out.splitlines()) == len(lines) + 37


def test_json_has_the_same_facts(adapted, capsys):
    path = adapted / "native" / WEIGHTS_NAME
    main([str(path), "--json", "--sha256"])
    values = json.loads(capsys.readouterr().out)
    assert values == json.loads(json.dumps(inspect_file(path, sha256=True).to_dict()))
    assert values["sha256"] == {WEIGHTS_NAME: hashlib.sha256(path.read_bytes()).hexdigest()}
    with safe_open(path, framework="pt") as file:
        assert values["metadata"] == file.metadata()
    assert values["bytes"] == path.stat().st_size
    assert len(values["layers"]) == 48


def test_several_files(adapted, tmp_path, capsys):
    broken = lora(KOHYA, 8, 4)
    broken[f"{KOHYA}.lora_up.weight"][0, 0] = math.nan
    save_file(broken, tmp_path / "broken.safetensors")
    right, wrong = str(adapted / "native"), str(tmp_path / "broken.safetensors")
    cli.main(["inspect", right, right])
    twice = capsys.readouterr().out
    cli.main(["inspect", right])
    once = capsys.readouterr().out
    assert twice == f"{once}\n{once}"
    for paths, code in (([right, wrong], 1), ([wrong, "nowhere", right], 2)):
        with pytest.raises(SystemExit) as caught:
            cli.main(["inspect", *paths])
        assert caught.value.code == code
        told = capsys.readouterr()
        assert "INFINITE VALUES in 1 tensors" in told.out
        assert once in told.out
        refused = "gralora inspect: error: nowhere: no such file or folder in '.'.\n"
        assert told.err == (refused if code == 2 else "")


def test_json_of_several_files(adapted, tmp_path, capsys):
    save_file(lora(KOHYA, 8, 4), tmp_path / "x.safetensors")
    paths = [adapted / "native", tmp_path / "x.safetensors"]
    main([*map(str, paths), "--json"])
    expected = [json.loads(json.dumps(inspect_file(path).to_dict())) for path in paths]
    assert json.loads(capsys.readouterr().out) == expected
    with pytest.raises(SystemExit):
        main(["nowhere", str(paths[1]), "--json"])
    assert json.loads(capsys.readouterr().out) == expected[1:]


def test_tags_stand_for_a_trigger(tmp_path):
    tags = {"ss_tag_frequency": json.dumps({"5_dog": {"grass": 2, " sks dog": 5}})}
    save_file(lora(KOHYA, 8, 4), tmp_path / "x.safetensors", metadata=tags)
    assert inspect_file(tmp_path / "x.safetensors").trigger == "sks dog"


@pytest.mark.parametrize("found", [[None, "a"], {"a": "many"}, {"a": None}, 3, {"a": 1e999}])
def test_tags_without_numbers_stand_for_nothing(tmp_path, found):
    tags = {"ss_tag_frequency": json.dumps({"5_dog": found})}
    save_file(lora(KOHYA, 8, 4), tmp_path / "x.safetensors", metadata=tags)
    assert inspect_file(tmp_path / "x.safetensors").trigger is None


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "an empty file"),
        (b"PK\x03\x04" + bytes(100), "a pickle"),
        (b"\x80\x02}q" + bytes(100), "Convert it to .safetensors"),
        (b"GGUF" + bytes(100), "a GGUF file"),
        (b"<!DOCTYPE html>" + bytes(100), "a web page in place of the file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"hello, hello, hello", "not a safetensors file"),
    ],
)
def test_other_files(content, text, tmp_path, capsys):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "x")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert text in error
    assert str(tmp_path / "x") in error


@pytest.mark.parametrize("left", [-1, 200, 20])
def test_truncated(left, tmp_path):
    save_file(lora(KOHYA, 8, 4), tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(whole[:left])
    with pytest.raises(AdapterFileError, match=r"not a complete safetensors file .* truncated"):
        inspect_file(tmp_path / "x.safetensors")


def _unknown(folder: Path) -> Path:
    save_file({"a.weight": torch.ones(2)}, folder / "x.safetensors")
    return folder / "x.safetensors"


def _several(folder: Path) -> Path:
    for name in "ab":
        save_file({"a.weight": torch.ones(2)}, folder / f"{name}.safetensors")
    return folder


def _no_tensors(folder: Path) -> Path:
    save_file({}, folder / "x.safetensors")
    return folder


def _damaged_metadata(folder: Path) -> Path:
    tensors = {"unet.x.gralora_A": torch.ones(2, 2, 2), "unet.x.gralora_B": torch.ones(2, 2, 2)}
    save_file(tensors, folder / "x.safetensors", metadata={"gralora_adapter_metadata": "{"})
    return folder


def _peft_of_pickles(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.bin").touch()
    return folder


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_unknown, "this is neither a known adapter nor a base of flux, "),
        (_several, r"contains several files \(a.safetensors, b.safetensors\)\. Pass one"),
        (_no_tensors, "it contains no tensors"),
        (_damaged_metadata, "gralora_adapter_metadata is damaged"),
        (_peft_of_pickles, "needs adapter_model.safetensors beside it; found adapter_model.bin"),
        (lambda folder: folder, "this folder contains no .safetensors file"),
        (lambda folder: folder / "absent", "no such file or folder"),
    ],
)
def test_refused(make, text, tmp_path):
    with pytest.raises(AdapterFileError, match=text):
        inspect_file(make(tmp_path))
