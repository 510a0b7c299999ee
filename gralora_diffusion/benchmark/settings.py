"""The benchmark's options as one object, and their checks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from gralora_diffusion.base_models.optional_libraries import LIBRARIES, leave_out_unused
from gralora_diffusion.benchmark.evaluation.encoder_sources import source_problem
from gralora_diffusion.benchmark.evaluation.endpoint import (
    Declared,
    Endpoint,
    parse_comparison,
    usual_comparisons,
    without_rate,
)
from gralora_diffusion.benchmark.evaluation.scores import is_known
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.staging import lies_in
from gralora_diffusion.options.fields import (
    Place,
    group_table,
    options_with,
    path_problems,
    value_problems,
)
from gralora_diffusion.options.path_names import from_home, path_problem
from gralora_diffusion.training.config.training_config import TrainingConfig

from .methods import Method
from .options import (
    BENCHMARK_GROUPS,
    ComparedOptions,
    EvaluationOptions,
    GenerationOptions,
    RunOptions,
    set_by_benchmark,
)
from .rates import at_rates, rate_problems

ENCODERS = (
    "dinov2=facebook/dinov2-base",
    "dino=facebook/dino-vits16",
    "clip=openai/clip-vit-base-patch32",
)
DRIFT_PROMPTS = (
    "a photo of a red bicycle leaning on a wall",
    "a bowl of fruit on a wooden table",
    "a mountain lake at sunrise",
    "a portrait of an old fisherman",
    "a busy street in Tokyo at night",
    "a watercolor painting of tulips",
    "a steam train crossing a bridge",
    "a cup of coffee beside an open book",
    "an astronaut standing on the moon",
    "a black and white photo of a city skyline",
    "a cottage in a snowy forest",
    "a sailing boat on a stormy sea",
)
#: Folders that a run writes to, within its own folder.
MADE = ("units", "base", "class_pictures", "held_out", "report")


@dataclass(kw_only=True)
class BenchmarkSettings(RunOptions, EvaluationOptions, GenerationOptions, ComparedOptions):
    """All options; ``training`` contains those of the trainer. Call :meth:`check`."""

    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if not self.protocols:
            captioned = self.captioned_dir or self.training.dataset_name
            self.protocols = ["captioned", "drift"] if captioned else ["subject", "drift", "prior"]
        self.methods = self.methods or ["base", "lora-r32", "lora-r64", "gralora-r32-k2"]
        if self.rates and not self._rate_problems():
            self.methods = at_rates(self.methods, self.rates, self.training.learning_rate)
        self.seeds = [0] if self.seeds is None else self.seeds
        self.report_only = self.report_only or self.blind or bool(self.blind_answers)
        self.drift_prompts = self.drift_prompts or list(DRIFT_PROMPTS)
        self.encoders = self.encoders or list(ENCODERS)
        # the shell expands ~ only at the start of a word, and nobody does in a YAML file
        for name in options_with(type(self), Place):
            if value := getattr(self, name):
                setattr(self, name, from_home(value))
        self.encoders = ["=".join(map(from_home, text.split("=", 1))) for text in self.encoders]

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def parsed_methods(self) -> list[Method]:
        return [Method.parse(name) for name in self.methods or ()]

    @property
    def encoder_sources(self) -> dict[str, str]:
        """Name of an encoder -> Hub id or folder."""
        pairs = (text.partition("=") for text in self.encoders or ())
        return {name: source for name, _, source in pairs}

    @property
    def declared(self) -> Declared | None:
        """The endpoint and the comparisons that were declared before the run, if any were."""
        if self.endpoint is None:
            return None
        return Declared.parse(self.endpoint, self.comparisons or ())

    def declare(self) -> None:
        """Choose what a new run decides, where the options leave it open."""
        self.seeding = self.seeding or "subject"
        several = len(self._curves) < len(self.methods or ())
        if self.endpoint is None:
            names = ("clip_i" if name == "clip" else name for name in self.encoder_sources)
            first = next(filter(is_known, names), None)
            along = first and several and "drift" in (self.protocols or ())
            self.endpoint = f"{first}@drift_{first}" if along else first
        if self.comparisons is None and self.endpoint:
            self.comparisons = usual_comparisons(self._comparable) or None

    def undeclared_methods(self) -> list[str]:
        """Report comparisons of methods that a new run does not have."""
        names = self._comparable
        return [
            f"--comparisons contains {text}, but {name} is not one of {', '.join(names)}"
            for text in self.comparisons or ()
            for name in text.split(":")
            if name not in names
        ]

    @property
    def _curves(self) -> list[str]:
        return list(dict.fromkeys(map(without_rate, self.methods or ())))

    @property
    def _comparable(self) -> list[str]:
        """The names that a comparison may contain: curves if the endpoint compares curves."""
        return self._curves if "@" in (self.endpoint or "") else list(self.methods or ())

    def check(self) -> None:
        """Check everything that can be checked before data or models are read.

        Raises:
            ConfigError: there are problems. The error lists all of them.
        """
        if problems := self.problems():
            raise ConfigError(problems)

    def problems(self) -> list[str]:
        """Return what :meth:`check` raises."""
        if unusable := [*self._unusable_paths()]:  # the other checks look for them
            return unusable
        problems = [*self._problems()]
        for name in self.methods or ():
            try:
                Method.parse(name)
            except ConfigError as error:
                commas = f"--methods contains {name!r}. Separate methods by spaces"
                problems += [commas] if "," in name else error.problems
        if not problems:
            problems += self._same_methods()
        return problems

    def _unusable_paths(self) -> Iterator[str]:
        """Yield a problem for each path that no file system can be asked for."""
        for options in (self, self.training):
            yield from path_problems(options)
        for name, source in self.encoder_sources.items():
            if problem := path_problem(source):
                yield f"--encoders contains {f'{name}={source}'!r:.80}, which {problem}"

    def _same_methods(self) -> list[str]:
        """Report methods that are written in two ways and would count as two."""
        names: dict[Method, str] = {}
        problems = []
        for method in self.parsed_methods:
            rate = str(float(method.learning_rate)) if method.learning_rate else ""
            first = names.setdefault(replace(method, learning_rate=rate), method.name)
            if first != method.name:
                problems.append(
                    f"--methods contains {first} and {method.name}, which are the same. Keep one"
                )
        return problems

    def _problems(self) -> list[str]:
        problems = list(value_problems(self))
        protocols, training = self.protocols or [], self.training
        problems += self._rate_problems()
        problems += _unreadable("endpoint", [self.endpoint or "dino"], Endpoint.parse)
        problems += _unreadable("comparisons", self.comparisons or (), parse_comparison)
        known = ("subject", "captioned", "drift", "prior")
        captioned = bool(self.captioned_dir), bool(training.dataset_name)
        if unknown := [p for p in protocols if p not in known]:
            problems.append(
                f"--protocols contains {', '.join(unknown)}; the protocols are {', '.join(known)}"
            )
        elif ("subject" in protocols) == ("captioned" in protocols):
            problems.append("--protocols needs either subject or captioned, but not both")
        elif "captioned" in protocols and sum(captioned) != 1:
            problems.append("--protocols captioned needs one of --captioned_dir and --dataset_name")
        elif "subject" in protocols and any(captioned):
            problems.append(
                "--captioned_dir and --dataset_name need --protocols captioned instead of subject"
            )
        elif "subject" in protocols and not self.dreambooth_dir:
            problems.append(
                "--dreambooth_dir is missing. Give a clone of https://github.com/google/dreambooth"
            )
        if not training.dataset_name:
            rows = [f"--{name}" for name in ("captions",) if self.captions]
            rows += ["--split peft"] if self.split == "peft" else []
            problems += [f"{option} needs --dataset_name, whose rows it counts" for option in rows]
        elif self.captions and training.caption_column:
            problems.append("--captions and --caption_column exclude each other. Leave out one")
        if "prior" in protocols and "subject" not in protocols:
            problems.append(
                "--protocols contains prior, which needs subject: it evaluates the subject's class"
            )
        for name in ("methods", "seeds", "subjects"):
            given = getattr(self, name) or []
            if twice := sorted({str(v) for v in given if given.count(v) > 1}):
                problems.append(f"--{name} contains {', '.join(twice)} twice. Keep one")
        if negative := [seed for seed in self.seeds or () if seed < 0]:
            problems.append(f"--seeds contains {negative[0]}; a seed must be at least 0")
        for text in self.encoders or ():
            name, equals, source = text.partition("=")
            if not (equals and source and name.isidentifier()):
                problems.append(
                    f"--encoders contains {text!r}; it must be NAME=SOURCE, as in {ENCODERS[0]}"
                )
            # writing a report needs no encoders
            elif not self.report_only and (problem := source_problem(source)):
                problems.append(f"--encoders contains {text!r}: {problem}")
        if self.blind and self.blind_answers:
            problems.append(
                "--blind writes a new page, and --blind_answers reads the answers to one that is "
                "there. Give one of them"
            )
        if not self.report_only:
            problems += self._read_and_written()
        problems += self._ray_problems()
        full = any(m.startswith("full") for m in self.methods or ())
        if full and (training.quantization or training.bnb_quantization_config_path):
            problems.append(
                "--methods contains full, which cannot train the weights of a quantized base. "
                "Leave out full or --quantization"
            )
        if training.with_prior_preservation and "captioned" in protocols:
            problems.append(
                "--with_prior_preservation needs --protocols subject instead of captioned"
            )
        teacher = training.with_prior_preservation and training.prior_source == "teacher"
        if teacher and full:
            problems.append(
                "--methods contains full, which has no frozen base to be the teacher. Leave it "
                "out, or give --prior_source images"
            )
        return problems

    def _rate_problems(self) -> list[str]:
        rate = self.training.learning_rate
        return rate_problems(self.methods or (), self.rates, rate) if self.rates else []

    def _ray_problems(self) -> list[str]:
        problems = []
        if self.ray is not None and importlib.util.find_spec("ray") is None:
            problems.append(
                "--ray needs the package ray: pip install 'gralora-diffusion[cluster]'. Or leave "
                "out --ray"
            )
        if (self.ray_gpus_per_trial or 0) > 1:
            problems.append(
                f"--ray_gpus_per_trial is {self.ray_gpus_per_trial:g}, but a trial uses one GPU. "
                "Give 1, or less to share a GPU"
            )
        if self.ray_gpus_per_trial is not None and self.ray is None:
            problems.append("--ray_gpus_per_trial has no effect without --ray. Leave it out")
        return problems

    def _read_and_written(self) -> list[str]:
        """Report inputs that the run would write to."""
        read = {
            f"--{name}": getattr(options, name)
            for options in (self, self.training)
            for name, place in options_with(type(options), Place).items()
            if place.read
        }
        read |= {f"--encoders {name}": path for name, path in self.encoder_sources.items()}
        here = {name: Path(path) for name, path in read.items() if path}
        made = [self.folder / name for name in MADE]
        return [
            f"--output_dir is {self.output_dir!r}, and the run would write to {name} "
            f"{str(path)!r} because one lies in the other. Give another folder"
            for name, path in here.items()
            if lies_in(self.folder, path) or any(lies_in(path, folder) for folder in made)
        ]

    def warnings(self) -> list[str]:
        """Return warnings about options that have no effect."""
        if "captioned" not in (self.protocols or ()):
            return []
        idle = [f"--{name}" for name in ("dreambooth_dir", "subjects") if getattr(self, name)]
        theirs = f", even if --suite {self.suite} sets them" if self.suite else ""
        learned = "--captioned_dir" if self.captioned_dir else "--dataset_name"
        use = f"these options have no effect with {learned}: {' and '.join(idle)}{theirs}"
        return [use] if idle else []

    def record(self) -> dict[str, Any]:
        """Return the options that differ from the defaults, in their groups' order."""
        default = BenchmarkSettings()
        always = ("output_dir", "methods", "seeds")
        own = {
            f.name: getattr(self, f.name)
            for group in BENCHMARK_GROUPS
            for f in fields(group)
            if f.name in always or getattr(self, f.name) != getattr(default, f.name)
        }
        # these belong to a command, not to a run
        for name in ("suite", "rates", "retry_failed", "report_only", "ray", "ray_gpus_per_trial"):
            own.pop(name, None)
        training = yaml.safe_load(self.training.to_yaml())
        own = {name: value for name, value in own.items() if not name.startswith("blind")}
        return own | {k: v for k, v in training.items() if k not in set_by_benchmark()}


def _unreadable(name: str, texts: Sequence[str], read: Callable[[str], object]) -> Iterator[str]:
    """Yield a problem for each text of an option that cannot be read."""
    for text in texts:
        try:
            read(text)
        except ValueError as error:
            yield f"--{name}: {error}"


def options_table() -> str:
    """Return ``docs/benchmark_options.md``: the benchmark's own options in Markdown tables."""
    parts = [
        "# Options of the benchmark",
        "This page is generated from the options themselves by "
        "`gralora_diffusion.benchmark.settings.options_table`. Give an option as `--name value`, "
        "or as `name: value` in the file that `--config` names; the command line overrides the "
        "file. [The trainer's options](options.md) can be given as well, except: "
        + ", ".join(f"`{name}`" for name in set_by_benchmark())
        + ".",
        *map(group_table, BENCHMARK_GROUPS),
    ]
    return "\n\n".join(parts) + "\n"


def leave_out_unused_by(settings: BenchmarkSettings) -> None:
    """Keep libraries from being imported that these options do not need."""
    training = settings.training
    needed = {"bitsandbytes"} if training.optimizer == "adamw8bit" else set()
    if training.quantizes:
        needed |= {*LIBRARIES}
    leave_out_unused([training.pretrained_model_name_or_path], needed)
