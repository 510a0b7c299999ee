"""`gralora sample`: images with and without an adapter or a LoRA, in a grid."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gralora_diffusion.base_models.folder import check_weight_files
from gralora_diffusion.base_models.optional_libraries import leave_out_unused
from gralora_diffusion.families import (
    LARGEST_CONTROL,
    SMALLEST_CONTROL,
    ControlCount,
    ModelFamily,
    find_pipeline_family,
    too_much_clip_skip,
)
from gralora_diffusion.io.dtypes import torch_dtype
from gralora_diffusion.io.errors import AdapterFileError, ConfigError
from gralora_diffusion.io.file_names import (
    CONTROL_RESOLUTION,
    METADATA_KEY,
    WEIGHTS_NAME,
    missing_base_problem,
    missing_problem,
)
from gralora_diffusion.io.hub import offline_problem
from gralora_diffusion.io.image_files import ImageError, folder_images, read_image
from gralora_diffusion.io.image_parameters import ImageParameters, save_png
from gralora_diffusion.io.process import lasting_imports, print_safely, quiet_libraries
from gralora_diffusion.io.safe_text import error_line
from gralora_diffusion.io.staging import OutputError, find_overlap, staged, unwritable
from gralora_diffusion.io.tensor_files import read_header, replacing
from gralora_diffusion.options.command_parser import CommandParser, finite
from gralora_diffusion.options.path_names import file_or_id

from .editing import (
    control_resolution_problem,
    control_size_problems,
    editing_pipeline,
    read_controls,
    read_fills,
)
from .generation import generate, parameters_of, takes_negative_prompt
from .grid import labelled_grid

#: What users may call an option -> how the message goes on.
_OTHER_NAMES = {
    **dict.fromkeys(("model", "base_model", "checkpoint"), "is called --base here"),
    "pretrained_model_name_or_path": "is called --base here",
    **dict.fromkeys(("lora_weights", "lora_path"), "is called --lora here"),
    **dict.fromkeys(("weights", "gralora", "adapter_path"), "is called --adapter here"),
    **dict.fromkeys(("prompts", "text"), "is called --prompt here"),
    **dict.fromkeys(("neg", "negative"), "is called --negative_prompt here"),
    **dict.fromkeys(("out", "output_dir", "output_path", "o"), "is called --output here"),
    **dict.fromkeys(("steps", "sample_steps"), "is called --num_inference_steps"),
    **dict.fromkeys(("n", "num_images", "count"), "is called --images_per_prompt here"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance"), "is called --guidance_scale here"),
    **dict.fromkeys(("width", "height", "resolution"), "does not exist here. See --size"),
    **dict.fromkeys(("strength", "alpha", "lora_scale", "weight"), "is called --scale here"),
    **dict.fromkeys(("precision", "mixed_precision"), "is called --dtype here"),
}
#: One more than the highest seed that torch takes.
_SEEDS = 1 << 64
#: Names of dtypes, as in the other commands.
DTYPES = ("fp32", "bf16", "fp16")


def parser() -> CommandParser:
    """Return the command's parser."""
    command = CommandParser(
        prog="gralora sample",
        description="Generate a grid of images with a base, and with an adapter.",
        other_names=_OTHER_NAMES,
    )
    command.add_argument(
        "--base",
        type=file_or_id,
        required=True,
        help="the base: a diffusers folder, a Hub id or a .safetensors file",
    )
    command.add_argument(
        "--base_config",
        type=file_or_id,
        help="for a base in one file: folder or Hub id of a pipeline of the same kind, which "
        "provides the configuration and what the file does not contain",
    )
    command.add_argument("--adapter", type=file_or_id, help="GraLoRA file, folder or Hub id")
    command.add_argument(
        "--lora",
        type=file_or_id,
        help="LoRA file, folder or Hub id that diffusers reads, such as an export",
    )
    command.add_argument("--prompt", nargs="+", required=True, help="one prompt or several")
    command.add_argument("--negative_prompt", help="what to steer away from")
    command.add_argument(
        "--image",
        type=file_or_id,
        nargs="+",
        help="control image for an editing base: one for all prompts or one for each; several for "
        "one prompt are separated by commas. For a base for inpainting: the image to fill",
    )
    command.add_argument(
        "--mask",
        type=file_or_id,
        nargs="+",
        help="mask of the image for a base for inpainting, white where to fill: one for all "
        "prompts or one for each",
    )
    command.add_argument(
        "--control_resolution",
        type=int,
        help="pixels per side of the control images, as an area, for FLUX.1 Kontext and FLUX.2 "
        "(default: what the adapter was trained with; without it, the pipeline's)",
    )
    command.add_argument("--output", required=True, type=Path, help="image file for the grid")
    command.add_argument(
        "--image_dir",
        type=Path,
        help="folder where each generated image is saved, too, in its own size",
    )
    command.add_argument(
        "--compare", action="store_true", help="also generate images with the base alone"
    )
    command.add_argument(
        "--reference", type=Path, help="folder with images to show in the first row"
    )
    command.add_argument("--images_per_prompt", type=int, default=1)
    command.add_argument("--scale", type=finite, default=1.0, help="strength of the adapter")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--size", type=int, help="pixels per side (default: the pipeline's)")
    command.add_argument("--guidance_scale", type=finite, help="(default: the pipeline's)")
    command.add_argument(
        "--image_guidance_scale",
        type=finite,
        help="guidance by the control image, for InstructPix2Pix (default: the pipeline's)",
    )
    command.add_argument("--num_inference_steps", type=int, default=30)
    command.add_argument(
        "--max_sequence_length",
        type=int,
        help="maximum number of tokens in a prompt, for bases that allow a choice (T5, FLUX.2); "
        "fewer are faster (default: the pipeline's)",
    )
    command.add_argument(
        "--clip_skip",
        type=int,
        help="layers to skip at the end of CLIP; 1 is what other programs call clip skip 2",
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of the computation (default: fp32 on the CPU; fp16 on a GPU, or bf16 for "
        "bases made for it, such as Stable Diffusion 3 and FLUX)",
    )
    return command


def main(argv: Sequence[str] | None = None) -> None:
    """``gralora sample``: generate a grid of images with a base and an adapter."""
    command = parser()
    args = command.parse_args(argv, check=_problems)

    rows: list[tuple[str, list[Image.Image]]] = []
    if args.reference:
        rows.append(("the subject", _images(args.reference, command)))
    if len(args.prompt) > 1 and not any(" " in prompt for prompt in args.prompt):
        print_safely(
            f"{len(args.prompt)} prompts of one word each. If they are one prompt, put it in "
            "quotes",
            error=True,
        )
    leave_out_unused([args.base])
    try:
        # before the images, so that a place that cannot be written to is found at once
        if args.image_dir:
            args.image_dir.mkdir(parents=True, exist_ok=True)
        with staged(args.output) as temporary:
            with quiet_libraries():
                generated = _generated(args, command)
            for made in generated:
                rows += [(made.label, list(row)) for row in zip(*made.images, strict=True)]
                if args.image_dir:
                    made.save(args.image_dir)
            grid = labelled_grid(rows, args.prompt)
            if args.output.suffix.lower() == ".png":
                save_png(grid, temporary, generated[-1].parameters[0][0])
            else:
                grid.save(temporary)
    except (OSError, OutputError) as error:
        command.error(str(error))
    print_safely(args.output)


@dataclass(frozen=True)
class _Generated:
    """Images with one adapter and what they were generated with, both as [prompt][image]."""

    label: str
    images: list[list[Image.Image]]
    parameters: list[list[ImageParameters]]

    def save(self, folder: Path) -> None:
        """Save each image in the folder, under the number of its prompt and its own."""
        for row, (images, described) in enumerate(zip(self.images, self.parameters, strict=True)):
            for column, (image, parameters) in enumerate(zip(images, described, strict=True)):
                with replacing(folder / _image_name(self.label, row, column)) as temporary:
                    save_png(image, temporary, parameters)


def _image_name(label: str, prompt: int, image: int) -> str:
    return f"{label}{'-' if label else ''}{prompt:02d}-{image:02d}.png"


def _generated(args: argparse.Namespace, command: argparse.ArgumentParser) -> list[_Generated]:
    """Generate the images: with the adapter, and before it with the base alone to compare."""
    pipe = open_pipeline(args, command)
    family = find_pipeline_family(type(pipe).__name__)
    if family and (problem := too_much_clip_skip(pipe, family, args.clip_skip)):
        command.error(problem)
    pipe, controls = _with_controls(pipe, args, command)
    options: dict[str, Any] = {
        "images_per_prompt": args.images_per_prompt,
        "seed": args.seed,
        "size": args.size,
        "negative_prompt": args.negative_prompt,
        "guidance_scale": args.guidance_scale,
        "inference_steps": args.num_inference_steps,
        "max_sequence_length": args.max_sequence_length,
        "clip_skip": args.clip_skip,
        "controls": controls,
        "control_resolution": args.control_resolution,
        "image_guidance_scale": args.image_guidance_scale,
    }

    def made(label: str, adapter: str | None) -> _Generated:
        described = parameters_of(
            pipe, args.prompt, base=args.base, adapter=adapter, scale=args.scale, **options
        )
        images = generate(pipe, args.prompt, progress=True, **options)
        return _Generated(label, images, described)

    labels = _labels(args)
    if args.lora:
        load_lora(pipe, args.lora, command)  # also if it is shown last, so that errors come first
        if args.adapter:
            pipe.unload_lora_weights()
    if args.adapter:
        try:
            from gralora_diffusion.adapters.adapter_file import read_adapter

            adapter = read_adapter(args.adapter)
            print_safely(pipe.load_gralora_weights(adapter, "sampled"))
        except (OSError, ValueError) as error:
            command.error(f"--adapter: {error}")
        if any(controls) and args.control_resolution is None:
            options["control_resolution"] = _trained_control_resolution(adapter.metadata)
    if not (args.adapter or args.lora):
        return [made("", None)]
    found = []
    if args.compare:
        pipe.set_adapters("sampled", 0.0)
        found.append(made(labels.pop(0), None))
    pipe.set_adapters("sampled", args.scale)
    found.append(made(labels.pop(0), args.adapter or args.lora))
    if labels:
        pipe.unload_gralora_weights()
        load_lora(pipe, args.lora, command)
        pipe.set_adapters("sampled", args.scale)
        found.append(made(labels.pop(0), args.lora))
    return found


def _trained_control_resolution(metadata: Mapping[str, str]) -> int | None:
    """Return what the control images of an adapter's training were reduced to, if they were."""
    stated = metadata.get(CONTROL_RESOLUTION, "")
    if not (stated.isascii() and stated.isdigit() and len(stated) <= 4):
        return None
    if not SMALLEST_CONTROL <= int(stated) <= LARGEST_CONTROL:
        return None
    print_safely(
        f"control images have at most {stated}x{stated} pixels, as in the adapter's training; "
        "--control_resolution sets another size"
    )
    return int(stated)


def _with_controls(
    pipe: Any, args: argparse.Namespace, command: argparse.ArgumentParser
) -> tuple[Any, list[list[Image.Image]]]:
    """Return the pipeline that edits, and the control images of each prompt, if there are some.

    For a base for inpainting, these are the pipeline that fills, and image and mask.
    """
    family = find_pipeline_family(type(pipe).__name__)
    problems: list[str] = []
    count: ControlCount | None = None
    if family is not None and family.fills(pipe):
        side = args.size or family.native_resolution(pipe)
        options, sides = ("image", "mask"), (side, side)
        controls = read_fills(options, args.image, args.mask, args.prompt, sides, problems)
    else:
        count = family.control_count(pipe) if family else ControlCount()
        controls = read_controls("image", args.image, args.prompt, count, problems)
        if args.mask:
            problems.append("--mask needs a base for inpainting, which this base is not")
    if args.control_resolution is not None and not problems:
        problem = control_resolution_problem(args.control_resolution, count)
        problems += [problem] if problem else []
    if family is not None and count is not None and not problems:
        wanted, divisor = args.control_resolution, family.size_divisor(pipe)
        problems += control_size_problems("image", controls, family, wanted, divisor)
    if problems:
        command.error("\n  ".join(problems))
    if not any(controls):
        return pipe, []
    assert family is not None
    pipe = editing_pipeline(pipe, family)
    taken = inspect.signature(type(pipe).__call__).parameters
    for name in ("image_guidance_scale", "max_sequence_length", "clip_skip", "negative_prompt"):
        if getattr(args, name) is not None and name not in taken:
            command.error(
                f"--{name}: {type(pipe).__name__} does not take this option. Leave it out"
            )
    return pipe, controls


def _labels(args: argparse.Namespace) -> list[str]:
    """Return the labels of the generated rows: the base, the adapter, the LoRA."""
    if args.adapter and args.lora:
        return [*(["before"] if args.compare else []), "GraLoRA", "LoRA"]
    return ["before", "after"] if args.compare else [""]


def load_lora(pipe: Any, source: str, parser: argparse.ArgumentParser) -> None:
    """Load a LoRA as diffusers' adapter "sampled", or end the command with the reason."""
    path = Path(source).expanduser()
    # diffusers takes a folder and the name of a file in it
    where: dict[str, Any] = {"weight_name": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else source
    try:
        pipe.load_lora_weights(folder, adapter_name="sampled", **where)
    except Exception as error:  # diffusers and PEFT may raise anything on files of others
        problem = offline_problem(error, source) or error_line(error)
        parser.error(
            f"--lora {source}: diffusers cannot load it on this base ({problem}). It reads what "
            "`gralora export --style diffusers` writes. Pass a GraLoRA file as --adapter"
        )


def open_pipeline(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Any:
    """Load the base on its device, in the precision it computes in."""
    import torch

    with lasting_imports():
        from diffusers import DiffusionPipeline

        from gralora_diffusion.base_models.loading import check_complete, check_tokenizers
        from gralora_diffusion.base_models.pipeline_index import PipelineIndex
        from gralora_diffusion.pipelines.placement import place

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if Path(args.base).is_file():
            pipe = _from_single_file(args, device, parser)
        else:
            index = PipelineIndex("base", args.base)
            _check_taken(args, index.pipeline_class, parser)
            folder = Path(args.base)
            if not folder.is_dir():
                folder = Path(DiffusionPipeline.download(args.base, use_safetensors=True))
            check_weight_files(folder)
            name = args.dtype or usual_dtype(index.family, device)
            pipe = DiffusionPipeline.from_pretrained(
                folder, dtype=torch_dtype(name), use_safetensors=True
            )
            check_complete(pipe)
            if index.family is not None:
                check_tokenizers(pipe, index.family)
        place(pipe, torch.device(device))
        return pipe
    except ConfigError as error:
        parser.error(error.problems[0].replace("--pretrained_model_name_or_path", "--base"))
    except Exception as error:  # libraries may raise anything on damaged files
        problem = (
            offline_problem(error, args.base) or f"no diffusers pipeline could be loaded ({error})"
        )
        parser.error(f"--base {args.base}: {problem}")


def _from_single_file(
    args: argparse.Namespace, device: str, parser: argparse.ArgumentParser
) -> Any:
    """Load a base from an original single file as the trainer does."""
    from gralora_diffusion.base_models.loading import find_base_family, load_base
    from gralora_diffusion.base_models.options import BaseModelOptions

    options = BaseModelOptions(
        pretrained_model_name_or_path=args.base, base_config=args.base_config
    )
    family = find_base_family(options)
    _check_taken(args, family.pipeline_classes[0], parser)
    dtype = torch_dtype(args.dtype or usual_dtype(family, device))
    return load_base(options, family, dtype, dtype)


def _check_taken(
    args: argparse.Namespace, class_name: str, parser: argparse.ArgumentParser
) -> None:
    """Reject options that pipelines of this class do not take."""
    import diffusers

    pipeline_class = getattr(diffusers, class_name, None)
    if pipeline_class is None:
        return
    parameters = inspect.signature(pipeline_class.__call__).parameters
    taken = {
        "negative_prompt": takes_negative_prompt(pipeline_class),
        **{name: name in parameters for name in ("max_sequence_length", "clip_skip")},
    }
    for name in taken:
        if getattr(args, name) is not None and not taken[name]:
            parser.error(f"--{name}: {class_name} does not take this option. Leave it out")
    family = find_pipeline_family(class_name)
    if family and (problem := family.sequence_problem(args.max_sequence_length)):
        parser.error(problem)


def usual_dtype(family: ModelFamily | None, device: str) -> str:
    """Return the name in ``DTYPES`` that pipelines of a family generate in by default.

    Args:
        family: None for pipelines of no supported family.
    """
    if device == "cpu":
        return "fp32"
    return family.generation_precision if family else ModelFamily.generation_precision


def _problems(args: argparse.Namespace) -> Iterator[str]:
    """Yield the invalid options, before a model is loaded."""
    yield from _unreadable_sources(args)
    if args.reference and not args.reference.exists():
        yield f"--reference {args.reference} cannot be read as a folder: No such file or directory"
    if args.image_guidance_scale is not None and not args.image:
        yield "--image_guidance_scale has no effect without --image. Leave it out"
    if args.control_resolution is not None and not args.image:
        yield "--control_resolution has no effect without --image. Leave it out"
    if args.compare and not (args.adapter or args.lora):
        yield "--compare needs an adapter to compare with. Pass --adapter or --lora"
    known = sorted(end for end, kind in Image.registered_extensions().items() if kind in Image.SAVE)
    if args.output.is_dir() or args.output.suffix.lower() not in known:
        yield f"--output is '{args.output}'; it must be an image file, such as grid.png"
    elif problem := unwritable(args.output.parent):
        yield f"--output {args.output} cannot be written ({problem})"
    adapter = Path(args.adapter or "").expanduser()
    # a grid may lie beside the adapter: only these files of an adapter's folder are read
    weights = adapter.rglob("*.safetensors") if args.adapter and adapter.is_dir() else [adapter]
    read = [
        args.base,
        args.base_config,
        args.lora,
        None if adapter.exists() else args.adapter,
        args.reference,
        *(args.image or ()),
        *(args.mask or ()),
        *(file for file in weights if file.is_file()),
    ]
    if source := find_overlap(args.output, read):
        yield f"--output {args.output} overlaps {source}, which is read. Choose another --output"
    if args.image_dir:
        yield from _problems_of_image_dir(args, read)
    for name in ("images_per_prompt", "num_inference_steps", "max_sequence_length", "clip_skip"):
        if (value := getattr(args, name)) is not None and value < 1:
            yield f"--{name} is {value}; it must be at least 1"
    if not 0 <= args.seed < _SEEDS:
        yield (
            f"--seed is {args.seed}; it must be at least 0 and below {_SEEDS}. The same seed gives "
            "the same images"
        )
    if args.size is not None and (args.size < 8 or args.size % 8):
        yield (
            f"--size is {args.size}; it must be a positive multiple of 8. The nearest is "
            f"{max(8, 8 * round(args.size / 8))}"
        )


def _unreadable_sources(args: argparse.Namespace) -> Iterator[str]:
    """Yield the sources that are missing or of another kind, by their names and headers."""
    for name, find_problem in (
        ("base", missing_base_problem),
        ("base_config", missing_base_problem),
        ("adapter", missing_problem),
        ("lora", missing_problem),
    ):
        if (source := getattr(args, name)) and (problem := find_problem(source)):
            yield f"--{name} {source}: {problem}"
    for name in ("adapter", "lora"):
        path = Path(getattr(args, name) or "").expanduser()
        # of a folder, only the file with our name is known to be the adapter
        file = path / WEIGHTS_NAME if path.is_dir() else path
        if not (getattr(args, name) and file.is_file()):
            continue
        try:
            _, metadata = read_header(file)
        except AdapterFileError as error:
            yield f"--{name}: {error}"
            continue
        if name == "lora" and METADATA_KEY in metadata:
            yield f"--lora {path}: this is a GraLoRA adapter. Pass it as --adapter"


def _problems_of_image_dir(args: argparse.Namespace, read: list[Any]) -> Iterator[str]:
    if args.image_dir.exists() and not args.image_dir.is_dir():
        yield f"--image_dir {args.image_dir} is a file. Give a folder"
        return
    for label in _labels(args):
        for row in range(len(args.prompt)):
            for column in range(args.images_per_prompt):
                file = args.image_dir / _image_name(label, row, column)
                if source := find_overlap(file, read):
                    yield (
                        f"--image_dir {args.image_dir}: {file.name} overlaps {source}, which is "
                        "read. Choose another --image_dir"
                    )
                    return


def _images(folder: Path, parser: argparse.ArgumentParser) -> list[Image.Image]:
    try:
        files = folder_images(file.name for file in folder.iterdir()).images
    except OSError as error:
        parser.error(f"--reference {folder} cannot be read as a folder: {error.strerror}")
    if not files:
        parser.error(f"--reference {folder} contains no images")
    images, problems = [], []
    for name in files:
        try:
            images.append(read_image(folder / name))
        except ImageError as error:
            problems.append(f"{name} cannot be decoded: {error}")
    if problems:
        parser.error("\n  ".join([f"--reference {folder}:", *problems]))
    return images
