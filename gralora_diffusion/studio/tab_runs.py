"""The tab for runs: the queue, live curves, validation images, and what can be done with a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr
from markupsafe import Markup

from gralora_diffusion.io.durations import duration
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.templates import for_html

from . import curves, live
from .context import Studio, choice, chosen_of, log_of, messages, shown, waits_for
from .engine.jobs import Job
from .engine.runs import Run, differing_options

#: (name in the metrics, title) of the plots; the loss is also smoothed.
_PLOTS = (
    ("loss", "loss"),
    ("lr", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("samples_per_second", "samples per second"),
    ("peak_memory_gib", "peak memory, GiB"),
)
_GONE = "This run is no longer there. Choose another one"
#: Options whose values differ between any two runs, and say nothing.
_PLACES = ("output_dir",)


@dataclass
class RunsTab:
    """Components that other tabs read or trigger."""

    chosen: gr.Radio
    duplicate: gr.Button
    compare: gr.Button


def build(studio: Studio) -> RunsTab:
    """Lay out the tab inside the current tabs."""
    with gr.Tab("Runs", id="runs") as tab, gr.Row():
        with gr.Column(scale=1, min_width=300):
            chosen = gr.Radio([], label="Runs", elem_id="runs-list", elem_classes="vertical")
            other = gr.Dropdown([("", "")], value="", label="Show beside it", elem_id="runs-other")
            steps = gr.Textbox(
                label="Steps in all, when it is resumed",
                info="A finished run continues with more",
                placeholder="as many as planned",
                max_lines=1,
                elem_id="runs-steps",
            )
        with gr.Column(scale=3, min_width=340):
            gr.HTML(live.part("runs-state"), elem_id="runs-state", js_on_load=None)
            with gr.Row():
                save = gr.Button("Save now", elem_id="runs-save", min_width=80)
                sample = gr.Button("Sample now", elem_id="runs-sample", min_width=80)
                stop = gr.Button("Stop", elem_id="runs-stop", min_width=80)
                resume = gr.Button("Resume", elem_id="runs-resume", min_width=80)
                duplicate = gr.Button("Duplicate with changes", min_width=170)
                compare = gr.Button("Generate with it", elem_id="runs-compare", min_width=120)
            for name in ("runs-plots", "runs-strip", "runs-log"):
                gr.HTML(live.part(name), elem_id=name, js_on_load=None)
            place = gr.HTML(js_on_load=None)
            again = gr.Button(elem_id="runs-refresh", elem_classes="unseen")
            seen = gr.State({})

    def refresh(name: str | None, beside: str | None, before: dict[str, Any]) -> Any:
        """Return which choices have changed since ``before``, and what the page is to ask for."""
        runs = studio.runs()
        labels = _labels(runs)
        run = chosen_of(runs, name, before.get("gone", False))
        gone = run is None and bool(name or before.get("gone"))
        shown_name = run.name if run else None
        others = [("", ""), *((r.name, r.name) for r in runs if r is not run)]
        second = next((r for r in runs if r.name == beside and r is not run), None)
        beside_name = second.name if second else ""
        changes = [
            choice(gr.Radio, labels, shown_name, name, before.get("labels")),
            choice(gr.Dropdown, others, beside_name, beside, before.get("others")),
            live.place("runs", labels, run=shown_name or "", beside=beside_name, gone="1" * gone),
        ]
        return [*changes, {"labels": labels, "others": others, "gone": gone}]

    inputs, outputs = [chosen, other, seen], [chosen, other, place, seen]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    refreshing = {"fn": refresh, "inputs": inputs, "outputs": outputs, **quiet}
    gr.on([again.click, chosen.input, other.input, tab.select], **refreshing)

    def ask(what: str, name: str | None) -> None:
        try:
            if (run := studio.run(name)) is not None:
                run.ask(what)
            else:
                gr.Warning(absent(name))
        except ConfigError as error:
            gr.Warning(str(for_html(error.problems[0])))
        except OSError as error:
            gr.Warning(str(for_html(f"{name} cannot be read: {error.strerror or error}")))

    def resume_run(name: str | None, in_all: str) -> str:
        """Put the run into the queue again; return what the field of the steps then contains."""
        run = studio.run(name)
        if run is None:
            gr.Warning(absent(name))
        elif run.state in ("waiting", "running"):
            gr.Warning("The run is already waiting or running")
        else:
            try:
                line = run.resume_command(in_all)
            except ConfigError as error:
                gr.Warning(str(for_html(error.problems[0])))
                return in_all
            studio.jobs.add("train", run.folder.name, line, run.folder, queued=True)
            return ""
        return in_all

    for button, what in ((save, "save"), (sample, "sample"), (stop, "stop")):
        button.click(partial(ask, what), chosen, **quiet).then(**refreshing)
    resume.click(resume_run, [chosen, steps], steps, **quiet).then(**refreshing)
    return RunsTab(chosen, duplicate, compare)


def look(studio: Studio, query: Mapping[str, str]) -> tuple[dict[str, str], object]:
    """Return what the tab shows of the chosen run, and the labels of all."""
    runs = studio.runs()
    by_name = {run.name: run for run in runs}
    run, second = by_name.get(query.get("run", "")), by_name.get(query.get("beside", ""))
    gone = bool(query.get("gone") or (query.get("run") and run is None))
    both = [found for found in (run, second) if found is not None]
    made = {
        "state": lambda: messages([_GONE], "note") if gone else _state(run, studio.jobs.list()),
        "plots": lambda: _plots(both),
        "strip": lambda: _strips(studio, both),
        "log": lambda: log_of(run.job, 15) if run and run.job else Markup(""),
    }
    texts = {f"runs-{part}": shown(_or_problem(make)) for part, make in made.items()}
    return texts, _labels(runs)


def absent(name: str | None) -> str:
    """Return what is said where a run is needed, and there is none with this name."""
    return _GONE if name else "Choose a run first"


def _labels(runs: Sequence[Run]) -> list[tuple[str, str]]:
    return [(_label(run), run.name) for run in runs]


def _label(run: Run) -> str:
    """Return a run's name and state, and its step once it has ended."""
    try:
        parts = [run.name, state := run.state]
        if state not in ("waiting", "running") and run.rows:
            parts.append(_step(run))
    except OSError as error:  # the other runs are shown all the same
        parts = [run.name, f"cannot be read: {error.strerror or error}"]
    return " · ".join(parts)


def _step(run: Run) -> str:
    return f"step {run.rows[-1]['step']}" + (f" of {run.steps}" if run.steps else "")


def _or_problem(make: Callable[[], Markup]) -> Markup:
    try:
        return make()
    except OSError as error:
        return messages([f"the run cannot be read: {error}"])


def _state(run: Run | None, jobs: Sequence[Job]) -> Markup:
    if run is None:
        return Markup(
            '<p class="empty">There is no run yet. Choose images, then fill in Train. Runs that a'
            " terminal starts in this folder appear here, too.</p>"
        )
    rows, state = run.rows, run.state
    share = min(1.0, rows[-1]["step"] / run.steps) if rows and run.steps else None
    bar = Markup("")
    if share is not None:
        bar = Markup('<progress max="1" value="{}" aria-label="steps"></progress>').format(
            f"{share:.3f}"
        )
    facts = [*([_step(run)] if rows else ()), str(run.folder)]
    if state == "waiting":
        facts.append(waits_for(jobs))
    if state == "running" and not rows:
        facts.append("loading the base and encoding the images")
    if state == "stopped" and not rows:
        facts.append("stopped before its first step: “Duplicate with changes” starts it again")
    status = run.status if state == "running" else None
    if status is not None and status.alive is not False:  # not of an earlier process
        if status.seconds_left is not None:
            facts.append(f"{duration(status.seconds_left)} left")
        facts += [f"{what} is requested" for what in status.pending]
        facts += [f"{a['text']} (step {a['step']})" for a in status.answers.values()]
    if checkpoints := run.checkpoints:
        facts.append(f"checkpoints: {', '.join(map(str, checkpoints))}")
    return Markup('<h3>{} <span class="state {}">{}</span></h3>{}<p class="facts">{}</p>').format(
        for_html(run.name), state, state, bar, for_html(" · ".join(facts))
    )


def _plots(runs: Sequence[Run]) -> Markup:
    made = []
    for name, title in _PLOTS:
        raw = [
            curves.Curve(run.name, curves.numbers_of(run.rows, name), number)
            for number, run in enumerate(runs)
        ]
        raw = [curve for curve in raw if curve.points]
        if name == "loss":
            smooth = [curves.Curve(c.label, curves.smoothed(c.points), c.number) for c in raw]
            made.append(curves.plot("loss, mean over a twentieth", smooth, raw))
        else:
            made.append(curves.plot(title, raw))
    body = Markup('<div class="plots">{}</div>').format(Markup("").join(made))
    if len(runs) < 2:
        return body
    return curves.legend([run.name for run in runs]) + body + _differences(runs)


def _differences(runs: Sequence[Run]) -> Markup:
    found: Mapping[str, list[Any]] = differing_options(runs)
    rows = Markup("").join(
        Markup("<tr><th>{}</th>{}</tr>").format(
            for_html(name),
            Markup("").join(
                Markup("<td>{}</td>").format(for_html(_written(value))) for value in values
            ),
        )
        for name, values in found.items()
        if name not in _PLACES
    )
    if not rows:
        return Markup('<p class="facts">The options of both runs are the same.</p>')
    heads = Markup("").join(Markup("<th>{}</th>").format(for_html(run.name)) for run in runs)
    return Markup('<table class="options"><tr><th>option</th>{}</tr>{}</table>').format(heads, rows)


def _written(value: Any) -> str:
    """Return the value of an option as its field in the form has it, on one line."""
    if value is None:
        return "default"
    return " · ".join(value) if isinstance(value, list) else str(value)


def _strips(studio: Studio, runs: Sequence[Run]) -> Markup:
    """Return the validation images over time, a row for each run."""
    made = []
    for run in runs:
        steps = []
        for step, images in run.validations:
            pictures = Markup("").join(
                studio.picture(image, f"step {step}, image {image.stem}", "thumbnail")
                for image in images
            )
            steps.append(
                Markup("<figure><div>{}</div><figcaption>step {}</figcaption></figure>").format(
                    pictures, step
                )
            )
        if steps:
            name = Markup("<h4>{}</h4>").format(for_html(run.name)) if len(runs) > 1 else ""
            row = Markup('{}<div class="strip" tabindex="0">{}</div>')
            made.append(row.format(name, Markup("").join(steps)))
    return Markup("").join(made)
