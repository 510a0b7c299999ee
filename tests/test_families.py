import sys
import types

import diffusers
import pytest
from torch import nn

import gralora_diffusion.families as families
from gralora_diffusion import GraloraConfig, get_family, inject, list_families
from gralora_diffusion.families import ModelFamily, find_family

from . import models


@pytest.fixture
def add_family(tmp_path, monkeypatch):
    """Write a module into the package of families, as a new family would be added."""
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    before = set(sys.modules)

    def add(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        families._families.cache_clear()

    yield add
    families._families.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith(f"{families.__name__}."):
            del sys.modules[name]


NEW = """
from gralora_diffusion.families.stable_diffusion import StableDiffusion

class Other(StableDiffusion):
    name = {name!r}
    pipeline_classes = ({pipeline!r},)

FAMILY = Other()
"""


class TestDiscovery:
    def test_a_family_is_one_file(self, add_family):
        add_family("other", NEW.format(name="other", pipeline="OtherPipeline"))
        assert list_families() == sorted(["other", *models.PIPELINES])
        pipeline = type("OtherPipeline", (), {})
        assert find_family(pipeline()).name == "other"
        assert find_family(type("Derived", (pipeline,), {})).name == "other"

    @pytest.mark.parametrize(
        ("name", "pipeline", "text"),
        [
            ("stable-diffusion", "OtherPipeline", "two families are named 'stable-diffusion'"),
            ("other", "StableDiffusionPipeline", "StableDiffusionPipeline belongs to .* and "),
        ],
    )
    def test_duplicates_raise(self, add_family, name, pipeline, text):
        add_family("other", NEW.format(name=name, pipeline=pipeline))
        with pytest.raises(ValueError, match=text):
            list_families()

    @pytest.mark.parametrize("text", ["FAMILIE = 1", "import nowhere_to_be_found"])
    def test_errors_in_a_family_are_not_swallowed(self, add_family, text):
        add_family("broken", text)
        with pytest.raises((AttributeError, ImportError)):
            list_families()


class TestLookUp:
    def test_by_name_and_by_pipeline(self):
        for name, build in models.PIPELINES.items():
            pipe = build()
            assert get_family(name) is get_family(pipe) is find_family(type(pipe))
            assert get_family(name).name == name

    def test_unknown(self):
        with pytest.raises(
            ValueError, match=r"no family named 'sd15'. Families: .*stable-diffusion"
        ):
            get_family("sd15")
        with pytest.raises(ValueError, match="SimpleNamespace is not a pipeline of a supported"):
            get_family(types.SimpleNamespace())
        assert find_family(types.SimpleNamespace()) is None

    def test_every_family_has_a_tiny_pipeline_here(self):
        assert list_families() == sorted(models.PIPELINES)


@pytest.mark.parametrize("name", list_families())
class TestEachFamily:
    def test_pipeline_classes_exist(self, name):
        absent = [c for c in get_family(name).pipeline_classes if not hasattr(diffusers, c)]
        assert absent == []

    def test_components(self, name):
        family, pipe = get_family(name), models.PIPELINES[name]()
        assert family.components[0] == family.denoiser
        assert set(family.target_presets) <= set(family.components)
        assert all(isinstance(getattr(pipe, c), nn.Module) for c in family.components)
        assert family.objective in ("ddpm", "flow_matching")

    def test_every_entry_of_every_preset_is_adapted(self, name):
        family, pipe = get_family(name), models.PIPELINES[name]()
        for component, presets in family.target_presets.items():
            model = getattr(pipe, component)
            for preset, endings in presets.items():
                found = family.resolve_preset(component, preset, model)
                assert found == list(endings)
                config = GraloraConfig(r=4, gralora_k=4, target_modules=found)
                inject(model, config, f"{preset} of {component}")  # refuses what matches nothing

    def test_presets_that_do_not_fit(self, name):
        family, pipe = get_family(name), models.PIPELINES[name]()
        with pytest.raises(ValueError, match=r"no target preset 'most' for .* Presets: attention"):
            family.resolve_preset(family.denoiser, "most", pipe)
        with pytest.raises(ValueError, match=r"for vae of .* Presets: none"):
            family.resolve_preset("vae", "attention", pipe.vae)
        with pytest.raises(ValueError, match="this Linear has none of the layers of preset"):
            family.resolve_preset(family.denoiser, "attention", nn.Linear(2, 2))

    def test_is_complete(self, name):
        assert isinstance(get_family(name), ModelFamily)
        assert not getattr(type(get_family(name)), "__abstractmethods__", None)
