"""The ``gralora`` command: one subcommand per task."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from gralora_diffusion.io.process import compute_in_one_thread, guard_terminal, own_process
from gralora_diffusion.io.safe_text import TerminalParser
from gralora_diffusion.io.version import __version__
from gralora_diffusion.options.command_parser import must_be


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``gralora <command> [options]``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        own_process()
    guard_terminal()
    parser = TerminalParser(prog="gralora", description="GraLoRA for image models.")
    parser.add_argument("--version", action="version", version=f"gralora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands.add_parser("train", add_help=False, help="train an adapter")
    commands.add_parser("data", add_help=False, help="show what a training would see of its images")
    commands.add_parser(
        "caption", add_help=False, help="write captions for a folder of images with a model"
    )
    commands.add_parser(
        "control", add_help=False, help="save, sample or stop a running training; its status"
    )
    commands.add_parser("sample", add_help=False, help="generate images with a base and an adapter")
    commands.add_parser(
        "export", add_help=False, help="write a checkpoint, a LoRA or a folder for other programs"
    )
    commands.add_parser("import", add_help=False, help="convert an existing LoRA to an adapter")
    commands.add_parser("inspect", add_help=False, help="report what a file is and contains")
    commands.add_parser(
        "benchmark", add_help=False, help="train, evaluate and compare methods side by side"
    )
    commands.add_parser(
        "studio", add_help=False, help="open a local page for all of this, in a browser"
    )
    commands.add_parser(
        "demo", add_help=False, help="train on the bundled base, on the CPU, without a download"
    )
    commands.add_parser("samples", add_help=False, help="copy the bundled samples to a folder")
    # each command parses its own options and prints its own help
    first = arguments[0] if arguments else "--help"
    if first not in commands.choices and not first.startswith("-"):
        advice = must_be(first, commands.choices)
        parser.exit(2, f"gralora: error: the command is {first!r}; {advice}\n")
    if not arguments:
        parser.print_help()
        parser.exit(2)
    command = parser.parse_args(arguments[:1]).command
    try:
        _run(command, arguments[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        # the interpreter flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # the exit code of SIGPIPE
    except KeyboardInterrupt:
        parser.exit(130, f"\ngralora {command}: interrupted\n")


def _run(command: str, rest: Sequence[str]) -> None:
    if command == "train":
        from gralora_diffusion.training.main import main as train

        train(rest)
    elif command == "data":
        from gralora_diffusion.training.data_command import main as data

        data(rest)
    elif command == "caption":
        from gralora_diffusion.training.caption_command import main as caption

        caption(rest)
    elif command == "control":
        from gralora_diffusion.training.control_command import main as control

        control(rest)
    elif command == "sample":
        from gralora_diffusion.pipelines.sample_command import main as sample

        sample(rest)
    elif command == "export":
        from gralora_diffusion.export.main import main as export

        export(rest)
    elif command == "import":
        from gralora_diffusion.lora_import.main import main as import_lora

        import_lora(rest)
    elif command == "inspect":
        compute_in_one_thread()
        from gralora_diffusion.inspection.main import main as inspect

        inspect(rest)
    elif command == "benchmark":
        from gralora_diffusion.benchmark.command import main as benchmark

        benchmark(rest)
    elif command == "studio":
        from gralora_diffusion.studio.main import main as studio

        studio(rest)
    elif command == "demo":
        from gralora_diffusion.demo import demo

        demo(rest)
    elif command == "samples":
        from gralora_diffusion.demo import copy_samples

        copy_samples(rest)


if __name__ == "__main__":
    main()
