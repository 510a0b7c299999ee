"""The conversion of the ComfyUI node, imported from its folder as a package, without ComfyUI."""

import importlib
import sys
from types import ModuleType

from tests import ROOT

_package = ModuleType("comfyui_gralora")
_package.__path__ = [str(ROOT / "samples/comfyui_gralora")]
sys.modules[_package.__name__] = _package
conversion = importlib.import_module("comfyui_gralora.conversion")
