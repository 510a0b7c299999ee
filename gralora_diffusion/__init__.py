"""GraLoRA (granular low-rank adaptation, arXiv 2505.20355) for image models.

Importing this package gives every diffusers pipeline the methods ``load_gralora_weights``,
``save_gralora_weights``, ``fuse_gralora``, ``unfuse_gralora`` and ``unload_gralora_weights``. It
takes no time: what needs torch and diffusers is imported when it is first used.
"""

from typing import TYPE_CHECKING

from .io.lazy import lazy_names
from .pipelines.methods import install

if TYPE_CHECKING:
    from .adapters.config import GraloraConfig
    from .adapters.injection import GraloraTuner, TargetError, eject, inject
    from .adapters.layers import GraloraConv2d, GraloraLinear
    from .errors import AdapterFileError
    from .families import get_family, list_families
    from .pipelines.loading import LoadReport
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "adapters.config": ["GraloraConfig"],
            "families": ["get_family", "list_families"],
            "adapters.injection": ["GraloraTuner", "TargetError", "eject", "inject"],
            "adapters.layers": ["GraloraConv2d", "GraloraLinear"],
            "pipelines.loading": ["LoadReport"],
            "errors": ["AdapterFileError"],
        },
    )

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

install()
