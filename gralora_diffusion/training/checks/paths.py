"""Checks of the files, folders and Hub ids that the training options name.

Nothing is downloaded and no image is opened here; ``data`` checks that images can be decoded.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from gralora_diffusion.families import family_name_of, list_families
from gralora_diffusion.io.errors import CheckpointError
from gralora_diffusion.io.file_names import (
    ADDRESS,
    BEST_NAME,
    PIPELINE_INDEX,
    WEIGHTS_NAME,
    looks_like_hub_id,
    nearby,
    real_path,
)
from gralora_diffusion.io.image_files import is_image
from gralora_diffusion.io.staging import lies_in, places_of
from gralora_diffusion.options.command_parser import must_be
from gralora_diffusion.options.fields import Place, options_with, texts_of
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.captions import concept_folders, is_caption_file

#: A file -> the kind of folder that it is in. Such a folder may contain an image by chance.
_NOT_OF_IMAGES = {
    PIPELINE_INDEX: "this is a base model",
    WEIGHTS_NAME: "this is the output of a training",
    "training_config.yaml": "this is the output of a training",
}
#: Folders that are searched for images and captions: "/" has hundreds of thousands.
_MOST_FOLDERS = 1000
_ARCHIVES = (".zip", ".rar", ".7z", ".gz", ".tar", ".tgz", ".xz")
# option -> (the file that identifies a diffusers folder, whether a single file is allowed)
MODEL_FOLDERS = {
    "pretrained_model_name_or_path": (PIPELINE_INDEX, True),
    "base_config": (PIPELINE_INDEX, False),
    "pretrained_vae_model_name_or_path": ("config.json", False),
}
#: Files and folders that a run creates, replaces or deletes in its output folder, besides the
#: tracker's files.
MADE = (
    ".gralora.*",  # lock, status and requests
    *(WEIGHTS_NAME, BEST_NAME, "checkpoint-*", ".unfinished-*", "validation", "validation.png"),
    *("README.md", "metrics.jsonl", "training_curve.png", "training_config.yaml"),
    "validation_over_time.png",
)


def check_base(config: TrainingConfig) -> Iterator[str]:
    if not config.pretrained_model_name_or_path:
        yield (
            "--pretrained_model_name_or_path is missing. Give a diffusers folder, a Hub id such as "
            "owner/name, or a .safetensors file"
        )
    if config.family is not None and config.family not in (known := list_families()):
        yield f"--family is {config.family!r}; {must_be(config.family, known, family_name_of)}"
    for name, (index, single_file) in MODEL_FOLDERS.items():
        value = getattr(config, name)
        if value and (problem := model_problem(value, index, single_file)):
            yield f"--{name} is {value!r}: {problem}"


def model_problem(
    value: str, index: str, single_file: bool = False, library: str = "diffusers"
) -> str | None:
    """Return why a file, folder or Hub id cannot be a model, or None if it may be one.

    Args:
        index: the file that every folder with a model of ``library`` contains.
        single_file: whether a single file is allowed.
    """
    wanted = f"Give a {library} folder, which contains {index}, or a Hub id"
    path = Path(value)
    if path.is_dir():
        return None if (path / index).is_file() else f"this folder has no {index}. {wanted}"
    if path.is_file():
        if not single_file:
            return f"this is a file. {wanted}"
        if path.suffix not in (".safetensors", ".gguf"):
            return f"a single file must be a .safetensors or .gguf file. Convert it. {wanted}"
        return None
    if "://" in value:
        return ADDRESS
    if not looks_like_hub_id(value, bare=library == "transformers"):
        problem = f"there is no such file or folder{nearby(path)}"
        return problem if problem.endswith("?") else f"{problem}. {wanted}"
    return _repo_id_problem(value)


def _repo_id_problem(value: str) -> str | None:
    # only now, because it takes a while
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(value)
    except HFValidationError:
        return (
            "this is neither a local file or folder nor a Hub id, which is owner/name made of "
            "letters, digits, '-', '_' and '.'"
        )
    return None


def check_data(config: TrainingConfig) -> Iterator[str]:
    yield from _images_and_captions(config)
    yield from _masks(config)
    yield from _held_out(config)


def _images_and_captions(config: TrainingConfig) -> Iterator[str]:
    folder, dataset = config.instance_data_dir, config.dataset_name
    if config.data_config:
        return  # its sets are checked one by one
    if folder and dataset:
        yield (
            f"--instance_data_dir is {folder!r} and --dataset_name is {dataset!r}, but a run "
            "trains on only one of them. Leave one out"
        )
    elif dataset:
        if importlib.util.find_spec("datasets") is None:
            yield f"--dataset_name is {dataset!r}, which needs: pip install datasets"
        if not config.instance_prompt and not config.caption_column:
            yield (
                "--dataset_name needs --caption_column or --instance_prompt. Give the column with "
                "the captions, or one prompt for all images"
            )
    elif not folder:
        yield (
            "--instance_data_dir is missing. Give the folder with the training images, or a "
            "dataset with --dataset_name"
        )
    elif problem := _folder_problem(Path(folder)):
        yield f"--instance_data_dir is {folder!r}: {problem}"
    elif not (config.instance_prompt or _has_captions(Path(folder))):
        yield (
            f"--instance_prompt is missing, and {folder!r} contains no captions: no .txt, .caption "
            "or .json file and no metadata.jsonl, .csv or .parquet. Give a prompt such as "
            "--instance_prompt 'a photo of sks dog'"
        )


def _masks(config: TrainingConfig) -> Iterator[str]:
    """Report a folder of masks that cannot be one."""
    used = config.masked_loss or config.inpaint_given_masks
    if not (used and config.mask_data_dir):
        return
    folder = Path(config.mask_data_dir)
    if config.dataset_name:
        yield (
            "--mask_data_dir is for --instance_data_dir; the rows of --dataset_name have no file "
            "names. Give the masks as a column, --mask_column"
        )
    elif config.instance_data_dir and real_path(folder) == real_path(config.instance_data_dir):
        yield (
            f"--mask_data_dir is {config.mask_data_dir!r}, which is --instance_data_dir. Masks "
            "beside the images need no option but other names, such as 001.mask.png"
        )
    elif problem := _folder_problem(folder, "masks", "Put the masks into it"):
        yield f"--mask_data_dir is {config.mask_data_dir!r}: {problem}"


def _held_out(config: TrainingConfig) -> Iterator[str]:
    """Report folders of held-out images, and of what belongs to them, that cannot be one."""
    folder = config.held_out_data_dir
    if not folder:
        return
    advice = "Put images of the subject into it that are not trained on"
    own = config.instance_data_dir
    if own and real_path(folder) == real_path(own):
        yield (
            f"--held_out_data_dir is {folder!r}, which is also --instance_data_dir. Held-out "
            "images are never trained on: give a folder with other images of the subject"
        )
    elif problem := _folder_problem(Path(folder), "held-out images", advice):
        yield f"--held_out_data_dir is {folder!r}: {problem}"
    elif not (config.instance_prompt or _has_captions(Path(folder))):
        yield (
            f"--held_out_data_dir is {folder!r}, which contains no captions, and there is no "
            "--instance_prompt. Give one of them"
        )
    for name in ("held_out_control_data_dir", "held_out_mask_data_dir"):
        for part in texts_of(getattr(config, name)):
            if problem := _folder_problem(Path(part), "images", "Put the images into it"):
                yield f"--{name} is {part!r}: {problem}"


def check_controls(config: TrainingConfig) -> Iterator[str]:
    for folder in config.control_data_dir or ():
        if problem := _folder_problem(Path(folder), "images before the edit", "Put them into it"):
            yield f"--control_data_dir is {folder!r}: {problem}"
        elif config.instance_data_dir and real_path(folder) == real_path(config.instance_data_dir):
            yield (
                f"--control_data_dir is {folder!r}, which is also --instance_data_dir. The images "
                "before the edit need a folder of their own"
            )
    if config.control_data_dir and config.dataset_name:
        yield (
            "--control_data_dir and --dataset_name exclude each other. Name the dataset's columns "
            "with --control_column"
        )
    if config.control_data_dir and config.control_column:
        yield (
            "--control_data_dir and --control_column exclude each other: control images are "
            "either in folders or named by a metadata file. Leave one out"
        )


def _names_below(folder: Path) -> Iterator[str]:
    """Yield the names of files in a folder and below; what may not be read is passed over."""
    for _, _, names in islice(os.walk(folder), _MOST_FOLDERS):
        yield from names


def _folder_problem(
    path: Path,
    content: str = "images",
    advice: str = "Put the training images into it; three to ten are usual",
) -> str | None:
    if not path.exists():
        return f"there is no such folder{nearby(path)}"
    if not path.is_dir():
        unpack = " Unpack the archive first." if path.suffix.lower() in _ARCHIVES else ""
        return f"this is a file.{unpack} Give the folder with the {content}"
    for name, what in _NOT_OF_IMAGES.items():
        if (path / name).is_file():
            return f"{what}, as {name} shows. Give the folder with the {content}"
    others = []
    for name in _names_below(path):
        if is_image(name):
            return None
        others.append(name)
    if not others:
        return f"this folder is empty. {advice}"
    some = ", ".join(sorted(others)[:5]) + (", ..." if len(others) > 5 else "")
    return (
        f"none of its {len(others)} files is an image ({some}). "
        "Images are .jpg, .png, .webp and other formats that Pillow reads"
    )


def _has_captions(folder: Path) -> bool:
    """Whether files or the names of folders give captions to its images."""
    beside = any(map(is_caption_file, _names_below(folder)))
    return beside or bool(concept_folders(folder))


def check_output(config: TrainingConfig) -> Iterator[str]:
    for name in ("output_dir", "latent_cache_dir"):
        if (value := getattr(config, name)) and (problem := _unwritable(Path(value))):
            yield f"--{name} is {value!r}: {problem}"
    if not config.output_dir:
        yield "--output_dir is empty. Give the folder for the adapter and all other output"
    yield from check_inputs(config)
    store = CheckpointStore(config.output_dir)
    if config.resume_from_checkpoint:
        try:
            store.find(config.resume_from_checkpoint)
        except CheckpointError as error:
            yield str(error)
        if config.overwrite_output_dir:
            yield (
                "--overwrite_output_dir and --resume_from_checkpoint exclude each other: a run "
                "cannot be resumed and overwritten at once. Leave one out"
            )
    if not config.overwrite_output_dir:
        yield from _earlier_run(config, store)
    if config.report_to in ("tensorboard", "wandb") and not importlib.util.find_spec(
        config.report_to
    ):
        yield (
            f"--report_to is {config.report_to!r}, which needs: pip install {config.report_to}. Or "
            "give --report_to none"
        )
    if config.hub_model_id and _repo_id_problem(config.hub_model_id):
        yield (
            f"--hub_model_id is {config.hub_model_id!r}; it must be owner/name made of letters, "
            "digits, '-', '_' and '.'"
        )


def check_inputs(config: TrainingConfig) -> Iterator[str]:
    """Report inputs that the run would write to or delete."""
    places = options_with(type(config), Place)
    read = [
        (name, path, text)
        for name, place in places.items()
        if place.read
        for text in texts_of(getattr(config, name))
        for path in places_of(text)
    ]
    for name in (name for name, place in places.items() if place.written):
        for source, path, text in read:
            value = getattr(config, name)
            if not value or name == source or not lies_in(Path(value), path):
                continue
            pair = {name, source}
            if pair == {"class_data_dir", "instance_data_dir"} and lies_in(path, Path(value)):
                continue  # one folder for both: ``options`` has a clearer message
            yield (
                f"--{name} is {value!r}, which is or lies in --{source} {text!r}. A run does "
                "not write to its inputs. Give another folder"
            )
    made = [Path(config.output_dir, entry) for entry in made_in(config)]
    for source, path, text in read:
        # a run's own checkpoint is read there on purpose
        if source != "resume_from_checkpoint" and any(lies_in(path, entry) for entry in made):
            yield (
                f"--{source} is {text!r}, which this run would replace or delete because it "
                f"lies in --output_dir {config.output_dir!r}. Give another --output_dir"
            )


def made_in(config: TrainingConfig) -> list[str]:
    """Return the names in the output folder that the run creates, replaces or deletes."""
    folder = Path(config.output_dir)
    patterns = (*MADE, Path(config.logging_dir).parts[0] if config.logging_dir else "")
    entries = folder.iterdir() if folder.is_dir() else ()
    names = [entry.name for entry in entries]
    return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def _earlier_run(config: TrainingConfig, store: CheckpointStore) -> Iterator[str]:
    """Report an earlier run that would be overwritten."""
    if whole := store.list():
        if not config.resume_from_checkpoint:
            yield (
                f"--output_dir is {config.output_dir!r}, which contains {whole[-1][1].name} of an "
                "earlier run. Resume it with --resume_from_checkpoint latest, give another "
                "folder, or replace it with --overwrite_output_dir"
            )
    elif config.resume_from_checkpoint in (None, "latest") and _has_adapter(config.output_dir):
        yield (
            f"--output_dir is {config.output_dir!r}, which contains {WEIGHTS_NAME} of an earlier "
            "run, but no checkpoint to resume. Give another folder, or replace it with "
            "--overwrite_output_dir. To start from its values, give it as --initial_adapter to a "
            "run with another folder"
        )


def _has_adapter(folder: str) -> bool:
    return (Path(folder) / WEIGHTS_NAME).exists()


def _unwritable(path: Path) -> str | None:
    if path.exists() and not path.is_dir():
        return "this is a file. Give a folder"
    nearest = next((p for p in (path, *path.absolute().parents) if p.exists()), Path.cwd())
    if not nearest.is_dir():
        return f"{str(nearest)!r} is a file, so no folder can be created in it"
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"{str(nearest)!r} is not writable. Give another folder or change its permissions"
    return None
