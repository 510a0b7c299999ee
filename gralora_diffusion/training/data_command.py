"""The command ``gralora data``: what a run would see of its images, without training."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from gralora_diffusion.io.errors import ConfigError, DataError
from gralora_diffusion.io.process import log_to_terminal, print_safely, quiet_libraries
from gralora_diffusion.io.safe_text import first_few, for_terminal_line
from gralora_diffusion.options.fields import Limits, Place, option
from gralora_diffusion.options.parsing import ParsedOptions, read_options, read_text
from gralora_diffusion.training.checks.options import find_image_problems
from gralora_diffusion.training.config.data_file import with_data_file
from gralora_diffusion.training.config.other_programs import OTHER_NAMES
from gralora_diffusion.training.config.training_config import OPTION_GROUPS, TrainingConfig

if TYPE_CHECKING:  # torch takes seconds
    from .data.image_folder import Example
    from .data.sets import SampledSet

#: What the report says of the images, and the names that belong to it.
Finding = tuple[str, list[str]]
#: Names in a line of findings.
_MOST_NAMES = 10
#: An image is named if a crop shows less than this fraction of it.
_WELL_SHOWN = 0.75


@dataclass(kw_only=True)
class SheetOptions:
    """What the command writes."""

    _argument_group_name: ClassVar[str] = "Contact sheet"

    sheet: Annotated[str | None, Place(written=True)] = option(
        None, "PNG file for a contact sheet: crops of the images, with their prompts"
    )
    sheet_images: Annotated[int, Limits(at_least=1)] = option(
        120, "Number of images on the sheet at most, evenly spread over all"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. The exit code is 2 for wrong options, and for data that cannot be used."""
    log_to_terminal()
    config, sheet, parsed = read(sys.argv[1:] if argv is None else argv)
    found = find_image_problems(config, sheet) + list(_sheet_problems(sheet))
    if problems := [*parsed.problems, *parsed.located(found)]:
        _exit(ConfigError(problems))
    with quiet_libraries():
        try:
            lines = list(_report(with_data_file(config), sheet))
        except ConfigError as error:
            _exit(ConfigError(parsed.located(error.problems)))
        except DataError as error:
            _exit(error)
    print_safely("\n".join(lines))


def _exit(error: Exception) -> None:
    print_safely(f"error: {error}", error=True)
    sys.exit(2)


def read(argv: Sequence[str]) -> tuple[TrainingConfig, SheetOptions, ParsedOptions]:
    """Read the trainer's options and the command's own; a file or folder may come first."""
    line = list(argv)
    if line and not line[0].startswith("-"):
        line = [f"--{_option_of(Path(line[0]))}", *line]
    groups = (*OPTION_GROUPS, SheetOptions)
    parsed = read_options(groups, line, other_names=OTHER_NAMES, prog="gralora data")
    own = {f.name: parsed.values[f.name] for f in fields(SheetOptions)}
    rest = {name: value for name, value in parsed.values.items() if name not in own}
    return TrainingConfig(**rest), SheetOptions(**own), parsed


def _option_of(path: Path) -> str:
    """Return the option that a file or folder is meant for: a list in YAML is a data file."""
    if path.is_dir():
        return "instance_data_dir"
    try:
        lines = map(str.strip, read_text(path, "--config").splitlines())
    except ConfigError:
        return "config"  # whose reader names the problem
    first = next((row for row in lines if row and row[0] != "#"), "")
    return "data_config" if first.startswith(("-", "[")) else "config"


def _sheet_problems(sheet: SheetOptions) -> Iterator[str]:
    path = Path(sheet.sheet or "sheet.png")
    if path.suffix.lower() != ".png":
        yield f"--sheet is {sheet.sheet!r}; its name must end in .png"
    elif path.is_dir():
        yield f"--sheet is {sheet.sheet!r}: this is a folder. Give the name of a file"
    elif not path.parent.is_dir():
        yield f"--sheet is {sheet.sheet!r}, but there is no folder {str(path.parent)!r}"


def _report(config: TrainingConfig, sheet: SheetOptions) -> Iterator[str]:
    """Yield the lines of the report, and write the sheet.

    Raises:
        ConfigError: the base cannot be read.
        DataError: the images have problems.
    """
    from .data.contact_sheet import write_contact_sheet
    from .data.data_module import find_class_images, find_images
    from .data.held_out import find_held_out_images
    from .data.sets import sampled_sets
    from .data.truncation import truncated_prompts

    images = find_images(config)
    classes = find_class_images(config, images)
    trained = {"the images to train on": images, "the class images": classes}
    held_out = find_held_out_images(config, trained)
    config, family, pipe = _with_base(config)
    parts = sampled_sets(config, images, family.size_divisor(pipe) if family else 8)
    yield from _numbers(config, parts, images, classes, len(held_out))
    hashes, cells = _looked_at(parts, config, sheet)
    findings = [*_alike(images, hashes), *_unusual(parts)]
    if family is not None:
        long = truncated_prompts(pipe, family, config, images, classes)
        findings.append(("prompts that are cut off", long))
    for what, found in findings:
        yield f"{what}: {len(found) or 'none'}"
        if found:
            yield f"  {for_terminal_line(first_few(found, _MOST_NAMES))}"
    if family is None:
        yield (
            "\nWithout --pretrained_model_name_or_path, sizes are multiples of 8, the default "
            "resolution is 512, and no prompt is compared with what a text encoder reads."
        )
    if sheet.sheet:
        write_contact_sheet(Path(sheet.sheet), cells)
        shown = f"{len(cells)} of {len(images)} images"
        yield f"\ncontact sheet: {for_terminal_line(sheet.sheet)}, {shown}"


def _with_base(config: TrainingConfig) -> tuple[TrainingConfig, Any, Any]:
    """Return the options with the base's defaults, its family and its pipeline without weights."""
    if not config.pretrained_model_name_or_path:
        side = config.resolution or max(config.resolutions or [512])
        return replace(config, resolution=side), None, None
    from gralora_diffusion.base_models.loading import find_base_family
    from gralora_diffusion.base_models.meta_base import empty_base

    from .checks.base import resolve_defaults
    from .runtime.acceleration import DTYPES

    family = find_base_family(config)
    pipe = empty_base(config, family, DTYPES["no"])
    return resolve_defaults(config, family, pipe, "no"), family, pipe


def _numbers(
    config: TrainingConfig,
    parts: Sequence[SampledSet],
    images: Sequence[Example],
    classes: Sequence[Example],
    held_out: int,
) -> Iterator[str]:
    """Yield tables of the sets and of the sizes."""
    from .data.dataset import TrainingSet
    from .data.sets import described_sets

    samples = TrainingSet(parts, config.seed, batch_size=config.train_batch_size)
    captions = {caption for image in images for caption in image.captions}
    yield from _columns(
        [
            ("images", f"{len(images)}, with {len(captions)} different captions"),
            *((f"  set {n}", text) for n, text in enumerate(described_sets(config, images), 1)),
            *([("class", f"{len(classes)} images")] if classes else []),
            *([("held out", f"{held_out} images, never trained on")] if held_out else []),
            ("prompts", f"{len(samples.prompts)} different"),
            ("epoch", f"{len(samples)} samples in batches of {config.train_batch_size}"),
        ]
    )
    yield ""
    counts, padding = Counter(samples.targets), samples.stream.padding
    sizes = [
        (f"{height} x {width}", str(count), str(padding.get((height, width), 0) or ""))
        for (height, width), count in sorted(counts.items())
    ]
    yield from _columns([("height x width", "images", "repeated in an epoch"), *sizes])
    yield ""


def _looked_at(
    parts: Sequence[SampledSet], config: TrainingConfig, sheet: SheetOptions
) -> tuple[list[int], list[tuple[Any, str, str]]]:
    """Decode all images; return their hashes, and the cells of the sheet if one is wanted."""
    from .data.contact_sheet import as_image
    from .data.similarity import difference_hash

    count = sum(len(part.examples) for part in parts)
    every = -(-count // sheet.sheet_images)
    hashes: list[int] = []
    cells = []
    for part in parts:
        plan = part.plans[0]
        for example in part.examples:
            image = example.load()
            if sheet.sheet and len(hashes) % every == 0:
                key = example.content_key
                crop = plan.kept(example.size, key, config.cached_crops, config.seed)[0]
                prompt = part.caption_rules.variants(example.caption, config.seed)[0]
                label = f"{example.name}, {crop.height} x {crop.width}"
                cells.append((as_image(plan.pixel_values(image, crop)), label, prompt))
            hashes.append(difference_hash(image))
    return hashes, cells


def _alike(images: Sequence[Example], hashes: Sequence[int]) -> Iterator[Finding]:
    """Yield findings about images that come more than once."""
    from .data.similarity import equal_groups, near_pairs

    names, keys = [image.name for image in images], [image.content_key for image in images]
    same = [" = ".join(names[n] for n in group) for group in equal_groups(keys)]
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    near = near_pairs({number: hashes[number] for number in first.values()})
    yield "the same file", same
    yield "nearly the same", [f"{names[a]} ~ {names[b]}" for a, b in near]


def _unusual(parts: Sequence[SampledSet]) -> Iterator[Finding]:
    """Yield findings about crops and captions."""
    from .data.caption_variants import TRIGGER

    enlarged, cut, without = [], [], []
    for part in parts:
        trigger = part.caption_rules.trigger.lower()
        for example in part.examples:
            shown = min(plan.shown(example.size) for plan in part.plans)
            if any(plan.enlarges(example.size) for plan in part.plans):
                enlarged.append(f"{example.name} ({example.size[0]}x{example.size[1]})")
            if shown < _WELL_SHOWN:
                cut.append(f"{example.name} ({shown:.0%})")
            texts = [caption.lower() for caption in example.captions]
            if not all(trigger in text or TRIGGER in text for text in texts):
                without.append(example.name)
    yield "enlarged to the size that they are trained at", enlarged
    yield f"a crop shows less than {_WELL_SHOWN:.0%} of the image", cut
    yield "captions without the trigger word, which is put before them", without


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
