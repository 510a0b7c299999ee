"""The commands on the bundled samples: ``gralora demo`` and ``gralora samples``."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gralora_diffusion.io.bundled import samples_folder
from gralora_diffusion.io.image_files import is_image
from gralora_diffusion.io.process import print_safely
from gralora_diffusion.io.safe_text import TerminalParser
from gralora_diffusion.io.staging import OutputError, staged
from gralora_diffusion.options.command_parser import CommandParser

FOLDER = "outputs/demo"
PROMPTS = (
    "a sks toy in the snow",
    "a sks toy on the beach",
    "a sks toy at night",
    "a sks toy on a brick wall",
)
_USAGE = "gralora demo [folder] [options]"
#: Nothing is downloaded, and the training is on the CPU. For such a small model, one thread is
#: nearly as fast as two, and other processes slow it down less.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
}


def demo(argv: Sequence[str] | None = None) -> None:
    """Train an adapter of a new subject on the bundled base, on the CPU, and show the result.

    Nothing is downloaded. Options after the folder go to the trainer, such as --max_train_steps 50.
    """
    parser = TerminalParser(
        prog="gralora demo", description=demo.__doc__, usage=_USAGE.replace("demo ", "demo [-h] ")
    )
    parser.add_argument(
        "folder",
        nargs="?",
        help=f"for all output (default: {FOLDER}, which a second demo replaces)",
    )
    arguments = list(argv or ())
    args, options = parser.parse_known_args(arguments[:1])  # further words are the trainer's
    options += arguments[1:]
    if args.folder is None:
        options.append("--overwrite_output_dir")
    folder = Path(args.folder or FOLDER)
    if any(re.match("--output[-_]dir(=|$)", option) for option in options):
        parser.exit(2, f"{parser.prog}: error: --output_dir is the first argument here: {_USAGE}\n")
    if problem := _images_of_others(folder):
        parser.exit(2, f"{parser.prog}: error: {problem}\n")
    try:
        samples = samples_folder()
    except FileNotFoundError as error:
        parser.error(str(error))
    with _environment():  # before the libraries, which read it, are imported
        from gralora_diffusion.pipelines.sample_command import main as sample
        from gralora_diffusion.training.main import main as train
        from gralora_diffusion.training.runtime.control import read_status

        config = str(samples / "configs/tiny_robot.yaml")
        train(["--config", config, f"--output_dir={folder}", *options])
        if read_status(folder).state == "stopped":  # by a signal; it has said how to resume
            return
        shown = ["--base", str(samples / "tiny-base"), f"--adapter={folder}"]
        shown += ["--guidance_scale", "1.5", "--prompt"]
        reference = ["--compare", f"--reference={samples / 'subjects/robot/train'}"]
        sample([*reference, f"--output={folder / 'grid.png'}", *shown, *PROMPTS])
    again = shlex.join(["gralora", "sample", *shown, "a sks toy on grass", "--output", "toy.png"])
    print_safely(
        f"\nadapter:        {folder / 'pytorch_gralora_weights.safetensors'}\n"
        f"training curve: {folder / 'training_curve.png'}\n"
        f"grid:           {folder / 'grid.png'}\n\n"
        f"Generate more with:\n  {again}"
    )


def _images_of_others(folder: Path) -> str | None:
    """Return why a folder of images is not for the demo's output, or None."""
    from gralora_diffusion.training.runtime.folder_lock import CONFIG_NAME

    # of a name that no file can have, the trainer says so
    if not os.path.isdir(folder) or (folder / CONFIG_NAME).exists():
        return None
    if not any(map(is_image, folder.iterdir())):
        return None
    return (
        f"{folder} contains images, but the demo trains on its own, and the folder is for its "
        f"output. To train on yours, run: gralora train --config sd15 --instance_data_dir {folder}"
    )


def samples_parser() -> CommandParser:
    """Return the parser of ``gralora samples``."""
    parser = CommandParser(
        prog="gralora samples",
        description=copy_samples.__doc__,
        other_names=dict.fromkeys(("output_dir", "folder", "o"), "is called --output here"),
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("samples"),
        help="the new folder (default: samples, where the documentation's commands expect it)",
    )
    return parser


def copy_samples(argv: Sequence[str] | None = None) -> None:
    """Copy the bundled samples: a tiny base, encoders, subjects, options, nodes for ComfyUI."""
    parser = samples_parser()
    output = parser.parse_args(argv).output
    if output.exists():
        parser.error(f"--output {output} exists already. Choose another --output")
    try:
        with staged(output) as temporary:
            ignored = shutil.ignore_patterns("__pycache__", "demo.sh")
            shutil.copytree(samples_folder(), temporary, ignore=ignored)
    except (FileNotFoundError, OutputError) as error:
        parser.error(str(error))
    print_safely(output)


@contextmanager
def _environment() -> Iterator[None]:
    """Add ``_ENVIRONMENT`` to the process's environment inside; what is set there stays."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
