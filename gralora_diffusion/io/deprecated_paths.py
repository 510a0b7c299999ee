"""Names of version 0.1 that have moved: they keep working for one release, with a warning.

``install`` makes the old modules importable. ``names_of`` is the ``__getattr__`` of a module or
package that still has the name of an old module.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = __name__.partition(".")[0]
#: Module of version 0.1 -> the module with its contents now.
MODULES = {
    "benchmark.encoders": "benchmark.evaluation.encoders",
    "benchmark.metrics": "benchmark.evaluation.metrics",
    "benchmark.results": "benchmark.evaluation.results",
    "benchmark.scores": "benchmark.evaluation.scores",
    "benchmark.statistics": "benchmark.evaluation.statistics",
    "benchmark.kept": "benchmark.run_config",
    "benchmark.mechanism": "benchmark.diagnostics",
    "benchmark.report.content": "benchmark.report.report_data",
    "benchmark.report.files": "benchmark.report.data_files",
    "benchmark.report.mechanism": "benchmark.report.diagnostics",
    "benchmark.report.pictures": "benchmark.report.images",
    "benchmark.report.sentences": "benchmark.report.summary",
    "benchmark.running": "benchmark.runner",
    "benchmark.told": "benchmark.effective_settings",
    "blockwise": "adapters.layers.functional",
    "bookkeeping": "pipelines.diffusers_registry",
    "colour_profiles": "io.colour_profiles",
    "command_line": "io.process",
    "compatibility": "adapters.compatibility",
    "config": "adapters.config",
    "config_values": "adapters.placement.layer_config",
    "empty_models": "base_models.meta_models",
    "export.ways": "export.loaders",
    "factors": "adapters.layers.parameters",
    "file_names": "io.file_names",
    "fused_linear": "adapters.layers.fused_linear",
    "fused_projections": "adapters.placement.fused_projections",
    "hub": "io.hub",
    "image_files": "io.image_files",
    "injection": "adapters.injection",
    "json_files": "io.json_files",
    "layers": "adapters.layers",
    "layers.base": "adapters.layers.base",
    "layers.conv2d": "adapters.layers.conv2d",
    "layers.linear": "adapters.layers.linear",
    "layouts": "key_maps",
    "layouts.latent_diffusion": "key_maps.latent_diffusion",
    "layouts.layout": "key_maps.key_map",
    "layouts.text_encoders": "key_maps.text_encoders",
    "lazy": "io.lazy",
    "lora_config": "lora_files.peft_config",
    "lora_keys": "lora_files.keys",
    "lora_scaling": "lora_files.scaling",
    "low_rank": "lora_files.low_rank",
    "model_folder": "base_models.folder",
    "offloading": "pipelines.offloading",
    "original_file": "base_models.single_file_header",
    "path_patterns": "adapters.placement.path_patterns",
    "pipeline_methods": "pipelines.methods",
    "regular_files": "io.regular_files",
    "safe_text": "io.safe_text",
    "sampling": "pipelines.sample_command",
    "staging": "io.staging",
    "state": "adapters.adapter_file",
    "targets": "adapters.placement.targets",
    "tensor_files": "io.tensor_files",
    "training.acceleration": "training.runtime.acceleration",
    "training.adapters": "training.optimization.adapters",
    "training.base_model": "base_models.loading",
    "training.batches": "training.data.data_module",
    "training.beginning": "training.preparation",
    "training.buckets": "training.data.buckets",
    "training.caching": "training.data.cache",
    "training.captions": "training.data.captions",
    "training.checkpoint": "training.checkpoints.store",
    "training.config": "training.config.training_config",
    "training.config_checks": "training.checks.options",
    "training.config_options": "training.config.options",
    "training.config_paths": "training.checks.paths",
    "training.config_patterns": "training.config.layer_patterns",
    "training.config_picture_options": "training.config.data_options",
    "training.data": "training.data.image_folder",
    "training.dataset_rows": "training.data.hf_dataset",
    "training.empty_base": "base_models.meta_base",
    "training.family_options": "training.checks.family",
    "training.initial_adapter": "training.optimization.initial_adapter",
    "training.memory": "training.runtime.memory",
    "training.metadata": "training.outputs.metadata",
    "training.objectives": "training.optimization.objectives",
    "training.optimizers": "training.optimization.optimizers",
    "training.option_parsing": "options.parsing",
    "training.outcome": "training.outputs.output_dir",
    "training.ownership": "training.runtime.folder_lock",
    "training.pictures": "training.data.transforms",
    "training.pipeline_index": "base_models.pipeline_index",
    "training.plan": "training.dry_run.plan",
    "training.plan_text": "training.dry_run.formatting",
    "training.prior": "training.data.class_images",
    "training.processes": "training.runtime.agreement",
    "training.prompt_lengths": "training.data.truncation",
    "training.quantization": "base_models.quantization",
    "training.records": "training.outputs.model_card",
    "training.rehearsal": "training.dry_run.fake_step",
    "training.run_state": "training.checkpoints.state",
    "training.same_run": "training.checkpoints.resume",
    "training.samples": "training.data.dataset",
    "training.single_file": "base_models.single_file",
    "training.step": "training.optimization.step",
    "training.streams": "training.data.sampler",
    "training.tensor_store": "training.data.tensor_store",
    "training.validation": "training.outputs.validation",
    "unfinished": "io.cleanup_on_exit",
    "warm_start": "lora_import",
    "warm_start.base": "lora_import.base",
    "warm_start.conversion": "lora_import.conversion",
    "warm_start.files": "lora_import.files",
    "warm_start.main": "lora_import.main",
    "warm_start.names": "lora_import.names",
    "warm_start.reading": "lora_import.reading",
    "warm_start.through_diffusers": "lora_import.through_diffusers",
}
#: What is in another place than the rest of its module, or has another name.
NAMES = {
    "training.pictures.decode": "io.image_files.read_image",
    "training.pictures.read_image": "io.image_files.read_image",
    "training.pictures.is_image": "io.image_files.is_image",
    "training.pictures.as_srgb": "io.image_files.as_srgb",
    "training.pictures.image_extensions": "io.image_files.image_extensions",
    "benchmark.encoders.Picture": "benchmark.evaluation.encoders.ShownImage",
    "benchmark.encoders.read_picture": "benchmark.evaluation.encoders.read_image_file",
    "benchmark.kept.write_down": "benchmark.run_config.save_run_config",
    "benchmark.mechanism.MechanismLog": "benchmark.diagnostics.DiagnosticsLog",
    "benchmark.metrics.unit": "benchmark.evaluation.metrics.normalize",
    "benchmark.report.content.Content": "benchmark.report.report_data.ReportData",
    "benchmark.report.content.MethodContent": "benchmark.report.report_data.MethodData",
    "benchmark.report.content.ParetoContent": "benchmark.report.report_data.ParetoData",
    "benchmark.report.content.ProtocolContent": "benchmark.report.report_data.ProtocolData",
    "benchmark.report.content.ScoreContent": "benchmark.report.report_data.ScoreData",
    "benchmark.report.content.content_of": "benchmark.report.report_data.report_data_of",
    "benchmark.report.mechanism.mechanism_of": "benchmark.report.diagnostics.diagnostics_of",
    "benchmark.report.mechanism.MechanismContent": "benchmark.report.diagnostics.DiagnosticsData",
    "benchmark.results.Mechanism": "benchmark.evaluation.results.Diagnostics",
    "benchmark.results.UNITS_FOLDER": "benchmark.evaluation.results.TRIALS_FOLDER",
    "benchmark.results.UnitKey": "benchmark.evaluation.results.TrialKey",
    "benchmark.results.UnitResult": "benchmark.evaluation.results.TrialResult",
    "benchmark.running.Drawn": "benchmark.runner.Generated",
    "benchmark.running.PICTURES": "benchmark.ledger.IMAGES",
    "benchmark.told.told_layers": "benchmark.effective_settings.named_layers",
    "benchmark.told.told_settings": "benchmark.effective_settings.effective_settings",
    "bookkeeping.note_components": "pipelines.diffusers_registry.register_components",
    "bookkeeping.note_fused": "pipelines.diffusers_registry.register_fused",
    "export.ways.Way": "export.loaders.ArtifactLoader",
    "fused_linear.Way": "adapters.layers.fused_linear.Backend",
    "fused_linear.choose_way": "adapters.layers.fused_linear.select_backend",
    "layouts.layout.Layout": "key_maps.key_map.KeyMap",
    "layouts.layout.LayoutError": "key_maps.key_map.KeyMapError",
    "sampling.draw": "pipelines.generation.generate",
    "sampling.drawing_mode": "pipelines.generation.generation_mode",
    "sampling.labelled_grid": "pipelines.grid.labelled_grid",
    "sampling.takes_negative_prompt": "pipelines.generation.takes_negative_prompt",
    "tensor_files.AdapterFileError": "io.errors.AdapterFileError",
    "tensor_files.some": "io.safe_text.first_few",
    "training.acceleration.make_cheaper": "training.runtime.acceleration.enable_memory_savings",
    "training.adapters.put_back": "training.optimization.adapters.restore",
    "training.adapters.read_out": "training.optimization.adapters.extract",
    "training.adapters.weights_for_use": "training.optimization.adapters.inference_weights",
    "training.base_model.completed": "training.checks.base.resolve_defaults",
    "training.base_model.present": "base_models.loading.existing_models",
    "training.batches.find_class_pictures": "training.data.data_module.find_class_images",
    "training.batches.find_pictures": "training.data.data_module.find_images",
    "training.beginning.complete_class_pictures": "training.preparation.complete_class_images",
    "training.buckets.size_problems": "training.checks.options.size_problems",
    "training.captions.PictureFolder": "training.data.captions.CaptionedFolder",
    "training.checkpoint.CheckpointError": "io.errors.CheckpointError",
    "training.config.ConfigError": "io.errors.ConfigError",
    "training.config.group_table": "options.fields.group_table",
    "training.config_checks.ConfigError": "io.errors.ConfigError",
    "training.config_checks.OPTIMIZERS": "training.config.options.OPTIMIZERS",
    "training.config_checks.check_sizes": "training.checks.base.check_sizes",
    "training.config_checks.find_remarks": "training.checks.options.find_warnings",
    "training.config_options.BaseModelOptions": "base_models.options.BaseModelOptions",
    "training.config_options.choices_of": "options.fields.choices_of",
    "training.config_options.option": "options.fields.option",
    "training.config_picture_options.DataOptions": "training.config.data_options.DataOptions",
    "training.config_picture_options.ImageOptions": "training.config.data_options.ImageOptions",
    "training.config_picture_options.PriorOptions": "training.config.data_options.PriorOptions",
    "training.data.DataError": "io.errors.DataError",
    "training.data.check_pictures": "training.data.image_folder.check_images",
    "training.data.warn_of_long_pictures": "training.data.image_folder.warn_of_long_images",
    "training.data.warn_of_small_pictures": "training.data.image_folder.warn_of_small_images",
    "training.empty_base.check_without_weights": "training.checks.base.check_without_weights",
    "training.loop.train": "training.run.train",
    "training.memory.bytes_of": "pipelines.placement.bytes_of",
    "training.memory.optimizer_state_bytes": (
        "training.optimization.optimizers.optimizer_state_bytes"
    ),
    "training.memory.tensors_of": "pipelines.placement.tensors_of",
    "training.plan_text.optimizer_label": "training.dry_run.plan.optimizer_label",
    "training.plan_text.plan_text": "training.dry_run.formatting.format_plan",
    "training.prior.class_pictures_lacking": "training.data.class_images.missing_class_images",
    "training.prior.class_pictures_there": "training.data.class_images.existing_class_images",
    "training.prior.draw_class_images": "training.data.class_images.generate_class_images",
    "training.prior.frozen_base": "adapters.injection.adapters_disabled",
    "training.prompt_lengths.cuts_told_already": "training.data.truncation.reported_truncation",
    "training.prompt_lengths.tell_cut_prompts": "training.data.truncation.report_truncation",
    "training.records.CURVE_NAME": "training.outputs.curve.CURVE_NAME",
    "training.records.METRICS_NAME": "training.outputs.metrics.METRICS_NAME",
    "training.records.MetricsFile": "training.outputs.metrics.MetricsFile",
    "training.records.draw_curve": "training.outputs.curve.plot_curve",
    "training.rehearsal.ImaginedData": "training.dry_run.fake_step.FakeData",
    "training.rehearsal.imagined_objective": "training.dry_run.fake_step.FakeObjective",
    "training.step.RowMaker": "training.optimization.step.BatchBuilder",
    "training.step.Rows": "training.optimization.step.DenoisingBatch",
    "training.streams.Ahead": "training.data.sampler.Prefetcher",
    "training.streams.generator": "training.data.seeds.generator",
    "training.streams.seed_from": "training.data.seeds.seed_from",
    "training.validation.draw_validation": "training.outputs.validation.generate_validation",
    "unfinished.tidied": "io.cleanup_on_exit.cleanup_on_exit",
    "unfinished.tidy_all": "io.cleanup_on_exit.clean_up_all",
}


def install() -> None:
    """Make the modules of version 0.1 importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _place(module: str, name: str) -> str:
    """Return where a name of an old module is now, from the package on."""
    old = module.removeprefix(f"{_PACKAGE}.")
    return NAMES.get(f"{old}.{name}", f"{MODULES.get(old, 'io.errors')}.{name}")


def names_of(module: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module of version 0.1."""

    def get(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        # errors were importable from every module that raised them
        for place in (_place(module, name), f"io.errors.{name}"):
            home, _, new_name = place.rpartition(".")
            new = import_module(f"{_PACKAGE}.{home}")
            if hasattr(new, new_name):
                break
        else:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(new, new_name)
        warnings.warn(
            f"{module}.{name} is now {_PACKAGE}.{home}.{new_name}; the old name will be removed in "
            "the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return value

    return get


class _Finder:
    """Finds the old modules, which only contain ``names_of``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix(f"{_PACKAGE}.")
        new = MODULES.get(old)
        if old == fullname or new is None or new.startswith(f"{old}."):
            return None
        is_package = any(name.startswith(f"{old}.") for name in MODULES)
        return ModuleSpec(fullname, _Loader(), is_package=is_package)


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = names_of(module.__name__)
        module.__class__ = _OldModule


class _OldModule(ModuleType):
    """What is set in an old module, as tests do that replace a function, is set in the new one."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__") or isinstance(value, ModuleType):
            super().__setattr__(name, value)
            return
        home, _, new_name = _place(self.__name__, name).rpartition(".")
        setattr(import_module(f"{_PACKAGE}.{home}"), new_name, value)
