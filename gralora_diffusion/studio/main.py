"""``gralora studio``: the page's options and its server."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import os
import secrets
import shutil
import socket
import sys
import threading
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.file_names import real_path
from gralora_diffusion.io.process import lasting_imports, log_to_terminal, print_safely
from gralora_diffusion.options.command_parser import CommandParser
from gralora_diffusion.options.path_names import file_or_id

from .engine.signatures import STATE, make_key
from .engine.workspace import Workspace

FOLDER = "gralora-studio"
#: Environment variable with the password, so that no list of processes shows it.
PASSWORD = "GRALORA_STUDIO_PASSWORD"
_SHORTEST_PASSWORD = 8
#: Addresses that stand for all of the machine's own.
_ALL = ("0.0.0.0", "::")
#: The first of the ports that are tried, as in Gradio.
_PORT, _PORTS = 7860, 100
_OTHER_NAMES = {
    **dict.fromkeys(("server_port",), "is called --port here"),
    **dict.fromkeys(("host", "server_name"), "is called --listen here"),
    **dict.fromkeys(("password", "auth", "token"), f"is the environment variable {PASSWORD} here"),
    "share": "does not exist here: nothing leaves this machine. See --listen",
    "inbrowser": "is what happens unless you pass --no_browser",
}


def parser() -> CommandParser:
    """Return the command's parser."""
    command = CommandParser(
        prog="gralora studio",
        description="Open a local page to choose images, train, follow runs, compare and export.",
        other_names=_OTHER_NAMES,
    )
    command.add_argument(
        "folder",
        metavar="FOLDER",
        type=file_or_id,
        nargs="?",
        default=FOLDER,
        help="folder of the runs and of everything else that the studio makes (default: "
        f"{FOLDER}); runs that are there already appear, too",
    )
    command.add_argument(
        "--port", type=int, help=f"port of the page (default: the first free one from {_PORT})"
    )
    command.add_argument(
        "--listen",
        metavar="ADDRESS",
        nargs="?",
        const="0.0.0.0",
        help=f"let other machines open the page, too; needs a password in {PASSWORD}",
    )
    command.add_argument("--no_browser", action="store_true", help="do not open a browser")
    return command


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the studio until it is interrupted."""
    command = parser()
    args = command.parse_args(argv, check=_problems)
    if importlib.util.find_spec("gradio") is None:
        command.error("the studio needs Gradio: pip install 'gralora-diffusion[studio]'")
    log_to_terminal()
    folder = Path(args.folder).expanduser()
    # one studio for each folder, because each starts what waits in the queue
    from gralora_diffusion.training.runtime.folder_lock import owned

    try:
        make_key()
    except OSError as error:
        command.error(
            f"the studio signs its jobs with a key of yours, which cannot be used ({error}). Give "
            f"a folder that you can write to in the environment variable {STATE}"
        )
    try:
        with owned(Workspace(folder).state, f"the studio's folder '{folder}'"):
            _serve(args, folder)
    except ConfigError as error:
        command.error(error.problems[0])


def _problems(args: argparse.Namespace) -> Iterator[str]:
    folder = Path(args.folder).expanduser()
    if folder.exists() and not folder.is_dir():
        yield f"FOLDER is '{folder}', which is a file. Give a folder"
    for path in Workspace(folder).own_folders:
        if path.is_symlink():
            yield (
                f"FOLDER has '{path}', which is a link: the studio would delete and start what is "
                "elsewhere. Delete the link, or give another folder"
            )
    if args.port is not None and not 0 < args.port < 65536:
        yield f"--port is {args.port}; it must be from 1 to 65535"
    password = os.environ.get(PASSWORD, "")
    if args.listen is not None and len(password) < _SHORTEST_PASSWORD:
        yield (
            "--listen lets anyone on the network ask for the page, which can read files and start "
            f"processes. Set a password of at least {_SHORTEST_PASSWORD} characters in "
            f"the environment variable {PASSWORD}"
        )


def _serve(args: argparse.Namespace, folder: Path) -> None:
    host = args.listen or "127.0.0.1"
    listening = _listening_socket(host, args.port)
    port = listening.getsockname()[1]
    token = os.environ[PASSWORD] if args.listen else secrets.token_urlsafe(24)
    # other users of this machine see the command line of the browser
    once = None if args.listen else secrets.token_urlsafe(24)
    uploads = Workspace(folder).uploads
    shutil.rmtree(uploads, ignore_errors=True)  # of a studio that was killed
    _keep_to_this_machine(str(real_path(uploads)))
    with lasting_imports():
        import uvicorn

        from .gradio_import import import_gradio

        import_gradio()
        from .context import Studio
        from .guard import address_of, address_with
        from .server import application, start_queue

    studio = Studio.at(folder)
    names = {socket.gethostname().lower(), host.lower()} if args.listen else ()
    app = application(studio, token, listens=args.listen is not None, once=once, names=names)
    stop = start_queue(studio.jobs)
    if args.listen:
        print_safely(
            f"warning: every machine that reaches {host}:{port} can ask for the page. The "
            "password and all that it shows go over the network unencrypted. An SSH tunnel to "
            "a studio without --listen is safer",
            error=True,
        )
        address = address_of(socket.gethostname() if host in _ALL else host, port)
    else:
        address = address_with(token, host, port)
    print_safely(f"gralora studio, with its files in {real_path(folder)}\n{address}")
    print_safely("End it with Ctrl-C. Runs continue, and the next start finds them.")
    sys.stdout.flush()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,  # an open page never ends its requests itself
        )
    )
    logging.getLogger("uvicorn.error").addFilter(_is_unexpected)
    if not args.no_browser:
        threading.Timer(
            1.0, _open_browser, [address_with(once, host, port) if once else address]
        ).start()
    try:
        server.run(sockets=[listening])
    finally:
        stop.set()
        shutil.rmtree(uploads, ignore_errors=True)


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Whether a message is more than that requests of open pages were cancelled at the end."""
    kind = record.exc_info[0] if record.exc_info else None
    cancelled = kind is not None and issubclass(kind, asyncio.CancelledError)
    return not cancelled and "graceful shutdown exceeded" not in record.getMessage()


def _listening_socket(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens at a free port, or at ``port``.

    Raises:
        ConfigError: there is none.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reason = ""
    for number in [port] if port else range(_PORT, _PORT + _PORTS):
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            made.bind((host, number))
            made.listen(128)
            return made
        except (OSError, UnicodeError) as error:
            reason = str(error)
            made.close()
    which = f"--port {port}" if port else f"each port from {_PORT}"
    raise ConfigError([f"{which} of {host} cannot be opened ({reason}). Give another --port"])


def _keep_to_this_machine(uploads: str) -> None:
    """Set what Gradio reads when it is imported: where uploads go, and that it calls nobody."""
    os.environ["GRADIO_TEMP_DIR"] = uploads
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.pop("GRADIO_HISTORY_BUCKET", None)
    os.environ.pop("GRADIO_ROOT_PATH", None)


def _open_browser(address: str) -> None:
    with suppress(webbrowser.Error):
        webbrowser.open(address)


if __name__ == "__main__":
    main()
