"""``gralora export``: convert an adapter to formats that other programs read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gralora_diffusion.base_models.optional_libraries import leave_out_unused
from gralora_diffusion.families import family_name_of, list_families
from gralora_diffusion.io.file_names import missing_base_problem, missing_problem
from gralora_diffusion.io.process import (
    cleanup_on_signals,
    lasting_imports,
    print_safely,
    quiet_libraries,
)
from gralora_diffusion.io.staging import OutputError, check_output, find_overlap
from gralora_diffusion.options.command_parser import CommandParser, finite
from gralora_diffusion.options.path_names import file_or_id

from .choices import DTYPE_CHOICES, FORMATS, READERS, STYLES, USER_FIELDS, parity_path

if TYPE_CHECKING:
    from .fused import FusedReport
    from .lora import LoraReport

_FP8 = (
    "This file is for ComfyUI: diffusers ignores the scales and would generate noise. For a file "
    "that both read, pass --no_fp8_scale."
)
#: What users may call an option -> how the message goes on.
_OTHER_NAMES = {
    **dict.fromkeys(("input", "lora", "weights", "path"), "is called --adapter here"),
    **dict.fromkeys(("model", "base_model", "checkpoint"), "is called --base here"),
    "pretrained_model_name_or_path": "is called --base here",
    **dict.fromkeys(("out", "output_dir", "output_path"), "is called --output here"),
    **dict.fromkeys(("type", "to"), "is called --format here"),
    **dict.fromkeys(("precision", "save_precision"), "is called --dtype here"),
    **dict.fromkeys(("strength", "alpha", "weight"), "is called --scale here"),
    **dict.fromkeys(("force", "f"), "is called --overwrite here"),
}
#: Format -> options that only it takes.
_ONLY = {
    "lora": ("rank", "energy"),
    "checkpoint": ("denoiser_only", "no_fp8_scale", "hash"),
}


def parser() -> CommandParser:
    """Return the parser of the command's options."""
    command = CommandParser(
        prog="gralora export",
        description="Convert an adapter to formats that other programs read.",
        other_names=_OTHER_NAMES,
        meanings={"family": family_name_of},
    )
    command.add_argument(
        "--adapter", type=file_or_id, required=True, help="GraLoRA file, folder or Hub id"
    )
    command.add_argument(
        "--format",
        required=True,
        choices=(*FORMATS, "lora", "diff"),
        help="checkpoint: the base with the adapter added, as one file in the original layout, "
        "which ComfyUI reads. diffusers: the same as a folder. lora: an ordinary LoRA with exactly "
        "the same update. diff: the dense update, for ComfyUI",
    )
    command.add_argument("--output", required=True, type=Path, help="file, or folder for diffusers")
    command.add_argument(
        "--base",
        type=file_or_id,
        help="original .safetensors file, diffusers folder or Hub id. It is required for "
        "checkpoint, diffusers and --verify. Otherwise it is only used to check that the adapter "
        "fits",
    )
    command.add_argument("--scale", type=finite, default=1.0, help="strength of the adapter")
    command.add_argument(
        "--dtype",
        default="keep",
        choices=DTYPE_CHOICES,
        help="dtype of the output; keep: the base's, or the adapter's for lora and diff (fp32 if "
        "it is fp8)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    command.add_argument(
        "--family", choices=list_families(), help="family of the base, if neither file names it"
    )

    group = command.add_argument_group("lora")
    group.add_argument(
        "--style",
        choices=STYLES,
        help="style of the names (default: comfyui). "
        + ". ".join(f"{style}: for {readers}" for style, readers in READERS.items())
        + ". Other programs silently ignore names that they do not know",
    )
    group.add_argument("--rank", type=int, help="truncate each layer to this rank")
    group.add_argument(
        "--energy", type=float, help="truncate, but keep this part of the squared norm"
    )

    group = command.add_argument_group("checkpoint and diffusers")
    group.add_argument(
        "--denoiser_only", action="store_true", help='write a file for "Load Diffusion Model"'
    )
    group.add_argument(
        "--stochastic_rounding", action="store_true", help="round up or down at random"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of stochastic rounding and of --verify"
    )
    group.add_argument("--no_fp8_scale", action="store_true", help="write fp8 without scales")
    group.add_argument(
        "--hash", action="store_true", help="write hashes; this reads the output once more"
    )
    group.add_argument(
        "--variant", type=file_or_id, help="variant of the base's weight files, such as fp16"
    )
    group.add_argument(
        "--revision", type=file_or_id, help="branch, tag or commit of the base on the Hub"
    )
    group.add_argument("--cache_dir", type=file_or_id, help="folder for downloads")

    group = command.add_argument_group("metadata of the file")
    for name in USER_FIELDS:
        group.add_argument(f"--{name}", help=f"modelspec.{name}")

    group = command.add_argument_group("verification")
    group.add_argument(
        "--verify",
        action="store_true",
        help="generate latents with the attached adapter and with the exported file; if they "
        "differ, fail and write nothing",
    )
    group.add_argument("--verify_prompt", nargs="+", default=["a photo"], metavar="PROMPT")
    group.add_argument("--verify_steps", type=int, default=4)
    group.add_argument("--verify_size", type=int, help="pixels per side (default: the base's)")
    group.add_argument(
        "--verify_bound",
        type=finite,
        help="largest allowed difference, in units of the adapter's effect",
    )
    group.add_argument(
        "--base_config",
        type=file_or_id,
        help="pipeline that completes a base in one file, for --verify",
    )
    return command


def main(argv: Sequence[str] | None = None) -> None:
    """``gralora export``."""
    command = parser()
    # before anything is imported or downloaded
    args = command.parse_args(argv, check=_problems)
    leave_out_unused([args.base, args.base_config], (), args.revision, args.cache_dir)
    with quiet_libraries():
        from .parity import ParityError

        try:
            with cleanup_on_signals():
                print_safely(_export(args))
            if not args.verify:  # it would be a report on the previous output
                parity_path(args.output).unlink(missing_ok=True)
            if args.dtype == "fp8_e4m3" and not args.no_fp8_scale:
                print(_FP8)
        except (ParityError, OSError, ValueError) as error:
            command.exit(2, f"{command.prog}: error: {error}\n")


def _problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield the invalid options and combinations of options, before anything is read."""
    args.output = args.output.expanduser()
    yield from _path_problems(args)
    fused = args.format in FORMATS
    if fused and not args.base:
        yield f"--format {args.format} needs --base, the base that the adapter is added to"
    if args.verify and not args.base:
        yield "--verify needs --base, the base that it generates with"
    if args.verify and args.format == "diff":
        yield (
            "--verify is not possible for --format diff, because diffusers does not read .diff "
            "files. It is possible for checkpoint, diffusers and lora"
        )
    for format, options in _ONLY.items():
        given = [f"--{name}" for name in options if getattr(args, name) not in (None, False)]
        if given and args.format != format:
            yield f"{', '.join(given)}: only allowed with --format {format}"
    if args.style and args.format != "lora":
        yield "--style: only allowed with --format lora"
    if args.stochastic_rounding and not fused:
        yield "--stochastic_rounding: only allowed with --format checkpoint or diffusers"
    if args.family and fused:
        yield (
            "--family: only allowed with --format lora or diff, because otherwise the base "
            "determines the family"
        )
    if args.no_fp8_scale and args.dtype != "fp8_e4m3":
        yield "--no_fp8_scale: only allowed with --dtype fp8_e4m3"
    if args.verify_steps < 1:
        yield f"--verify_steps is {args.verify_steps}; it must be at least 1"
    if args.verify_size is not None and (args.verify_size < 8 or args.verify_size % 8):
        yield (
            f"--verify_size is {args.verify_size}; it must be a positive multiple of 8, such as 512"
        )
    if args.verify_bound is not None and not args.verify_bound > 0:
        yield f"--verify_bound is {args.verify_bound}; it must be above 0"
    if not args.adapter:
        yield "--adapter is empty; it must be a file, a folder or a Hub id"
    if args.rank is not None and args.rank < 1:
        yield f"--rank is {args.rank}; it must be at least 1"
    if args.energy is not None and not 0 < args.energy <= 1:
        yield f"--energy is {args.energy}; it must be above 0 and at most 1"
    if args.format != "diffusers" and args.output.suffix != ".safetensors":
        yield f"--output is '{args.output}'; its name must end in .safetensors"
    if args.format == "diffusers" and args.output.suffix in (".safetensors", ".ckpt"):
        yield (
            f"--output is '{args.output}', but --format diffusers writes a folder. Give its name, "
            "or --format checkpoint for one file"
        )


def _path_problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield the files and folders that cannot be read or written."""
    for name, find_problem in (
        ("adapter", missing_problem),
        ("base", missing_base_problem),
        ("base_config", missing_base_problem),
    ):
        if (source := getattr(args, name)) and (problem := find_problem(source)):
            yield f"--{name} {source}: {problem}"
    # not every file of an adapter's folder is read; ``export_*`` checks those that are
    adapter = None if Path(args.adapter).expanduser().is_dir() else args.adapter
    read = [adapter, args.base, args.base_config]
    try:
        check_output(args.output, args.overwrite, read, args.cache_dir)
    except OutputError as error:
        yield str(error)
    if source := find_overlap(parity_path(args.output), read, args.cache_dir):
        yield (
            f"--output {args.output}: the report on this output would replace {source}, which "
            "is read. Choose another --output"
        )


def _export(args: argparse.Namespace) -> FusedReport | LoraReport:
    with lasting_imports():
        from gralora_diffusion.adapters.adapter_file import read_adapter

        from .diff import export_diff
        from .fused import export_fused
        from .lora import export_lora
        from .verification import Verification

    adapter = read_adapter(args.adapter)
    fields = {name: getattr(args, name) for name in USER_FIELDS if getattr(args, name) is not None}
    common: dict[str, Any] = {
        "dtype": args.dtype,
        "scale": args.scale,
        "metadata": fields,
        "overwrite": args.overwrite,
    }
    download = {"variant": args.variant, "revision": args.revision, "cache_dir": args.cache_dir}
    verification = Verification(
        adapter,
        args.base,
        args.output,
        scale=args.scale,
        prompts=args.verify_prompt,
        seed=args.seed,
        steps=args.verify_steps,
        size=args.verify_size,
        bound=args.verify_bound,
        base_config=args.base_config,
        open_options=download,
    )
    if args.verify:
        _ = verification.opened  # before anything is written
    if args.format in FORMATS:
        return export_fused(
            adapter,
            args.base,
            args.output,
            format=args.format,
            stochastic=args.stochastic_rounding,
            seed=args.seed,
            fp8_scale=not args.no_fp8_scale,
            denoiser_only=args.denoiser_only,
            hashes=args.hash,
            verify=partial(verification.check_fused, denoiser_only=args.denoiser_only)
            if args.verify
            else None,
            **download,
            **common,
        )
    if args.format == "diff":
        return export_diff(adapter, args.output, base=args.base, family=args.family, **common)
    style = args.style or "comfyui"
    truncation = {"rank": args.rank, "energy": args.energy}
    check = partial(verification.check_lora, style=style, dtype=args.dtype, **truncation)
    return export_lora(
        adapter,
        args.output,
        style=style,
        base=args.base,
        family=args.family,
        verify=check if args.verify else None,
        **truncation,
        **common,
    )
