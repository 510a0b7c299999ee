"""The tab for a new run: a form of all options, the plan, and what it would write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import gradio as gr
from markupsafe import Markup

from gralora_diffusion.io.bundled import config_names
from gralora_diffusion.io.templates import for_html

from .context import Studio, follow, log_of, messages, shown
from .engine.defaults import base_defaults, decided_by_base
from .engine.form import (
    BASIC,
    Checked,
    Field,
    all_fields,
    check,
    described,
    fitted,
    from_file,
    groups,
    without_fit,
)
from .engine.jobs import Job, gralora
from .engine.runs import JOB_CONFIG, Run
from .engine.workspace import free_path

_NO_PLAN = "The plan needs options without problems"
#: Memory of usual cards, in GiB.
_CARDS = (8, 12, 16, 24)
#: What is the user's own: a preset leaves these options as they are once they are filled in.
_OWN = ("instance_data_dir", "instance_prompt", "output_dir", "validation_prompt")


@dataclass
class TrainTab:
    """Components that other tabs read or fill.

    Attributes:
        fields: option -> its component.
        inputs: the same in the form's order.
        checked: the components that a check changes.
        checking: arguments of an event that checks the form.
        start: starts ``run``, which returns ``checked`` and the folder of the run; None if it did
            not start.
    """

    fields: dict[str, Any]
    inputs: list[Any]
    checked: list[Any]
    checking: dict[str, Any]
    start: gr.Button
    run: Callable[..., Any]


def build(studio: Studio) -> TrainTab:
    """Lay out the tab inside the current tabs."""
    with gr.Tab("Train", id="train"), gr.Row():
        with gr.Column(scale=3, min_width=340):
            with gr.Row():
                preset = gr.Dropdown(
                    [("", ""), *((_title(name), name) for name in _presets())],
                    value="",
                    label="Preset",
                    info="Bundled options, by family of the base; tiny_robot needs no download",
                    elem_id="train-preset",
                )
                extent = gr.Radio(
                    ["basic", "all"], value="basic", label="Options shown", elem_id="train-extent"
                )
            gr.HTML(
                '<input type="search" id="train-search" placeholder="Search all options"'
                ' aria-label="Search all options">',
                js_on_load=None,
            )
            fields: dict[str, Any] = {}
            for group in groups():
                basic = any(f.name in BASIC for f in group.fields)
                with gr.Column(elem_classes=["group", *(["basic"] if basic else [])]):
                    gr.HTML(shown(Markup("<h3>{}</h3>").format(group.title)), js_on_load=None)
                    for f in group.fields:
                        fields[f.name] = _component(f)
        with gr.Column(scale=2, min_width=320, elem_id="train-side"):
            with gr.Row(elem_id="train-actions"):
                start = gr.Button("Start", variant="primary", elem_id="train-start", min_width=90)
                plan = gr.Button("Plan", elem_id="train-plan", min_width=90)
            card = gr.Radio(
                [(f"{size} GB", size) for size in _CARDS],
                label="Fit the options into a GPU of",
                info="Plans the run, and changes what saves the memory that is missing",
                elem_id="train-card",
            )
            problems = gr.HTML(elem_id="train-problems", js_on_load=None)
            planned = gr.HTML(elem_id="train-planned", js_on_load=None)
            yaml = gr.Code(label="The file of options", language=None, interactive=False, lines=4)
            command = gr.Code(
                label="The same as a command",
                language=None,
                interactive=False,
                lines=2,
                wrap_lines=True,
            )

        undo = gr.State({})
        defaults = gr.State({})
    names, inputs = list(fields), list(fields.values())
    checked = [problems, yaml, command]
    described_fields = [fields[name] for name in decided_by_base()]

    def as_texts(values: tuple[Any, ...]) -> dict[str, str | bool]:
        return {name: "" if v is None else v for name, v in zip(names, values, strict=True)}

    def read(values: tuple[Any, ...]) -> Checked:
        return check(as_texts(values))

    def show(*given: Any) -> Any:
        *values, before = given
        found = read(tuple(values))
        now = base_defaults(found.config)
        changes = [
            gr.skip() if now.get(name) == before.get(name) else _with_default(name, now.get(name))
            for name in decided_by_base()
        ]
        return (*_shown_check(found), *changes, now)

    def run(*values: Any) -> Any:
        found = read(values)
        output = Path(found.config.output_dir).absolute()
        blocked = [
            (None, f"{job.title} is waiting or running with this --output_dir. Give another one")
            for job in studio.jobs.list()
            if job.output == output and job.state in ("waiting", "running")
        ]
        if found.problems or blocked:
            gr.Warning("The run has not started: see the problems")
            more = Checked(found.config, (*found.problems, *blocked), found.warnings)
            return (*_shown_check(more), None)
        line = gralora("train", "--config", f"{{folder}}/{JOB_CONFIG}")
        studio.jobs.add(
            "train", output.name, line, output, queued=True, files={JOB_CONFIG: found.yaml}
        )
        return (*_shown_check(found), output)

    def add_plan(found: Checked, *options: str) -> Job:
        line = gralora("train", "--config", f"{{folder}}/{JOB_CONFIG}", "--dry_run", *options)
        return studio.jobs.add("plan", "plan", line, files={JOB_CONFIG: found.yaml})

    def make_plan(*values: Any) -> Any:
        found = read(values)
        if found.problems:
            yield shown(messages([_NO_PLAN]))
            return
        job = add_plan(found)
        for state in follow(job, "planning the run, without loading weights ..."):
            yield shown(state)
        yield shown(log_of(job, 80, "table"))

    def fit(size: int | None, undo: dict[str, Any], *values: Any) -> Any:
        """Fill in what makes the run fit. What an earlier search filled in is taken back first."""
        given = as_texts(values)
        start = without_fit(given, undo)
        checked_form = check(start)
        nothing = [gr.skip()] * (len(names) + 1)
        if size is None or checked_form.problems:
            yield [shown(messages([_NO_PLAN])), None, *nothing]
            return
        job = add_plan(checked_form, f"--device_memory={size}GiB")
        for state in follow(job, f"looking for options that fit into {size} GB ..."):
            yield [shown(state), size, *nothing]
        log = log_of(job, 80, "table")
        found = fitted(start, job.log())
        if found is None:
            head = messages([f"The form is as before: nothing makes the run fit into {size} GB"])
            yield [shown(head * (job.state == "done") + log), None, *nothing]
            return
        head = Markup('<p class="state finished">fits into {} GB</p>').format(size)
        head += messages([found.said.replace(", give ", ", the form now has ")], "note")
        new = start | found.values
        updates = [gr.skip() if new[n] == given[n] else new[n] for n in names]
        yield [shown(head + log), None, found.undo, *updates]

    def load(name: str, *values: Any) -> Any:
        if not name:
            return [gr.skip()] * len(names)
        current = dict(zip(names, values, strict=True))
        kept = {n: current[n] for n in _OWN if current[n]}
        return list((from_file(name) | kept).values())

    events = [c.input if isinstance(c, (gr.Checkbox, gr.Dropdown)) else c.blur for c in inputs] + [
        c.submit for c in inputs if isinstance(c, gr.Textbox)
    ]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    checking = {
        "fn": show,
        "inputs": [*inputs, defaults],
        "outputs": [*checked, *described_fields, defaults],
        **quiet,
    }
    gr.on(events, trigger_mode="always_last", **checking)
    preset.input(load, [preset, *inputs], inputs, **quiet).then(**checking)
    plan.click(make_plan, inputs, planned, concurrency_limit=2, **quiet)
    card.input(
        fit,
        [card, undo, *inputs],
        [planned, card, undo, *inputs],
        concurrency_limit=2,
        **quiet,
    ).then(**checking)
    extent.input(None, extent, None, js="(extent) => studio.setExtent(extent)")
    return TrainTab(fields, inputs, checked, checking, start, run)


def new_output(studio: Studio) -> str:
    """Return a folder for the output of a new run."""
    return str(free_path(studio.workspace.runs, "my-adapter"))


def filled_from(studio: Studio, run: Run) -> list[Any]:
    """Return the values of the form for another run with the options of ``run``.

    Raises:
        ConfigError: its file of options cannot be read.
    """
    values = from_file(run.config)
    values["output_dir"] = str(free_path(run.folder.parent, run.folder.name))
    return [values[f.name] for f in all_fields()]


def _presets() -> list[str]:
    return config_names()


def _title(name: str) -> str:
    return f"{name}: {shorten(described(name), 70, placeholder=' ...')}"


def _component(f: Field) -> Any:
    """Return the component of an option; its id lets problems be shown beside it."""
    given: dict[str, Any] = {
        "label": f.name,
        "info": f.help,
        "elem_id": f"opt-{f.name}",
        "elem_classes": ["opt", *(["basic"] if f.name in BASIC else [])],
    }
    if f.kind == "switch":
        return gr.Checkbox(value=bool(f.default), **given)
    if f.kind == "choice":
        return gr.Dropdown(_choices(f, f.if_empty), value=f.default, **given)
    if f.kind == "lines":
        given["info"] += ". One on each line"
    lines, most = (2, 4) if f.kind == "lines" else (1, 1)
    given["placeholder"] = _if_empty(f.if_empty)
    return gr.Textbox(value=str(f.default), lines=lines, max_lines=most, **given)


def _choices(f: Field, default: str) -> list[tuple[str, str]]:
    empty = [] if f.default else [(_if_empty(default) or "none", "")]
    return [*empty, *((c, c) for c in f.choices)]


def _if_empty(default: str) -> str:
    return f"default: {default}" if default else ""


def _with_default(name: str, known: str | None) -> Any:
    """Return the update of an option's component that shows the value for an empty field.

    Args:
        known: the value; None if it is not known, so that the help's words are shown.
    """
    f = next(f for f in all_fields() if f.name == name)
    if f.kind == "choice":
        return gr.Dropdown(choices=_choices(f, known or f.if_empty))
    return gr.Textbox(placeholder=_if_empty(known or f.if_empty))


def _shown_check(found: Checked) -> tuple[Any, ...]:
    """Return problems, YAML and command of a checked form."""
    items = Markup("").join(
        Markup('<li data-option="{}">{}</li>').format(option or "", for_html(text))
        for option, text in found.problems
    )
    if found.problems:
        count = len(found.problems)
        head = f"{count} problem{'s' * (count > 1)}"
        list_ = Markup('<p class="state failed">{}</p><ul class="messages problem">{}</ul>')
        return shown(list_.format(head, items)), found.yaml, "# not before the problems are solved"
    ready = Markup('<p class="state finished">ready to start</p>')
    return shown(ready + messages(list(found.warnings), "note")), found.yaml, found.command
