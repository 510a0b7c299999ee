"""LoRAs are read as the program that wrote them reads them: against PEFT's own update."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from gralora_diffusion import AdapterFileError
from gralora_diffusion.inspection import inspect_file
from gralora_diffusion.lora_import import gralora_from_lora
from gralora_diffusion.lora_import.main import main
from tests.lora_import.loras import dense, save
from tests.models import PIPELINES, dense_updates
from tests.originals import ORIGINALS
from tests.reference import relative_error

PATH = "single_transformer_blocks.0.attn.to_q"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({n: nn.Linear(32, 32) for n in ("to_q", "to_k")})


class Transformer(nn.Module):
    """Two layers with the names of FLUX.1's, and reproducible weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.single_transformer_blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        attn = self.single_transformer_blocks[0].attn
        return attn["to_q"](x) + attn["to_k"](x)


def trained(folder: Path, **options: Any) -> Any:
    """A LoRA of PEFT that has been trained a little, saved; the model."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["to_q", "to_k"]} | options)
    model: Any = get_peft_model(Transformer(), config)
    if not isinstance(config.init_lora_weights, bool):
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "initial")
        model.peft_config["default"].init_lora_weights = options["init_lora_weights"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def expected(folder: Path) -> dict[str, Tensor]:
    """Path -> what PEFT, which reads the folder, makes of the original weights."""
    original = Transformer()
    merged = PeftModel.from_pretrained(Transformer(), str(folder)).merge_and_unload()
    updates = {
        name: layer.weight.detach().double() - original.get_submodule(name).weight.detach()
        for name, layer in merged.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return {name: update for name, update in updates.items() if update.any()}


def check(source: Any, wanted: dict[str, Tensor], family: str = "flux", **options: Any) -> None:
    adapter, layers = gralora_from_lora(source, family, 16, 2, **options)
    (part,) = adapter.components.values()
    found = dense_updates(part)
    assert sorted(found) == sorted(wanted)
    assert all(relative_error(found[name], wanted[name]) < 1e-5 for name in wanted)
    assert {layer.error for layer in layers.values()} == {0.0}


SCALINGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"alpha_pattern": {"to_k": 2}, "rank_pattern": {"to_k": 2}},
    {"alpha_pattern": {"^single_transformer_blocks.0.attn.to_k": 3}, "use_rslora": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
]


@pytest.mark.parametrize("options", SCALINGS)
def test_pefts_folder_and_diffusers_header(options, tmp_path):
    model = trained(tmp_path, **options)
    model.save_pretrained(tmp_path / "transformer")
    wanted = expected(tmp_path / "transformer")
    check(tmp_path / "transformer", wanted)
    check(tmp_path / "transformer" / "adapter_model.safetensors", wanted)
    norms = {f"{name}": float(update.norm()) for name, update in wanted.items()}
    for place in ("transformer", "transformer/adapter_model.safetensors"):
        layers = inspect_file(tmp_path / place).layers
        assert {layer.path: layer.norm for layer in layers} == pytest.approx(norms, rel=1e-4)
    config = json.loads((tmp_path / "transformer" / "adapter_config.json").read_text())
    pairs = {
        name: (layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data)
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }
    for start in ("", "diffusion_model.", "base_model.model.", "transformer."):
        for component in ("", "transformer."):
            tensors = {
                f"{start}{name}.lora_{part}.weight": tensor
                for name, pair in pairs.items()
                for part, tensor in zip("AB", pair, strict=True)
            }
            told = {f"{component}{field}": value for field, value in config.items()}
            file = save(tensors, tmp_path / "x.safetensors", lora_adapter_metadata=told)
            check(file, wanted)
            layers = inspect_file(file).layers
            assert [layer.norm for layer in layers] == pytest.approx(
                [norms[layer.path.removeprefix(start)] for layer in layers], rel=1e-4
            )


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_a_changed_base(kind, tmp_path):
    """It is refused wherever it is stored; PEFT's conversion of it gives the same update."""
    model = trained(tmp_path, init_lora_weights=kind, lora_alpha=4)
    model.save_pretrained(tmp_path / "transformer")
    with pytest.raises(AdapterFileError, match="path_initial_model_for_weight_conversion"):
        gralora_from_lora(tmp_path / "transformer", "flux", 16, 2)
    facts = inspect_file(tmp_path / "transformer")
    assert f"init_lora_weights is '{kind}'" in facts.problems[0]
    told = {"transformer.init_lora_weights": kind, "transformer.lora_alpha": 4, "transformer.r": 4}
    tensors = {f"transformer.{PATH}.lora_A.weight": torch.randn(4, 32)}
    tensors[f"transformer.{PATH}.lora_B.weight"] = torch.randn(32, 4)
    file = save(tensors, tmp_path / "x.safetensors", lora_adapter_metadata=told)
    with pytest.raises(AdapterFileError, match=f"init_lora_weights is '{kind}'"):
        gralora_from_lora(file, "flux", 16, 2)
    model.save_pretrained(
        tmp_path / "converted",
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    check(tmp_path / "converted", expected(tmp_path / "converted"))


def test_all_that_cannot_be_read_is_named_at_once(tmp_path):
    tensors = {}
    for name, rank in (("to_q", 4), ("to_k", 3)):
        layer = f"transformer.single_transformer_blocks.0.attn.{name}"
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, 32)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(32, 4)
    told = {"transformer.r": 8, "transformer.lora_alpha": 4, "transformer.modules_to_save": ["x"]}
    file = save(tensors, tmp_path / "x.safetensors", lora_adapter_metadata=told)
    with pytest.raises(AdapterFileError) as caught:
        gralora_from_lora(file, "flux", 16, 2)
    for text in ("modules_to_save", "attn.to_q: the config says rank 8", "attn.to_k: rows of its"):
        assert text in str(caught.value)


def test_an_alpha_of_the_header_is_applied_or_ignored_on_request(tmp_path, capsys):
    down, up = torch.randn(4, 32), torch.randn(32, 4)
    tensors = {f"transformer.{PATH}.lora_A.weight": down, f"transformer.{PATH}.lora_B.weight": up}
    file = save(tensors, tmp_path / "x.safetensors", ss_network_alpha="16.0")
    with pytest.raises(AdapterFileError, match="ss_network_alpha 16\), and no tensor does"):
        gralora_from_lora(file, "flux", 16, 2)
    check(file, {PATH: dense(down, up, 4.0)}, header_alpha="apply")
    check(file, {PATH: dense(down, up)}, header_alpha="ignore")
    (layer,) = inspect_file(file).layers
    assert (layer.scaling, layer.norm) == (None, None)
    assert "--header_alpha" in layer.problem
    line = f"--lora {file} --family flux --rank 8 --gralora_k 2 --output {tmp_path}/new"
    with pytest.raises(SystemExit):
        main(line.split())
    assert "--header_alpha" in capsys.readouterr().err
    main([*line.split(), "--header_alpha", "apply"])


def test_a_layer_of_rank_0_has_no_update():
    name = f"transformer.{PATH}"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(0, 32),
        f"{name}.lora_B.weight": torch.ones(32, 0),
    }
    for hybrid in (0, 3):
        adapter, layers = gralora_from_lora(tensors, "flux", 8, 2, hybrid)
        (update,) = dense_updates(adapter.components["transformer"]).values()
        assert not update.any()
        assert [(layer.norm, layer.error) for layer in layers.values()] == [(0.0, 0.0)]


# -- OneTrainer and LyCORIS ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "flux2", "flux2-klein", "stable-diffusion-3"])
@pytest.mark.parametrize("start", ["lora_transformer_", "lora_transformer.", "lycoris_"])
def test_every_layer_by_its_flat_name(name, start):
    """Paths of diffusers with ``_`` for dots; FLUX.2's first were with dots."""
    tensors, wanted = {}, {}
    for path, layer in PIPELINES[name]().transformer.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        out, width, *kernel = layer.weight.shape
        down, up = torch.randn(2, width, *kernel), torch.randn(out, 2, *[1] * len(kernel))
        called = start + (path if start.endswith(".") else path.replace(".", "_"))
        tensors |= {f"{called}.lora_down.weight": down, f"{called}.lora_up.weight": up}
        tensors[f"{called}.alpha"] = torch.tensor(1.0)
        wanted[path] = dense(down, up, 0.5)
    adapter, _ = gralora_from_lora(tensors, name, 4, 2)
    found = dense_updates(adapter.components["transformer"])
    assert sorted(found) == sorted(wanted)
    assert all(relative_error(found[path], wanted[path]) < 1e-6 for path in wanted)


def test_flat_names_of_text_encoders():
    """OneTrainer's second of FLUX.1 is T5."""
    names = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": (
            "text_encoder.text_model.encoder.layers.0.mlp.fc1"
        ),
        "lora_te2_encoder_block_0_layer_1_DenseReluDense_wi_0": (
            "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_0"
        ),
        f"lora_transformer_{PATH.replace('.', '_')}": f"transformer.{PATH}",
    }
    tensors = {}
    for name in names:
        tensors |= {f"{name}.lora_down.weight": torch.ones(2, 8)}
        tensors |= {f"{name}.lora_up.weight": torch.ones(8, 2)}
    _, layers = gralora_from_lora(tensors, "flux", 4, 2)
    assert sorted(layers) == sorted(names.values())


@pytest.mark.parametrize("family", ["flux", "flux2", "stable-diffusion-3"])
def test_flat_names_that_are_none(family):
    name = "lora_transformer_transformer_blocks_0_nothing"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 8),
        f"{name}.lora_up.weight": torch.ones(8, 2),
    }
    with pytest.raises(AdapterFileError, match=f"do not exist in the transformer of .*: {name}"):
        gralora_from_lora(tensors, family, 4, 2)


# -- ComfyUI's Train LoRA --------------------------------------------------------------------------


def train_lora(original: dict[str, Tensor], rank: int = 2) -> Any:
    """What the node writes for a model: a LoRA of each matrix, differences of what has one axis."""
    tensors, small = {}, []
    for key, weight in original.items():
        name, _, leaf = key.rpartition(".")
        if leaf == "weight" and weight.dim() > 1:
            down = torch.randn(rank, *weight.shape[1:])
            tensors[f"{name}.lora_up.weight"] = torch.randn(len(weight), rank)
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
        elif leaf in ("weight", "bias"):
            small.append(f"{name}.{'diff_b' if leaf == 'bias' else 'diff'}")
            tensors[small[-1]] = torch.randn_like(weight)
    return tensors, small


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl", "flux"])
def test_differences_of_norms_and_biases_are_left_out_on_request(name, tmp_path, capsys):
    pipe = PIPELINES[name]()
    original = {
        key.removeprefix("model."): tensor
        for key, tensor in ORIGINALS[name](pipe).items()
        if key.startswith("model.diffusion_model.")
    }
    tensors, small = train_lora(original)
    file = save(tensors, tmp_path / "x.safetensors")
    options = {}
    line = f"--lora {file} --family {name} --rank 4 --gralora_k 2 --output {tmp_path}/new"
    if hasattr(pipe, "unet"):
        options["unet_config"] = pipe.unet.config
        pipe.save_pretrained(tmp_path / "base")
        line = line.replace(f"--family {name}", f"--base {tmp_path}/base")
    with pytest.raises(AdapterFileError, match="--leave_out_norms_and_biases"):
        gralora_from_lora(file, name, 4, 2, **options)
    left_out: list[str] = []
    adapter, layers = gralora_from_lora(file, name, 4, 2, left_out=left_out, **options)
    assert sorted(left_out) == sorted(small)
    alone = {key: tensor for key, tensor in tensors.items() if key not in small}
    pure, _ = gralora_from_lora(alone, name, 4, 2, **options)
    assert {layer.error for layer in layers.values()} == {0.0}
    assert pure.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(pure.tensors[key], adapter.tensors[key]) for key in pure.tensors)
    main([*line.split(), "--leave_out_norms_and_biases"])
    told = capsys.readouterr().out
    assert f"left out: {len(small)} tensors of norms and biases" in told
    assert all(key in told for key in small)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("diffusion_model.img_in.diff", torch.ones(8, 8)),  # a whole weight
        ("diffusion_model.img_in.set_weight", torch.ones(8)),  # in place of the base's
        ("diffusion_model.img_in.reshape_weight", torch.ones(2)),
        ("diffusion_model.norm.weight", torch.ones(8)),
    ],
)
def test_nothing_else_is_left_out(key, tensor):
    name = f"transformer.{PATH}"
    tensors = {
        f"{name}.lora_A.weight": torch.ones(2, 32),
        f"{name}.lora_B.weight": torch.ones(32, 2),
    }
    with pytest.raises(AdapterFileError, match=key.rpartition(".")[0]):
        gralora_from_lora(tensors | {key: tensor}, "flux", 8, 2, left_out=[])


def test_a_trained_bias_of_pefts_is_left_out_on_request(tmp_path):
    model = trained(tmp_path, lora_bias=True)
    model.save_pretrained(tmp_path / "transformer")
    with pytest.raises(AdapterFileError, match=r"lora_B\.bias"):
        gralora_from_lora(tmp_path / "transformer", "flux", 16, 2)
    left_out: list[str] = []
    wanted = {
        name: layer.get_delta_weight("default").detach().double()
        for name, layer in model.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }
    check(tmp_path / "transformer", wanted, left_out=left_out)
    assert len(left_out) == 2
