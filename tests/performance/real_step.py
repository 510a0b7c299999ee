"""Time and peak memory of a whole step at real sizes: ``python -m tests.performance.real_step``.

Denoisers of the published sizes with random weights, each with the adapter that the family's first
preset gives: noisy latents at the usual resolution, forward, backward, clipping, AdamW. Measured
peaks are compared with what the plan of ``--dry_run`` says of the same step, on fake tensors.

Ways: ``bf16``; ``checkpointing``, gradients recomputed; ``bnb-4bit``, ``bnb-8bit`` and
``torchao-int8``, a quantized base; ``streamed``, as ``checkpointing`` with all blocks streamed.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gralora_diffusion import GraloraConfig, get_family, inject
from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.base_models.options import BaseModelOptions
from gralora_diffusion.base_models.quantization import quantize_empty
from gralora_diffusion.base_models.streaming import Streaming, block_bytes
from gralora_diffusion.pipelines.placement import bytes_of, tensors_of
from gralora_diffusion.training.runtime.acceleration import checkpoint_gradients
from gralora_diffusion.training.runtime.memory import MemoryMeter, materialize
from tests.performance.measuring import (
    add_measuring_options,
    interleaved,
    machine,
    prepare,
    print_results,
    spread,
)

WAYS = ("bf16", "checkpointing", "bnb-4bit", "bnb-8bit", "torchao-int8", "streamed")
_NAME = "default"
CPU = torch.device("cpu")
#: Way of a quantized base -> what --quantization calls it.
KINDS: dict[str, Any] = {
    "bnb-4bit": "bnb-nf4",
    "bnb-8bit": "bnb-int8",
    "torchao-int8": "torchao-int8",
}


@dataclass(frozen=True)
class Base:
    """A published denoiser.

    Attributes:
        config: of the class, as published; the rest are its defaults.
        latents: (C, h, w) at the usual resolution.
        conditioning: name -> shape of a row.
        quick: what makes it small, and the side of its latents then.
    """

    family: str
    kind: str
    config: dict[str, Any]
    latents: tuple[int, int, int]
    conditioning: dict[str, tuple[int, ...]]
    quick: dict[str, Any]


_SMALL_UNET = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
BASES = {
    "sd15": Base(
        "stable-diffusion",
        "UNet2DConditionModel",
        {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
        (4, 64, 64),
        {"prompt_embeds": (77, 768)},
        _SMALL_UNET,
    ),
    "sdxl": Base(
        "stable-diffusion-xl",
        "UNet2DConditionModel",
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        (4, 128, 128),
        {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,), "time_ids": (6,)},
        {
            "block_out_channels": (32, 32, 32),
            "layers_per_block": 1,
            "transformer_layers_per_block": 1,
            "attention_head_dim": 4,
        },
    ),
    "sd35-medium": Base(
        "stable-diffusion-3",
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "in_channels": 16,
            "out_channels": 16,
            "pos_embed_max_size": 384,
            "sample_size": 128,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        (16, 128, 128),
        {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)},
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
        },
    ),
    "flux": Base(
        "flux",
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        (16, 128, 128),
        {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,), "guidance": ()},
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
    ),
    "flux2-klein": Base(
        "flux2-klein",
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        (128, 64, 64),
        {"prompt_embeds": (512, 7680)},
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
    ),
}


class Step:
    """A denoiser with its adapter and optimizer, and one step of them."""

    def __init__(self, base: Base, denoiser: nn.Module, rank: int, quick: bool) -> None:
        self.base, self.denoiser, self.quick = base, denoiser, quick
        self.family = get_family(base.family)
        preset = next(iter(self.family.target_presets[self.family.denoiser]))
        targets = self.family.resolve_preset(self.family.denoiser, preset, denoiser)
        denoiser.requires_grad_(False)
        inject(denoiser, GraloraConfig(r=rank, gralora_k=2, alpha=rank, target_modules=targets))
        for module in denoiser.modules():
            if isinstance(module, GraloraLayer):
                module.cast_adapter(_NAME, torch.float32)
        denoiser.train()
        self.trained = [p for p in denoiser.parameters() if p.requires_grad]

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        channels, height, width = self.base.latents
        if self.quick:
            height, width = 16, 16
        latents = torch.randn(1, channels, height, width, device=device, dtype=torch.bfloat16)
        conditioning = {
            name: torch.ones(1, *shape, device=device, dtype=torch.bfloat16)
            for name, shape in self.base.conditioning.items()
        }
        return latents, torch.full((1,), 500, device=device), conditioning

    def backward(self, inputs: tuple[Tensor, Tensor, dict[str, Tensor]]) -> None:
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            prediction = self.family.predict(self.denoiser, *inputs)
        prediction.float().square().mean().backward()


def make_denoiser(base: Base, device: torch.device, quick: bool) -> nn.Module:
    """Make it on the device in bf16, at once, because fp32 may not fit."""
    config = {**base.config, **(base.quick if quick else {})}
    kind: Any = getattr(diffusers, base.kind)
    with torch.device("meta"):
        model: nn.Module = kind(**config).to(torch.bfloat16)
    if device.type == "meta":
        return model
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        path, _, leaf = name.rpartition(".")
        part = model.get_submodule(path)
        old = getattr(part, leaf)
        if leaf in part._buffers:
            continue
        new = torch.empty(old.shape, device=device, dtype=old.dtype)
        part._parameters[leaf] = nn.Parameter(new.normal_(std=0.02), requires_grad=False)
    if any(buffer.is_meta for buffer in model.buffers()):
        # tables that the constructor computes, of a model with fewer layers
        fewer = {"num_layers": 1, "dual_attention_layers": ()} if "num_layers" in config else {}
        for name, buffer in kind(**{**config, **fewer}).named_buffers():
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = buffer.to(device)
    return model


def planned_bytes(base: Base, way: str, rank: int, quick: bool, device: torch.device) -> int:
    """Bytes of the same step on fake tensors, as ``--dry_run`` measures them."""
    model, surplus = make_denoiser(base, torch.device("meta"), quick), 0
    if way in KINDS:
        family, options = get_family(base.family), BaseModelOptions(quantization=KINDS[way])
        surplus = quantize_empty(options, family, family.denoiser, model, torch.bfloat16)
    with torch.device("meta"):
        step = Step(base, model, rank, quick)
    if way in ("checkpointing", "streamed"):
        checkpoint_gradients(model)
    streamed = Streaming().bytes_needed(block_bytes(model))
    state = 2 * bytes_of(step.trained)
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize(model, device)
        held = bytes_of(tensors_of(model)) - surplus
        step.trained = [p for p in model.parameters() if p.requires_grad]
        meter = MemoryMeter(device, tensors_of(model))
        with meter:
            step.backward(step.inputs(device))
    if way == "streamed":
        held += streamed.ring - streamed.streamed
    return held + state + meter.peak


def measure(name: str, way: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    base = BASES[name]
    plan = planned_bytes(base, way, args.rank, args.quick, device)
    quantized = way.startswith(("bnb", "torchao"))
    denoiser = make_denoiser(base, CPU if quantized or way == "streamed" else device, args.quick)
    if quantized:
        denoiser = QUANTIZERS[way](denoiser, device)
    step = Step(base, denoiser, args.rank, args.quick)
    if way in ("checkpointing", "streamed"):
        checkpoint_gradients(denoiser)
    if way == "streamed":
        Streaming().start(denoiser, device)
    for parameter in step.trained:
        parameter.data = parameter.data.to(device)
    optimizer = torch.optim.AdamW(step.trained, fused=True)
    inputs = step.inputs(device)

    def run() -> None:
        step.backward(inputs)
        torch.nn.utils.clip_grad_norm_(step.trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    run()
    torch.cuda.reset_peak_memory_stats(device)
    times = interleaved({"step": run}, device, args.rounds, args.seconds)["step"]
    return {
        "base": name,
        "way": way,
        "weights": sum(p.numel() for p in denoiser.parameters()),
        "rounds": len(times),
        "ms": 1e3 * median(times),
        "spread_ms": 1e3 * spread(times),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "plan_gib": plan / 2**30,
    }


def _bitsandbytes(denoiser: nn.Module, device: torch.device, bits: int) -> nn.Module:
    import bitsandbytes as bnb

    for path, module in list(denoiser.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        shape, bias = (module.in_features, module.out_features), module.bias is not None
        new: Any
        if bits == 4:
            kind = {"quant_type": "nf4", "compress_statistics": False}  # --quantization bnb-nf4
            new = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=torch.bfloat16, **kind)
            new.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **kind)
        else:
            new = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False)
        new.bias = module.bias
        parent, _, leaf = path.rpartition(".")
        setattr(denoiser.get_submodule(parent), leaf, new)
    return denoiser.to(device)


def _torchao(denoiser: nn.Module, device: torch.device) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(denoiser.to(device), Int8WeightOnlyConfig())
    return denoiser


QUANTIZERS: dict[str, Callable[[nn.Module, torch.device], nn.Module]] = {
    "bnb-4bit": lambda model, device: _bitsandbytes(model, device, 4),
    "bnb-8bit": lambda model, device: _bitsandbytes(model, device, 8),
    "torchao-int8": _torchao,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--ways", nargs="+", default=["bf16"], choices=WAYS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="small models, to try the command")
    add_measuring_options(parser, rounds=11, seconds=15)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    if args.quick:
        args.rounds, args.seconds = 3, 0.0
    device = prepare(args)
    if device.type != "cuda":
        raise SystemExit("real sizes need a CUDA device: --device cuda")
    where, results = machine(device, "diffusers", "peft", "bitsandbytes", "torchao"), []
    for name in args.bases:
        for way in args.ways:
            try:
                results.append(measure(name, way, args, device))
            except (
                RuntimeError,
                ImportError,
                ValueError,
                TypeError,
            ) as error:  # no room, no library
                text = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                results.append({"base": name, "way": way, "error": text})
            gc.collect()
            torch.cuda.empty_cache()
    head = ["base", "way", "ms", "peak GiB", "plan GiB"]
    lines = [
        [row["base"], row["way"], row["error"], "", ""]
        if "error" in row
        else [row["base"], row["way"]]
        + [f"{row[key]:.2f}" for key in ("ms", "peak_gib", "plan_gib")]
        for row in results
    ]
    print_results(args, where, head, lines, results)


if __name__ == "__main__":
    main()
