"""The command ``gralora caption``: a model of transformers writes captions beside the images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gralora_diffusion.io.process import print_safely, quiet_libraries
from gralora_diffusion.io.safe_text import error_line, for_terminal_line
from gralora_diffusion.options.command_parser import CommandParser

if TYPE_CHECKING:  # they import the image libraries, and torch
    from .data.caption_model import CaptionModel
    from .data.own_captions import CaptionedImage


def parser() -> CommandParser:
    """Return the command's parser."""
    result = CommandParser(
        prog="gralora caption",
        description="Write captions with a model that describes images, each into a .txt file "
        "beside its image. Images that have a caption are left out. The same command goes on after "
        "an interruption. The exit code is 1 if some images got no caption.",
    )
    add = result.add_argument
    add(
        "folder", metavar="FOLDER", type=Path, help="folder of images, or of folders such as 10_dog"
    )
    add(
        "--model",
        required=True,
        help="Hub id or folder of a model that transformers loads without code of the repository: "
        "BLIP, Florence-2, Qwen-VL, SmolVLM, PaliGemma and others",
    )
    add("--prompt", help="what the model is asked, or for BLIP how captions begin")
    add(
        "--max_new_tokens",
        type=int,
        default=100,
        help="tokens of a caption, at most (default: 100)",
    )
    add("--prefix", default="", help="text before each caption")
    add("--suffix", default="", help="text after each caption")
    add("--overwrite", action="store_true", help="write new captions for images that have one, too")
    add("--dry_run", action="store_true", help="only say which images would get a caption")
    add("--revision", help="branch, tag or commit of the model on the Hub")
    add("--cache_dir", help="folder for downloads from the Hub")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    command = parser()
    options = command.parse_args(sys.argv[1:] if argv is None else argv, check=_problems)
    from .data.own_captions import list_images

    try:
        images, _ = list_images(options.folder)
    except OSError as error:
        command.fail([f"FOLDER {str(options.folder)!r} cannot be read: {error}"])
    if not images:
        command.fail(
            [f"FOLDER {str(options.folder)!r} has no image. Give the folder with the images"]
        )
    chosen = [image for image in images if options.overwrite or not image.caption]
    left_out = [image for image in chosen if image.problem]
    chosen = [image for image in chosen if not image.problem]
    print_safely(
        f"{len(images)} images: {len(chosen)} to caption, "
        f"{len(images) - len(chosen) - len(left_out)} with a caption already"
    )
    for image in left_out:
        print_safely(f"{_name(image, options.folder)} is left out: {image.problem}", error=True)
    whole = not left_out
    if options.dry_run:
        for image in chosen:
            print_safely(f"{_name(image, options.folder)} would get a caption")
    elif chosen:
        whole &= _write_captions(command, chosen, options)
    if not whole:
        sys.exit(1)


def _problems(options: argparse.Namespace) -> Iterator[str]:
    from gralora_diffusion.io.file_names import nearby

    from .checks.paths import model_problem

    if not options.folder.is_dir():
        what = "this is a file" if options.folder.exists() else "there is no such folder"
        yield f"FOLDER is {str(options.folder)!r}: {what}{nearby(options.folder)}"
    if problem := model_problem(options.model, "config.json", library="transformers"):
        yield f"--model is {options.model!r}: {problem}"
    if options.max_new_tokens < 1:
        yield f"--max_new_tokens is {options.max_new_tokens}; it must be at least 1"


def _write_captions(
    command: CommandParser, images: Sequence[CaptionedImage], options: argparse.Namespace
) -> bool:
    """Caption images one by one; return whether all have been captioned."""
    from gralora_diffusion.io.image_files import read_image

    from .data.own_captions import write_caption

    model = _load(command, options)
    whole = True
    for image in images:
        name = _name(image, options.folder)
        try:
            text = model.caption(read_image(image.path), options.prompt, options.max_new_tokens)
            text = write_caption(image, framed(text, options.prefix, options.suffix))
        except (OSError, ValueError) as error:
            whole = False
            print_safely(f"{name} has no new caption: {error_line(error)}", error=True)
        else:
            print_safely(f"{name}: {for_terminal_line(text)}")
    return whole


def _load(command: CommandParser, options: argparse.Namespace) -> CaptionModel:
    with quiet_libraries():
        from gralora_diffusion.io.hub import offline_problem

        from .data.caption_model import load_caption_model

        try:
            return load_caption_model(
                options.model,
                prompt=options.prompt,
                revision=options.revision,
                cache_dir=options.cache_dir,
            )
        except (OSError, ValueError) as error:
            offline = offline_problem(
                error, options.model, revision=options.revision, cache_dir=options.cache_dir
            )
            command.fail([f"--model {options.model}: {offline or error_line(error)}"])


def framed(text: str, prefix: str, suffix: str) -> str:
    """Return the text of a model as a caption, with words before and after it.

    Raises:
        ValueError: the model has no words for the image.
    """
    plain = "".join(char if char.isprintable() else " " for char in text).strip()
    if not plain:
        raise ValueError("the model returned no text")
    return " ".join(part for part in (prefix, plain, suffix) if part)


def _name(image: CaptionedImage, folder: Path) -> str:
    return for_terminal_line(image.path.relative_to(folder))
