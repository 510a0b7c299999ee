"""The prompts of the validation images, from the options and from a file, each with its settings.

A text file has a prompt a line, perhaps with kohya's flags after it. A YAML file is a list of
prompts, or of mappings with a prompt and settings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.regular_files import read_regular
from gralora_diffusion.io.yaml_files import compose
from gralora_diffusion.options.command_parser import must_be
from gralora_diffusion.options.fields import Limits

from .options import ValidationOptions

_MOST_BYTES = 1 << 20
_MOST_PROMPTS, _MOST_PROBLEMS = 1000, 100
#: A flag in a line of a text file, such as " --w 512", and what kohya's scripts mean by it.
_FLAG = re.compile(r"(?:^|\s)--([A-Za-z]+)(?=\s|$)")
_FLAGS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "num_inference_steps",
    "l": "guidance_scale",
}


@dataclass(frozen=True, kw_only=True)
class ValidationPrompt:
    """A prompt and how its images are generated; None is what the options say.

    Attributes:
        width, height: in pixels; both or none.
        seed: of the first image; each further one has the next seed.
        scale: strength of the adapter.
        images: number of images.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    scale: float = 1.0
    images: int | None = None


_LIMITS = {
    "width": Limits(at_least=8),
    "height": Limits(at_least=8),
    "seed": Limits(at_least=0, below=2**32),
    "num_inference_steps": Limits(at_least=1),
    "guidance_scale": Limits(at_least=0),
    "scale": Limits(),
    "images": Limits(at_least=1),
}
_WHOLE = _LIMITS.keys() - {"guidance_scale", "scale"}
_NAMES = [f.name for f in fields(ValidationPrompt)]


def validation_prompts(options: ValidationOptions, divisor: int = 8) -> list[ValidationPrompt]:
    """Return the prompts of the options, then those of their file.

    Args:
        divisor: what width and height must be multiples of.

    Raises:
        ConfigError: the file cannot be read or has problems. The error lists all of them, each with
            its line.
    """
    found = [ValidationPrompt(prompt=prompt) for prompt in options.validation_prompt or ()]
    if options.validation_prompts_file is None:
        return found
    path = Path(options.validation_prompts_file)
    option = f"--validation_prompts_file is {str(path)!r}"
    try:
        text = read_regular(path, _MOST_BYTES).decode("utf-8-sig")
        entries = list(_of_yaml(text) if path.suffix.lower() in (".yaml", ".yml") else _of(text))
    except OSError as error:
        raise ConfigError([f"{option}: it cannot be read: {error.strerror or error}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{option}: it is not text in UTF-8 ({error.reason})"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{option}: it is not YAML: {' '.join(str(error).split())}"]) from error
    except ValueError as error:
        raise ConfigError([f"{option}: {error}"]) from error
    if len(entries) > _MOST_PROMPTS:
        problem = f"it contains {len(entries):,} prompts, of {_MOST_PROMPTS} at most"
        raise ConfigError([f"{option}: {problem}"])
    problems: list[str] = []
    for line, entry in entries:
        if len(problems) >= _MOST_PROBLEMS:
            problems.append(f"{path}:{line}: the file is not read further. Mend these first")
            break
        values, wrong = _checked(entry, divisor)
        problems += [f"{path}:{line}: {problem}" for problem in wrong]
        if not wrong:
            found.append(ValidationPrompt(**values))
    if not entries:
        problems.append(f"{option}: it contains no prompt")
    if problems:
        raise ConfigError(problems)
    return found


#: Setting -> its text, or a problem if the entry has no such form.
Entry = dict[str, str] | str


def _of(text: str) -> Iterator[tuple[int, Entry]]:
    """Yield (line, entry) of a text file; lines that begin with # are comments."""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        prompt, *rest = _FLAG.split(line)
        entry: dict[str, str] = {"prompt": prompt.strip()}
        for flag, value in zip(rest[::2], rest[1::2], strict=True):
            name = _FLAGS.get(flag, f"--{flag}")
            if name in entry:
                yield number, f"--{flag} is given twice. Remove one"
                break
            entry[name] = value.strip()
        else:
            yield number, entry


def _of_yaml(text: str) -> Iterator[tuple[int, Entry]]:
    """Yield (line, entry) of a YAML list; values are texts as they are written."""
    root = compose(text)
    if root is None:
        return
    if not isinstance(root, yaml.SequenceNode):
        yield root.start_mark.line + 1, "it must be a list, with a - before each prompt"
        return
    for node in root.value:
        line = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            yield line, {"prompt": node.value}
        elif not isinstance(node, yaml.MappingNode):
            yield line, "it must be a prompt, or settings with a prompt"
        elif not all(isinstance(part, yaml.ScalarNode) for pair in node.value for part in pair):
            yield line, "its settings must be plain values"
        else:
            names = Counter(key.value for key, _ in node.value)
            if twice := sorted(name for name, count in names.items() if count > 1):
                yield line, f"{', '.join(twice)} is given twice. Remove one"
            else:
                yield line, {key.value: value.value for key, value in node.value}


def _checked(entry: Entry, divisor: int) -> tuple[dict[str, Any], list[str]]:
    """Return the values of an entry, and the problems with it."""
    if isinstance(entry, str):
        return {}, [entry]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, text in entry.items():
        if len(problems) >= _MOST_PROBLEMS:
            break
        if name not in _NAMES:
            allowed = [f"--{flag}" for flag in _FLAGS] if name.startswith("--") else _NAMES
            problems.append(f"{name} is not a setting; {must_be(name, allowed)}")
        elif name not in _LIMITS:
            values[name] = text
        else:
            try:
                values[name] = int(text) if name in _WHOLE else float(text)
            except ValueError:
                wanted = "a whole number" if name in _WHOLE else "a number"
                problems.append(f"{name} is {text!r}; it must be {wanted}")
                continue
            if not _LIMITS[name].allow(values[name]):
                wanted = _LIMITS[name].wanted(values[name])
                problems.append(f"{name} is {text:.80}; it must be {wanted}")
            elif name in ("width", "height") and values[name] % divisor:
                problems.append(f"{name} is {text}; it must be a multiple of {divisor}")
    if not entry.get("prompt", "").strip():
        problems.append("there is no prompt")
    if ("width" in entry) != ("height" in entry):
        problems.append("width and height must be given together")
    return values, problems
