"""What a run is asked to do while it runs, and what it says about itself meanwhile.

A request is an empty file in the run's output folder and the status a small JSON file, so that both
work on every system and over a network share. Whether the run is alive is known by the lock on its
folder, not by what the status says.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gralora_diffusion.adapters.placement.layer_config import is_finite_number, is_integer
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.json_files import read_object
from gralora_diffusion.io.regular_files import is_regular
from gralora_diffusion.io.stop_signals import StopSignals
from gralora_diffusion.io.tensor_files import replacing

from .folder_lock import CONFIG_NAME, is_owned, owner_facts, owner_name

logger = logging.getLogger(__name__)

#: What a run can be asked for.
REQUESTS = {
    "save": "write a checkpoint after the current step",
    "sample": "generate the validation images after the current step",
    "stop": "finish the current step, write a checkpoint and the adapter, and end",
}
#: States of a run; "ended" is one that was killed, interrupted or failed.
STATES = ("preparing", "training", "saving", "finished", "stopped", "ended")
_STATUS_NAME, _REQUEST_PREFIX = ".gralora.status", ".gralora.request-"
#: More bytes than a status has.
_MOST_BYTES = 10_000
#: Seconds between looks for requests, and between two writings of the status.
_LOOK_SECONDS, _STATUS_SECONDS = 0.2, 1.0


# -- for others ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What is known about the run in a folder.

    Attributes:
        state: one of ``STATES``.
        alive: whether its process lives; None if the folder's file system has no locks.
        owner: the process, for people; None unless it may be alive.
        step: optimizer steps done, of ``steps``; None before the first.
        loss: of the last step; None if it overflowed.
        seconds_left: expected until the last step.
        updated: when the run last said something, in seconds since 1970 by its machine's clock.
        pending: requests that the run has not taken up yet.
        answers: request -> its number, counted from 1, the step, and what was done.
    """

    state: str
    alive: bool | None
    owner: str | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    seconds_left: float | None = None
    updated: float | None = None
    pending: tuple[str, ...] = ()
    answers: Mapping[str, Mapping[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON has them."""
        return asdict(self)


def request(folder: Path, what: str) -> None:
    """Ask the run in ``folder`` for one of ``REQUESTS``; return at once.

    ``read_status(folder).answers`` tells later what was done. Asking again before that changes
    nothing.

    Raises:
        ConfigError: there is no run in the folder, its process has ended, or the folder cannot be
            written to.
    """
    if what not in REQUESTS:
        raise ConfigError([f"{what!r} is not a request; it must be one of {', '.join(REQUESTS)}"])
    status = read_status(folder)
    if status.alive is False:
        raise ConfigError([f"no run is alive in {folder}: {_past(status)}. Nothing was requested"])
    path = _request_path(folder, what)
    try:
        open(path, "x").close()  # a link to nothing is not followed
    except FileExistsError as error:
        if os.path.lexists(path) and not is_regular(path):
            raise ConfigError([f"{path} is in the way. Delete it"]) from error
    except OSError as error:
        raise ConfigError([f"{folder} cannot be written to ({error})"]) from error


def read_status(folder: Path) -> RunStatus:
    """Return what is known about the run in ``folder``.

    Raises:
        ConfigError: there is no run in the folder, or its status cannot be read.
    """
    alive = is_owned(folder)
    said = _read_status(folder)
    if said is None and not alive and not (folder / CONFIG_NAME).exists():
        raise ConfigError([f"there is no run in {folder}. Give the --output_dir of a training"])
    if alive and said is not None and not _is_of_owner(folder, said):
        said = None  # of an earlier run
    if said is None:
        state = "ended" if alive is False else "preparing"
        said = {}
    else:
        state = said["state"] if said.get("state") in STATES else "ended"
        if alive is False and state not in ("finished", "stopped"):
            state = "ended"
    return RunStatus(
        state=state,
        alive=alive,
        owner=None if alive is False else owner_name(folder),
        step=_integer(said.get("step")),
        steps=_integer(said.get("steps")),
        loss=_number(said.get("loss")),
        seconds_left=_number(said.get("seconds_left")),
        updated=_number(said.get("updated")),
        pending=tuple(what for what in REQUESTS if _is_requested(folder, what)),
        answers=_answers(said.get("answers")),
    )


def _past(status: RunStatus) -> str:
    where = f" at step {status.step} of {status.steps}" if status.step is not None else ""
    verb = {"finished": "it finished", "stopped": "it was stopped"}
    return f"{verb.get(status.state, 'it ended')}{where}"


def _request_path(folder: Path, what: str) -> Path:
    return folder / f"{_REQUEST_PREFIX}{what}"


def _is_requested(folder: Path, what: str) -> bool:
    """Whether there is a request; only what :meth:`RunControl.take` can remove is one."""
    return is_regular(_request_path(folder, what))


def _read_status(folder: Path) -> dict[str, Any] | None:
    path = folder / _STATUS_NAME
    try:
        return read_object(path, _MOST_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path} cannot be read: {error}"]) from error


def _is_of_owner(folder: Path, said: Mapping[str, Any]) -> bool:
    facts = owner_facts(folder)
    return facts is not None and [said.get("pid"), said.get("host")] == list(facts[:2])


def _integer(value: Any) -> int | None:
    return int(value) if is_integer(value) and 0 <= value < 2**53 else None


def _number(value: Any) -> float | None:
    return float(value) if is_finite_number(value) else None


def _answers(said: Any) -> dict[str, dict[str, Any]]:
    """Return the answers in a status that have the right form."""
    found = {}
    for what in REQUESTS:
        answer = said.get(what) if isinstance(said, dict) else None
        if not isinstance(answer, dict):
            continue
        number, step = _integer(answer.get("number")), _integer(answer.get("step"))
        if number is not None and step is not None:
            found[what] = {"number": number, "step": step, "text": str(answer.get("text", ""))}
    return found


# -- for the run -----------------------------------------------------------------------------------


class RunControl:
    """The run's side: hears requests in its folder and by signals, and writes its status.

    Only one process of a run reads and writes the folder; each hears signals. A status that cannot
    be written is left out, because no run should end because of it.

    Args:
        folder: output folder, in the process that reads and writes it; None in others.
        signals: signals that ask the process to stop, if it listens to them.
    """

    def __init__(self, folder: Path | None = None, signals: StopSignals | None = None) -> None:
        self.folder, self.signals = folder, signals
        self._looked = self._written = -_STATUS_SECONDS
        self._found = False
        self._facts: dict[str, Any] = {"pid": os.getpid(), "answers": {}}
        self._begun: tuple[int, float] = (0, 0.0)

    def discard_requests(self) -> None:
        """Remove requests to an earlier run in the folder."""
        if self.folder is not None:
            for what in REQUESTS:
                with suppress(OSError):
                    _request_path(self.folder, what).unlink()

    def begin(self, step: int, steps: int) -> None:
        """Say that the steps begin after ``step``, and put signals off until a step is done."""
        if self.signals is not None:
            self.signals.put_off(
                "stopping after this step: a checkpoint and the adapter will be written. The next "
                "signal ends the run at once, and what was not saved is lost."
                if self.folder is not None
                else ""
            )
        self._begun = step, time.monotonic()
        host = owner_facts(self.folder) if self.folder is not None else None
        self._facts |= {"host": host[1] if host else socket.gethostname()}
        self._facts |= {"step": step, "steps": steps, "loss": None, "seconds_left": None}
        self.say("training")

    def is_asked(self) -> bool:
        """Whether this process was asked for anything. It may be called at every step."""
        if self._stops_by_signal():
            return True
        now = time.monotonic()
        if self.folder is None or now - self._looked < _LOOK_SECONDS:
            return self._found
        self._looked = now
        self._found = any(_is_requested(self.folder, what) for what in REQUESTS)
        return self._found

    def is_asked_to_stop(self) -> bool:
        """Whether this process was asked to stop; for work that takes long."""
        if self.folder is None:
            return self._stops_by_signal()
        return self.is_asked() and (self._stops_by_signal() or _is_requested(self.folder, "stop"))

    def _stops_by_signal(self) -> bool:
        return self.signals is not None and self.signals.asked

    def take(self) -> frozenset[str]:
        """Return what this process was asked for, and remove the requests."""
        taken = {"stop"} if self._stops_by_signal() else set()
        if self.folder is not None:
            for what in REQUESTS:
                with suppress(OSError):
                    if _is_requested(self.folder, what):
                        _request_path(self.folder, what).unlink()
                        taken.add(what)
        self._found = False
        return frozenset(taken)

    def progress(self, step: int, loss: float | None) -> None:
        """Say that a step is done; the status is written now and then."""
        if self.folder is None:
            return
        first, began = self._begun
        left = (self._facts["steps"] - step) * (time.monotonic() - began) / max(1, step - first)
        self._facts |= {"step": step, "loss": loss, "seconds_left": round(left, 1)}
        if time.monotonic() - self._written >= _STATUS_SECONDS:
            self.say("training")

    def answer(self, what: str, text: str) -> None:
        """Say that a request was answered."""
        answers = self._facts["answers"]
        number = answers.get(what, {"number": 0})["number"] + 1
        step = self._facts["step"]
        answers[what] = {"number": number, "step": step, "text": text}
        if self.folder is not None:
            logger.info("step %d, as requested: %s", step, text)
        self.say("training")

    def say(self, state: str) -> None:
        """Write the status now, with one of ``STATES``."""
        if self.folder is None:
            return
        self._written = time.monotonic()
        text = json.dumps({"state": state, **self._facts, "updated": time.time()})
        with suppress(OSError), replacing(self.folder / _STATUS_NAME, sync=False) as temporary:
            temporary.write_text(text, encoding="utf-8")
