"""Prompts times adapters times strengths, and the bare base, all from the same noise.

``python -m gralora_diffusion.studio.engine.comparing FILE`` reads what to compare from a JSON file
and generates it into the file's folder: an image for each cell, with its settings, and the grid.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from gralora_diffusion.adapters.placement.layer_config import is_finite_number, is_integer
from gralora_diffusion.io.file_names import public_name
from gralora_diffusion.io.json_files import parse_object, read_object
from gralora_diffusion.io.process import log_to_terminal, print_safely, quiet_libraries
from gralora_diffusion.io.regular_files import is_regular
from gralora_diffusion.io.tensor_files import replacing
from gralora_diffusion.options.path_names import path_problem

SPEC_NAME, GRID_NAME = "comparison.json", "grid.png"
_MOST_BYTES = 1 << 20
_MOST_CELLS = 1000


@dataclass(frozen=True)
class Row:
    """A row of a comparison.

    Attributes:
        scales: adapter -> strength; empty for the base alone.
        lora: its adapter is a LoRA, which diffusers loads.
    """

    label: str
    scales: dict[str, float]
    lora: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Attributes:
        base: a diffusers folder, a Hub id or a single file.
        adapters: GraLoRA files, folders or Hub ids.
        loras: LoRA files, folders or Hub ids, such as exports.
        scales: strengths of each adapter and LoRA.
        blends: shares of the second of two adapters, whose strengths then add up to 1.
        with_base: also generate with the base alone.
        seeds: the noise of the images; each prompt has an image for each seed.
        guidance_scale, size, max_sequence_length: the pipeline's own if None. The last is the
            maximum number of tokens of a prompt.
    """

    base: str
    prompts: list[str]
    adapters: list[str] = field(default_factory=list)
    loras: list[str] = field(default_factory=list)
    scales: list[float] = field(default_factory=lambda: [1.0])
    blends: list[float] = field(default_factory=list)
    with_base: bool = True
    seeds: list[int] = field(default_factory=lambda: [0])
    negative_prompt: str | None = None
    steps: int = 30
    guidance_scale: float | None = None
    size: int | None = None
    max_sequence_length: int | None = None

    @property
    def rows(self) -> list[Row]:
        """The rows from top to bottom."""
        rows = [Row("base", {})] if self.with_base else []
        for adapter in self.adapters:
            rows += [Row(f"{_label(adapter)}\nx {s:g}", {adapter: s}) for s in self.scales]
        for share in self.blends if len(self.adapters) == 2 else ():
            first, second = self.adapters
            label = f"{_label(first)} x {1 - share:g}\n+ {_label(second)} x {share:g}"
            rows.append(Row(label, {first: 1 - share, second: share}))
        for lora in self.loras:
            label = public_name(lora.removesuffix(".safetensors"))
            rows += [Row(f"{label}\nx {s:g}", {lora: s}, lora=True) for s in self.scales]
        return rows

    @property
    def columns(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each column."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    def problems(self) -> list[str]:
        """Return why it cannot be generated, before anything is loaded."""
        found = []
        if not self.base.strip():
            found.append("the base is missing. Give a diffusers folder, a Hub id or a file")
        for text in (self.base.strip(), *self.adapters, *self.loras):
            if problem := path_problem(text):
                found.append(f"{text!r:.80} {problem}")
        if not self.prompts:
            found.append("there is no prompt. Give one on each line")
        each = len(self.adapters) + len(self.loras)
        rows = self.with_base + each * len(self.scales) + len(self.blends)
        cells = rows * len(self.prompts) * len(self.seeds)
        if cells > _MOST_CELLS:
            found.append(f"these are {cells:,} images; at most {_MOST_CELLS:,} are compared")
        blended = self.blends and len(self.adapters) == 2
        if cells <= _MOST_CELLS and not (self.with_base or (each and self.scales) or blended):
            found.append("there is nothing to compare. Choose an adapter, or the base alone")
        if each and not self.scales:
            found.append("there is no strength. Give one or several, such as 0.5 1")
        if self.blends and len(self.adapters) != 2:
            found.append("a blend needs two adapters. Choose two, or leave the blend empty")
        if any(not 0 <= share <= 1 for share in self.blends):
            found.append("the share of a blend must be from 0 to 1")
        if not all(map(is_finite_number, self.scales)):
            found.append("a strength must be a finite number")
        if self.guidance_scale is not None and not is_finite_number(self.guidance_scale):
            found.append("the guidance scale must be a finite number")
        if self.steps < 1:
            found.append(f"the steps are {self.steps}; they must be at least 1")
        if not self.seeds or any(not 0 <= seed < 2**63 for seed in self.seeds):
            found.append("a seed must be a whole number from 0")
        if self.size is not None and (self.size < 8 or self.size % 8):
            found.append(f"the size is {self.size}; it must be a positive multiple of 8")
        if self.max_sequence_length is not None and self.max_sequence_length < 1:
            tokens = self.max_sequence_length
            found.append(f"the tokens of a prompt are {tokens}; they must be at least 1")
        return found

    def to_json(self) -> str:
        """Return the text that :func:`read` reads."""
        return json.dumps(asdict(self), indent=1)


def _label(adapter: str) -> str:
    path = Path(adapter)
    return public_name(str(path.parent) if is_regular(path) else adapter)


def read(path: Path) -> Comparison:
    """Read a comparison.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not contain a comparison.
    """
    values = read_object(path, _MOST_BYTES)
    for name, value in values.items():
        if name in _KINDS and not _KINDS[name](value):
            raise ValueError(f"{path.name} does not contain a comparison: {name} is {value!r:.80}")
    try:
        return Comparison(**values)
    except TypeError as error:
        raise ValueError(f"{path.name} does not contain a comparison: {error}") from error


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _list_of(is_item: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(is_item, value))


def _or_none(is_value: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_value(value)


#: Field of a comparison -> whether a value from JSON is one of its kind.
_KINDS: dict[str, Callable[[object], bool]] = {
    "base": _is_text,
    "prompts": _list_of(_is_text),
    "adapters": _list_of(_is_text),
    "loras": _list_of(_is_text),
    "scales": _list_of(is_finite_number),
    "blends": _list_of(is_finite_number),
    "with_base": lambda value: isinstance(value, bool),
    "seeds": _list_of(is_integer),
    "negative_prompt": _or_none(_is_text),
    "steps": is_integer,
    "guidance_scale": _or_none(is_finite_number),
    "size": _or_none(is_integer),
    "max_sequence_length": _or_none(is_integer),
}


def cell_name(row: int, column: int) -> str:
    """Return the name of a cell's image."""
    return f"{row:02d}-{column:02d}.png"


def settings_of(path: Path) -> dict[str, Any]:
    """Return what an image of a cell was generated with; {} if it does not say so."""
    with suppress(OSError):
        status = path.stat()
        return dict(_settings(path, status.st_mtime_ns, status.st_size))
    return {}


@lru_cache(maxsize=4 * _MOST_CELLS)
def _settings(path: Path, changed: int, size: int) -> dict[str, Any]:
    del changed, size  # another content
    from PIL import Image

    from gralora_diffusion.io.image_parameters import OWN

    if not is_regular(path):
        return {}
    try:
        with Image.open(path, formats=("PNG",)) as image:
            # all of the image is decoded: its texts may come after its pixels
            return parse_object(image.text.get(OWN, ""))  # type: ignore[attr-defined]
    except Exception:  # Pillow raises almost any kind of error on a damaged file
        return {}


def generate_into(folder: Path, comparison: Comparison) -> None:
    """Generate all cells and the grid. A cell's file appears when it is complete."""
    from PIL import Image

    from gralora_diffusion.io.image_parameters import save_png
    from gralora_diffusion.pipelines.generation import generate, parameters_of
    from gralora_diffusion.pipelines.grid import labelled_grid
    from gralora_diffusion.pipelines.sample_command import load_lora, open_pipeline, parser

    command = parser()
    # options of `gralora sample`, so that the base is loaded as there; the prompts come below
    line = ["--base", comparison.base, "--prompt", "-", "--output", "grid.png"]
    if comparison.negative_prompt:
        line.append(f"--negative_prompt={comparison.negative_prompt}")
    if comparison.max_sequence_length is not None:
        line.append(f"--max_sequence_length={comparison.max_sequence_length}")
    with quiet_libraries():
        pipe = open_pipeline(command.parse_args(line), command)
        names = {adapter: f"adapter_{i}" for i, adapter in enumerate(comparison.adapters)}
        for source, name in names.items():
            try:
                print_safely(pipe.load_gralora_weights(source, name))
            except (OSError, ValueError) as error:
                command.error(f"adapter {source}: {error}")
        grid: list[tuple[str, list[Image.Image]]] = []
        loaded = None  # the LoRA
        for number, row in enumerate(comparison.rows):
            label = " ".join(row.label.split())
            print_safely(f"row {number + 1} of {len(comparison.rows)}: {label}")
            if row.lora:  # one at a time, after all other rows
                (lora, strength), *_ = row.scales.items()
                if lora != loaded:
                    if names and loaded is None:
                        pipe.unload_gralora_weights()
                    elif loaded is not None:
                        pipe.unload_lora_weights()
                    load_lora(pipe, lora, command)
                    loaded = lora
                pipe.set_adapters("sampled", strength)
            elif row.scales:
                pipe.set_adapters([names[a] for a in row.scales], [*row.scales.values()])
            elif names:
                pipe.set_adapters(next(iter(names.values())), 0.0)
            # a blend is described by its label
            adapter, scale = next(iter(row.scales.items()), (None, None))
            if len(row.scales) > 1:
                adapter, scale = label, None
            images = []
            for column, (prompt, seed) in enumerate(comparison.columns):
                options: dict[str, Any] = {
                    "seed": seed,
                    "size": comparison.size,
                    "negative_prompt": comparison.negative_prompt,
                    "guidance_scale": comparison.guidance_scale,
                    "inference_steps": comparison.steps,
                    "max_sequence_length": comparison.max_sequence_length,
                }
                ((image,),) = generate(pipe, [prompt], **options)
                described = parameters_of(
                    pipe, [prompt], base=comparison.base, adapter=adapter, scale=scale, **options
                )
                with replacing(folder / cell_name(number, column), sync=False) as temporary:
                    save_png(image, temporary, described[0][0])
                images.append(image)
            grid.append((row.label, images))
        captions = [f"{prompt}, seed {seed}" for prompt, seed in comparison.columns]
        with replacing(folder / GRID_NAME) as temporary:
            save_png(labelled_grid(grid, captions), temporary, described[0][0])


def main(argv: Sequence[str] | None = None) -> None:
    """Generate the comparison in the file that the command line names."""
    (path,) = sys.argv[1:] if argv is None else argv
    log_to_terminal()
    comparison = read(Path(path))
    if problems := comparison.problems():
        print_safely("error: " + "\n  ".join(problems), error=True)
        sys.exit(2)
    generate_into(Path(path).parent, comparison)


if __name__ == "__main__":
    main()
