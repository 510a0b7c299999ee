"""What all tabs share: the studio's folder, its jobs, the files that it may show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from gralora_diffusion.io.templates import for_html

from .engine.jobs import Job, Jobs
from .engine.opened import OpenedFiles
from .engine.runs import Run, find_runs
from .engine.workspace import Workspace

#: How often a page asks for news, in seconds.
INTERVAL = 2.0


@dataclass
class Studio:
    """The studio behind all pages."""

    workspace: Workspace
    jobs: Jobs
    opened: OpenedFiles = field(default_factory=OpenedFiles)

    @classmethod
    def at(cls, folder: Path) -> Studio:
        """Return the studio of a folder, whose files may be shown."""
        workspace = Workspace(folder.resolve())
        studio = cls(workspace, Jobs(workspace.jobs))
        studio.opened.open_folder(workspace.folder)
        return studio

    def runs(self) -> list[Run]:
        """Return all runs, the newest first; files of those that were started here are shown."""
        runs = find_runs(self.workspace.folder, self.jobs.list())
        for run in runs:
            if run.job is not None:  # its folder may be anywhere
                self.opened.open_folder(run.folder)
        return runs

    def run(self, name: str | None) -> Run | None:
        """Return the run with this name."""
        return next((run for run in self.runs() if run.name == name), None)

    def adapters(self) -> list[tuple[str, str]]:
        """Return (name, path) of the finished adapters of all runs."""
        return [(run.name, str(run.folder)) for run in self.runs() if run.adapter is not None]

    def address(self, file: Path, kind: str = "view") -> str:
        """Return the address of a file: its "view", "thumbnail", or the "file" itself."""
        changed = file.stat().st_mtime_ns if file.exists() else 0
        return f"/studio/{kind}/{self.opened.add(file)}?v={changed}"


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


def log_of(job: Job, lines: int = 40, kind: str = "") -> Markup:
    """Return the end of a job's output as it is; a "plan" is a table, which is not wrapped."""
    text = "\n".join(job.log().rstrip().split("\n")[-lines:])
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


def follow(job: Job, note: str) -> Iterator[Markup]:
    """Yield the state of a job until it has ended: a note, and the end of its output."""
    while job.wait(0.7) in ("running", "waiting"):
        yield Markup('<p class="state running">{}</p>').format(note) + log_of(job)
    yield Markup("")
