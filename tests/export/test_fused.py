"""Fused files against pipelines that were fused in memory, written by independent writers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from gralora_diffusion import AdapterFileError, get_family, inject
from gralora_diffusion.adapters.adapter_file import read_adapter
from gralora_diffusion.export import export_fused
from gralora_diffusion.export.bases import BaseError
from gralora_diffusion.export.lora import export_lora, read_by_diffusers
from gralora_diffusion.export.names import StyleError
from gralora_diffusion.export.parity import ParityError
from gralora_diffusion.export.verification import Verification
from gralora_diffusion.io.staging import OutputError
from tests.models import PIPELINES, adapt_everywhere, config, merged
from tests.originals import ORIGINALS, ldm, transformer_alone, write
from tests.tiny.parts import text_encoder_with_projection


def tiny(name: str) -> Any:
    """A tiny pipeline that has what its original file holds."""
    pipe = PIPELINES[name]()
    if name == "stable-diffusion-3":
        torch.manual_seed(0)
        pipe.text_encoder = text_encoder_with_projection(32, 32)
        pipe.text_encoder.text_projection.weight.data.copy_(torch.eye(32))
    return pipe


def held(name: str) -> list[str]:
    """Components that may have an adapter and are in the original file."""
    family = get_family(name)
    return [c for c in family.components if c in family.original_key_maps]


@pytest.fixture(scope="module", params=list(PIPELINES))
def case(request, tmp_path_factory):
    """Family, base pipeline, adapter on all that the file holds, all tensors fused."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    adapt_everywhere(tiny(name), held(name)).save_gralora_weights(folder / "adapter")
    tiny(name).save_pretrained(folder / "base")
    return name, folder, ORIGINALS[name](merged([(folder / "adapter", 1.0)], tiny(name)))


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.allclose(found[key], tensor, rtol=1e-6, atol=1e-7), key


def test_from_an_original_file(case, tmp_path):
    name, folder, expected = case
    base = write(ORIGINALS[name](tiny(name)), tmp_path / "base.safetensors")
    before = base.read_bytes()
    report = export_fused(folder / "adapter", base, tmp_path / "fused.safetensors")
    assert set(report.layers) == set(held(name))
    found, original = load_file(tmp_path / "fused.safetensors"), load_file(base)
    assert set(found) == set(original)
    agree(found, expected)
    assert base.read_bytes() == before
    changed = {key for key in found if not torch.equal(found[key], original[key])}
    assert changed == {key for key in expected if not torch.equal(expected[key], original[key])}


def test_from_a_diffusers_folder(case, tmp_path):
    name, folder, expected = case
    export_fused(folder / "adapter", folder / "base", tmp_path / "fused.safetensors")
    found = load_file(tmp_path / "fused.safetensors")
    if name.startswith("flux2"):  # written with bare keys
        expected = transformer_alone(expected)
    extra = {key for key in expected if key not in found}
    assert all(key.endswith((".position_ids", "logit_scale", "betas", "decay")) for key in extra)
    agree(found, {key: tensor for key, tensor in expected.items() if key in found})
    more = set(found) - set(expected)
    copies = ("clip_l.transformer.text_projection.weight", "encoder.embed_tokens.weight")
    assert all(key.endswith(copies) for key in more)


def test_the_denoiser_alone(case, tmp_path):
    name, folder, expected = case
    denoiser = get_family(name).denoiser
    adapt_everywhere(tiny(name), [denoiser]).save_gralora_weights(tmp_path / "adapter")
    expected = transformer_alone(ORIGINALS[name](merged([(tmp_path / "adapter", 1.0)], tiny(name))))
    base = write(ORIGINALS[name](tiny(name)), tmp_path / "base.safetensors")
    alone = write(transformer_alone(ORIGINALS[name](tiny(name))), tmp_path / "alone.safetensors")
    for number, source in enumerate((folder / "base", base, alone)):
        output = tmp_path / f"{number}.safetensors"
        export_fused(tmp_path / "adapter", source, output, denoiser_only=source != alone)
        found = load_file(output)
        assert set(found) == set(expected)
        agree(found, expected)


def test_a_diffusers_folder(case, tmp_path):
    name, folder, _ = case
    components = list(get_family(name).components)
    adapt_everywhere(tiny(name)).save_gralora_weights(tmp_path / "adapter")
    export_fused(tmp_path / "adapter", folder / "base", tmp_path / "fused", format="diffusers")
    found = type(tiny(name)).from_pretrained(tmp_path / "fused")
    expected = merged([(tmp_path / "adapter", 1.0)], tiny(name))
    for component in (*components, "vae"):
        agree(getattr(found, component).state_dict(), getattr(expected, component).state_dict())
    names = {str(p.relative_to(folder / "base")) for p in (folder / "base").rglob("*")}
    assert names == {
        str(p.relative_to(tmp_path / "fused")) for p in (tmp_path / "fused").rglob("*")
    }


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl"])
def test_diffusers_reads_the_file_as_the_fused_pipeline(name, tmp_path):
    """By its own ``from_single_file``; the other families' need their full widths, and in
    test_layouts every row of those goes through the same converters."""
    pipe = tiny(name)
    pipe.save_pretrained(tmp_path / "base")
    adapt_everywhere(pipe).save_gralora_weights(tmp_path / "adapter")
    export_fused(tmp_path / "adapter", tmp_path / "base", tmp_path / "fused.safetensors")
    read = type(pipe).from_single_file(
        str(tmp_path / "fused.safetensors"), config=str(tmp_path / "base")
    )
    expected = merged([(tmp_path / "adapter", 1.0)], tiny(name))
    for component in (*get_family(name).components, "vae"):
        agree(getattr(read, component).state_dict(), getattr(expected, component).state_dict())


def test_a_base_that_predicts_v_says_so_in_the_file(tmp_path):
    pipe = PIPELINES["stable-diffusion-xl"]()
    pipe.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipe.save_pretrained(tmp_path / "base")
    adapt_everywhere(pipe, ["unet"]).save_gralora_weights(tmp_path / "adapter")
    export_fused(tmp_path / "adapter", tmp_path / "base", tmp_path / "fused.safetensors")
    found = load_file(tmp_path / "fused.safetensors")
    assert found["v_pred"].numel() == found["ztsnr"].numel() == 0


@pytest.mark.parametrize("source", ["base", "base.safetensors"])
def test_a_square_projection_that_the_original_has_transposed(source, tmp_path):
    def build() -> Any:
        pipe = PIPELINES["stable-diffusion-xl"]()
        torch.manual_seed(0)
        pipe.text_encoder_2 = text_encoder_with_projection(24, 24)
        return pipe

    build().save_pretrained(tmp_path / "base")
    write(ORIGINALS["stable-diffusion-xl"](build()), tmp_path / "base.safetensors")
    pipe = build()
    inject(pipe.text_encoder_2, config(["text_projection"], hybrid_r=2), "a")
    pipe.save_gralora_weights(tmp_path / "adapter")
    export_fused(tmp_path / "adapter", tmp_path / source, tmp_path / "fused.safetensors")
    expected = ORIGINALS["stable-diffusion-xl"](merged([(tmp_path / "adapter", 1.0)], build()))
    found = load_file(tmp_path / "fused.safetensors")
    agree(found, {key: tensor for key, tensor in expected.items() if key in found})


def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path):
    pipe = PIPELINES["stable-diffusion"]()
    pipe.save_pretrained(tmp_path / "base")
    adapt_everywhere(pipe).save_gralora_weights(tmp_path / "adapter")
    output = tmp_path / "fused.safetensors"
    alone = transformer_alone(ORIGINALS["stable-diffusion"](PIPELINES["stable-diffusion"]()))
    write(alone, tmp_path / "unet.safetensors")
    with pytest.raises(AdapterFileError, match=r"weights for text_encoder(.|\n)*full checkpoint"):
        export_fused(tmp_path / "adapter", tmp_path / "unet.safetensors", output)
    with pytest.raises(AdapterFileError, match=r"weights for text_encoder(.|\n)*not contain it"):
        export_fused(tmp_path / "adapter", tmp_path / "base", output, denoiser_only=True)
    PIPELINES["flux"]().save_pretrained(tmp_path / "flux")
    with pytest.raises(
        AdapterFileError, match="trained for stable-diffusion, but the base is flux"
    ):
        export_fused(tmp_path / "adapter", tmp_path / "flux", output)
    other = dict(list(alone.items())[:-3])
    other = {key: tensor for key, tensor in other.items() if ".attn1.to_q." not in key}
    write(other, tmp_path / "less.safetensors")
    adapt_everywhere(PIPELINES["stable-diffusion"](), ["unet"]).save_gralora_weights(
        tmp_path / "unet_adapter"
    )
    with pytest.raises(AdapterFileError, match=r"unet: the base has no .*attn1\.to_q"):
        export_fused(tmp_path / "unet_adapter", tmp_path / "less.safetensors", output)
    config = json.loads((tmp_path / "base/unet/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "base/unet/config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match="this is a quantized base"):
        export_fused(tmp_path / "adapter", tmp_path / "base", output)
    assert not output.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def quantized_text_encoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a text encoder in fp8 and its scales, and the denoiser as it was."""
    made = {}
    for key, tensor in tensors.items():
        if key.startswith("cond_stage_model.") and tensor.dim() == 2 and "embedding" not in key:
            made[key] = tensor.to(torch.float8_e4m3fn)
            made[key.removesuffix("weight") + "scale_weight"] = torch.ones(())
        else:
            made[key] = tensor
    return made


def test_a_base_whose_text_encoder_alone_is_quantized(tmp_path):
    name = "stable-diffusion"
    adapt_everywhere(tiny(name), ["unet"]).save_gralora_weights(tmp_path / "adapter")
    tiny(name).save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/text_encoder/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "base/text_encoder/config.json").write_text(json.dumps(config))
    file = write(quantized_text_encoder(ORIGINALS[name](tiny(name))), tmp_path / "b.safetensors")
    fused = ORIGINALS[name](merged([(tmp_path / "adapter", 1.0)], tiny(name)))
    expected = {
        key.removeprefix("model.diffusion_model."): tensor
        for key, tensor in fused.items()
        if key.startswith("model.diffusion_model.")
    }
    for base in (file, tmp_path / "base"):
        output = tmp_path / "fused.safetensors"
        with pytest.raises(ValueError, match=r"quantized(.|\n)*--denoiser_only"):
            export_fused(tmp_path / "adapter", base, output)
        export_fused(tmp_path / "adapter", base, output, denoiser_only=True, overwrite=True)
        found = load_file(output)
        agree(found, expected)
        assert found.keys() == expected.keys()
        # a LoRA of the denoiser needs nothing else of the base either
        export_lora(tmp_path / "adapter", tmp_path / "lora.safetensors", base=base, overwrite=True)
        output.unlink()
    adapt_everywhere(tiny(name)).save_gralora_weights(tmp_path / "both")
    for base in (file, tmp_path / "base"):
        with pytest.raises(
            AdapterFileError, match=r"weights for text_encoder(.|\n)*not contain it"
        ):
            export_fused(tmp_path / "both", base, tmp_path / "x.safetensors", denoiser_only=True)
        with pytest.raises(ValueError, match="quantized"):
            export_lora(tmp_path / "both", tmp_path / "new.safetensors", base=base)


def test_a_file_of_flux2_with_its_text_encoder(tmp_path):
    """ComfyUI's file of all models: text encoders are copied as they are, and not adapted."""
    name = "flux2-klein"
    everything = {
        f"model.diffusion_model.{key.removeprefix('model.diffusion_model.')}": tensor
        for key, tensor in ORIGINALS[name](tiny(name)).items()
    }
    start = "text_encoders.qwen3_4b.transformer."
    text = {start + key: t for key, t in tiny(name).text_encoder.state_dict().items()}
    base = write(everything | text, tmp_path / "aio.safetensors")
    adapt_everywhere(tiny(name), ["transformer"]).save_gralora_weights(tmp_path / "adapter")
    export_fused(tmp_path / "adapter", base, tmp_path / "fused.safetensors")
    found = load_file(tmp_path / "fused.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in text.items())
    adapt_everywhere(tiny(name), ["text_encoder"]).save_gralora_weights(tmp_path / "text")
    place = "Its place in a single file of flux2-klein is not known. Export a diffusers folder"
    with pytest.raises(AdapterFileError, match=f"weights for text_encoder. {place}"):
        export_fused(tmp_path / "text", base, tmp_path / "new.safetensors")
    with pytest.raises(StyleError) as caught:
        export_lora(tmp_path / "text", tmp_path / "new.safetensors", style="diffusers", base=base)
    advice = "does not read this component of flux2-klein. Export it as a diffusers folder"
    assert str(caught.value).endswith(advice)


def test_the_base_is_never_replaced(tmp_path):
    pipe = PIPELINES["stable-diffusion"]()
    pipe.save_pretrained(tmp_path / "base")
    adapt_everywhere(pipe, ["unet"]).save_gralora_weights(tmp_path / "adapter")
    base = write(
        ORIGINALS["stable-diffusion"](tiny("stable-diffusion")), tmp_path / "b.safetensors"
    )
    before = base.read_bytes()
    with pytest.raises(OutputError, match="which is read"):
        export_fused(tmp_path / "adapter", base, base, overwrite=True)
    with pytest.raises(OutputError, match="which is read"):
        export_fused(
            tmp_path / "adapter",
            tmp_path / "base",
            tmp_path / "base",
            format="diffusers",
            overwrite=True,
        )
    assert base.read_bytes() == before


def test_biases_and_shards(tmp_path):
    """Trained biases take the base's place; a sharded base is read through its index."""
    pipe = PIPELINES["stable-diffusion"]()
    torch.manual_seed(3)
    inject(pipe.unet, config(bias="all"), "a")
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith("bias"):
            parameter.data += 0.5
    pipe.save_gralora_weights(tmp_path / "adapter")
    base = PIPELINES["stable-diffusion"]()
    base.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert len(list((tmp_path / "base/unet").glob("*-of-*.safetensors"))) > 2
    pipe.fuse_gralora()
    pipe.unload_gralora_weights()
    expected = pipe.unet.state_dict()
    export_fused(tmp_path / "adapter", tmp_path / "base", tmp_path / "fused", format="diffusers")
    agree(DiffusionPipeline.from_pretrained(tmp_path / "fused").unet.state_dict(), expected)
    export_fused(tmp_path / "adapter", tmp_path / "base", tmp_path / "fused.safetensors")
    agree(load_file(tmp_path / "fused.safetensors"), ldm.unet_tensors(pipe.unet))
    with pytest.raises(AdapterFileError, match="cannot be scaled"):
        export_fused(tmp_path / "adapter", tmp_path / "base", tmp_path / "x.safetensors", scale=0.5)


@pytest.mark.parametrize("scaled", [True, False])
def test_fp8_of_the_denoiser_alone(scaled, tmp_path):
    pipe = PIPELINES["flux"]()
    pipe.save_pretrained(tmp_path / "base")
    adapt_everywhere(pipe, ["transformer"]).save_gralora_weights(tmp_path / "adapter")
    exact, small = tmp_path / "exact.safetensors", tmp_path / "small.safetensors"
    export_fused(tmp_path / "adapter", tmp_path / "base", exact)
    report = export_fused(
        tmp_path / "adapter", tmp_path / "base", small, dtype="fp8_e4m3", fp8_scale=scaled
    )
    exact, small = load_file(exact), load_file(small)
    start, fp8 = "model.diffusion_model.", torch.float8_e4m3fn
    matrices = {k for k, t in exact.items() if k.startswith(start) and t.dim() == 2}
    assert {key for key, t in small.items() if t.dtype == fp8 and t.dim() == 2} == matrices
    assert (f"{start}scaled_fp8" in small) == scaled
    for key, value in exact.items():
        if key not in matrices:
            assert torch.equal(small[key], value)
            continue
        scale = torch.tensor(1.0)
        if scaled:
            scale = small[key.removesuffix("weight") + "scale_weight"]
            assert 224 < value.abs().max() / scale <= 448
        assert torch.equal(small[key].float(), (value / scale).to(fp8).float())
    assert report.loss.error > 0.02
    assert "bf16" in report.remedies or not report.remedies


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_plain_fp8_base(stored, tmp_path):
    """Fused in another dtype only: so few bits would round most of the update away."""
    pipe = PIPELINES["flux"]()
    adapt_everywhere(PIPELINES["flux"](), ["transformer"]).save_gralora_weights(
        tmp_path / "adapter"
    )
    tensors = {
        key: t.to(stored) if t.dim() == 2 else t
        for key, t in transformer_alone(ORIGINALS["flux"](pipe)).items()
    }
    base = write(tensors, tmp_path / "base.safetensors")
    with pytest.raises(BaseError, match=r"stored in fp8_e\dm\d, .*--dtype bf16"):
        export_fused(tmp_path / "adapter", base, tmp_path / "kept.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base.safetensors"}

    exact = write({key: t.float() for key, t in tensors.items()}, tmp_path / "exact.safetensors")
    export_fused(tmp_path / "adapter", exact, tmp_path / "sum.safetensors", scale=0.02)
    expected = load_file(tmp_path / "sum.safetensors")
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        report = export_fused(tmp_path / "adapter", base, tmp_path / name, dtype=name, scale=0.02)
        agree(load_file(tmp_path / name), {k: t.to(dtype) for k, t in expected.items()})
        assert report.loss.error < 0.1
    report = export_fused(
        tmp_path / "adapter", base, tmp_path / "fp8", dtype="fp8_e4m3", scale=0.02
    )
    small = load_file(tmp_path / "fp8")
    for key, value in expected.items():
        scale = small.get(key.removesuffix("weight") + "scale_weight", torch.tensor(1.0))
        matrix = value.dim() == 2
        wanted = (value / scale).to(torch.float8_e4m3fn) if matrix else value
        assert torch.equal(small[key].float(), wanted.float())
    assert "bf16" in report.remedies


@pytest.mark.parametrize("name", PIPELINES)
def test_verification(name, tmp_path):
    """Right files of every family pass, one without the adapter's update does not."""
    family = get_family(name)
    pipe = PIPELINES[name]()
    pipe.save_pretrained(tmp_path / "base")
    components = [c for c in held(name) if c in read_by_diffusers(family)]
    adapt_everywhere(pipe, components).save_gralora_weights(tmp_path / "adapter")
    verification = Verification(
        read_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out", steps=2, size=32
    )
    export_fused(tmp_path / "adapter", tmp_path / "base", tmp_path / "fused.safetensors")
    verification.check_fused(tmp_path / "fused.safetensors")
    told = json.loads((tmp_path / "out.parity.json").read_text())
    assert set(told["ways"]) == {"fused weights", "LoRA by load_lora_weights"}
    assert all(way["relative"] < 1e-4 for way in told["ways"].values())
    export_fused(tmp_path / "adapter", tmp_path / "base", tmp_path / "none.safetensors", scale=0.0)
    with pytest.raises(ParityError, match="failed: fused weights"):
        verification.check_fused(tmp_path / "none.safetensors")
