"""The files of an output folder that are meant for readers, and their names."""

from __future__ import annotations

import re
from pathlib import Path

from gralora_diffusion.io.file_names import BEST_NAME, WEIGHTS_NAME, real_path

from .curve import CURVE_NAME
from .metrics import METRICS_NAME

CARD_NAME, CARD_IMAGE_NAME = "README.md", "validation.png"
HISTORY_NAME = "validation_over_time.png"
#: The folder of all validations, and files in the folder of one of them.
VALIDATION_NAME, GRID_NAME, PROMPTS_NAME = "validation", "grid.png", "prompts.txt"
#: Files that are uploaded, besides validation images.
_BEST = f"{BEST_NAME}/{WEIGHTS_NAME}"
_SHOWN = (WEIGHTS_NAME, _BEST, CARD_NAME, CARD_IMAGE_NAME, CURVE_NAME, HISTORY_NAME, METRICS_NAME)
#: Files that a validation writes, as paths in the output folder.
_OF_VALIDATIONS = re.compile(
    rf"{VALIDATION_NAME}/step-\d+/(\d+-\d+\.png|{re.escape(GRID_NAME)}|{re.escape(PROMPTS_NAME)})"
)


def to_be_shown(folder: Path) -> list[str]:
    """Return the files in an output folder that are meant for publication, and no others.

    The options are left out, because the card contains them without this machine's paths. A link is
    left out even if it has the name of such a file, because it leads out of the folder.
    """
    files = [folder / name for name in _SHOWN]
    files += (folder / VALIDATION_NAME).glob("step-*/*")
    names = [path.relative_to(folder).as_posix() for path in sorted(files) if _is_own(path, folder)]
    return [name for name in names if name in _SHOWN or _OF_VALIDATIONS.fullmatch(name)]


def _is_own(path: Path, folder: Path) -> bool:
    return path.is_file() and real_path(path) == real_path(folder) / path.relative_to(folder)
