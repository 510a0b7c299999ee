"""Finds the images to train on in folders, and rejects those that cannot be trained on.

The caption of an image is the first of these: its line in the metadata file, the text of the
``.txt``, ``.caption`` or ``.json`` file beside it, the prompt for all images. All images are
decoded once as a check; afterwards only their paths, captions and hashes are kept.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm.auto import tqdm

from gralora_diffusion.io.errors import DataError
from gralora_diffusion.io.image_files import folder_images, is_image, masks_beside, read_image
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.io.staging import lies_in
from gralora_diffusion.training.config.data_file import ALL_IMAGES, ImageSet

from .captions import (
    LIKELY_CAPTIONS,
    METADATA_NAME,
    METADATA_NAMES,
    CaptionedFolder,
    ListedImage,
    caption_files,
    concept_folders,
    one_line,
    read_captions,
    read_metadata,
)
from .checked_files import CheckedFiles
from .controls import (
    CONTROL_COLUMNS,
    ControlFolder,
    ControlImage,
    ControlPlaces,
    FoundControl,
    check_control,
)
from .masks import FoundMask, Mask, MaskError, MaskPlaces, check_mask, find_masks
from .sources import Source, unchanged_bytes
from .transforms import CropPlan

logger = logging.getLogger(__name__)

#: Images and videos that are not read, most of them because Pillow has no reader for them.
UNREAD_IMAGES = frozenset(
    {
        *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".eps", ".ps", ".ai", ".pdf", ".wmf"),
        *(".emf", ".xcf", ".exr", ".hdr", ".kra", ".fit", ".fits", ".dng", ".cr2", ".cr3", ".nef"),
        *(".arw", ".raf", ".orf", ".rw2", ".raw", ".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg"),
        *(".mpeg", ".h5", ".hdf", ".hdf5"),
    }
)
#: Files that other trainers keep beside an image.
_CACHES = (".npz", ".npy", ".pt", ".safetensors")
_CAPTIONS = "captions without an image or in an unsupported format, or other files, ignored"
_IMAGES = "images in an unsupported format, ignored; HEIC needs the package pillow-heif"
_OTHERS = "other files, ignored"
#: Role of the images -> why their masks are not used.
WHOLE_IMAGES = {
    "instance": "masks left out, since --masked_loss is not given",
    "class": "masks left out, since class images are trained as a whole",
    "held_out": "masks left out, since --masked_loss is not given",
}
_UNUSED_MASKS = "masks left out, since they belong to no image"
#: A warning names images of which a crop shows less than this fraction.
_SMALL_PART = 1 / 4
MAX_NAMES = 10
#: Number of images that are decoded at once to check them.
AT_ONCE = 8
#: Number of images that wait for it.
_PENDING = 1000
#: Fewer images are checked before anybody could read a progress bar.
MIN_FOR_PROGRESS = 50


@dataclass(frozen=True, slots=True)  # a set may have 100,000 of them
class Example:
    """An image and its caption. The image stays where it is until it is loaded.

    Attributes:
        source: where the image is; ``str`` names it in messages.
        content_key: SHA-256 of the image's bytes.
        size: width and height in pixels, upright.
        repeats: how many times it is used in an epoch.
        concept: name of the sub-folder that sets the repeats.
        mask: which part of it the loss counts; None for the whole image.
        controls: what it was made from, in the order in which an editing base gets them.
        image_set: the set that it belongs to.
        other_captions: further ones; each sample uses one of all.
    """

    source: Source
    caption: str
    content_key: str
    size: tuple[int, int]
    repeats: int = 1
    concept: str | None = None
    mask: Mask | None = None
    controls: tuple[ControlImage, ...] = ()
    image_set: ImageSet = ALL_IMAGES
    other_captions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its file's name, or what else names it in messages."""
        return str(getattr(self.source, "name", self.source))

    @property
    def cache_key(self) -> str:
        """What identifies everything that is encoded for it, besides the crop."""
        return self.content_key + (f" {self.mask.cache_key}" if self.mask else "")

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions, of which each sample uses one."""
        return (self.caption, *self.other_captions)

    def load(self) -> Image.Image:
        """Return the image, upright, RGB and in the colors of sRGB.

        Raises:
            DataError: it no longer exists, or has changed since it was found.
        """
        return read_image(self.read_bytes())

    def read_bytes(self) -> bytes:
        """Return the bytes of the image's file.

        Raises:
            DataError: as for ``load``.
        """
        return unchanged_bytes(self.source, self.content_key)


class Found(NamedTuple):
    """An image that has not been opened yet; ``name`` and ``no_caption`` are for messages.

    The latter says why a file beside it gives it no caption.
    """

    name: str
    source: Source
    caption: str
    repeats: int = 1
    concept: str | None = None
    mask: FoundMask | None = None
    controls: tuple[FoundControl, ...] = ()
    other_captions: tuple[str, ...] = ()
    no_caption: str | None = None


def find_examples(
    folder: str | Path,
    prompt: str | None = None,
    *,
    caption_column: str | None = None,
    skip_bad_images: bool = False,
    role: str = "instance",
    masks: MaskPlaces | None = None,
    controls: ControlPlaces | None = None,
    caption_per_line: bool = False,
    cache_dir: str | Path | None = None,
    remember: bool = True,
) -> list[Example]:
    """Return the images in ``folder``, sorted by name.

    A sub-folder is only read if the metadata file names an image in it, or if the folder has no
    metadata file and sub-folders named as in kohya's sd-scripts, see ``concept_name``. Files that
    are not used, such as masks without ``masks``, are left out with a warning that names them;
    hidden files are left out silently.

    Args:
        prompt: caption of the images that have none.
        caption_column: column of the metadata file, or key of a .json file; by default one of
            ``CAPTION_COLUMNS``.
        skip_bad_images: leave out images that cannot be decoded, or whose mask or control images
            cannot be used, with a warning.
        role: "instance", "class" or "held_out", which errors use to name the flags.
        masks: where the masks of the images are; None to train on whole images.
        controls: where their control images are; None for images without any.
        caption_per_line: each line of a text file is a caption of its own.
        cache_dir: folder that knows images which were decoded before, see ``CheckedFiles``.
        remember: write there which have been decoded now.

    Raises:
        DataError: there is no folder, it has no image, a control image is missing, or there are
            problems with the images, the captions, the masks or the metadata file. The error lists
            all of them.
    """
    folder = Path(folder)
    place = f"--{role}_data_dir {str(folder)!r}"
    if not folder.is_dir():
        raise DataError(place, ["there is no such folder. Give the folder with the images"])
    problems: list[str] = []
    found = []
    columns = () if controls is None else controls.columns or CONTROL_COLUMNS
    try:
        for part in _image_folders(folder, one_line(prompt), place, masks):
            found += _find_in(
                part,
                folder,
                caption_column,
                place,
                problems,
                role,
                masks,
                columns,
                caption_per_line,
            )
        if controls is not None and controls.folders:
            found = _with_folders(found, controls, problems)
    except OSError as error:
        raise DataError(place, [f"the folder cannot be read: {error}"]) from error
    if controls is not None and controls.columns and not any(image.controls for image in found):
        problems.append(
            f"--control_column is {' '.join(controls.columns)}, but no line of a metadata file "
            "names a control image there"
        )
    prompt_of = "class" if role == "class" else "instance"
    advice = (
        f"Give --{prompt_of}_prompt for all images without one, write a .txt file beside it, or "
        f"name it in {METADATA_NAME}"
    )
    with CheckedFiles(folder, cache_dir, write=remember) as checked:
        return check_images(found, place, problems, advice, skip_bad_images, checked)


def warn_of_small_images(examples: Iterable[Example], plan: CropPlan) -> None:
    """Log which images are smaller than the size that they are trained at."""
    small = [f"{e.name} ({e.size[0]}x{e.size[1]})" for e in examples if plan.enlarges(e.size)]
    place = "aspect-ratio buckets" if plan.buckets else f"--resolution {plan.resolution}"
    _warn(place, "smaller images, enlarged for training", small)


def warn_of_long_images(examples: Iterable[Example], plan: CropPlan) -> None:
    """Log which images are so long that a crop shows only a small part of them."""
    long = [
        f"{e.name} ({e.size[0]}x{e.size[1]})" for e in examples if plan.shown(e.size) < _SMALL_PART
    ]
    place = "aspect-ratio buckets" if plan.buckets else f"--resolution {plan.resolution}"
    _warn(place, "long images, of which a sample shows less than a quarter", long)


def warn_of_missed_masks(examples: Iterable[Example], plan: CropPlan) -> None:
    """Log which images have crops that show nothing of what their mask leaves."""
    missed = [e.name for e in examples if e.mask and plan.may_miss(e.size, e.mask.box)]
    place = "aspect-ratio buckets" if plan.buckets else f"--resolution {plan.resolution}"
    _warn(
        place, "masks whose white part a crop may miss; such a sample trains nothing inside", missed
    )


def _image_folders(
    folder: Path, prompt: str, place: str, masks: MaskPlaces | None
) -> list[CaptionedFolder]:
    """Return the folder itself, or its sub-folders with a concept each.

    Raises:
        DataError: the folder has both images of its own and concepts.
    """
    concepts = [part for part in concept_folders(folder) if not _is_of_masks(part.path, masks)]
    names = os.listdir(folder)
    listed = any(name.lower() in METADATA_NAMES for name in names)
    if listed or not concepts:
        return [CaptionedFolder(folder, prompt)]
    named = [str(part.concept) for part in concepts]
    if own := [name for name in names if is_image(name)]:
        problem = (
            f"it contains images ({first_few(sorted(own))}) and folders whose names have repeats "
            f"and a prompt ({first_few(named)}), and only one of both is read. Move the images "
            "into such a folder, or rename the folders"
        )
        raise DataError(place, [problem])
    others = [
        name
        for name in names
        if name not in named and name[0] != "." and not _is_of_masks(folder / name, masks)
    ]
    _warn(place, "ignored beside the concepts' folders", sorted(others))
    return concepts


def _is_of_masks(path: Path, masks: MaskPlaces | None) -> bool:
    """Whether ``path`` is the folder of masks, or contains it."""
    return bool(masks and masks.folder and lies_in(masks.folder, path))


def _with_folders(
    found: Sequence[Found], places: ControlPlaces, problems: list[str]
) -> list[Found]:
    """Return the images with their control images in the folders of ``places``."""
    if named := [image.name for image in found if image.controls]:
        problems.append(
            f"a metadata file names control images of {first_few(named)}, and {places.option} "
            "is given. Leave out one of them"
        )
        return list(found)
    searched = [ControlFolder(folder, places.option) for folder in places.folders]
    with_controls = [
        image._replace(
            controls=tuple(c for folder in searched if (c := folder.find(image.name)) is not None)
        )
        for image in found
    ]
    for folder in searched:
        problems += folder.problems()
        place = f"{places.option} {str(folder.path)!r}"
        _warn(place, "control images without a training image, ignored", folder.unused())
    return with_controls


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder; ``is_dir`` raises an error for a link to itself."""
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def _find_in(
    part: CaptionedFolder,
    top: Path,
    column: str | None,
    place: str,
    problems: list[str],
    role: str,
    masks: MaskPlaces | None,
    control_columns: Sequence[str],
    caption_per_line: bool,
) -> list[Found]:
    """Return the images of one folder with captions, masks and listed control images.

    Other files are reported.
    """
    with os.scandir(part.path) as entries:  # pathlib takes long for 100,000 files
        visible = {e.name: _is_folder(e) for e in entries if not e.name.startswith(".")}
    folders = {name for name, is_folder in visible.items() if is_folder}
    files = sorted(visible.keys() - folders)
    before = len(problems)
    mask_column = masks.column if masks else None
    listed = read_metadata(part.path, files, column, problems, mask_column, control_columns)
    controls = {name for entry in listed.values() for name in entry.controls} - listed.keys()
    images, named_masks = folder_images(files)
    listed_masks = {entry.mask for entry in listed.values() if entry.mask}
    if both := sorted(listed_masks & listed.keys()):
        problems.append(f"listed as images and as masks: {', '.join(both)}")
    unlisted = [name for name in named_masks if name not in {*listed, *controls}]
    names = sorted({*listed, *images} - listed_masks - controls)
    if not names and len(problems) == before:
        problems.append(
            f"there is no image in {part.concept or 'it'}, and sub-folders are not read. Put "
            "the images into it, or give the folder that contains them"
        )
    metadata = [name for name in files if name.lower() in METADATA_NAMES]
    used = {*metadata, *names, *named_masks, *listed_masks, *controls}
    found, differing = [], []
    masked: dict[str, FoundMask] = {}
    unused_masks = sorted({*unlisted, *listed_masks})
    if masks is not None:
        beside = _beside(masks_beside, part.path, names, files)
        of_image = {n: [m for m in beside[n] if m not in listed] for n in names}
        own = _folder_of_masks(masks, part)
        masked, unused = find_masks(part.path, listed, of_image, masks, own, problems)
        taken = {mask.name for mask in masked.values() if not mask.of_alpha}
        unused_masks = [*(name for name in unlisted if name not in taken), *unused]
    within, top_of_part = part.path.relative_to(top).as_posix(), str(part.path)
    for name, texts in _beside(caption_files, part.path, names, files).items():
        given = {metadata[0]: listed[name].captions} if _has_caption(listed, name) else {}
        why_none, parent = None, os.path.dirname(os.path.join(top_of_part, name))
        for file in texts:
            known = len(problems)
            captions = read_captions(os.path.join(parent, file), column, problems, caption_per_line)
            if captions is not None:
                used.add(file)
                given |= {file: tuple(captions)} if captions else {}
                if not captions:
                    why_none = f"{file} {'is empty' if known == len(problems) else 'is not read'}"
        path = part.path / name
        shown = name if within == "." else f"{within}/{name}"
        if len(set(given.values())) > 1:
            first, *others = given
            differing.append(f"{shown} ({first}, not {', '.join(others)})")
        caption, *others = next(iter(given.values()), (part.prompt,))
        of_part = part.repeats, part.concept
        before_edit = tuple(
            FoundControl(control, part.path / control)
            for control in listed.get(name, ListedImage()).controls
        )
        mask, rest = masked.get(name), tuple(others)
        found.append(Found(shown, path, caption, *of_part, mask, before_edit, rest, why_none))
    _warn(place, "images with captions that differ, of which the first is used", differing)
    _warn(place, WHOLE_IMAGES[role] if masks is None else _UNUSED_MASKS, unused_masks)
    _report_unused(place, [name for name in files if name not in used], names)
    unread = folders - {n.partition("/")[0] for n in (*names, *listed_masks, *controls)}
    unread -= {name for name in unread if _is_of_masks(part.path / name, masks)}
    _warn(place, "sub-folders that are not read", sorted(unread))
    missed = _not_named(part.path, names, listed_masks | controls)
    _warn(place, "images in sub-folders left out, since they are not listed", missed)
    return found


def _folder_of_masks(masks: MaskPlaces, part: CaptionedFolder) -> Path | None:
    """Return the folder of the masks of a folder of images, which has sub-folders of its names."""
    if masks.folder is None or part.concept is None:
        return masks.folder
    return masks.folder / part.path.name


def _has_caption(listed: Mapping[str, ListedImage], name: str) -> bool:
    return name in listed and bool(listed[name].caption)


def _not_named(folder: Path, names: Sequence[str], others: Iterable[str]) -> list[str]:
    """Return unlisted images in sub-folders of which other images are listed.

    Args:
        others: masks and control images that are listed.
    """
    parents = {Path(name).parent for name in names if "/" in name}
    there = {
        (parent / name).as_posix()
        for parent in parents
        for name in folder_images(path.name for path in (folder / parent).iterdir()).images
    }
    return sorted(there.difference(names, others))


def _beside(
    find: Callable[[Sequence[str], Sequence[str]], dict[str, list[str]]],
    folder: Path,
    names: Iterable[str],
    files: Sequence[str],
) -> dict[str, list[str]]:
    """Return image -> what ``find`` finds for it in its own folder: names of files there.

    Args:
        find: names of images in a folder, and of all files there -> image -> files.
        names: of images, as paths in ``folder``.
        files: in ``folder`` itself.
    """
    by_parent = defaultdict(list)
    for name in names:
        by_parent[name.rpartition("/")[0]].append(name)
    found: dict[str, list[str]] = {}
    for parent, there in by_parent.items():
        names_there = os.listdir(folder / parent) if parent else files
        own = {name: name.rpartition("/")[2] for name in there}
        beside = find(list(own.values()), names_there)
        found |= {name: beside.get(short, []) for name, short in own.items()}
    return dict(sorted(found.items()))


def _report_unused(place: str, names: Sequence[str], images: Iterable[str]) -> None:
    """Report files that are neither images nor captions of images."""
    if not names:
        return
    stems = {key.lower() for p in images for key in (p, Path(p).stem)}
    kinds: dict[str, list[str]] = {_CAPTIONS: [], _IMAGES: [], _OTHERS: []}
    for name in names:
        ending = Path(name).suffix.lower()
        beside = Path(name).stem.lower() in stems and ending not in _CACHES
        if ending in UNREAD_IMAGES:
            kinds[_IMAGES].append(name)
        else:
            kinds[_CAPTIONS if beside or ending in LIKELY_CAPTIONS else _OTHERS].append(name)
    for what, of_kind in kinds.items():
        _warn(place, what, of_kind)


def check_images(
    found: Sequence[Found],
    place: str,
    problems: list[str],
    caption_advice: str,
    skip_bad_images: bool,
    checked: CheckedFiles,
) -> list[Example]:
    """Decode every image that ``checked`` does not know, and make each an example.

    Raises:
        DataError: there are problems. The error lists ``problems``, the images without a caption
            and those that cannot be decoded or whose mask or control images cannot be used,
            which ``skip_bad_images`` leaves out instead.
    """
    examples, bad, warnings, without = [], [], [], []
    quiet = None if len(found) >= MIN_FOR_PROGRESS else True  # None: shown in a terminal only
    pool = ThreadPoolExecutor(AT_ONCE)  # Pillow and hashlib let other threads run
    try:
        look_at = partial(_look_at, checked=checked)
        starts = range(0, len(found), _PENDING)  # each image that waits takes memory
        chunks = (found[start : start + _PENDING] for start in starts)
        looked = chain.from_iterable(
            # threads would only take time
            map(look_at, chunk)
            if all(checked.knows("image", image.source) for image in chunk)
            else pool.map(look_at, chunk)
            for chunk in chunks
        )
        bar = tqdm(looked, "Checking images", len(found), unit="", disable=quiet)
        for image, seen in zip(found, bar, strict=True):
            if isinstance(seen, str):
                bad.append(f"{image.name}{seen}")
                continue
            if worse := [control for control in seen.controls if isinstance(control, str)]:
                bad += [f"{image.name}: its control image {control}" for control in worse]
                continue
            warnings += [f"{image.name} ({'; '.join(seen.warnings)})"] if seen.warnings else []
            if not image.caption:
                why = f": {image.no_caption}" if image.no_caption else ""
                without.append(f"{image.name} has no caption{why}")
            examples.append(
                Example(
                    image.source,
                    image.caption,
                    seen.content_key,
                    seen.size,
                    image.repeats,
                    image.concept,
                    seen.mask,
                    tuple(c for c in seen.controls if isinstance(c, ControlImage)),
                    other_captions=image.other_captions,
                )
            )
    finally:
        pool.shutdown(cancel_futures=True)
    if without:
        problems += [*without, caption_advice]
    if bad and not skip_bad_images:
        problems += bad
        problems.append("To train without these images, give --skip_bad_images")
    if problems:
        raise DataError(place, problems)
    if not examples:
        raise DataError(place, [*bad, "no image is left"] if bad else ["it has no rows"])
    _warn(place, "images left out", bad)
    _warn(place, "images used without the parts that cannot be read", warnings)
    again = _contradictions(examples)
    _warn(place, "images that have the control images and the caption of another image", again)
    return examples


def _contradictions(examples: Iterable[Example]) -> list[str]:
    """Return names of images that say the same of the same control images as an earlier one."""
    first: dict[tuple[str, ...], str] = {}
    again = []
    for example in examples:
        name = example.name
        key = (*example.captions, *(control.content_key for control in example.controls))
        earlier = first.setdefault(key, name)
        if example.controls and earlier != name:
            again.append(f"{name} (as {earlier})")
    return again


class _Seen(NamedTuple):
    """What is kept of an image that was decoded."""

    content_key: str
    size: tuple[int, int]
    mask: Mask | None
    controls: list[ControlImage | str]  # or why there is none
    warnings: tuple[str, ...]


def _look_at(image: Found, checked: CheckedFiles) -> _Seen | str:
    """Decode an image, its mask and its control images.

    A text says why that is not possible, after the image's name.
    """
    try:
        seen = checked.decode("image", image.source)
    except Exception as error:  # a dataset may raise any kind
        return f" cannot be decoded: {str(error) or type(error).__name__}"
    mask = None
    if image.mask is not None:
        try:
            mask = check_mask(image.mask, seen.size, checked)
        except MaskError as error:
            return f": {image.mask} {error}"
        except Exception as error:
            return f": {image.mask} cannot be used: {str(error) or type(error).__name__}"
    controls = [check_control(control, checked) for control in image.controls]
    return _Seen(seen.content_key, seen.size, mask, controls, seen.warnings)


def _warn(place: str, what: str, names: Sequence[str]) -> None:
    if names:
        logger.warning("%s: %s (%d): %s", place, what, len(names), first_few(names, MAX_NAMES))
