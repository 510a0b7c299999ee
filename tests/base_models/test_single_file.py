"""Bases in one original file, of every family: told apart, read, completed, refused."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gralora_diffusion.base_models.loading import find_base_family, find_pipeline_class, load_base
from gralora_diffusion.base_models.unread_weights import unread_models
from gralora_diffusion.families import get_family
from gralora_diffusion.io.errors import ConfigError
from tests.base_models.test_unread_weights import check_models
from tests.models import PIPELINES
from tests.originals import ORIGINALS, transformer_alone, without, write
from tests.tiny.parts import text_encoder_with_projection
from tests.training.runs import assert_close, config, run

#: family -> model -> how its keys begin in a file that holds it
PARTS: dict[str, dict[str, str]] = {
    "stable-diffusion": {"vae": "first_stage_model.", "text_encoder": "cond_stage_model."},
    "stable-diffusion-xl": {
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
    "stable-diffusion-3": {
        "vae": "first_stage_model.",
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.clip_g.",
        "text_encoder_3": "text_encoders.t5xxl.",
    },
    "flux": {
        "vae": "vae.",
        "text_encoder": "text_encoders.clip_l.",
        "text_encoder_2": "text_encoders.t5xxl.",
    },
    "flux2": {},
    "flux2-klein": {},
}
CLIPS = ("text_encoder", "text_encoder_2")
#: family -> text encoder in its file -> why it cannot be read later
READ_BY_DIFFUSERS = {
    "stable-diffusion-xl": {
        "text_encoder_2": "the file has the transpose of text_projection.weight"
    },
    # files have no projection of CLIP-L; diffusers makes it the identity
    "stable-diffusion-3": {
        "text_encoder": "its files do not have exactly the names and shapes of its weights"
    },
}


def build(name: str, seed: int) -> Any:
    """A pipeline that diffusers' reader of single files can tell and take: see its limits in
    docs/troubleshooting/base_models.md."""
    if name == "stable-diffusion-xl":
        return PIPELINES[name](seed, clip_g_layers=10)
    if name == "stable-diffusion-3":
        pipe = PIPELINES[name](seed, num_layers=38, pooled_projection_dim=32 + 24)
        pipe.text_encoder = text_encoder_with_projection(32, 32)
        with torch.no_grad():
            pipe.text_encoder.text_projection.weight.copy_(torch.eye(32))
        return pipe
    pipe = PIPELINES[name](seed)
    if name == "flux":
        pipe.transformer = full_width_flux()
        pipe.to(torch.bfloat16)
    return pipe


@cache
def full_width_flux() -> FluxTransformer2DModel:
    """One block of each kind, 0.5 billion numbers in bf16, made in a second."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=40,
            pooled_projection_dim=24,
            guidance_embeds=True,
        )
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    numbers = torch.randn(100_003, generator=torch.Generator().manual_seed(0)) / 50
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            flat, period = parameter.view(-1), numbers.roll(start).to(torch.bfloat16)
            for begin in range(0, len(flat), len(period)):
                flat[begin : begin + len(period)] = period[: len(flat) - begin]
            start += 1009  # so that no two layers are alike
    return model


class Base:
    """A pipeline, its tensors under their original keys, and on disk: its folder, and the folder
    of another pipeline with the same configuration."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.pipe, self.other = build(name, 0), build(name, 1)
        self.tensors = ORIGINALS[name](self.pipe)
        self.place, self.other_folder = folder, folder / "other"
        # without weights of the denoiser, which every file has
        denoiser = get_family(name).denoiser
        for part, component in self.other.components.items():
            if part != denoiser and component is not None:
                component.save_pretrained(self.other_folder / part)
        getattr(self.other, denoiser).save_config(self.other_folder / denoiser)
        self.other.save_config(self.other_folder)

    @cached_property
    def folder(self) -> Path:
        self.pipe.save_pretrained(self.place / "same")
        return self.place / "same"

    def file(self, parts: tuple[str, ...] = (), *, bare: bool = False) -> Path:
        """A file with the denoiser and these models; with ``bare`` keys, the denoiser alone."""
        path = self.place / f"{'-'.join(parts)} {bare}.safetensors"
        if not path.exists():
            absent = [start for part, start in PARTS[self.name].items() if part not in parts]
            tensors = without(self.tensors, *absent)
            write(transformer_alone(tensors) if bare else tensors, path)
        return path

    def whole(self) -> Path:
        return self.file(tuple(PARTS[self.name]))


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Base]]:
    folder = tmp_path_factory.mktemp("originals")
    yield cache(lambda name: Base(name, folder / name))
    shutil.rmtree(folder)  # a base of full width is large
    full_width_flux.cache_clear()


def load(file: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    chosen = config(pretrained_model_name_or_path=file, **options)
    return load_base(chosen, find_base_family(chosen), dtype)


def problem_of(file: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, **options)
    return str(caught.value)


def models(pipe: Any) -> dict[str, nn.Module]:
    return {n: model for n, model in pipe.components.items() if isinstance(model, nn.Module)}


def options_of(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def assert_same_models(pipe: Any, expected: dict[str, nn.Module]) -> None:
    assert models(pipe).keys() == expected.keys()
    for name, model in models(pipe).items():
        dtype = model.dtype  # which looks through the whole model
        ours, theirs = model.state_dict(), expected[name].state_dict()
        assert ours.keys() == theirs.keys(), name
        differing = [k for k in ours if not torch.equal(ours[k].to(dtype), theirs[k].to(dtype))]
        assert not differing, (name, differing)


@pytest.mark.parametrize(
    ("name", "parts", "bare"),
    [
        *((name, tuple(parts), False) for name, parts in PARTS.items() if parts),
        ("stable-diffusion", (), False),
        ("stable-diffusion", ("vae",), True),
        ("stable-diffusion-xl", (), True),
        ("stable-diffusion-xl", ("vae", "text_encoder"), False),
        ("stable-diffusion-xl", ("vae", "text_encoder_2"), False),
        ("stable-diffusion-3", (), True),
        ("stable-diffusion-3", ("vae",), False),
        ("stable-diffusion-3", ("vae", *CLIPS), False),
        ("stable-diffusion-3", ("text_encoder_2",), False),
        ("flux", (), True),
        *((name, (), bare) for name in ("flux2", "flux2-klein") for bare in (False, True)),
    ],
)
def test_models_of_the_file_and_the_rest_of_the_other(
    base_of: Callable[[str], Base], name: str, parts: tuple[str, ...], bare: bool
) -> None:
    base, family = base_of(name), get_family(name)
    file = base.file(parts, bare=bare)
    held = set() if bare else {*parts}  # bare keys are those of a denoiser alone
    pipe = load(file, base.pipe.dtype, base_config=base.other_folder)
    expected = {
        n: models(base.pipe if n in held or n == family.denoiser else base.other)[n]
        for n in models(base.pipe)
    }
    assert type(pipe) is type(base.pipe)
    assert_same_models(pipe, expected)
    assert options_of(pipe.scheduler) == options_of(base.pipe.scheduler)
    assert not any(p.requires_grad for m in models(pipe).values() for p in m.parameters())


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("name", sorted(PARTS))
def test_models_that_are_read_later(base_of: Callable[[str], Base], name: str, bare: bool) -> None:
    """Those of the file, and those of the other pipeline."""
    base, family = base_of(name), get_family(name)
    file = base.file(bare=True) if bare else base.whole()
    chosen = config(pretrained_model_name_or_path=file, base_config=base.other_folder)
    names = (family.denoiser, *family.all_text_encoders)
    found = unread_models(chosen, family, names, base.pipe.dtype)
    assert found.models.keys() == found.weights.keys() == set(names) - found.whole.keys()
    assert found.whole == ({} if bare else READ_BY_DIFFUSERS.get(name, {}))
    check_models(chosen, family, base.pipe.dtype, sorted(found.models))


def test_a_part_that_is_left_out_is_not_read_later(
    base_of: Callable[[str], Base], tmp_path: Path
) -> None:
    base, family = base_of("stable-diffusion-3"), get_family("stable-diffusion-3")
    folder = configuration_of(base, tmp_path)
    chosen = config(pretrained_model_name_or_path=base.file(("vae", *CLIPS)), base_config=folder)
    found = unread_models(chosen, family, family.all_text_encoders, torch.float32)
    assert found.models.keys() | found.whole.keys() == {*CLIPS}


@pytest.mark.parametrize("name", sorted(PARTS))
def test_the_folders_adapter(
    base_of: Callable[[str], Base], name: str, images: Path, tmp_path: Path
) -> None:
    base, family = base_of(name), get_family(name)
    shared: dict[str, Any] = {
        "instance_data_dir": images,
        "max_train_steps": 2,
        "resolution": 16,
        "train_text_encoder": bool(family.text_encoders) or None,
        "max_sequence_length": 8 if family.max_sequence_length else None,
        "mixed_precision": "bf16" if base.pipe.dtype == torch.bfloat16 else "no",
    }
    one = run(pretrained_model_name_or_path=base.folder, output_dir=tmp_path / "one", **shared)
    two = run(
        pretrained_model_name_or_path=base.whole(),
        base_config=base.folder,
        output_dir=tmp_path / "two",
        **shared,
    )
    assert_close(one, two, 1e-4)  # the VAE's attention comes as convolutions of one pixel


def test_precisions(base_of: Callable[[str], Base]) -> None:
    base = base_of("stable-diffusion-3")
    pipe = load(base.whole(), torch.float16, base_config=base.other_folder)
    assert {m.dtype for n, m in models(pipe).items() if n != "vae"} == {torch.float16}
    assert_same_models(pipe, models(base.pipe))
    assert pipe.vae.dtype == torch.float32
    # what transformers keeps in fp32, as in a folder: T5 overflows otherwise
    folder = load_base(
        config(pretrained_model_name_or_path=base.folder),
        get_family(base.name),
        torch.float16,
    )
    for name, model in models(folder).items():
        dtypes = {key: p.dtype for key, p in getattr(pipe, name).named_parameters()}
        assert dtypes == {key: p.dtype for key, p in model.named_parameters()}
    assert torch.float32 in {p.dtype for p in pipe.text_encoder_3.parameters()}


class TestTextEncodersThatLack:
    def test_an_optional_one_is_left_out_with_a_warning(
        self,
        base_of: Callable[[str], Base],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        base = base_of("stable-diffusion-3")
        file = base.file(("vae", *CLIPS))
        folder = configuration_of(base, tmp_path)
        with caplog.at_level(logging.WARNING):
            pipe = load(file, base_config=folder)
        assert (pipe.text_encoder_3, pipe.tokenizer_3) == (None, None)
        assert "the base is loaded without text_encoder_3" in caplog.text
        expected = models(base.pipe)
        del expected["text_encoder_3"]
        assert_same_models(pipe, expected)

    def test_one_that_is_needed_is_asked_for(
        self, base_of: Callable[[str], Base], tmp_path: Path
    ) -> None:
        base = base_of("stable-diffusion-3")
        file, folder = base.file(("text_encoder",)), configuration_of(base, tmp_path)
        problem = problem_of(file, base_config=folder)
        assert "2 problems with the options" in problem
        for name in ("vae", "text_encoder_2"):
            assert f"--base_config {folder} does not contain the weights of the {name}" in problem

    def test_left_out_though_it_is_there(self, base_of: Callable[[str], Base]) -> None:
        base = base_of("stable-diffusion-3")
        options = {"leave_out_text_encoders": ["text_encoder_3"], "base_config": base.other_folder}
        pipe = load(base.whole(), **options)
        assert (pipe.text_encoder_3, pipe.tokenizer_3) == (None, None)
        expected = models(base.pipe)
        del expected["text_encoder_3"]
        assert_same_models(pipe, expected)


def configuration_of(base: Base, path: Path) -> Path:
    """A folder of the pipeline without any weights."""
    ignore = shutil.ignore_patterns("*.safetensors")
    return shutil.copytree(base.folder, path / "configuration", ignore=ignore)


def test_another_vae(base_of: Callable[[str], Base]) -> None:
    base = base_of("stable-diffusion-xl")
    file = base.whole()
    vae = base.other_folder / "vae"
    pipe = load(file, base_config=base.folder, pretrained_vae_model_name_or_path=vae)
    assert_same_models(pipe, {**models(base.pipe), "vae": base.other.vae})


def test_base_config_from_the_hub(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    """The pipeline that diffusers names for the file, and one that is named by id: both as they
    lie in the Hub's cache."""
    base = base_of("stable-diffusion-3")
    file = base.file(("vae",))
    for repo in ("stabilityai/stable-diffusion-3.5-large", "me/mine"):
        cached(base.other_folder, repo, tmp_path / "cache")
    expected = {**models(base.other), "transformer": base.pipe.transformer, "vae": base.pipe.vae}
    for base_config in (None, "me/mine"):
        pipe = load(file, base_config=base_config, cache_dir=tmp_path / "cache")
        assert_same_models(pipe, expected)
    without_t5 = base.file(("vae", *CLIPS))
    pipe = load(without_t5, cache_dir=tmp_path / "cache")
    assert pipe.text_encoder_3 is None
    pipe = load(without_t5, cache_dir=tmp_path / "cache", base_config="me/mine")
    assert_same_models(pipe, {**models(base.pipe), "text_encoder_3": base.other.text_encoder_3})


def cached(folder: Path, repo: str, cache: Path) -> None:
    place = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)


def test_a_file_that_predicts_v_says_so(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    base = base_of("stable-diffusion-xl")
    file = tmp_path / "v.safetensors"
    write({**base.tensors, "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, file)
    scheduler = load(file, base_config=base.folder).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
    assert type(scheduler) is type(base.pipe.scheduler)


# -- what a file is ---------------------------------------------------------------------------


def header_alone(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A whole file of these tensors that takes no place on the disk: all its bytes are a hole."""
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * int(torch.Size(shape).numel())
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


P = "model.diffusion_model."
SD_IN = {f"{P}input_blocks.0.0.weight": (320, 4, 3, 3)}
XL_IN = {**SD_IN, f"{P}label_emb.0.0.weight": (1280, 2816)}
CLIP_G = {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,)}
SD3_IN = {
    "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536),
    "joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
}
FLUX_IN = {
    "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
    "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
    "vector_in.in_layer.weight": (3072, 768),
}
GUIDANCE = {"guidance_in.in_layer.bias": (3072,), "guidance_in.in_layer.weight": (3072, 256)}
FLUX2_IN = {
    "double_blocks.0.img_attn.qkv.weight": (18432, 6144),
    "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
    "single_stream_modulation.lin.weight": (18432, 6144),
}


@pytest.mark.parametrize(
    ("family", "shapes"),
    [
        ("stable-diffusion", SD_IN),
        (
            "stable-diffusion",  # 2.x
            {**SD_IN, f"{P}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)},
        ),
        ("stable-diffusion-xl", {**XL_IN, **CLIP_G}),
        ("stable-diffusion-xl", XL_IN),
        ("stable-diffusion-3", {**SD3_IN, "pos_embed": (1, 36864, 1536)}),
        ("stable-diffusion-3", {**SD3_IN, "pos_embed": (1, 147456, 1536)}),
        ("stable-diffusion-3", {**SD3_IN, "pos_embed": (1, 5, 1536)}),  # unknown to diffusers
        ("flux", FLUX_IN),
        ("flux", {**FLUX_IN, **GUIDANCE, "img_in.weight": (3072, 64)}),
        ("flux2", {**FLUX2_IN, **GUIDANCE}),
        ("flux2-klein", FLUX2_IN),
    ],
)
def test_families_told_by_full_size_headers(
    tmp_path: Path, family: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    file = header_alone(tmp_path / "m.safetensors", shapes)
    chosen = config(pretrained_model_name_or_path=file)
    assert find_base_family(chosen).name == family
    told = config(pretrained_model_name_or_path=file, family=family)
    assert find_base_family(told).name == family


DEV_IN = {**FLUX_IN, **GUIDANCE, "img_in.weight": (3072, 64)}


@pytest.mark.parametrize(
    ("pipeline", "shapes"),
    [
        (None, DEV_IN),  # Kontext has the same keys and shapes
        ("FluxPipeline", FLUX_IN),  # schnell has no guidance, as no base for edits has
        ("FluxFillPipeline", {**DEV_IN, "img_in.weight": (3072, 384)}),
        ("StableDiffusionInpaintPipeline", {f"{P}input_blocks.0.0.weight": (320, 9, 3, 3)}),
        (
            "StableDiffusionInstructPix2PixPipeline",
            {f"{P}input_blocks.0.0.weight": (320, 8, 3, 3)},
        ),
        (
            "StableDiffusionXLInstructPix2PixPipeline",
            {**XL_IN, f"{P}input_blocks.0.0.weight": (320, 8, 3, 3)},
        ),
        (None, SD_IN),
    ],
)
def test_what_a_header_shows_of_the_task(
    tmp_path: Path, pipeline: str | None, shapes: dict[str, tuple[int, ...]]
) -> None:
    chosen = config(pretrained_model_name_or_path=header_alone(tmp_path / "m.safetensors", shapes))
    assert find_pipeline_class(chosen, find_base_family(chosen)) == pipeline


def test_a_completing_pipeline_says_what_the_file_is(tmp_path: Path) -> None:
    file = header_alone(tmp_path / "m.safetensors", DEV_IN)
    for pipeline in ("FluxKontextPipeline", "FluxPipeline"):
        index = {"_class_name": pipeline, "_diffusers_version": "0.42.0"}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        chosen = config(pretrained_model_name_or_path=file, base_config=tmp_path)
        assert find_pipeline_class(chosen, find_base_family(chosen)) == pipeline


@pytest.mark.parametrize(
    ("problem", "shapes"),
    [
        ("it is an adapter", {"lora_unet_down_blocks_0.lora_down.weight": (4, 320)}),
        (
            "it is an adapter",
            {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)},
        ),
        ("those of one model in diffusers' layout", {"down_blocks.0.resnets.0.conv1.bias": (320,)}),
        ("(its keys: decoder.conv_in.bias, ...)", {"decoder.conv_in.bias": (512,)}),
        (
            "does not belong to a supported family",
            {"first_stage_model.decoder.conv_in.bias": (512,)},
        ),
        (
            "for 'xl_refiner'",
            {
                **XL_IN,
                "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (1,),
            },
        ),
        ("for 'flux-depth'", {**FLUX_IN, **GUIDANCE, "img_in.weight": (3072, 128)}),
        (
            "this is a quantized file (double_blocks.0.img_attn.qkv.scale_weight)",
            {**FLUX_IN, "double_blocks.0.img_attn.qkv.scale_weight": (1,)},
        ),
    ],
)
def test_files_that_are_no_base(
    tmp_path: Path, problem: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    file = header_alone(tmp_path / "m.safetensors", shapes)
    assert problem in problem_of(file)


def scaled_fp8(tensors: dict[str, Tensor], form: str, path: Path) -> tuple[Path, Path]:
    """Write a file with its matrices in fp8, as ComfyUI does, and one with the values they have."""
    noise = torch.Generator().manual_seed(0)
    made, values, layers = {}, {}, {}
    for key, tensor in tensors.items():
        made[key] = values[key] = tensor
        layer = key.removesuffix(".weight")
        if tensor.ndim != 2 or layer == key or "embed" in key:
            continue
        dtype = torch.float8_e5m2 if form == "tensors" else torch.float8_e4m3fn
        scale = torch.rand((), generator=noise) / 100
        made[key] = (tensor / scale).to(dtype)
        values[key] = made[key].float() * scale
        made[f"{layer}.{'scale_weight' if form == 'old' else 'weight_scale'}"] = scale
        made[f"{layer}.{'scale_input' if form == 'old' else 'input_scale'}"] = torch.ones(())
        layers[layer] = {"format": str(dtype).removeprefix("torch.")}
        if form == "tensors":
            text = json.dumps(layers[layer]).encode()
            made[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    metadata = {"format": "pt"}
    if form == "old":
        made["model.diffusion_model.scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    if form == "header":
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    assert layers
    save_file(made, path, metadata)
    return path, write(values, path.with_name("values.safetensors"))


class TestScaledFp8:
    @pytest.mark.parametrize("form", ["old", "tensors", "header"])
    def test_the_values_are_those_of_its_scales(
        self, base_of: Callable[[str], Base], form: str, tmp_path: Path
    ) -> None:
        base = base_of("stable-diffusion-3")
        file, values = scaled_fp8(base.tensors, form, tmp_path / "scaled.safetensors")
        found = load(file, base_config=base.other_folder)
        assert_same_models(found, models(load(values, base_config=base.other_folder)))

    def test_what_cannot_be_read(self, base_of: Callable[[str], Base], tmp_path: Path) -> None:
        base = base_of("stable-diffusion-3")
        file, _ = scaled_fp8(base.tensors, "tensors", tmp_path / "scaled.safetensors")
        good = load_file(file)
        key = next(key for key in good if key.endswith(".weight_scale"))
        layer = key.removesuffix(".weight_scale")

        def problem(name: str, tensor: Tensor) -> str:
            save_file({**good, name: tensor}, file)
            return problem_of(file, base_config=base.other_folder)

        text = f"{key} is nan; a scale must be positive and finite. Pass the file in 16 bits"
        assert text in problem(key, torch.tensor(torch.nan))
        quantized = f"({layer}.comfy_quant), which cannot be read"
        assert quantized in problem(key, torch.ones(2))
        assert quantized in problem(f"{layer}.weight", good[f"{layer}.weight"].float())
        other = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
        text = f"{layer} has the format 'mxfp8'; only float8_e4m3fn and float8_e5m2 can be read"
        assert text in problem(f"{layer}.comfy_quant", other)
        assert "cannot be read (" in problem(f"{layer}.comfy_quant", other[:3])
        packed = good[f"{layer}.weight"].view(torch.uint8)
        four = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
        save_file({**good, f"{layer}.weight": packed, f"{layer}.comfy_quant": four}, file)
        text = "it has weights in nvfp4. Of ComfyUI's formats, only float8_e4m3fn and float8_e5m2"
        assert text in problem_of(file, base_config=base.other_folder)


def test_a_file_that_is_cut(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(base_of("flux2").file().read_bytes()[:-1])
    assert "not a complete safetensors file" in problem_of(file)


@pytest.mark.parametrize("name", sorted(PARTS.keys() - {"flux"}))
class TestAnotherPipelineThanItsOwn:
    def test_weights_lack(self, base_of: Callable[[str], Base], name: str, tmp_path: Path) -> None:
        base = base_of(name)
        tensors = dict(base.tensors)
        missing = [k for k in tensors if k.startswith(P) and k.endswith("weight")][-1]
        del tensors[missing]
        file = write(tensors, tmp_path / "m.safetensors")
        denoiser = get_family(name).denoiser
        problem = problem_of(file, base_config=base.folder)
        assert f"its {denoiser} cannot be read with the configuration of {base.folder} (" in problem

    def test_weights_are_left_over(
        self, base_of: Callable[[str], Base], name: str, tmp_path: Path
    ) -> None:
        base = base_of(name)
        tensors = {**base.tensors, f"{P}more.weight": torch.zeros(7)}
        problem = problem_of(write(tensors, tmp_path / "m.safetensors"), base_config=base.folder)
        assert "cannot be read with the configuration" in problem

    def test_of_another_family(self, base_of: Callable[[str], Base], name: str) -> None:
        other = "flux2" if name != "flux2" else "stable-diffusion"
        file = base_of(name).file()
        said = f"this single file is {name}, but --family or --base_config says {other}"
        assert said in problem_of(file, base_config=base_of(other).folder)
        assert said in problem_of(file, family=other)
        problem = problem_of(file, base_config=base_of(other).folder, family=name)
        assert f"--family {name}, but --base_config is {other}" in problem


def test_what_to_give_when_the_rest_is_not_to_be_found(
    base_of: Callable[[str], Base],
) -> None:
    # offline
    assert "as --base_config" in problem_of(base_of("stable-diffusion").whole())
    # several models have such a file
    problem = problem_of(base_of("flux2-klein").file())
    assert (
        "this single file is flux2-klein, but it does not show which of these models it is"
        in problem
    )


def test_a_width_that_diffusers_does_not_read(tmp_path: Path) -> None:
    pipe: Any = PIPELINES["flux"]()
    pipe.save_pretrained(tmp_path / "folder")
    tensors: dict[str, Tensor] = ORIGINALS["flux"](pipe)
    file = write(tensors, tmp_path / "m.safetensors")
    problem = problem_of(file, base_config=tmp_path / "folder")
    assert "its transformer cannot be read with the configuration of" in problem
