"""The tab to share an adapter: exports, what a file is, and what an upload would send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from gralora_diffusion.export.choices import DTYPE_CHOICES, FORMATS, LORA_DTYPE_CHOICES, READERS
from gralora_diffusion.io.regular_files import read_regular
from gralora_diffusion.io.templates import for_html
from gralora_diffusion.options.path_names import path_problem
from gralora_diffusion.training.outputs.published import CARD_NAME, to_be_shown

from . import live
from .context import Studio, begun, choice, follow, log_of, messages, shown
from .engine.jobs import gralora
from .engine.publishing import PublishError, problems_before
from .engine.publishing import publish as send_to_hub
from .engine.workspace import file_name, free_path
from .tab_compare import base_of

#: Bytes of a model card, at most.
_MOST_CARD = 1 << 20
#: Options of `gralora inspect` that may be chosen.
_LOOKS = ("all_layers", "check", "sha256")
#: Option of `gralora export` -> its label, its help, and whether only a LoRA has it.
_MORE = {
    "scale": ("Strength", "Of the adapter; empty: 1", False),
    "rank": ("Rank of a LoRA", "Empty: exact. Less is smaller, and says what it loses", True),
    "title": ("Title", "Written into the file, as are the others", False),
    "author": ("Author", "", False),
    "description": ("Description", "", False),
    "license": ("License", "", False),
    "trigger_phrase": ("Trigger phrase", "", False),
    "tags": ("Tags", "", False),
}
_NO_ADAPTER = "there is no adapter yet. Train one, or wait until it is done"


def build(studio: Studio) -> None:
    """Lay out the tab inside the current tabs."""
    with gr.Tab("Share", id="share") as tab:
        with gr.Row():
            with gr.Column(scale=1, min_width=330):
                gr.HTML("<h3>Export</h3>", js_on_load=None)
                adapter = gr.Dropdown([], value=None, label="Adapter", elem_id="share-adapter")
                form = gr.Radio(
                    [
                        ("LoRA: a small file, for nearly every program", "lora"),
                        ("checkpoint: base and adapter as one file", "checkpoint"),
                        ("diffusers folder: base and adapter", "diffusers"),
                        ("dense update: a large file, for ComfyUI only", "diff"),
                    ],
                    value="lora",
                    label="Format",
                    elem_id="share-format",
                    elem_classes="vertical",
                )
                style = gr.Dropdown(
                    [(f"{style}: {readers}", style) for style, readers in READERS.items()],
                    value="comfyui",
                    label="For",
                    info="Programs name the layers of a LoRA differently",
                    elem_id="share-style",
                )
                base = gr.Textbox(
                    label="Base",
                    info="Needed for a checkpoint, a folder, a check",
                    elem_id="share-base",
                )
                dtype = gr.Dropdown(
                    list(LORA_DTYPE_CHOICES),
                    value="keep",
                    label="Precision",
                    info="keep: as it is. The others are rounded to, and the export says how much",
                    elem_id="share-dtype",
                )
                verify = gr.Checkbox(
                    label="Check it",
                    info="Generate with the attached adapter and with the export, and compare",
                    elem_id="share-verify",
                )
                with gr.Accordion("Strength, rank and texts in the file", open=False):
                    more = [
                        gr.Textbox("", label=label, info=info, max_lines=1, elem_id=f"share-{name}")
                        for name, (label, info, _) in _MORE.items()
                    ]
                export = gr.Button("Export", variant="primary", elem_id="share-export")
                exported = gr.HTML(elem_id="share-exported", js_on_load=None)
            with gr.Column(scale=1, min_width=330):
                gr.HTML("<h3>What is this file?</h3>", js_on_load=None)
                dropped = gr.File(
                    label="Drop a .safetensors file", height=130, elem_id="share-dropped"
                )
                path = gr.Textbox(
                    label="Or the path of a file or folder, or a Hub id", elem_id="share-path"
                )
                looks = gr.CheckboxGroup(
                    [("every layer", "all_layers"), ("NaN", "check"), ("SHA-256", "sha256")],
                    value=[],
                    label="Also",
                    info="NaN: read all tensors of a checkpoint, and look for NaN and infinity",
                    elem_id="share-looks",
                )
                inspect = gr.Button("Inspect", elem_id="share-inspect")
                facts = gr.HTML(elem_id="share-facts", js_on_load=None)
        gr.HTML("<h3>Model card and upload</h3>", js_on_load=None)
        with gr.Row():
            repository = gr.Textbox(
                label="Repository on the Hub",
                info="owner/name; a name alone is below your own account",
                max_lines=1,
                elem_id="share-repository",
            )
            token = gr.Textbox(
                label="Token",
                info="Empty: that of `hf auth login`. It is used once, and kept nowhere",
                type="password",
                max_lines=1,
                elem_id="share-token",
            )
            private = gr.Checkbox(True, label="Private", info="Only you see a new repository")
            publish = gr.Button("Upload these files", elem_id="share-publish", min_width=140)
        published = gr.HTML(elem_id="share-published", js_on_load=None)
        card = gr.HTML(elem_id="share-card", js_on_load=None)
        listed = gr.State([])
        place = gr.HTML(js_on_load=None)
        again = gr.Button(elem_id="share-refresh", elem_classes="unseen")
        seen = gr.State([])
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def refresh(chosen: str | None, before: list[tuple[str, str]]) -> Any:
        choices = studio.adapters()
        paths = [path for _, path in choices]
        value = chosen if chosen in paths else (paths[0] if paths else None)
        return (
            choice(gr.Dropdown, choices, value, chosen, before),
            live.place("share", choices),
            choices,
        )

    def choose(chosen: str | None) -> Any:
        if not chosen:
            return "", "", "", []
        folder = Path(chosen)
        try:
            names = to_be_shown(folder)
            return base_of(studio, chosen), folder.name, shown(_card(folder, names)), names
        except OSError as error:
            text = f"{chosen} cannot be read: {error.strerror or error}"
            return "", "", shown(messages([text])), []

    def send(
        chosen: str | None, names: list[str], where: str, secret: str | None, hidden: bool
    ) -> Any:
        """Yield what is shown of an upload, the list of files, and an empty field of the token."""
        secret = (secret or "").strip() or None
        if chosen not in [path for _, path in studio.adapters()]:
            yield shown(messages([_NO_ADAPTER])), gr.skip(), gr.skip(), ""
            return
        folder = Path(chosen)
        try:
            found = problems_before(folder, names, where.strip(), secret)
            if found:
                now = to_be_shown(folder)
                yield shown(messages(found)), shown(_card(folder, now)), now, ""
                return
            note = f"sending {len(names)} files to {where.strip()} ..."
            text = Markup('<p class="state running">{}</p>').format(for_html(note))
            yield shown(text), gr.skip(), gr.skip(), ""
            address = send_to_hub(folder, names, where.strip(), secret, hidden)
            done = '<p class="state finished">sent: <a href="{0}" target="_blank">{0}</a></p>'
            text = Markup(done).format(for_html(address))
        except PublishError as error:
            text = messages([str(error)])
        except OSError as error:
            text = messages([f"{chosen} cannot be read: {error.strerror or error}"])
        yield shown(text), gr.skip(), gr.skip(), ""

    def run_export(
        chosen: str | None,
        kind: str,
        names: str,
        source: str,
        precision: str,
        checked: bool,
        *texts: str,
    ) -> Any:
        if not chosen:
            yield shown(messages([_NO_ADAPTER]))
            return
        if not source.strip() and (checked or kind in FORMATS):
            yield shown(messages(["the base is missing. Give that of the adapter"]))
            return
        if problem := path_problem(source.strip()):
            yield shown(messages([f"the base is {source.strip()!r:.80}, which {problem}"]))
            return
        suffix = "" if kind == "diffusers" else ".safetensors"
        stem = file_name(f"{Path(chosen).name}-{names if kind == 'lora' else kind}", "export")
        output = free_path(studio.workspace.exports, stem + suffix)
        line = ["export", f"--adapter={chosen}", f"--format={kind}", f"--output={output}"]
        line += [f"--style={names}"] if kind == "lora" else []
        line += [f"--base={source.strip()}"] if source.strip() else []
        line += [f"--dtype={precision}", *(["--verify"] if checked else [])]
        for (name, (_, _, only_lora)), text in zip(_MORE.items(), texts, strict=False):
            if (text := (text or "").replace("\0", "").strip()) and (
                kind == "lora" or not only_lora
            ):
                line.append(f"--{name}={text}")
        yield shown(begun(note := f"writing {output.name} ..."))
        job = studio.jobs.add("export", output.name, gralora(*line), output)
        for state in follow(job, note):
            yield shown(state)
        result = log_of(job)
        if job.state == "done":
            done = Markup('<p class="state finished">{}</p>').format(for_html(output))
            if output.is_file():
                link = studio.link(output, f"Download {output.name}", "file")
                done += Markup("<p>{}</p>").format(link)
            result = done + result
        else:
            result = Markup('<p class="state failed">not exported</p>') + result
        yield shown(result)

    def run_inspect(target: str | None, also: Sequence[str]) -> Any:
        if not target or not (target := target.strip()):
            yield shown(messages(["drop a file, or give the path of one"]))
            return
        if problem := path_problem(target):
            yield shown(messages([f"the path is {target!r:.80}, which {problem}"]))
            return
        yield shown(begun(note := f"reading {Path(target).name} ..."))
        options = [f"--{name}" for name in _LOOKS if name in also]
        job = studio.jobs.add("inspect", "inspect", gralora("inspect", *options, "--", target))
        for state in follow(job, note):
            yield shown(state)
        folder = Path(target).parent
        instead = {"(--all_layers)": "(choose “every layer” above)"}
        if folder.is_relative_to(studio.workspace.uploads):
            instead[f"{folder}/"] = ""
        yield shown(log_of(job, 2000, "table", instead))

    def choose_format(kind: str, precision: str) -> Any:
        choices = LORA_DTYPE_CHOICES if kind == "lora" else DTYPE_CHOICES
        value = precision if precision in choices else "keep"
        return gr.Dropdown(interactive=kind == "lora"), gr.Dropdown(list(choices), value=value)

    def inspect_either(file: str | None, text: str, also: Sequence[str]) -> Any:
        yield from run_inspect(text.strip() or file, also)

    gr.on([again.click, tab.select], refresh, [adapter, seen], [adapter, place, seen], **quiet)
    form.input(choose_format, [form, dtype], [style, dtype], **quiet)
    adapter.change(choose, adapter, [base, repository, card, listed], **quiet)
    publish.click(
        send,
        [adapter, listed, repository, token, private],
        [published, card, listed, token],
        **quiet,
    )
    export.click(run_export, [adapter, form, style, base, dtype, verify, *more], exported, **quiet)
    # what was given last is inspected; the button prefers the path, which can be seen beside it
    dropped.upload(run_inspect, [dropped, looks], facts, **quiet)
    path.submit(run_inspect, [path, looks], facts, **quiet)
    inspect.click(inspect_either, [dropped, path, looks], facts, **quiet)


def look(studio: Studio, query: Mapping[str, str]) -> tuple[dict[str, str], object]:
    """Return the adapters to choose from; nothing else changes by itself."""
    del query
    return {}, studio.adapters()


def _card(folder: Path, names: list[str]) -> Markup:
    """Return the files that an upload would send, and the model card's text."""
    sizes = [(name, (folder / name).stat().st_size) for name in names]
    total = sum(size for _, size in sizes)
    items = Markup("").join(
        Markup("<li>{} <small>{:,} bytes</small></li>").format(for_html(name), size)
        for name, size in sizes
    )
    head = Markup("<p>An upload sends these {} files, and no others, {:.1f} MB:</p>")
    files = head.format(len(sizes), total / 1e6) + Markup("<ul>{}</ul>").format(items)
    try:
        text = read_regular(folder / CARD_NAME, _MOST_CARD).decode("utf-8", "replace")
    except OSError:
        return files
    summary = Markup("<summary>The text of {}</summary>").format(CARD_NAME)
    body = Markup('<pre class="log">{}</pre>').format(for_html(text))
    return files + Markup("<details open>{}{}</details>").format(summary, body)
