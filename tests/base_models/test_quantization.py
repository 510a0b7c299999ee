"""Training on a quantized frozen base: the options, and whole runs.

diffusers wants a GPU for bitsandbytes. In the tests that run without one the base is quantized
after it is loaded, to the same layers; the rest of the run is the real one.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline
from torch import nn

import gralora_diffusion  # noqa: F401  gives pipelines their methods
from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.adapters.placement.targets import base_of, quantization_of
from gralora_diffusion.base_models.loading import load_base
from gralora_diffusion.base_models.meta_base import empty_base
from gralora_diffusion.base_models.quantization import loading_arguments, quantize_empty
from gralora_diffusion.families import get_family
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training import loop
from gralora_diffusion.training.checks.options import validate
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data import class_images
from gralora_diffusion.training.loop import Trainer
from tests.models import PIPELINES, draw
from tests.originals import ORIGINALS, write
from tests.quantized import KINDS, dequantized, identical, pipeline, quantize, stored
from tests.reference import relative_error
from tests.training.runs import (
    adapter,
    assert_close,
    assert_same_run,
    config,
    metrics,
    run,
    run_two,
)

FAMILY = get_family("stable-diffusion")
TORCHAO = ["torchao-fp8", "torchao-int8"]
#: Adam divides by the root of the squared gradient: else a gradient near zero keeps no digits.
SMOOTH = {"adam_epsilon": 1e-4}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base-of-64")
    pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared number for number is computed in fp32, where there is a GPU too."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def data(base: Path, images: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "max_train_steps": 4,
    }


# -- options ---------------------------------------------------------------------------------------


def problems_of(data: dict[str, Any], **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(config(**data, **options))
    return caught.value.problems


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"quantization": "torchao-fp8", "bnb_quantization_config_path": "bnb.json"},
            "--quantization and --bnb_quantization_config_path exclude each other",
        ),
        ({"quantize_text_encoders": True}, "--quantize_text_encoders needs --quantization"),
        ({"bnb_quantization_config_path": "none.json"}, "cannot be read: No such file"),
    ],
)
def test_options_that_do_not_go_together(
    data: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    (problem,) = problems_of(data, **options)
    assert text in problem


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "must contain a JSON object with the arguments of BitsAndBytesConfig: Exp"),
        ("[1]", "must contain a JSON object"),
        ('{"load_in_4bit": true, "quant_type": "nf4"}', "BitsAndBytesConfig has no quant_type; it"),
        ('{"bnb_4bit_quant_type": "nf4"}', 'neither "load_in_4bit" nor "load_in_8bit" is true'),
        ('{"load_in_4bit": true, "load_in_8bit": true}', "are both True"),
        ('{"load_in_4bit": "yes"}', "load_in_4bit must be a boolean"),
        ('{"load_in_8bit": true, "llm_int8_threshold": 6}', "llm_int8_threshold must be a float"),
    ],
)
def test_files_of_arguments(data: dict[str, Any], tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "bnb.json").write_text(content, encoding="utf-8")
    (problem,) = problems_of(data, bnb_quantization_config_path=tmp_path / "bnb.json")
    assert problem.startswith(f"--bnb_quantization_config_path {tmp_path / 'bnb.json'}")
    assert text in problem


def test_no_such_kind(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'nf4'; it must be one of bnb-nf4, bnb-int8"):
        config(**data, quantization="nf4")
    options = {name: str(value) for name, value in data.items() if name != "max_train_steps"}
    with pytest.raises(ConfigError) as caught:
        validate(TrainingConfig(**options, instance_prompt="a dog", quantization="nf4"))
    (problem,) = caught.value.problems
    assert "--quantization is 'nf4'; it must be one of bnb-nf4, bnb-int8" in problem


@pytest.mark.parametrize("kind", KINDS)
def test_missing_package(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    package = "torchao" if kind in TORCHAO else "bitsandbytes"
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a)
    )
    assert problems_of(data, quantization=kind) == [
        f"--quantization {kind} needs: pip install {package}"
    ]


@no_gpu
@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-int8"])
def test_without_a_gpu(data: dict[str, Any], tmp_path: Path, kind: str) -> None:
    text = "cannot be used on this machine: No GPU found.* The torchao kinds work without a GPU"
    with pytest.raises(ConfigError, match=f"--quantization {kind} {text}"):
        validate(config(**data, quantization=kind))
    bits = 4 if kind == "bnb-nf4" else 8
    (tmp_path / "bnb.json").write_text(json.dumps({f"load_in_{bits}bit": True}), encoding="utf-8")
    with pytest.raises(ConfigError, match=text):
        validate(config(**data, bnb_quantization_config_path=tmp_path / "bnb.json"))


def test_single_file(data: dict[str, Any], base: Path, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base)
    data["pretrained_model_name_or_path"] = write(
        ORIGINALS["stable-diffusion"](pipe), tmp_path / "sd.safetensors"
    )
    (problem,) = problems_of(data, quantization="torchao-int8")
    assert (
        "diffusers does not quantize a single file when it loads it. Load the file once" in problem
    )


def test_fp8_products_are_something_else(data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--do_fp8_training is .* --quantization torchao-fp8"):
        config(**data, do_fp8_training=True)


def test_what_the_libraries_are_told(data: dict[str, Any], tmp_path: Path) -> None:
    def mapping(**options: Any) -> dict[str, Any]:
        chosen = config(**data, **options)
        arguments = loading_arguments(chosen, FAMILY, torch.bfloat16)
        return arguments["quantization_config"].quant_mapping

    assert loading_arguments(config(**data), FAMILY, torch.bfloat16) == {}
    nf4 = mapping(quantization="bnb-nf4", quantize_text_encoders=True)
    assert isinstance(nf4["unet"], diffusers.BitsAndBytesConfig)
    assert isinstance(nf4["text_encoder"], transformers.BitsAndBytesConfig)
    for wanted in nf4.values():
        assert wanted.quantization_method() == "nf4"
        assert wanted.bnb_4bit_compute_dtype == torch.bfloat16
    int8 = mapping(quantization="bnb-int8")
    assert int8.keys() == {"unet"}
    assert int8["unet"].quantization_method() == "llm_int8"
    path = tmp_path / "bnb.json"
    own = diffusers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["conv_in"]
    )
    path.write_text(own.to_json_string(use_diff=False), encoding="utf-8")  # as it writes itself
    (read,) = mapping(bnb_quantization_config_path=path).values()
    assert read.to_dict() == {**own.to_dict(), "bnb_4bit_compute_dtype": "bfloat16"}


def test_torchao_without_gradient_checkpointing_is_remarked(data: dict[str, Any]) -> None:
    (warning,) = validate(config(**data, quantization="torchao-int8"))
    assert "--quantization torchao-int8 without --gradient_checkpointing" in warning
    chosen = config(**data, quantization="torchao-int8", gradient_checkpointing=True)
    assert validate(chosen) == []


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        ("bnb-nf4", {}),
        ("bnb-nf4", {"bnb_4bit_use_double_quant": True}),
        ("bnb-int8", {}),
    ],
)
def test_what_bitsandbytes_saves(
    data: dict[str, Any], tmp_path: Path, which: str, changes: dict[str, Any]
) -> None:
    """Counted on the meta device, against the stored tensors."""
    options: dict[str, Any] = {"quantization": which}
    if changes:
        arguments = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **changes}
        (tmp_path / "bnb.json").write_text(json.dumps(arguments), encoding="utf-8")
        options = {"bnb_quantization_config_path": tmp_path / "bnb.json"}
    chosen, dtype = config(**data, **options), torch.bfloat16
    empty = empty_base(chosen, FAMILY, dtype)
    surplus = quantize_empty(chosen, FAMILY, "unet", empty.unet, dtype)
    assert quantize_empty(chosen, FAMILY, "text_encoder", empty.text_encoder, dtype) == 0
    real = quantize(pipeline().unet.to(dtype), which, **changes)
    kept = 0
    for layer in real.modules():
        if isinstance(layer, nn.Linear):
            weight: Any = layer.weight
            kept += weight.nbytes
            state = getattr(weight, "quant_state", None)
            if state is None:
                kept += weight.SCB.nbytes
            else:
                kept += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    dense = sum(m.weight.nbytes for m in empty.unet.modules() if isinstance(m, nn.Linear))
    assert dense - surplus == pytest.approx(kept, rel=1e-3)


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options for a run on each kind of base."""
    kind: str = request.param
    if kind in TORCHAO:
        return {"quantization": kind}

    def load(config: TrainingConfig, family: Any, dtype: torch.dtype, **others: Any) -> Any:
        pipe = load_base(config, family, dtype, **others)
        changes = {"bnb_4bit_compute_dtype": dtype} if kind == "bnb-nf4" else {}
        quantize(pipe.unet, kind, **changes)
        return pipe

    monkeypatch.setattr(loop, "load_base", load)
    monkeypatch.setattr(class_images, "load_base", load)
    return {}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The pipeline of the last run, and what was stored of it before its first step."""
    seen: dict[str, Any] = {}
    original = Trainer.train

    def watched(self: Trainer) -> None:
        denoiser = getattr(self.pipe, self.family.denoiser)
        seen["pipe"], seen["before"] = self.pipe, stored(denoiser, self.pipe.text_encoder)
        original(self)

    monkeypatch.setattr(Trainer, "train", watched)
    return seen


@pytest.fixture(scope="module")
def finished() -> dict[str, Path]:
    return {}


@pytest.fixture
def trained(
    data: dict[str, Any],
    kind: dict[str, Any],
    finished: dict[str, Path],
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Train on this kind of base, once for all tests with the same options; they only read."""

    def train(**options: Any) -> Path:
        options = {**data, **kind, **options}
        key = repr((request.node.callspec.params["kind"], sorted(options.items())))
        if key not in finished:
            finished[key] = run(output_dir=tmp_path_factory.mktemp("trained") / "out", **options)
        return finished[key]

    return train


def quantized_layers(model: nn.Module) -> list[nn.Linear]:
    """The quantized linear layers of a model; all of its linear layers are."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(quantization_of(layer) for layer in layers)
    return layers


def test_learns_and_leaves_the_base_as_it_was(
    data: dict[str, Any], kind: dict[str, Any], seen: dict[str, Any], tmp_path: Path, base: Path
) -> None:
    data |= {"validation_prompt": "a dog", "validation_inference_steps": 2, "validation_steps": 3}
    data |= {"num_validation_images": 1, "max_train_steps": 6, **SMOOTH}
    out = run(output_dir=tmp_path / "out", **kind, **data)
    pipe = seen["pipe"]
    assert len(quantized_layers(pipe.unet)) == 50
    assert identical(stored(pipe.unet, pipe.text_encoder), seen["before"])
    assert len([m for m in pipe.unet.modules() if isinstance(m, GraloraLayer)]) == 32
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    saved = adapter(out)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in saved.values())

    # the same run on a base of the dequantized weights learns the same
    plain = StableDiffusionPipeline.from_pretrained(base)
    for name, layer in plain.unet.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data.copy_(dequantized(base_of(pipe.unet.get_submodule(name))))
    plain.save_pretrained(tmp_path / "dequantized")
    options = {**data, "pretrained_model_name_or_path": tmp_path / "dequantized"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "load_base", load_base)
        other = run(output_dir=tmp_path / "other", **options)
    losses = [torch.tensor([row["loss"] for row in metrics(folder)]) for folder in (out, other)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert_close(out, other, 1e-3)

    fresh = StableDiffusionPipeline.from_pretrained(base)
    fresh.set_progress_bar_config(disable=True)
    before = draw(fresh)
    fresh.load_gralora_weights(out)
    assert relative_error(draw(fresh), before) > 1e-3


def test_resumes_bit_for_bit(data: dict[str, Any], kind: dict[str, Any], tmp_path: Path) -> None:
    options = {**data, **kind, "lora_dropout": 0.2, "checkpointing_steps": 2}
    run(output_dir=tmp_path / "whole", **options)
    run(output_dir=tmp_path / "two", **{**options, "max_train_steps": 2})
    run(output_dir=tmp_path / "two", resume_from_checkpoint="latest", **options)
    assert_same_run(tmp_path / "whole", tmp_path / "two")


def test_gradient_checkpointing_changes_nothing(trained: Callable[..., Path]) -> None:
    assert_close(trained(), trained(gradient_checkpointing=True), 1e-5)


def test_bf16(trained: Callable[..., Path]) -> None:
    out = trained(mixed_precision="bf16", gradient_checkpointing=True)
    other = trained(gradient_checkpointing=True)
    assert {tensor.dtype for tensor in adapter(out).values()} == {torch.float32}
    losses = [torch.tensor([row["loss"] for row in metrics(folder)]) for folder in (out, other)]
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0)


@pytest.mark.parametrize("source", ["images", "teacher"])
def test_prior(data: dict[str, Any], kind: dict[str, Any], tmp_path: Path, source: str) -> None:
    data |= {"with_prior_preservation": True, "class_prompt": "a dog", "prior_source": source}
    if source == "images":
        data |= {"class_data_dir": tmp_path / "class", "num_class_images": 2}
        data |= {"sample_batch_size": 2}
    out = run(output_dir=tmp_path / "out", **kind, **data)
    assert all(tensor.abs().max() > 0 for tensor in adapter(out).values())
    if source == "images":
        assert len(list((tmp_path / "class").iterdir())) == 2


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("which", TORCHAO)
def test_text_encoders(
    data: dict[str, Any], seen: dict[str, Any], tmp_path: Path, which: str, trained: bool
) -> None:
    options = {**data, "quantization": which, "quantize_text_encoders": True}
    options |= {"train_text_encoder": trained, "text_encoder_lr": 1e-2}
    out = run(output_dir=tmp_path / "out", gradient_checkpointing=trained, **options)
    pipe = seen["pipe"]
    assert len(quantized_layers(pipe.text_encoder)) == 12
    assert identical(stored(pipe.unet, pipe.text_encoder), seen["before"])
    assert pipe.vae.dtype == torch.float32
    assert not any(quantization_of(module) for module in pipe.vae.modules())
    saved = adapter(out)
    assert {key.partition(".")[0] for key in saved} == (
        {"unet", "text_encoder"} if trained else {"unet"}
    )
    assert all(tensor.abs().max() > 0 for tensor in saved.values())


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_every_family(
    images: Path, seen: dict[str, Any], tmp_path: Path, name: str, saved_base: Callable[[str], Path]
) -> None:
    base = saved_base(name)
    options: dict[str, Any] = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": images,
        "max_train_steps": 2,
        "gradient_checkpointing": True,
    }
    plain = run(output_dir=tmp_path / "plain", **options)
    out = run(
        output_dir=tmp_path / "out",
        quantization="torchao-fp8",
        quantize_text_encoders=True,
        validation_prompt="a dog",
        validation_inference_steps=1,
        num_validation_images=1,
        **options,
    )
    family, pipe = get_family(name), seen["pipe"]
    for component in (family.denoiser, *family.all_text_encoders):
        model = getattr(pipe, component)
        assert any(quantization_of(layer) for layer in model.modules()), component
    # of some layers the denoiser drops the output
    moved, expected = (
        {k for k, t in adapter(folder).items() if t.any()} for folder in (out, plain)
    )
    assert moved == expected
    assert len(moved) > 0.8 * len(adapter(out))


@pytest.mark.parametrize("kind", TORCHAO, indirect=True)
def test_a_base_that_is_quantized_on_disk(
    data: dict[str, Any], kind: dict[str, Any], trained: Callable[..., Path], tmp_path: Path
) -> None:
    chosen = config(**data, **kind)
    load_base(chosen, FAMILY, torch.float32).save_pretrained(tmp_path / "quantized")
    one = trained()
    data["pretrained_model_name_or_path"] = tmp_path / "quantized"
    two = run(output_dir=tmp_path / "two", **data)
    assert_same_run(one, two)
    for folder, by in ((one, kind["quantization"]), (two, "torchao")):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert f"The base was quantized during training (unet by {by})." in card
        assert f"| quantized base | unet by {by} |" in card

    with pytest.raises(ConfigError, match=r"its unet is already quantized \(torchao\), so --quant"):
        run(output_dir=tmp_path / "three", quantization="torchao-int8", **data)
    text = "its unet was quantized from float32 and only computes in that.* --mixed_precision no"
    with pytest.raises(ConfigError, match=text):
        run(output_dir=tmp_path / "four", **{**data, "mixed_precision": "bf16"})


@no_gpu
def test_a_base_on_disk_that_this_machine_cannot_run(
    data: dict[str, Any], tmp_path: Path, base: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.save_pretrained(tmp_path / "nf4")
    path = tmp_path / "nf4" / "unet" / "config.json"
    entry = diffusers.BitsAndBytesConfig(load_in_4bit=True).to_dict()
    entry["quant_method"] = "bitsandbytes"
    whole = {**json.loads(path.read_text(encoding="utf-8")), "quantization_config": entry}
    path.write_text(json.dumps(whole), encoding="utf-8")
    data["pretrained_model_name_or_path"] = tmp_path / "nf4"
    with pytest.raises(ConfigError, match="nf4 cannot be used: No GPU found"):
        run(output_dir=tmp_path / "out", **data)


@pytest.mark.parametrize("which", TORCHAO)
def test_two_processes(data: dict[str, Any], tmp_path: Path, which: str) -> None:
    data |= {"quantization": which, "max_train_steps": 2, **SMOOTH}
    one = run(output_dir=tmp_path / "one", train_batch_size=4, **data)
    two = run_two(output_dir=tmp_path / "two", train_batch_size=2, **data)
    assert_close(one, two, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("which", [*KINDS, "file"])
def test_on_a_gpu(
    data: dict[str, Any], seen: dict[str, Any], tmp_path: Path, which: str, precision: str
) -> None:
    options: dict[str, Any] = {"quantization": which}
    if which == "file":
        double = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
        (tmp_path / "bnb.json").write_text(json.dumps(double), encoding="utf-8")
        options = {"bnb_quantization_config_path": tmp_path / "bnb.json"}
    options |= {**data, "mixed_precision": precision, "gradient_checkpointing": True}
    options |= {"quantize_text_encoders": True, "train_text_encoder": True}
    options |= {"text_encoder_lr": 1e-2, "checkpointing_steps": 2}
    options |= {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2}
    options |= {"class_data_dir": tmp_path / "class", "sample_batch_size": 2}
    options |= {"validation_prompt": "a dog", "validation_inference_steps": 2}
    options |= {"num_validation_images": 1}
    out = run(output_dir=tmp_path / "out", **options)
    pipe = seen["pipe"]
    assert len(quantized_layers(pipe.unet)) == 50
    assert len(quantized_layers(pipe.text_encoder)) == 12
    assert pipe.unet.device.type == "cuda"
    assert identical(stored(pipe.unet, pipe.text_encoder), seen["before"])
    saved = adapter(out)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in saved.values())
    run(output_dir=tmp_path / "two", **{**options, "max_train_steps": 2})
    run(output_dir=tmp_path / "two", resume_from_checkpoint="latest", **options)
    assert_close(tmp_path / "two", out, 1e-2)
