"""The studio as a web application: Gradio's page and the studio's own addresses, guarded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection

import gradio as gr
from fastapi import FastAPI

from . import live, page, tab_benchmark, tab_compare, tab_runs, tab_share
from .context import Studio
from .engine.jobs import Jobs
from .files import routes
from .first_page import FirstPage
from .guard import MOST_UPLOAD, Guard

#: What the page may ask for while a tab is open.
_LOOKS: dict[str, live.Look] = {
    "runs": tab_runs.look,
    "compare": tab_compare.look,
    "share": tab_share.look,
    "benchmark": tab_benchmark.look,
}
logger = logging.getLogger(__name__)
#: Seconds between looks at the queue.
_LOOK = 1.0


def application(
    studio: Studio,
    token: str,
    *,
    listens: bool = False,
    once: str | None = None,
    names: Collection[str] = (),
) -> Guard:
    """Return the application: every request passes the guard first.

    Args:
        token: what a browser must show; with ``listens``, the password.
        listens: other machines may ask, too.
        once: another token, which is valid once.
        names: of this machine, by which others may ask.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(live.routes(studio, _LOOKS))
    app.include_router(routes(studio.opened, studio.workspace.kept))
    app = gr.mount_gradio_app(
        app,
        page.build(studio),
        path="/",
        allowed_paths=[],
        max_file_size=MOST_UPLOAD,
        ssr_mode=False,
        show_error=False,
        enable_monitoring=False,
        mcp_server=False,
        run_history=False,
        pwa=False,
        footer_links=[],
        theme=page.theme(),
        head=page.HEAD,
    )
    return Guard(FirstPage(app, page.SCRIPT), token, listens, frozenset(names), once)


def start_queue(jobs: Jobs) -> threading.Event:
    """Start what waits in the queue, in a thread, until the returned event is set."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_LOOK):
            try:
                jobs.start_waiting()
            except Exception:  # the disk may be full for a while; the queue goes on afterwards
                logger.exception("the queue could not be read")

    threading.Thread(target=watch, name="queue", daemon=True).start()
    return stop
