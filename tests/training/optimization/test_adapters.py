"""The adapter of a run: where it goes, and the weights that are to be used."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from peft import GraloraConfig as PeftConfig
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from gralora_diffusion import inject
from gralora_diffusion.adapters.adapter_file import config_to_dict, save_adapter
from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.families import get_family
from gralora_diffusion.io.errors import CheckpointError, ConfigError
from gralora_diffusion.training.optimization.adapters import (
    adapter_configs,
    adapter_parameters,
    add_adapters,
    extract,
    inference_weights,
    restore,
)
from tests.models import stable_diffusion
from tests.training.runs import config

FAMILY = get_family("stable-diffusion")
BOTH = ("unet", "text_encoder")


def adapted(**options: Any) -> Any:
    pipe = stable_diffusion()
    add_adapters(pipe, FAMILY, config(train_text_encoder=True, **options))
    return pipe


def test_same_seed_same_adapter_and_another_one_for_another_seed() -> None:
    first, second, third = (
        extract(adapted(seed=seed), FAMILY, BOTH).components for seed in (1, 1, 2)
    )
    for part in BOTH:
        a, b, c = (x[part].tensors for x in (first, second, third))
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert any(not torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize(
    ("options", "endings"),
    [
        ({}, {"to_q", "to_k", "to_v", "0"}),
        ({"lora_layers": "to_q,conv1"}, {"to_q", "conv1"}),
        ({"lora_layers": "re:down_blocks.*to_k"}, {"to_k"}),
        ({"target_preset": "attention+ff"}, {"to_q", "to_k", "to_v", "0", "proj", "2"}),
        ({"exclude_modules": "to_q,to_out.0"}, {"to_k", "to_v"}),
        ({"exclude_modules": "re:.*to_[qk]", "lora_layers": "to_q,to_v,conv1"}, {"to_v", "conv1"}),
    ],
)
def test_targets(options: dict[str, Any], endings: set[str]) -> None:
    tensors = extract(adapted(**options), FAMILY, BOTH).components["unet"].tensors
    assert {key.split(".gralora_")[0].split(".")[-1] for key in tensors} == endings
    if "re:" in options.get("lora_layers", ""):
        assert all(key.startswith("down_blocks.") for key in tensors)


def test_what_is_excluded_is_so_in_whichever_model_has_it() -> None:
    """As PEFT does it, which reads the config."""
    pipe = adapted(exclude_modules="attn2.to_q,k_proj")
    bare = stable_diffusion()
    usual = adapted()
    for part, ending in zip(BOTH, ("attn2.to_q", "k_proj"), strict=True):
        config = getattr(pipe, part).peft_config["default"]
        assert config.exclude_modules == {ending}
        paths = set(layers(getattr(pipe, part)))
        assert paths == {p for p in layers(getattr(usual, part)) if not p.endswith(ending)}
        theirs = LoraConfig(
            target_modules=config.target_modules, exclude_modules=config.exclude_modules
        )
        model = inject_adapter_in_model(theirs, getattr(bare, part))
        assert paths == {p for p, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"exclude_modules": "to_qq"}, r"--exclude_modules to_qq matches none of the \d+ layers"),
        (
            {"exclude_modules": "to_q,conv1"},
            "--exclude_modules conv1 matches none of .* such as down_",
        ),
        ({"exclude_modules": "re:to_q"}, "--exclude_modules to_q matches none of"),
        (
            {"exclude_modules": "re:.*"},
            r"with exclude_modules=\.\* not found in the model: no layer",
        ),
    ],
)
def test_what_cannot_be_excluded(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        adapted(**options)


def layers(model: torch.nn.Module) -> dict[str, GraloraLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, GraloraLayer)}


#: Endings whose widths are all divisible by 8, and two convolutions with one of 4.
WIDE_AND_NARROW = "to_q,to_k,conv1,conv_in,conv_out"


def test_patterns_of_rank_k_and_alpha_go_to_both_models() -> None:
    pipe = adapted(
        rank=8,
        hybrid_rank=2,
        gralora_k=4,
        lora_layers=WIDE_AND_NARROW,
        rank_pattern=[r"attn2\.to_[qk]=16", "to_q=4", "q_proj=12"],
        k_pattern=["to_k=2", "1.self_attn.q_proj=2"],
        alpha_pattern=["conv_in=2.5", "v_proj=5"],
    )
    assert set(layers(pipe.unet)) > {"conv_in", "conv_out"}
    for path, layer in layers(pipe.unet).items():
        end = path.rsplit(".", 1)[-1]
        r = 16 if "attn2" in path else 4 if end == "to_q" else 8
        assert layer.r == {"default": r}, path
        assert layer.gralora_k == {"default": 2 if end == "to_k" else 4}, path
        # without --lora_alpha the scaling is 1, whatever the rank
        assert layer.scaling == {"default": 2.5 / 10 if end == "conv_in" else 1.0}, path
    for path, layer in layers(pipe.text_encoder).items():
        ours = path.endswith("q_proj")
        assert layer.r == {"default": 12 if ours else 8}, path
        assert layer.gralora_k == {"default": 2 if path.endswith("1.self_attn.q_proj") else 4}, path
        assert layer.scaling == {"default": 5 / 10 if path.endswith("v_proj") else 1.0}, path
    unet, text = (getattr(pipe, part).peft_config["default"] for part in BOTH)
    assert unet.rank_pattern == {r"attn2\.to_[qk]": 16, "to_q": 4}
    assert text.rank_pattern == {"q_proj": 12}
    assert unet.alpha_pattern == {"conv_in": 2.5, r"attn2\.to_[qk]": 18, "to_q": 6}
    assert text.alpha_pattern == {"v_proj": 5, "q_proj": 14}


def test_a_given_alpha_holds_for_every_rank() -> None:
    """As in PEFT's LoRA."""
    pipe = adapted(rank=8, lora_alpha=4, rank_pattern=["to_q=16"], alpha_pattern=["to_k=2"])
    for path, layer in layers(pipe.unet).items():
        scaling = 4 / 16 if path.endswith("to_q") else 2 / 8 if path.endswith("to_k") else 4 / 8
        assert layer.scaling == {"default": scaling}, path
    assert pipe.unet.peft_config["default"].alpha_pattern == {"to_k": 2}


def test_k_is_lowered_where_widths_ask_for_it(caplog: pytest.LogCaptureFixture) -> None:
    """conv_in and conv_out have 4 channels on one side; the rest is 16 or 32 wide."""
    caplog.set_level(logging.INFO)
    pipe = adapted(rank=16, gralora_k=16, lora_layers=WIDE_AND_NARROW, k_pattern=["to_k=8"])
    ks = {path: layer.gralora_k["default"] for path, layer in layers(pipe.unet).items()}
    for path, k in ks.items():
        expected = 4 if path in ("conv_in", "conv_out") else 8 if path.endswith("to_k") else 16
        assert k == expected, path
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"unet: k is lowered to 4 on 2 of {len(ks)} layers, as their widths require: conv_in, "
        "conv_out"
    ]
    unet, text = (getattr(pipe, part).peft_config["default"] for part in BOTH)
    assert unet.k_pattern == {"^(?:conv_in|conv_out)": 4, "to_k": 8}
    assert text.k_pattern == {}
    assert config_to_dict(text).keys() == config_to_dict(PeftConfig()).keys()
    again = stable_diffusion().unet
    inject(again, unet)  # which lowers nothing
    assert {path: layer.gralora_k["default"] for path, layer in layers(again).items()} == ks


def test_a_lowered_layer_takes_the_place_of_a_given_k() -> None:
    pipe = adapted(rank=16, gralora_k=2, lora_layers="to_q,conv_in", k_pattern=["conv_in=16"])
    assert layers(pipe.unet)["conv_in"].gralora_k == {"default": 4}
    assert pipe.unet.peft_config["default"].k_pattern == {"^conv_in": 4}


def test_configs_need_no_weights() -> None:
    """Not even those of a model on the meta device, and nothing is injected."""
    options = config(rank=16, gralora_k=16, lora_layers=WIDE_AND_NARROW, rank_pattern=["to_q=32"])
    with torch.device("meta"):
        bare = stable_diffusion().unet
    (made,) = adapter_configs({"unet": bare}, FAMILY, options).values()
    pipe = stable_diffusion()
    add_adapters(pipe, FAMILY, options)
    assert not layers(bare)
    assert config_to_dict(made) == config_to_dict(pipe.unet.peft_config["default"])


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (
            {"rank_pattern": ["to_z=8", "to_q=8", "attn1.to_q=4"], "alpha_pattern": ["fc7=1"]},
            [
                "--rank_pattern 'to_z' matches none of the 40 target layers, such as down_blocks",
                "--rank_pattern 'attn1.to_q' has no effect: earlier patterns match all 4 layers",
                "--alpha_pattern 'fc7' matches none",
            ],
        ),
        ({"lora_layers": "to_q,norm1"}, ["do not fit the base: UNet2.*norm1: a GroupNorm"]),
        (
            {"gralora_k": 4, "rank_pattern": ["to_[qk]=6"], "k_pattern": ["to_q=2"]},
            [r"do not fit the base: .*\.to_k: r=6 not divisible by gralora_k=4"],
        ),
        # of what is not there, the layers are worse than the patterns
        ({"lora_layers": "to_z", "rank_pattern": ["to_z=8"]}, ["target_modules to_z not found"]),
    ],
)
def test_what_does_not_fit_the_base(options: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted(**options)
    for problem, text in zip(caught.value.problems, texts, strict=True):
        assert re.search(text, problem, re.DOTALL), problem


def test_read_out_is_a_copy_and_put_back_restores(tmp_path: Path) -> None:
    pipe = adapted()
    before = extract(pipe, FAMILY, BOTH)
    save_adapter(before, tmp_path / "x.safetensors")
    with torch.no_grad():
        for part in BOTH:
            for parameter in adapter_parameters(pipe, part):
                parameter.add_(1)
    restore(pipe, BOTH, tmp_path / "x.safetensors")
    after = extract(pipe, FAMILY, BOTH)
    for part in BOTH:
        a, b = before.components[part].tensors, after.components[part].tensors
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(p.requires_grad for p in adapter_parameters(pipe, "unet"))
    with pytest.raises(CheckpointError, match="it adapts text_encoder, unet"):
        restore(pipe, ("unet",), tmp_path / "x.safetensors")


PATTERNED = {"rank_pattern": ["attn1.to_q=8", "to_q=12"], "alpha_pattern": ["to_k=3", "to_v=2"]}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, None),
        ({"rank_pattern": None}, "--rank_pattern .* there, None here"),
        ({"k_pattern": ["to_q=1"]}, "--k_pattern None there, {'to_q': 1} here"),
        ({"alpha_pattern": ["to_k=3", "to_v=2.5"]}, "--alpha_pattern .*2.0.* there, .*2.5.* here"),
        ({"alpha_pattern": ["to_v=2", "to_k=3"]}, "--alpha_pattern "),  # the order counts
    ],
)
def test_put_back_compares_patterns(
    tmp_path: Path, changes: dict[str, Any], text: str | None
) -> None:
    path = save_adapter(extract(adapted(**PATTERNED), FAMILY, BOTH), tmp_path / "x.safetensors")
    other = adapted(**{**PATTERNED, **changes}, seed=1)
    if text is not None:
        with pytest.raises(CheckpointError, match=text):
            restore(other, BOTH, path)
        return
    restore(other, BOTH, path)
    save_adapter(extract(other, FAMILY, BOTH), tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("averaged", [False, True])
def test_weights_for_use(averaged: bool) -> None:
    parameters = [torch.nn.Parameter(torch.tensor([1.0, 2.0]))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    ema = EMAModel(parameters, decay=0.5, min_decay=0.5) if averaged else None
    with torch.no_grad():
        parameters[0].add_(0.3)
    if ema is not None:
        ema.step(parameters)  # the first step only copies
        with torch.no_grad():
            parameters[0].add_(0.2)
        ema.step(parameters)
    trained = copy.deepcopy(parameters[0].data)
    expected = torch.tensor([1.4, 2.4]) if averaged else trained
    with inference_weights(parameters, optimizer, ema):
        torch.testing.assert_close(parameters[0].data, expected)
    assert torch.equal(parameters[0].data, trained)


@pytest.mark.parametrize(
    ("decay", "steps", "age"),
    [(0.999, 200, 20), (0.99, 200, 20), (0.999, 800, 80), (0.99, 800, 80), (0.9, 200, 9)],
)
def test_how_old_an_average_is(decay: float, steps: int, age: float) -> None:
    """See docs/training/techniques.md: ``decay`` only counts once diffusers' warm-up reaches it."""
    now = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema = EMAModel([now], decay=decay, foreach=True)
    for step in range(1, steps + 1):
        now.data.fill_(step)
        ema.step([now])
    assert steps - float(ema.shadow_params[0]) == pytest.approx(age, abs=0.01)
