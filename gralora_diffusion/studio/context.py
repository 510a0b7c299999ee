"""What all tabs share: the studio's folder, its jobs, the files that it may show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from markupsafe import Markup

from gralora_diffusion.io.file_names import real_path
from gralora_diffusion.io.regular_files import is_regular
from gralora_diffusion.io.templates import for_html

from .engine.jobs import Job, Jobs
from .engine.opened import OpenedFiles
from .engine.runs import Run, find_runs
from .engine.workspace import Workspace

#: Kind of a job of the queue -> what users call it.
_NOUNS = {"train": "run", "compare": "comparison"}
_Named = TypeVar("_Named", Run, Job)


@dataclass
class Studio:
    """The studio behind all pages."""

    workspace: Workspace
    jobs: Jobs
    opened: OpenedFiles = field(default_factory=OpenedFiles)

    @classmethod
    def at(cls, folder: Path) -> Studio:
        """Return the studio of a folder, whose files may be shown."""
        workspace = Workspace(real_path(folder))
        studio = cls(workspace, Jobs(workspace.jobs))
        studio.opened.open_folder(workspace.folder)
        return studio

    def runs(self) -> list[Run]:
        """Return all runs, the newest first; files of those that were started here are shown."""
        runs = find_runs(self.workspace.folder, self.jobs.list())
        for run in runs:
            if run.job is not None and run.job.own:  # its folder may be anywhere
                self.opened.open_folder(run.folder)
        return runs

    def run(self, name: str | None) -> Run | None:
        """Return the run with this name."""
        return next((run for run in self.runs() if run.name == name), None)

    def adapters(self) -> list[tuple[str, str]]:
        """Return (name, path) of the finished adapters of all runs."""
        found = []
        for run in self.runs():
            with suppress(OSError):  # the tab of runs says which cannot be read
                if run.adapter is not None:
                    found.append((run.name, str(run.folder)))
        return found

    def loras(self) -> list[tuple[str, str]]:
        """Return (name, path) of the LoRA files that were exported or added here, newest first."""
        files = [
            job.output
            for job in reversed(self.jobs.list())
            if job.kind == "export" and job.output and "--format=lora" in job.command
        ]
        folder = self.workspace.loras
        added = list(folder.glob("*.safetensors")) if folder.is_dir() else []
        files += sorted(added, key=lambda file: file.name)
        return [(file.name, str(file)) for file in dict.fromkeys(files) if is_regular(file)]

    def address(self, file: Path, kind: str = "view") -> str | None:
        """Return the address of a file: its "view", "thumbnail", or the "file" itself.

        None if it is not shown, because it is in no opened folder.
        """
        try:
            changed = file.stat().st_mtime_ns
        except OSError:
            changed = 0
        try:
            return f"/studio/{kind}/{self.opened.add(file)}?v={changed}"
        except OSError:
            return None

    def link(self, file: Path, text: str, kind: str = "view") -> Markup:
        """Return a link to a file, or its name if it is not shown."""
        address = self.address(file, kind)
        if address is None:
            return Markup("{} is not shown: it is in another folder").format(for_html(file.name))
        target = "" if kind == "file" and file.suffix != ".html" else Markup(' target="_blank"')
        return Markup('<a href="{}"{}>{}</a>').format(address, target, for_html(text))

    def picture(self, file: Path, alt: str, kind: str = "view", title: str = "") -> Markup:
        """Return an image that leads to itself in its own size, or its name if it is not shown."""
        view, source = self.address(file), self.address(file, kind)
        if view is None or source is None:
            return Markup("<small>{} is in another folder</small>").format(for_html(file.name))
        saved = Markup("")
        if file.suffix == ".png":  # is sent as it is, with the settings in it
            saved = Markup(' data-save="{}"').format(self.address(file, "file"))
        image = '<a class="picture" href="{}" target="_blank"{}>'
        image += '<img src="{}" loading="lazy" alt="{}" title="{}"></a>'
        return Markup(image).format(view, saved, source, for_html(alt), for_html(title))


def chosen_of(items: Sequence[_Named], name: str | None, was_chosen: bool) -> _Named | None:
    """Return the chosen item, or the first one if none was ever chosen.

    Another is never chosen in place of one that is gone: a click that was meant for that one would
    reach this one.

    Args:
        was_chosen: an item was chosen before, and is gone.
    """
    if name or was_chosen:
        return next((item for item in items if item.name == name), None)
    return items[0] if items else None


def choice(component: type, choices: list[Any], value: Any, given: Any, before: Any) -> Any:
    """Return the update of a component with choices; none if there is nothing new.

    The value is left alone unless it must change, for the user may choose another meanwhile.

    Args:
        value: what should be chosen.
        given: what the page said was chosen.
        before: the choices that the page has.
    """
    if value != given:
        return component(choices=choices, value=value)
    return gr.skip() if choices == before else component(choices=choices)


def waits_for(jobs: Sequence[Job]) -> str:
    """Return what a waiting job waits for: the job of the queue that is running."""
    running = next((job for job in jobs if job.queued and job.state == "running"), None)
    if running is None:
        return "starts in a moment"
    return f"starts when the {_NOUNS.get(running.kind, running.kind)} {running.title} has ended"


def log_of(
    job: Job, lines: int = 40, kind: str = "", instead: Mapping[str, str] | None = None
) -> Markup:
    """Return the end of a job's output as it is, except for ``instead``; a "table" is not wrapped.

    Args:
        instead: text that means nothing to somebody who clicks -> what stands there instead.
    """
    text = job.log()
    for theirs, ours in (instead or {}).items():
        text = text.replace(theirs, ours)
    text = "\n".join(text.rstrip().split("\n")[-lines:])
    block = Markup('<pre class="log {}" tabindex="0">{}</pre>')
    return block.format(kind, for_html(text)) if text else Markup("")


def messages(texts: list[str], kind: str = "problem") -> Markup:
    """Return texts as a list of problems or of notes."""
    if not texts:
        return Markup("")
    items = Markup("").join(Markup("<li>{}</li>").format(for_html(text)) for text in texts)
    return Markup('<ul class="messages {}" role="status">{}</ul>').format(kind, items)


def shown(markup: Markup | str) -> str:
    """Return HTML as the value of ``gr.HTML``, which takes no subclass of ``str``."""
    return str(markup)


def begun(note: str) -> Markup:
    """Return a note on what has just begun, which is shown before its process has started."""
    return Markup('<p class="state running">{}</p>').format(for_html(note))


def follow(job: Job, note: str) -> Iterator[Markup]:
    """Yield the state of a job until it has ended: a note, and the end of its output."""
    while job.wait(0.7) in ("running", "waiting"):
        yield begun(note) + log_of(job)
    yield Markup("")
