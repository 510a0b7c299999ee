"""Images that several trials share: the bare base's, and the class images of prior preservation.

They are generated once, by whoever needs them first, and lie in the run's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gralora_diffusion.benchmark.evaluation.encoders import read_image_file
from gralora_diffusion.io.errors import DataError
from gralora_diffusion.training.data.class_images import missing_class_images

from .settings import BenchmarkSettings
from .tasks import Task, folder_name

#: Beginnings of the names of images for the unrelated prompts, and for the prompt of the class.
DRIFT, PRIOR = "drift-", "class-"
#: Folder of the bare base's images, within the run's folder.
BASE_FOLDER = "base"


class SharedImages(NamedTuple):
    """A folder of images that several trials share.

    Attributes:
        folder: where they are; it may contain others, too.
        beginning: of the names of the bare base's images; None for the class images to train on.
    """

    folder: Path
    beginning: str | None


def wanted_images(
    settings: BenchmarkSettings, task: Task
) -> dict[str, tuple[tuple[str, ...], int]]:
    """Return what a trial generates: beginning of the files' names -> prompts, images of each."""
    protocols = settings.protocols or ()
    wanted = {"": (task.prompts, settings.images_per_prompt)}
    if "drift" in protocols:
        wanted[DRIFT] = (tuple(settings.drift_prompts or ()), settings.drift_images)
    if "prior" in protocols:
        wanted[PRIOR] = ((task.class_prompt,), settings.prior_images)
    return wanted


def image_files(folder: Path, beginning: str, prompts: int, images: int) -> list[list[Path]]:
    """Return the files of each prompt's images."""
    return [
        [folder / f"{beginning}{row:03d}_{column}.png" for column in range(images)]
        for row in range(prompts)
    ]


def base_images(settings: BenchmarkSettings, task: Task, seed: int) -> list[SharedImages]:
    """Return the bare base's images that an adapter's are compared with."""
    folder = settings.folder / BASE_FOLDER / f"seed{seed}"
    if settings.seeding == "subject":
        folder /= task.subject
    places = {DRIFT: folder, PRIOR: folder / folder_name(task.class_prompt)}
    wanted = wanted_images(settings, task)
    return [SharedImages(place, kind) for kind, place in places.items() if kind in wanted]


def shared_images(settings: BenchmarkSettings, task: Task, seed: int) -> list[SharedImages]:
    """Return all images that a task's trials with this seed share with others."""
    found = base_images(settings, task, seed)
    config = task.config
    if config.with_prior_preservation and config.prior_source == "images":
        found.append(SharedImages(Path(str(config.class_data_dir)), None))
    return found


def files_of(images: SharedImages, root: Path) -> dict[str, bytes]:
    """Return their files by the paths relative to ``root``."""
    beginning = images.beginning or "class-"
    found = sorted(images.folder.glob(f"{beginning}*"))
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in found}


def is_complete(settings: BenchmarkSettings, task: Task, images: SharedImages) -> bool:
    """Return whether all of them exist and can be read; damaged ones are generated again."""
    if images.beginning is None:
        return not missing_class_images(task.config)
    prompts, count = wanted_images(settings, task)[images.beginning]
    rows = image_files(images.folder, images.beginning, len(prompts), count)
    return all(is_whole(file) for row in rows for file in row)


def is_whole(file: Path) -> bool:
    """Return whether an image exists and can be read."""
    if not file.exists():
        return False
    try:
        read_image_file(file)
    except DataError:
        return False
    return True
