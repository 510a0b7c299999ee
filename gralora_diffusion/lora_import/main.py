"""The command ``gralora import``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gralora_diffusion.base_models.optional_libraries import leave_out_unused
from gralora_diffusion.families import family_name_of, list_families
from gralora_diffusion.io.file_names import WEIGHTS_NAME, missing_base_problem, missing_problem
from gralora_diffusion.io.process import (
    cleanup_on_signals,
    lasting_imports,
    print_safely,
    quiet_libraries,
)
from gralora_diffusion.io.staging import OutputError, check_output
from gralora_diffusion.lora_files.scaling import HEADER_ALPHA
from gralora_diffusion.options.command_parser import CommandParser
from gralora_diffusion.options.path_names import file_or_id

if TYPE_CHECKING:
    from .conversion import ImportedLayer

#: Number of layers that are listed, those with the largest errors first.
LISTED = 20
#: Errors below this are rounding errors.
ROUNDING = 1e-6


def parser() -> CommandParser:
    """Return the command's parser."""
    result = CommandParser(
        prog="gralora import",
        description="Convert a LoRA to a GraLoRA adapter. A layer is converted exactly if "
        "hybrid_rank + rank / k is at least the LoRA's rank. Otherwise it gets the closest "
        "update, and the loss is reported. To continue training, pass the adapter to gralora "
        "train as --initial_adapter.",
        meanings={"family": family_name_of},
        other_names={
            **dict.fromkeys(("input", "adapter", "file", "weights"), "is called --lora here"),
            **dict.fromkeys(("model", "base_model", "checkpoint"), "is called --base here"),
            "pretrained_model_name_or_path": "is called --base here",
            **dict.fromkeys(("out", "output_dir", "output_path"), "is called --output here"),
            **dict.fromkeys(("network_dim", "dim", "r"), "is called --rank here"),
            **dict.fromkeys(("alpha", "network_alpha"), "is called --lora_alpha here"),
            "k": "is called --gralora_k here",
            **dict.fromkeys(("force", "f"), "is called --overwrite here"),
        },
    )
    result.add_argument(
        "--lora", type=file_or_id, required=True, help="file, PEFT folder or Hub id of the LoRA"
    )
    base = result.add_mutually_exclusive_group(required=True)
    base.add_argument("--family", choices=list_families(), help="family of its base")
    base.add_argument(
        "--base", type=file_or_id, help="the base itself, in diffusers' layout: folder or Hub id"
    )
    result.add_argument("--rank", type=int, required=True, help="rank of the new adapter")
    result.add_argument("--gralora_k", type=int, required=True, help="blocks per side")
    result.add_argument("--hybrid_rank", type=int, default=0, help="rank of the general pair")
    result.add_argument("--lora_alpha", type=int, help="(default: scaling 1)")
    result.add_argument(
        "--weight_name", type=file_or_id, help="which file in a folder or repository"
    )
    result.add_argument(
        "--revision", type=file_or_id, help="branch, tag or commit of the LoRA on the Hub"
    )
    result.add_argument("--cache_dir", type=file_or_id, help="folder for downloads")
    result.add_argument(
        "--header_alpha",
        choices=HEADER_ALPHA,
        help="how to treat an alpha that only a field of the header states, such as "
        "ss_network_alpha: scale by it, or use the factors unchanged",
    )
    result.add_argument(
        "--leave_out_norms_and_biases",
        action="store_true",
        help="leave out differences of norms and biases (.diff, .diff_b), which ComfyUI's Train "
        "LoRA writes, and list them; without this option such a file is refused",
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    result.add_argument("--output", required=True, type=Path, help="file, or folder for the file")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    command = parser()
    options = command.parse_args(argv, check=_problems)
    output = _file(options)
    leave_out_unused([options.base])
    try:
        with quiet_libraries(), cleanup_on_signals():
            print_safely(_import(options, output))
    except (OSError, ValueError) as error:
        command.exit(2, f"{command.prog}: error: {error}\n")
    print_safely(output)


def _file(options: argparse.Namespace) -> Path:
    output: Path = options.output
    return (output if output.suffix == ".safetensors" else output / WEIGHTS_NAME).expanduser()


def _problems(options: argparse.Namespace) -> Iterator[str]:
    """Yield what can be found without reading anything."""
    rank, k = options.rank, options.gralora_k
    if rank < 1 or k < 1 or rank % k:
        yield f"--rank is {rank} and --gralora_k is {k}; both must be at least 1, and k divide rank"
    if options.hybrid_rank < 0:
        yield f"--hybrid_rank is {options.hybrid_rank}; it must be at least 0"
    if options.lora_alpha == 0:
        yield "--lora_alpha is 0, which would make the adapter's scaling zero. Give another number"
    if options.output.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        yield f"--output is '{options.output}'; the name of a file must end in .safetensors"
    try:
        read = [options.lora, options.base]
        check_output(_file(options), options.overwrite, read, options.cache_dir)
    except OutputError as error:
        yield str(error)
    for name, find_problem in (("lora", missing_problem), ("base", missing_base_problem)):
        if (source := getattr(options, name)) and (problem := find_problem(source)):
            yield f"--{name} {source}: {problem}"


def _import(options: argparse.Namespace, output: Path) -> str:
    """Write the adapter; return the report."""
    with lasting_imports():
        from gralora_diffusion.adapters.adapter_file import save_adapter

        from .base import LoraBase
        from .conversion import gralora_from_lora

    base = LoraBase(options.base) if options.base else None
    left_out: list[str] | None = [] if options.leave_out_norms_and_biases else None
    adapter, layers = gralora_from_lora(
        options.lora,
        base.family if base else options.family,
        options.rank,
        options.gralora_k,
        options.hybrid_rank,
        options.lora_alpha,
        unet_config=base.unet_config if base else None,
        base=base,
        weight_name=options.weight_name,
        header_alpha=options.header_alpha,
        left_out=left_out,
        revision=options.revision,
        cache_dir=options.cache_dir,
    )
    save_adapter(adapter, output)
    lines = [f"left out: {len(left_out)} tensors of norms and biases"] if left_out else []
    lines += [f"  {key}" for key in left_out or ()]
    return "\n".join([*lines, _report(layers)])


def _report(layers: Mapping[str, ImportedLayer]) -> str:
    from .conversion import overall_error

    exact = sum(layer.error < ROUNDING for layer in layers.values())
    lines = [f"{exact} of {len(layers)} layers were converted exactly"]
    lossy = sorted(layers.items(), key=lambda item: -item[1].error * item[1].norm)
    lossy = [(name, layer) for name, layer in lossy if layer.error >= ROUNDING]
    if lossy:
        lines.append(f"{'lost':>8}  rank  k  layer")
    for name, layer in lossy[:LISTED]:
        lines.append(f"{layer.error:>8.2%}  {layer.rank:>4}  {layer.k}  {name}")
    if len(lossy) > LISTED:
        lines.append(f"... and {len(lossy) - LISTED} more")
    lines.append(f"lost of the whole update: {overall_error(layers):.3%}")
    return "\n".join(lines)
