"""The tab that generates with adapters: prompts by adapters by strengths, from the same noise."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from gralora_diffusion.io.templates import for_html

from . import live
from .context import Studio, choice, chosen_of, log_of, messages, shown, waits_for
from .engine.added_loras import keep_lora, lora_problem
from .engine.comparing import GRID_NAME, SPEC_NAME, Comparison, cell_name, read, settings_of
from .engine.jobs import COMPARING, Job
from .engine.workspace import free_path, stamp

_GONE = "This comparison is no longer there. Choose another one"


@dataclass
class CompareTab:
    """Components that other tabs fill."""

    adapters: gr.CheckboxGroup
    base: gr.Textbox


def build(studio: Studio) -> CompareTab:
    """Lay out the tab inside the current tabs."""
    with gr.Tab("Compare", id="compare") as tab:
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                adapters = gr.CheckboxGroup([], label="Adapters", elem_id="compare-adapters")
                loras = gr.Dropdown(
                    [],
                    value=[],
                    multiselect=True,
                    allow_custom_value=True,
                    label="LoRA files",
                    info="Exports and added files, or the path or Hub id of one; end it with Enter",
                    elem_id="compare-loras",
                )
                added = gr.UploadButton(
                    "Add a LoRA file",
                    file_types=[".safetensors"],
                    elem_id="compare-add",
                    min_width=120,
                )
                base = gr.Textbox(
                    label="Base", info="Filled in from the adapter's run", elem_id="compare-base"
                )
                with_base = gr.Checkbox(True, label="Also the base alone")
                with gr.Row():
                    blended = gr.Checkbox(
                        label="Also a blend of two adapters", elem_id="compare-blended"
                    )
                    share = gr.Slider(
                        0, 1, 0.5, step=0.05, label="Share of the second", elem_id="compare-share"
                    )
            with gr.Column(scale=3, min_width=320):
                prompts = gr.Textbox(
                    label="Prompts", info="One on each line", lines=3, elem_id="compare-prompts"
                )
                with gr.Row():
                    scales = gr.Textbox("1", label="Strengths", info="Such as 0.5 1")
                    seeds = gr.Textbox("0", label="Seeds", info="Such as 0 1 2")
                    steps = gr.Textbox(
                        "30", label="Steps", info="Of each image", elem_id="compare-steps"
                    )
                with gr.Row():
                    guidance = gr.Textbox("", label="Guidance scale", placeholder="the pipeline's")
                    size = gr.Textbox("", label="Size", placeholder="the pipeline's")
                    tokens = gr.Textbox("", label="Prompt tokens", placeholder="the pipeline's")
                    negative = gr.Textbox("", label="Negative prompt")
        with gr.Row():
            generate = gr.Button(
                "Generate", variant="primary", elem_id="compare-generate", min_width=120
            )
            stop = gr.Button("Stop", elem_id="compare-stop", min_width=80)
            again = gr.Button("Fill in its settings", elem_id="compare-again", min_width=130)
            earlier = gr.Dropdown(
                [], value=None, label="Comparisons", elem_id="compare-earlier", min_width=320
            )
        problems = gr.HTML(js_on_load=None)
        for name in ("compare-result", "compare-kept"):
            gr.HTML(live.part(name), elem_id=name, js_on_load=None)
        place = gr.HTML(js_on_load=None)
        again_button = gr.Button(elem_id="compare-refresh", elem_classes="unseen")
        seen = gr.State({})
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def refresh(chosen: list[str], job_name: str | None, before: dict[str, Any]) -> Any:
        """Return which choices have changed since ``before``, and what the page is to ask for."""
        jobs, (titles, there, exported) = _comparisons(studio), _choices(studio)
        job = chosen_of(jobs, job_name, before.get("gone", False))
        gone = job is None and bool(job_name or before.get("gone"))
        left = [path for path in chosen if path in {path for _, path in there}]
        changes = [
            choice(gr.CheckboxGroup, there, left, chosen, before.get("adapters")),
            choice(gr.Dropdown, titles, job.name if job else None, job_name, before.get("titles")),
            gr.skip() if before.get("loras", []) == exported else gr.Dropdown(choices=exported),
            live.place(
                "compare",
                (titles, there, exported),
                comparison=job.name if job else "",
                gone="1" * gone,
            ),
        ]
        now = {"adapters": there, "titles": titles, "gone": gone, "loras": exported}
        return [*changes, now]

    refreshing = {
        "fn": refresh,
        "inputs": [adapters, earlier, seen],
        "outputs": [adapters, earlier, loras, place, seen],
        **quiet,
    }

    def start(*values: Any) -> Any:
        comparison, found = _read(*values)
        found = [*found, *(comparison.problems() if comparison else [])]
        if found or comparison is None:
            return shown(messages(found)), gr.skip()
        folder = free_path(studio.workspace.comparisons, stamp())
        folder.mkdir(parents=True)
        (folder / SPEC_NAME).write_text(comparison.to_json(), encoding="utf-8")
        line = (*COMPARING, str(folder / SPEC_NAME))
        title = f"{folder.name}: {comparison.prompts[0][:40]}"
        job = studio.jobs.add("compare", title, line, folder, queued=True)
        return "", gr.Dropdown(choices=[(title, job.name)], value=job.name)

    def add(file: str | None, chosen: list[str]) -> Any:
        """Keep an uploaded LoRA, and choose it."""
        if not file:
            return gr.skip()
        if (problem := lora_problem(Path(file))) is not None:
            gr.Warning(str(for_html(problem)))
            return gr.skip()
        try:
            kept = keep_lora(Path(file), studio.workspace.loras)
        except OSError as error:
            gr.Warning(str(for_html(f"The file was not added: {error.strerror or error}")))
            return gr.skip()
        return gr.Dropdown(choices=studio.loras(), value=[*dict.fromkeys([*chosen, str(kept)])])

    def end(job_name: str | None) -> None:
        job = studio.jobs.find(job_name) if job_name else None
        if job is None or not _is_comparison(job):
            gr.Warning(_GONE if job_name else "Choose a comparison first")
        elif job.state not in ("waiting", "running"):
            gr.Warning("The comparison has ended already")
        else:
            job.stop()

    def fill_in(job_name: str | None) -> Any:
        job = studio.jobs.find(job_name) if job_name else None
        if job is not None and job.output is not None and _is_comparison(job):
            try:
                comparison = read(job.output / SPEC_NAME)
                there = [path for _, path in studio.adapters()]
                if gone := [path for path in comparison.adapters if path not in there]:
                    text = f"Left out, because they are no longer there: {', '.join(gone)}"
                    gr.Warning(str(for_html(text)))
                return _texts(comparison, there)
            except (OSError, ValueError) as error:
                gr.Warning(str(for_html(f"The comparison cannot be read: {error}")))
        else:
            gr.Warning(_GONE if job_name else "Choose a comparison first")
        return [gr.skip()] * len(inputs)

    def fill_base(chosen: list[str], present: str) -> Any:
        return base_of(studio, chosen[-1]) if chosen and not present.strip() else gr.skip()

    def name_share(chosen: list[str]) -> Any:
        second = Path(chosen[1]).name if len(chosen) == 2 else "the second"
        return gr.Slider(label=f"Share of {second}")

    gr.on([again_button.click, earlier.input, tab.select], **refreshing)
    added.upload(add, [added, loras], loras, **quiet)
    adapters.input(fill_base, [adapters, base], base, **quiet)
    adapters.change(name_share, adapters, share, **quiet)
    inputs = [
        adapters,
        loras,
        base,
        with_base,
        blended,
        share,
        prompts,
        scales,
        seeds,
        steps,
        guidance,
        size,
        tokens,
        negative,
    ]
    generate.click(start, inputs, [problems, earlier], **quiet).then(**refreshing)
    again.click(fill_in, earlier, inputs, **quiet)
    stop.click(end, earlier, None, **quiet).then(**refreshing)
    return CompareTab(adapters, base)


def look(studio: Studio, query: Mapping[str, str]) -> tuple[dict[str, str], object]:
    """Return what the tab shows of the chosen comparison, and its choices."""
    name = query.get("comparison", "")
    job = next((job for job in _comparisons(studio) if job.name == name), None)
    gone = job is None and bool(name or query.get("gone"))
    result = _result(studio, job) if job else messages([_GONE] * gone, "note")
    texts = {"compare-result": shown(result), "compare-kept": shown(_kept(studio))}
    return texts, _choices(studio)


def _comparisons(studio: Studio) -> list[Job]:
    """Return the comparisons, the newest first."""
    return [job for job in reversed(studio.jobs.list()) if _is_comparison(job)]


def _choices(studio: Studio) -> tuple[list[tuple[str, str]], ...]:
    """Return (label, value) of all comparisons, adapters and exported LoRA files."""
    titles = [(f"{job.title} · {job.state}", job.name) for job in _comparisons(studio)]
    return titles, studio.adapters(), studio.loras()


def _is_comparison(job: Job) -> bool:
    return job.kind == "compare" and job.output is not None


def base_of(studio: Studio, adapter: str) -> str:
    """Return the base that an adapter's run was started with; "" if it does not say so."""
    run = next((run for run in studio.runs() if str(run.folder) == adapter), None)
    return str(run.options.get("pretrained_model_name_or_path", "")) if run else ""


def _read(
    adapters: list[str],
    loras: list[str],
    base: str,
    with_base: bool,
    blended: bool,
    share: float,
    prompts: str,
    scales: str,
    seeds: str,
    steps: str,
    guidance: str,
    size: str,
    tokens: str,
    negative: str,
) -> tuple[Comparison | None, list[str]]:
    """Return the comparison in the fields, or the texts that are no numbers."""
    problems: list[str] = []

    def numbers(label: str, text: str, kind: type, word: str) -> list[Any]:
        """Return the numbers in a text. A comma may be a decimal one: it separates with a space."""
        found = []
        for part in re.split(r"(?:[\s;]|,(?=\s|$))+", text.strip()):
            try:
                if "_" in part:  # Python's own
                    raise ValueError
                found += [kind(part)] if part else []
            except ValueError:
                hint = ". Write a decimal point, and spaces between numbers" * ("," in part)
                problems.append(f"{label} is {part!r}; it must be {word}{hint}")
        return found

    def one(label: str, text: str, kind: type, word: str) -> Any:
        found = numbers(label, text, kind, word)
        if len(found) > 1:
            problems.append(f"{label} is {text.strip()!r}; it must be {word}, not several")
        return found[0] if found else None

    whole, number = "a whole number", "a number"
    comparison = Comparison(
        base=base.strip(),
        prompts=[line.strip() for line in prompts.split("\n") if line.strip()],
        adapters=list(adapters or []),
        loras=[text for lora in loras or () if (text := str(lora).strip())],
        scales=numbers("a strength", scales, float, number),
        blends=[float(share)] if blended else [],
        with_base=bool(with_base),
        seeds=numbers("a seed", seeds, int, whole),
        negative_prompt=negative.strip() or None,
        steps=30 if (given := one("the number of steps", steps, int, whole)) is None else given,
        guidance_scale=one("the guidance scale", guidance, float, number),
        size=one("the size", size, int, whole),
        max_sequence_length=one("the number of tokens of a prompt", tokens, int, whole),
    )
    return (None if problems else comparison), problems


def _texts(comparison: Comparison, there: Collection[str]) -> list[Any]:
    """Return the values of the fields that :func:`_read` reads as this comparison.

    Args:
        there: paths of the adapters that may be chosen. Others are left out.
    """

    def text(value: object) -> str:
        return "" if value is None else f"{value}"

    return [
        [path for path in comparison.adapters if path in there],
        comparison.loras,
        comparison.base,
        comparison.with_base,
        bool(comparison.blends),
        next(iter(comparison.blends), 0.5),
        "\n".join(comparison.prompts),
        " ".join(f"{scale:g}" for scale in comparison.scales),
        " ".join(map(str, comparison.seeds)),
        text(comparison.steps),
        text(comparison.guidance_scale),
        text(comparison.size),
        text(comparison.max_sequence_length),
        text(comparison.negative_prompt),
    ]


def _result(studio: Studio, job: Job) -> Markup:
    """Return the cells that there are so far, as a table with labels."""
    folder = job.output
    if folder is None:
        return messages([f"{job.title} has no folder"])
    try:
        comparison = read(folder / SPEC_NAME)
    except (OSError, ValueError) as error:
        return messages([f"{folder} cannot be read: {error}"])
    if problems := comparison.problems():
        return messages(problems)
    state = job.state
    head = Markup('<p><span class="state {}">{}</span> {}</p>').format(
        state, state, for_html(folder)
    )
    if state == "waiting":
        head += Markup('<p class="facts">{}</p>').format(for_html(waits_for(studio.jobs.list())))
    if state not in ("done",):
        head += log_of(job, 6)
    grid = folder / GRID_NAME
    if grid.is_file():
        head += Markup("<p>{}</p>").format(studio.link(grid, "the grid as one image"))
    titles = Markup("").join(
        Markup("<th>{}<small>seed {}</small></th>").format(for_html(prompt), seed)
        for prompt, seed in comparison.columns
    )
    rows = Markup("").join(
        Markup("<tr><th>{}</th>{}</tr>").format(
            for_html(" ".join(row.label.split())),
            Markup("").join(
                _cell(
                    studio,
                    folder / cell_name(number, column),
                    f"{row.label}, {prompt}, seed {seed}",
                )
                for column, (prompt, seed) in enumerate(comparison.columns)
            ),
        )
        for number, row in enumerate(comparison.rows)
    )
    table = Markup('<div class="wide"><table class="grid"><tr><th></th>{}</tr>{}</table></div>')
    return head + table.format(titles, rows)


def _cell(studio: Studio, path: Path, label: str) -> Markup:
    if not path.is_file():
        return Markup('<td><span class="pending"></span></td>')
    return Markup("<td>{}</td>").format(_picture(studio, path, " ".join(label.split())))


def _picture(studio: Studio, path: Path, label: str) -> Markup:
    settings = settings_of(path)
    # 0 is a value: a seed
    given = {
        name: v for name, v in settings.items() if v is not None and v is not False and v != ""
    }
    named = ", ".join(f"{name}: {value}" for name, value in given.items())
    return studio.picture(path, label, title=named)


def _kept(studio: Studio) -> Markup:
    """Return the images that were kept, the newest first."""
    folder = studio.workspace.kept
    files = sorted(folder.glob("*.png"), reverse=True) if folder.is_dir() else []
    if not files:
        return Markup("")
    head = Markup('<h3>Kept images</h3><p class="facts">{}</p>').format(for_html(folder))
    pictures = Markup("").join(
        Markup("<figure>{}</figure>").format(_picture(studio, file, file.stem)) for file in files
    )
    return head + Markup('<div class="strip" tabindex="0">{}</div>').format(pictures)
