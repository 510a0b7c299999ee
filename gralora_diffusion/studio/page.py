"""The page: its tabs, and what leads from one to another."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.templates import for_html

from . import tab_benchmark, tab_compare, tab_images, tab_runs, tab_share, tab_train
from .context import Studio
from .tab_compare import base_of
from .tab_runs import absent
from .tab_train import filled_from, new_output

#: Fonts that every machine has: nothing is fetched.
_FONT = ("system-ui", "sans-serif")
_MONO = ("ui-monospace", "monospace")


def theme() -> gr.themes.Base:
    """Return a calm, dense theme with the machine's own fonts."""
    base = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        spacing_size="sm",
        radius_size="sm",
        text_size="sm",
        font=list(_FONT),
        font_mono=list(_MONO),
    )
    return base.set(
        button_large_text_size="*text_sm",
        button_large_text_weight="500",
        button_large_padding="6px 12px",
        # the theme's own grey is too light for small text
        body_text_color_subdued="*neutral_600",
        block_title_text_color="*neutral_600",
        block_label_text_color="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def build(studio: Studio) -> gr.Blocks:
    """Return the page."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    with gr.Blocks(title="gralora studio", analytics_enabled=False, fill_width=True) as page:
        with gr.Tabs(elem_id="tabs") as tabs:
            images = tab_images.build(studio)
            train = tab_train.build(studio)
            runs = tab_runs.build(studio)
            compare = tab_compare.build(studio)
            tab_share.build(studio)
            tab_benchmark.build(studio)

        def use_images(
            folder: str,
            prompt: str,
            resolution: str,
            buckets: bool,
            masked: bool,
            masks: str,
            controls: str,
        ) -> Any:
            return (
                folder,
                prompt or gr.skip(),
                resolution.strip() or gr.skip(),
                buckets,
                masked or bool(masks.strip()),
                masks.strip(),
                controls.strip(),
                gr.Tabs(selected="train"),
            )

        data = (
            *("instance_data_dir", "instance_prompt", "resolution", "use_aspect_ratio_buckets"),
            *("masked_loss", "mask_data_dir", "control_data_dir"),
        )
        images.use.click(
            use_images,
            [
                *(images.folder, images.prompt, images.resolution, images.buckets),
                *(images.masked, images.masks, images.controls),
            ],
            [*(train.fields[name] for name in data), tabs],
            **quiet,
        ).then(**train.checking)

        def start(*values: Any) -> Any:
            *checked, folder = train.run(*values)
            name = next((run.name for run in studio.runs() if run.folder == folder), None)
            if name is None:
                return (*checked, gr.skip(), gr.skip())
            return (
                *checked,
                gr.Radio(choices=[(name, name)], value=name),
                gr.Tabs(selected="runs"),
            )

        train.start.click(start, train.inputs, [*train.checked, runs.chosen, tabs], **quiet).then(
            None, js="() => studio.toProblem()"
        )

        def duplicate(name: str | None) -> Any:
            run = studio.run(name)
            try:
                if run is not None:
                    return [*filled_from(studio, run), gr.Tabs(selected="train")]
                gr.Warning(absent(name))
            except ConfigError as error:
                text = for_html(f"The options of this run cannot be read: {error}")
                gr.Warning(str(text))
            return [gr.skip()] * (len(train.inputs) + 1)

        runs.duplicate.click(duplicate, runs.chosen, [*train.inputs, tabs], **quiet).then(
            **train.checking
        )

        def generate_with(name: str | None) -> Any:
            run = studio.run(name)
            if run is None or run.adapter is None:
                gr.Warning("The run has no finished adapter yet" if run else absent(name))
                return [gr.skip()] * 3
            path = str(run.folder)
            chosen = gr.CheckboxGroup(choices=studio.adapters(), value=[path])
            return chosen, base_of(studio, path), gr.Tabs(selected="compare")

        runs.compare.click(
            generate_with, runs.chosen, [compare.adapters, compare.base, tabs], **quiet
        )
        output = train.fields["output_dir"]
        page.load(partial(new_output, studio), None, output, **quiet).then(**train.checking)
    # what one page waits for must not keep another one waiting
    page.queue(default_concurrency_limit=8, api_open=False)
    return page


#: Runs before Gradio's own scripts.
SCRIPT = '<script src="/studio/page.js"></script>'
#: The style is linked after Gradio's, which would change the selectors of one that it is given.
HEAD = '<link rel="stylesheet" href="/studio/style.css">'
