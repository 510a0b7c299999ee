"""The tab for the benchmark: start the tiny suite, follow it, read the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from markupsafe import Markup

from gralora_diffusion.io.regular_files import is_regular
from gralora_diffusion.io.templates import for_html

from . import live
from .context import Studio, log_of, shown, waits_for
from .engine.jobs import Job, gralora
from .engine.workspace import free_path

_REPORT = "report/index.html"


def build(studio: Studio) -> None:
    """Lay out the tab inside the current tabs."""
    with gr.Tab("Benchmark", id="benchmark"):
        gr.HTML(
            "<p>The tiny suite trains LoRA and GraLoRA on the bundled subjects and compares them,"
            " without a download. It takes many minutes on a CPU.</p>",
            js_on_load=None,
        )
        with gr.Row():
            start = gr.Button("Start the tiny suite", variant="primary", min_width=160)
            stop = gr.Button("Stop", elem_id="benchmark-stop", min_width=80)
            resume = gr.Button("Resume", elem_id="benchmark-resume", min_width=80)
        gr.HTML(live.part("benchmark-state"), elem_id="benchmark-state", js_on_load=None)
        gr.HTML(live.place("benchmark", None), js_on_load=None)
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def add(folder: Any) -> None:
        line = gralora("benchmark", "--suite=tiny", f"--output_dir={folder}")
        studio.jobs.add("benchmark", folder.name, line, folder, queued=True)

    def begin() -> None:
        job = _latest(studio)
        if job is not None and job.state in ("waiting", "running"):
            gr.Warning("A benchmark is already waiting or running")
        else:
            add(free_path(studio.workspace.benchmarks, "tiny"))

    def go_on() -> None:
        job = _latest(studio)
        if job is None or job.state in ("waiting", "running", "done"):
            gr.Warning("There is no stopped benchmark to resume")
        else:
            add(job.output)

    def end() -> None:
        job = _latest(studio)
        if job is not None and job.state in ("waiting", "running"):
            job.stop()
        else:
            gr.Warning("No benchmark is waiting or running")

    for button, action in ((start, begin), (stop, end), (resume, go_on)):
        button.click(action, **quiet)


def look(studio: Studio, query: Mapping[str, str]) -> tuple[dict[str, str], object]:
    """Return what the tab shows of the latest benchmark."""
    del query
    return {"benchmark-state": shown(_state(studio, _latest(studio)))}, None


def _latest(studio: Studio) -> Job | None:
    jobs = reversed(studio.jobs.list())
    return next((job for job in jobs if job.kind == "benchmark" and job.output), None)


def _state(studio: Studio, job: Job | None) -> Markup:
    if job is None or job.output is None:
        return _reports(studio)
    state = job.state
    head = Markup('<p><span class="state {}">{}</span> {}</p>').format(
        state, state, for_html(job.output)
    )
    if state == "waiting":
        head += Markup('<p class="facts">{}</p>').format(for_html(waits_for(studio.jobs.list())))
    log = log_of(job, 12)
    if state == "running" and not log:
        head += Markup('<p class="facts">loading, which takes a while</p>')
    return head + log + _reports(studio)


def _reports(studio: Studio) -> Markup:
    """Return links to the reports of all benchmarks in the studio's folder, the newest first."""
    folder = studio.workspace.benchmarks
    found = [path for path in folder.glob(f"*/{_REPORT}") if is_regular(path)]
    links = Markup("").join(
        Markup("<li>{}</li>").format(
            studio.link(path, f"Read the report of {path.parts[-3]}", "file")
        )
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    )
    return Markup("<h3>Reports</h3><ul>{}</ul>").format(links) if links else links
