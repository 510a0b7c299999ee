"""Time to attach an adapter: ``python -m tests.performance.attach``.

A transformer with all blocks of FLUX.1, 19 double and 38 single, but narrow by default, so that
what is measured is not the copying of weights. In each round ``load_gralora_weights`` and
diffusers' ``load_lora_weights``, each from a file with the same layers and the same number of
parameters, and each followed by unloading.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from gralora_diffusion import GraloraConfig, get_family, inject
from tests.performance.measuring import (
    add_measuring_options,
    interleaved,
    machine,
    prepare,
    print_results,
    ratios,
    spread,
)

PRESETS = tuple(get_family("flux").target_presets["transformer"])


def make_pipeline(heads: int, double: int, single: int, device: torch.device) -> Any:
    """A pipeline that has nothing but its transformer, in bf16; the weights take no memory."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=16,
            num_attention_heads=heads,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
    for module in transformer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros((), dtype=torch.bfloat16, device=device)
                module._parameters[name] = torch.nn.Parameter(zero.expand(parameter.shape))
    missing = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return FluxPipeline(
        transformer=transformer.eval().requires_grad_(False),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(missing),
    )


def write_adapters(pipe: Any, preset: str, rank: int, k: int, folder: Path) -> int:
    """Write ``lora`` and ``gralora`` below ``folder``; return the number of layers."""
    transformer = pipe.transformer
    targets = get_family(pipe).resolve_preset("transformer", preset, transformer)
    transformer.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
    )
    lora = get_peft_model_state_dict(transformer)
    pipe.save_lora_weights(folder / "lora", transformer_lora_layers=lora)
    pipe.unload_lora_weights()
    config = GraloraConfig(
        r=rank, gralora_k=k, alpha=rank, target_modules=targets, init_weights=False
    )
    inject(transformer, config)
    pipe.save_gralora_weights(folder / "gralora")
    pipe.unload_gralora_weights()
    return len(lora) // 2


def print_profile(run: Callable[[], Any], lines: int) -> None:
    """Print the functions that took the most time, with all that they called."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumulative").print_stats(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, default=2, help="16 wide; 192 are as wide as FLUX.1")
    parser.add_argument("--double_blocks", type=int, default=19)
    parser.add_argument("--single_blocks", type=int, default=38)
    parser.add_argument("--presets", nargs="+", default=PRESETS[:2], choices=PRESETS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--gralora_k", type=int, default=2)
    parser.add_argument("--profile", type=int, default=0, help="print as many lines of a profile")
    add_measuring_options(parser, rounds=21, seconds=60)
    return parser


def main(arguments: list[str] | None = None) -> None:
    args = build_parser().parse_args(arguments)
    device = prepare(args)
    where = machine(device, "diffusers", "peft")
    diffusers_logging.set_verbosity_error()  # each time it says that there is no text encoder
    pipe = make_pipeline(args.heads, args.double_blocks, args.single_blocks, device)
    results = []
    for preset in args.presets:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            layers = write_adapters(pipe, preset, args.rank, args.gralora_k, folder)

            def load_gralora(folder: Path = folder) -> None:
                pipe.load_gralora_weights(folder / "gralora")

            def load_lora(folder: Path = folder) -> None:
                pipe.load_lora_weights(folder / "lora")

            runs = {"gralora": load_gralora, "lora": load_lora}
            undo = {"gralora": pipe.unload_gralora_weights, "lora": pipe.unload_lora_weights}
            times = interleaved(runs, device, args.rounds, args.seconds, undo)
            if args.profile:
                for name, run in runs.items():
                    print_profile(run, args.profile)
                    undo[name]()
        ours, lora = times.values()
        over = ratios(ours, lora)
        results.append(
            {
                "preset": preset,
                "layers": layers,
                "ms": 1e3 * median(ours),
                "lora_ms": 1e3 * median(lora),
                "ratio": median(over),
                "spread": spread(over),
            }
        )
    head = ["preset", "layers", "load_gralora_weights, ms", "load_lora_weights, ms", "ratio"]
    lines = [
        [
            str(row["preset"]),
            str(row["layers"]),
            f"{row['ms']:.0f}",
            f"{row['lora_ms']:.0f}",
            f"{row['ratio']:.2f} ± {row['spread']:.2f}",
        ]
        for row in results
    ]
    print_results(args, where, head, lines, results)


if __name__ == "__main__":
    main()
