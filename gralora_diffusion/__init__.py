"""GraLoRA (granular low-rank adaptation, arXiv 2505.20355) for image models.

Importing this package gives every diffusers pipeline the methods ``load_gralora_weights``,
``save_gralora_weights``, ``fuse_gralora``, ``unfuse_gralora`` and ``unload_gralora_weights``. This
takes no time, because torch and diffusers are only imported at the first use.
"""

from typing import TYPE_CHECKING

from .io import deprecated_paths
from .io.lazy import lazy_names
from .io.version import __version__ as __version__
from .pipelines.methods import install

if TYPE_CHECKING:
    from .adapters.adapter_file import read_adapter, save_adapter
    from .adapters.config import GraloraConfig
    from .adapters.injection import GraloraTuner, TargetError, eject, inject
    from .adapters.layers import GraloraConv2d, GraloraLinear
    from .base_models.loading import find_base_family, load_base
    from .base_models.options import BaseModelOptions
    from .export import export_diff, export_fused, export_lora
    from .families import Conditioning, ModelFamily, get_family, list_families, mend_clip_skip
    from .inspection import inspect_file
    from .io.bundled import samples_folder
    from .io.errors import AdapterFileError, CheckpointError, ConfigError, DataError
    from .lora_import import gralora_from_lora, overall_error
    from .pipelines import LoadReport
    from .pipelines.editing import control_arguments
    from .training.checks.options import validate
    from .training.config.training_config import TrainingConfig, parse_config
    from .training.run import train
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "adapters.adapter_file": ["read_adapter", "save_adapter"],
            "adapters.config": ["GraloraConfig"],
            "adapters.injection": ["GraloraTuner", "TargetError", "eject", "inject"],
            "adapters.layers": ["GraloraConv2d", "GraloraLinear"],
            "base_models.loading": ["find_base_family", "load_base"],
            "base_models.options": ["BaseModelOptions"],
            "io.bundled": ["samples_folder"],
            "io.errors": ["AdapterFileError", "CheckpointError", "ConfigError", "DataError"],
            "export": ["export_diff", "export_fused", "export_lora"],
            "families": [
                "Conditioning",
                "ModelFamily",
                "get_family",
                "list_families",
                "mend_clip_skip",
            ],
            "inspection": ["inspect_file"],
            "lora_import": ["gralora_from_lora", "overall_error"],
            "pipelines": ["LoadReport"],
            "pipelines.editing": ["control_arguments"],
            "training.checks.options": ["validate"],
            "training.config.training_config": ["TrainingConfig", "parse_config"],
            "training.run": ["train"],
        },
    )

__all__ = [
    "AdapterFileError",
    "BaseModelOptions",
    "CheckpointError",
    "Conditioning",
    "ConfigError",
    "DataError",
    "GraloraConfig",
    "GraloraConv2d",
    "GraloraLinear",
    "GraloraTuner",
    "LoadReport",
    "ModelFamily",
    "TargetError",
    "TrainingConfig",
    "control_arguments",
    "eject",
    "export_diff",
    "export_fused",
    "export_lora",
    "find_base_family",
    "get_family",
    "gralora_from_lora",
    "inject",
    "inspect_file",
    "list_families",
    "load_base",
    "mend_clip_skip",
    "overall_error",
    "parse_config",
    "read_adapter",
    "samples_folder",
    "save_adapter",
    "train",
    "validate",
]

install()
deprecated_paths.install()
