"""GraLoRA (granular low-rank adaptation, arXiv 2505.20355) for image models.

Importing this package gives every diffusers pipeline the methods ``load_gralora_weights``,
``save_gralora_weights``, ``fuse_gralora``, ``unfuse_gralora`` and ``unload_gralora_weights``.
"""

from . import pipelines
from .config import GraloraConfig
from .families import get_family, list_families
from .injection import GraloraTuner, TargetError, eject, inject
from .layers import GraloraConv2d, GraloraLinear
from .pipelines import LoadReport
from .state import AdapterFileError

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "GraloraConfig",
    "GraloraConv2d",
    "GraloraLinear",
    "GraloraTuner",
    "LoadReport",
    "TargetError",
    "eject",
    "get_family",
    "inject",
    "list_families",
]

pipelines.install()
