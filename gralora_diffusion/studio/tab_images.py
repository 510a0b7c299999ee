"""The tab for images: a folder, its captions, and how a run will crop it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.io.templates import for_html
from gralora_diffusion.options.path_names import path_problem
from gralora_diffusion.training.data.own_captions import CaptionedImage, list_images

from .context import Studio, messages, shown
from .engine.images import (
    CheckedFolder,
    add_images,
    check_folder,
)
from .engine.workspace import file_name

#: Folders with more images are only decoded when the button is clicked.
_CHECK_AT_ONCE = 60
#: The resolution of crops that are shown if none is given.
_ASSUMED = 512
#: Multiples that any base's sizes are of; a run uses its own base's.
_DIVISOR = 8


@dataclass
class ImagesTab:
    """Components that other tabs read or trigger."""

    use: gr.Button
    folder: gr.Textbox
    prompt: gr.Textbox
    resolution: gr.Textbox
    buckets: gr.Checkbox
    masked: gr.Checkbox
    masks: gr.Textbox
    controls: gr.Textbox


def build(studio: Studio) -> ImagesTab:
    """Lay out the tab inside the current tabs."""
    with gr.Tab("Images", id="images"):
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                folder = gr.Textbox(
                    label="Folder of images",
                    info="A path on this machine. Captions are in text files beside the images",
                    elem_id="images-folder",
                )
                with gr.Row():
                    opened = gr.Button("Open", elem_id="images-open", min_width=80)
                    upload = gr.UploadButton(
                        "Upload images",
                        file_count="multiple",
                        elem_id="images-upload",
                        min_width=120,
                    )
                name = gr.Textbox(label="Name of an uploaded set", value="my-images", max_lines=1)
            with gr.Column(scale=2, min_width=320):
                with gr.Row():
                    resolution = gr.Textbox(
                        label="Resolution", placeholder="the base's", max_lines=1
                    )
                    buckets = gr.Checkbox(label="Aspect-ratio buckets", container=True)
                trigger = gr.Textbox(
                    label="Trigger word", info="Shows which captions contain it", max_lines=1
                )
                prompt = gr.Textbox(
                    label="Prompt for images without a caption",
                    placeholder="a photo of sks dog",
                    max_lines=1,
                )
        with gr.Accordion("Masks and control images", open=False, elem_id="images-more"), gr.Row():
            masked = gr.Checkbox(
                label="Train only where masks are white",
                info="Masks beside the images, such as 1.mask.png for 1.png, or in this folder:",
                elem_id="images-masked",
            )
            masks = gr.Textbox(  # before the accordion is opened, its value is the one given here
                "",
                label="Folder of masks",
                info="Each has the name of its image",
                max_lines=1,
                elem_id="images-masks",
            )
            controls = gr.Textbox(
                "",
                label="Folders of control images",
                info="The images before an edit, under the names of the images; a folder on a line",
                lines=1,
                max_lines=3,
                elem_id="images-controls",
            )
        with gr.Row():
            check = gr.Button("Check as a run does", elem_id="images-check", min_width=160)
            use = gr.Button(
                "Train on these images", variant="primary", elem_id="images-use", min_width=160
            )
        seen = gr.State(())
        summary = gr.HTML(elem_id="images-summary")
        cards = gr.HTML(
            shown(
                Markup('<p class="empty">Open a folder of images, or upload some: five to ten of')
                + Markup(" one subject are enough to begin with.</p>")
            ),
            elem_id="images-cards",
        )

    def show(
        path: str,
        word: str,
        text: str,
        size: str,
        use_buckets: bool,
        use_masks: bool,
        mask_folder: str,
        control_folders: str,
        *,
        force: bool = False,
    ) -> Any:
        if not path.strip():
            return shown(messages(["the folder is missing. Give a path, or upload images"])), ""
        if problem := path_problem(path.strip()):
            return shown(messages([f"the folder is {path.strip()!r:.80}, which {problem}"])), ""
        target = Path(path.strip()).expanduser()
        try:
            count = len(list_images(target)[0])
            studio.opened.open_folder(target)
        except OSError as error:
            return shown(messages([_unreadable(target, error)])), ""
        checked, pixels, wrong = None, _ASSUMED, []
        if size.strip():
            if size.strip().isdecimal() and int(size) > 0 and int(size) % _DIVISOR == 0:
                pixels = int(size)
            else:
                wrong = [
                    f"the resolution is {size!r}; it must be a positive multiple of {_DIVISOR}"
                ]
        if count and (force or count <= _CHECK_AT_ONCE):
            from gralora_diffusion.training.data.masks import MaskPlaces  # imports torch

            own, *others = folders = [_path(mask_folder), *map(_path, control_folders.split("\n"))]
            for known in filter(None, folders):
                studio.opened.open_folder(known)
            checked = check_folder(
                target,
                text.strip() or None,
                pixels,
                use_buckets,
                _DIVISOR,
                masks=MaskPlaces(own) if use_masks or own else None,
                controls=[known for known in others if known],
            )
        try:  # only now: decoding takes long, and a caption may be edited meanwhile
            found, problems = list_images(target)
        except OSError as error:
            return shown(messages([_unreadable(target, error)])), ""
        problems += wrong
        if checked is not None:
            problems += [p for p in checked.problems if p not in problems]
        head = _summary(found, problems, checked, word.strip(), bool(size.strip()))
        return shown(head), shown(_cards(studio, found, checked, word.strip()))

    def add(files: list[str], set_name: str) -> Any:
        target = studio.workspace.images / file_name(set_name, "my-images")
        count, problems = add_images(target, map(Path, files or []))
        for problem in problems:
            gr.Warning(str(for_html(problem)))
        if count:
            gr.Info(f"{count} image{'s' * (count > 1)} added")
        return str(target)

    def show_and_remember(*given: Any) -> Any:
        return (*show(*given), given)

    def show_if_changed(before: tuple[Any, ...], *given: Any) -> Any:
        path, *_ = given
        if not path.strip() or given == tuple(before):
            return [gr.skip()] * 3
        return show_and_remember(*given)

    inputs = [folder, trigger, prompt, resolution, buckets, masked, masks, controls]
    texts = (folder, trigger, prompt, resolution, masks, controls)
    outputs = [summary, cards]
    gr.on(
        [opened.click, *(c.submit for c in texts)],
        show_and_remember,
        inputs,
        [*outputs, seen],
        api_visibility="private",
    )
    gr.on(
        [c.blur for c in texts],
        show_if_changed,
        [seen, *inputs],
        [*outputs, seen],
        api_visibility="private",
    )
    for box in (buckets, masked):
        box.input(show_if_changed, [seen, *inputs], [*outputs, seen], api_visibility="private")
    check.click(lambda *given: show(*given, force=True), inputs, outputs, api_visibility="private")
    upload.upload(add, [upload, name], folder, api_visibility="private").then(
        show_and_remember, inputs, [*outputs, seen], api_visibility="private"
    )
    return ImagesTab(use, folder, prompt, resolution, buckets, masked, masks, controls)


def _path(text: str) -> Path | None:
    return Path(text.strip()).expanduser() if text.strip() else None


def _unreadable(folder: Path, error: OSError) -> str:
    return f"{folder} cannot be read as a folder: {error.strerror or error}"


def _summary(
    found: list[CaptionedImage],
    problems: list[str],
    checked: CheckedFolder | None,
    word: str,
    is_given: bool,
) -> Markup:
    """Return what is known of the folder; the resolution is assumed unless it ``is_given``."""
    captioned = sum(bool(image.caption) for image in found)
    facts = [f"{len(found)} images, {captioned} with a caption of their own"]
    if word:
        having = sum(word.lower() in image.caption.lower() for image in found)
        facts.append(f"{word!r} is in {having} captions")
    if checked is not None and checked.crops:
        sizes = [f"{count} at {w}x{h}" for (h, w), count in checked.buckets]
        assumed = "" if is_given else f" (if the base's resolution is {_ASSUMED})"
        facts.append("trained at: " + ", ".join(sizes) + assumed)
        counts = {"a mask": len(checked.masks), "control images": len(checked.controls)}
        facts += [f"{count} with {what}" for what, count in counts.items() if count]
        enlarged = sum(crop.enlarged for crop in checked.crops.values())
        if enlarged:
            facts.append(f"{enlarged} enlarged, because they are smaller")
    elif found and not problems:
        facts.append("not decoded yet: click “Check as a run does”")
    line = Markup('<p class="facts">{}</p>').format(for_html(" · ".join(facts)))
    notes = checked.warnings if checked else []
    names = {image.path.name for image in found}
    return line + messages(_alike_as_one(problems, names)) + messages(notes, "note")


def _alike_as_one(problems: list[str], names: set[str]) -> list[str]:
    """Return problems of which those that say the same of several images are one."""
    images: dict[str, list[str]] = {}  # what is said -> the images of which it is said
    for problem in problems:
        name, _, rest = problem.partition(" ")
        if name in names:
            images.setdefault(rest, []).append(name)
        else:
            images[problem] = []
    return [f"{first_few(of)} {text}" if of else text for text, of in images.items()]


def _cards(
    studio: Studio, found: list[CaptionedImage], checked: CheckedFolder | None, word: str
) -> Markup:
    cards = [_card(studio, image, checked, word) for image in found]
    return Markup('<div class="cards">{}</div>').format(Markup("").join(cards))


def _card(
    studio: Studio, image: CaptionedImage, checked: CheckedFolder | None, word: str
) -> Markup:
    name = image.path.name
    crop = checked.crops.get(image.path) if checked else None
    address = studio.address(image.path, "thumbnail")
    if address is None:
        return Markup('<div class="card"><p>{} is in another folder</p></div>').format(
            for_html(name)
        )
    known = studio.opened.add(image.path)
    frame, note = Markup(""), Markup("")
    if crop is not None:
        left, top, right, bottom = (100 * value for value in crop.box)
        frame = Markup('<i class="crop" style="{}"></i>').format(
            f"left:{left:.2f}%;top:{top:.2f}%;width:{right - left:.2f}%;height:{bottom - top:.2f}%"
        )
        height, width = crop.bucket
        text = f"{width}x{height}"
        if crop.shown < 0.995:
            text += f", {crop.shown:.0%} shown"
        if crop.enlarged:
            text += ", enlarged"
        note = Markup("<small>{}</small>").format(text)
    missing = " without" if word and word.lower() not in image.caption.lower() else ""
    given = {"name": for_html(name), "id": known, "address": address, "text": image.caption}
    if image.is_editable:
        caption = Markup(
            '<textarea rows="3" data-caption="{id}" aria-label="Caption of {name}">{text}'
            "</textarea>"
        ).format_map(given)
    else:
        caption = Markup("<p>{text} <small>({problem})</small></p>").format_map(
            {**given, "problem": for_html(image.problem)}
        )
    picture = Markup(
        '<div class="frame"><span><img src="{address}" loading="lazy" alt="{name}">'
    ).format_map(given)
    picture += _mask(studio, image.path, checked) + frame + Markup("</span></div>")
    picture += _controls(studio, image.path, checked)
    line = Markup("<figcaption>{} {}<output></output></figcaption>").format(for_html(name), note)
    return Markup('<figure class="card{}">{}{}{}</figure>').format(missing, picture, line, caption)


def _mask(studio: Studio, image: Path, checked: CheckedFolder | None) -> Markup:
    """Return the mask as a shade over what a run leaves out, and nothing for an opacity."""
    path = checked.masks.get(image) if checked else None
    if path is None or path == image or (address := studio.address(path, "thumbnail")) is None:
        return Markup("")
    shade = '<img class="mask" src="{}" loading="lazy" alt="mask {}">'
    return Markup(shade).format(address, for_html(path.name))


def _controls(studio: Studio, image: Path, checked: CheckedFolder | None) -> Markup:
    """Return the control images, in the order in which the base gets them."""
    paths = checked.controls.get(image, []) if checked else []
    if not paths:
        return Markup("")
    pictures = Markup("").join(
        studio.picture(path, f"control image {path.name}", "thumbnail") for path in paths
    )
    return Markup('<div class="controls">{}</div>').format(pictures)
