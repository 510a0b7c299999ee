"""One trial: a method is attached to the base, trained, sampled, evaluated and detached."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import free_memory

from gralora_diffusion.adapters.placement.targets import find_targets
from gralora_diffusion.base_models.loading import (
    existing_models,
    find_base_family,
    find_pipeline_class,
    load_base,
)
from gralora_diffusion.benchmark.evaluation.encoders import Encoder, load_encoder
from gralora_diffusion.benchmark.evaluation.endpoint import UPDATE_NORM
from gralora_diffusion.benchmark.evaluation.metrics import (
    Scores,
    score_captioned,
    score_drift,
    score_prior,
    score_subject,
)
from gralora_diffusion.benchmark.evaluation.results import PromptResult, TrialResult
from gralora_diffusion.families import ControlCount
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.precision import tf32_products
from gralora_diffusion.io.tensor_files import replacing
from gralora_diffusion.pipelines.generation import generate
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.checks.base import resolve_defaults
from gralora_diffusion.training.checks.family import check_family_options
from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.data.class_images import generate_class_images
from gralora_diffusion.training.data.data_module import find_class_images
from gralora_diffusion.training.data.seeds import seed_from
from gralora_diffusion.training.loop import Trainer
from gralora_diffusion.training.optimization.adapters import adapter_configs, trained_components
from gralora_diffusion.training.optimization.step import TrainingDiverged
from gralora_diffusion.training.outputs.validation import encoding_apart
from gralora_diffusion.training.runtime.acceleration import DTYPES, make_accelerator

from .diagnostics import DiagnosticsLog, update_norm
from .effective_settings import effective_settings, named_layers
from .ledger import ADAPTER, IMAGES
from .methods import Method, bare_afterwards
from .settings import BenchmarkSettings
from .shared_images import (
    DRIFT,
    PRIOR,
    SharedImages,
    base_images,
    image_files,
    is_whole,
    shared_images,
    wanted_images,
)
from .tasks import Task
from .versions import versions

#: Trials with different seeds sample from different noise, those with one seed from the same.
_NOISES_PER_SEED = 10_000

#: The files of each prompt.
Generated = list[list[Path]]


def trial_seed(seed: int, subject: str) -> int:
    """Return the seed of a subject's trials, from 0 to 2**31 - 1, for all methods alike.

    If all subjects had the same initial factors, training noise and noise of the images, their
    trials would share an error that no number of subjects averages out.
    """
    return seed_from(seed, "subject", subject) >> 32


def _check_text_alone(config: TrainingConfig, count: ControlCount, fills: bool) -> None:
    """Check that a base generates from text alone, as the trials do.

    Args:
        count: of its control images.
        fills: whether it fills masks.

    Raises:
        ConfigError: it needs images.
    """
    if fills or count.least:
        base = f"--pretrained_model_name_or_path {config.pretrained_model_name_or_path}"
        does, needs = ("fills images", "and their masks") if fills else ("edits images", "to edit")
        raise ConfigError(
            [
                f"{base}: this base {does}, and the benchmark has no images {needs}: its trials "
                "generate from text alone. Give a text-to-image base"
            ]
        )


class Runner:
    """Runs the trials of a process, which share the encoders and the base, bare between trials.

    Raises:
        ConfigError: the base or an encoder cannot be loaded.
    """

    def __init__(self, settings: BenchmarkSettings, config: TrainingConfig) -> None:
        """``config``: the trainer's options of any trial."""
        self.settings = settings
        self.accelerator = make_accelerator(config)
        self.device = self.accelerator.device
        self.family = find_base_family(config)
        check_family_options(config, self.family)
        declared = find_pipeline_class(config, self.family)
        needed = self.family.edit_pipelines.get(declared or "", ControlCount())
        _check_text_alone(config, needed, declared == self.family.inpainting_pipeline is not None)
        self.encoders = _load_encoders(settings, config, self.device)
        _check_endpoint(settings, self.encoders)
        self.pipe = load_base(config, self.family, DTYPES[self.accelerator.mixed_precision])
        needed = self.family.control_count(self.pipe)
        _check_text_alone(config, needed, self.family.fills(self.pipe))
        self._denoiser.to(self.device)

    def run(
        self, task: Task, method: Method, seed: int, folder: Path, home: Path | None = None
    ) -> TrialResult:
        """Run a trial; its images and adapter are in ``folder`` afterwards.

        The base is the same afterwards, even after an error.

        Args:
            folder: does not contain images or an adapter yet.
            home: folder to which they will be moved, if any; paths in the result are relative to
                it.

        Raises:
            ConfigError: the method does not fit the base.
            TrainingDiverged: the loss is no longer a number.
        """
        config = self._config(task, method, seed)
        components = trained_components(config, self.family)
        with tf32_products(config.allow_tf32), self._fresh_afterwards(config):
            needed = base_images(self.settings, task, seed)
            unmoved = {str(i.beginning): self._draw_shared(task, config, i) for i in needed}
            with bare_afterwards(self.pipe, components, method):
                facts, drawn = self._train_and_draw(task, method, config, folder)
        home = home or folder
        scores, prompts = self._judge(task, drawn, unmoved, folder, home)
        return TrialResult(
            task.protocol,
            task.subject,
            method.name,
            seed,
            update_rank=method.update_rank,
            scores=scores,
            prompts=prompts,
            settings=effective_settings(self.settings, method, config, self.pipe, self.device),
            versions=versions(),
            folder=home,
            **facts,
        )

    def share(self, task: Task, seed: int, only: Sequence[SharedImages]) -> None:
        """Generate those of ``only`` that are missing: images that a task's trials share."""
        config = self._config(task, Method.parse("base"), seed)
        with tf32_products(config.allow_tf32), self._fresh_afterwards(config):
            for images in only:
                self._draw_shared(task, config, images)

    def _config(self, task: Task, method: Method, seed: int) -> TrainingConfig:
        own = trial_seed(seed, task.subject) if self.settings.seeding == "subject" else seed
        config = method.configured(replace(task.config, seed=own))
        return resolve_defaults(config, self.family, self.pipe, self.accelerator.mixed_precision)

    @contextmanager
    def _fresh_afterwards(self, config: TrainingConfig) -> Iterator[None]:
        """Afterwards, the models are where they were, and there is a new accelerator.

        Training leaves text encoders and VAE on the device if its steps need them. The old
        accelerator keeps schedule, optimizer, average and fp16's scale.
        """
        models = existing_models(self.pipe, {"vae", *self.family.all_text_encoders})
        places = {model: next(model.parameters()).device for model in models}
        try:
            yield
        finally:
            for model, device in places.items():
                if next(model.parameters()).device != device:
                    model.to(device)
            self.accelerator.free_memory()
            self.accelerator = make_accelerator(config)
            free_memory()

    def _train_and_draw(
        self, task: Task, method: Method, config: TrainingConfig, folder: Path
    ) -> tuple[dict[str, Any], dict[str, Generated]]:
        """Return fields of the result, and the files of the trained weights' images."""
        if method.kind == "base":
            trainer = None
            facts = {"parameters": 0, "steps": 0, "train_seconds": 0.0, "peak_memory_gib": None}
        else:
            trainer, facts = self._train(task, method, config, folder)
        with nullcontext() if trainer is None else trainer.inference_weights():
            if trainer is not None and self.settings.keep_adapters and method.kind != "full":
                folder.joinpath(ADAPTER).mkdir(parents=True)
                method.save(self.pipe, self.family, trainer.components, folder / ADAPTER)
            began = time.perf_counter()
            wanted = wanted_images(self.settings, task)
            drawn = {
                kind: self._draw(config, folder / IMAGES, kind, *w) for kind, w in wanted.items()
            }
            facts["generation_seconds"] = time.perf_counter() - began
            names = () if trainer is None else trainer.components
            facts["update_norm"] = update_norm([getattr(self.pipe, name) for name in names])
            if method.kind == "base":
                facts["update_norm"] = 0.0
        return facts, drawn

    def _train(
        self, task: Task, method: Method, config: TrainingConfig, folder: Path
    ) -> tuple[Trainer, dict[str, Any]]:
        """Train; return the trainer at its end, and fields of the result."""
        for images in shared_images(self.settings, task, seed=0):
            if images.beginning is None:
                self._draw_shared(task, config, images)
        began = time.perf_counter()
        layers = self._watched_layers(config)
        trainer = Trainer(
            config,
            self.family,
            list(task.examples),
            find_class_images(config),
            self.accelerator,
            CheckpointStore(folder),
            pipe=self.pipe,
            attach=method.attach,
        )
        trainer.set_up()
        facts = named_layers(config, [getattr(self.pipe, name) for name in trainer.components])
        log = self._mechanism_log(layers, trainer.max_steps)
        watched = (
            nullcontext()
            if log is None
            else log.watch(trainer.optimizer, trainer.inference_weights)
        )
        with watched, closing(trainer.steps(progress=False)) as steps:
            try:
                for _ in steps:
                    pass
            except TrainingDiverged as error:
                raise TrainingDiverged(error.args[0], _after_divergence(method, config)) from None
        return trainer, {
            "parameters": sum(p.numel() for p in trainer.parameters),
            "steps": trainer.state.step,
            "train_seconds": time.perf_counter() - began,
            "peak_memory_gib": trainer.memory.gib,
            "mechanism": None if log is None else log.result(),
            **facts,
        }

    def _watched_layers(self, config: TrainingConfig) -> list[str]:
        """Return paths in the bare denoiser of the layers that all methods but ``full`` adapt.

        Returns none if no mechanism is logged.
        """
        if self.settings.mechanism_steps is None:
            return []
        name, model = self.family.denoiser, self._denoiser
        return list(find_targets(model, adapter_configs({name: model}, self.family, config)[name]))

    def _mechanism_log(self, layers: Sequence[str], max_steps: int) -> DiagnosticsLog | None:
        every = self.settings.mechanism_steps
        if every is None:
            return None
        steps = range(1, max_steps + 1, every)
        return DiagnosticsLog(self._denoiser, layers, self.settings.mechanism_k, steps)

    @property
    def _denoiser(self) -> Any:
        return getattr(self.pipe, self.family.denoiser)

    # -- images ----------------------------------------------------------------------------------

    def _draw_shared(self, task: Task, config: TrainingConfig, images: SharedImages) -> Generated:
        """Generate what is missing of shared images; return the files of each prompt, if any."""
        if images.beginning is None:
            # not with the trial's seed, because it is a matter of chance which seed comes first
            generate_class_images(replace(config, seed=0), self.family, self.accelerator)
            return []
        wanted = wanted_images(self.settings, task)[images.beginning]
        return self._draw(config, images.folder, images.beginning, *wanted)

    def _draw(
        self,
        config: TrainingConfig,
        folder: Path,
        beginning: str,
        prompts: tuple[str, ...],
        count: int,
    ) -> Generated:
        """Generate the missing images into ``folder``; return the files of each prompt."""
        files = image_files(folder, beginning, len(prompts), count)
        if all(is_whole(file) for row in files for file in row):
            return files
        folder.mkdir(parents=True, exist_ok=True)
        encoders = existing_models(self.pipe, self.family.all_text_encoders)
        with (
            self.accelerator.autocast(),
            encoding_apart(self.pipe, encoders, self.device),
            _decoding_one_by_one(self.pipe.vae),
        ):
            rows = generate(
                self.pipe,
                prompts,
                count,
                seed=_NOISES_PER_SEED * config.seed,
                size=config.resolution,
                guidance_scale=self.settings.drawing_guidance_scale,
                inference_steps=self.settings.inference_steps,
                max_sequence_length=self.family.max_sequence_length and config.max_sequence_length,
                clip_skip=config.clip_skip,
                batch_size=self.settings.drawing_batch_size,
            )
            for row, images in zip(files, rows, strict=True):
                for file, image in zip(row, images, strict=True):
                    with replacing(file) as temporary:
                        image.save(temporary, format="PNG")
        return files

    # -- scores ------------------------------------------------------------------------------------

    def _judge(
        self,
        task: Task,
        drawn: dict[str, Generated],
        unmoved: dict[str, Generated],
        folder: Path,
        home: Path,
    ) -> tuple[dict[str, float], tuple[PromptResult, ...]]:
        """Score the images; return the scores of the trial and those of each prompt."""
        encoders, wanted = self.encoders, wanted_images(self.settings, task)
        if task.protocol == "captioned":
            scores = {"": score_captioned(encoders, drawn[""], task.texts, task.real)}
        else:
            diversity = self.settings.diversity
            scores = {
                "": score_subject(
                    encoders, drawn[""], task.texts, task.real, with_diversity=diversity
                )
            }
        if DRIFT in drawn:
            scores[DRIFT] = score_drift(
                encoders, drawn[DRIFT], unmoved[DRIFT], with_half=self.settings.peft_drift
            )
        overall = {name: value for part in scores.values() for name, value in part.overall.items()}
        if PRIOR in drawn:
            (after,), (before,) = drawn[PRIOR], unmoved[PRIOR]
            of_class = score_prior(encoders, after, before, task.real)
            scores[PRIOR] = Scores(of_class, [of_class])
            overall |= of_class
        paired = task.real if task.protocol == "captioned" else ()
        prompts = [
            PromptResult(
                prompt,
                tuple(file.relative_to(folder).as_posix() for file in row),
                values,
                os.path.relpath(paired[number], home) if paired and kind == "" else None,
            )
            for kind, (texts, _) in wanted.items()
            for number, (prompt, row, values) in enumerate(
                zip(texts, drawn[kind], scores[kind].by_prompt, strict=True)
            )
        ]
        return overall, tuple(prompts)


def device_error(error: BaseException | None) -> BaseException | None:
    """Return the first error of CUDA (or HIP) among an error and its causes.

    Returns None if there is none, or if it only ran out of memory.
    """
    while error is not None:
        text = str(error)
        is_of_device = isinstance(error, getattr(torch, "AcceleratorError", ())) or (  # torch 2.8
            isinstance(error, RuntimeError) and text.startswith(("CUDA error", "HIP error"))
        )
        if is_of_device and not re.search("out of memory|ALLOC_FAILED", text):
            return error
        error = error.__cause__ or error.__context__
    return None


def _load_encoders(
    settings: BenchmarkSettings, config: TrainingConfig, device: torch.device
) -> dict[str, Encoder]:
    try:
        return {
            name: load_encoder(
                source,
                device=device,
                preprocessing=settings.preprocessing,
                cache_dir=config.cache_dir,
            )
            for name, source in settings.encoder_sources.items()
        }
    except ValueError as error:
        raise ConfigError([f"--encoders: {error}"]) from error


def _check_endpoint(settings: BenchmarkSettings, encoders: Mapping[str, Encoder]) -> None:
    """Check that the declared endpoint will be measured.

    Raises:
        ConfigError: it will not.
    """
    if settings.declared is None:
        return
    protocols, endpoint = settings.protocols or (), settings.declared.endpoint
    seen = [f"{name}_i" if e.reads_text else name for name, e in encoders.items()]
    kinds = {"drift": ["drift_"], "prior": ["pres_", "prior_"]}
    measured = [*seen, *(f"{name}_t" for name, e in encoders.items() if e.reads_text)]
    measured += [f"div_{name}" for name in seen if settings.diversity]
    if settings.peft_drift and "drift" in protocols:
        measured += [f"peft_drift_{name}" for name in seen]
    measured += [f"{k}{n}" for p in protocols for k in kinds.get(p, ()) for n in seen]
    for score in (endpoint.score, endpoint.along):
        if score not in (None, UPDATE_NORM, *measured):
            raise ConfigError(
                [
                    f"--endpoint is {endpoint}, but {score} is not measured. These are: "
                    f"{', '.join(measured)}"
                ]
            )


def _after_divergence(method: Method, config: TrainingConfig) -> str:
    """Return advice that names the benchmark's options instead of the trainer's."""
    plain = replace(method, learning_rate="").name
    text = f"Give --methods {plain}-lr<rate> with a lower rate (it is {config.learning_rate:g})"
    if config.mixed_precision == "fp16":
        text += ", or --mixed_precision bf16 and another --output_dir"
    return f"{text}."


@contextmanager
def _decoding_one_by_one(vae: Any) -> Iterator[None]:
    """Decode images one by one: at 1024 pixels, four at once take more memory than all else."""
    before = vae.use_slicing
    vae.use_slicing = True
    try:
        yield
    finally:
        vae.use_slicing = before
