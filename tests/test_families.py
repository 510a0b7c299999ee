import fnmatch
import inspect
import sys
import types
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import gralora_diffusion.families as families
from gralora_diffusion import GraloraConfig, get_family, inject, list_families
from gralora_diffusion.families import ModelFamily, find_family, mend_clip_skip
from tests import models


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
            ValueError, match=r"no family is named 'sd15'. Choose from .*stable-diffusion"
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
        encoders = set(family.all_text_encoders)
        assert all(isinstance(getattr(pipe, c), nn.Module) for c in {family.denoiser, *encoders})
        assert encoders == {n for n in pipe.components if n.startswith("text_encoder")}
        assert {*family.usual_text_encoders, *family.optional_text_encoders} <= encoders
        assert family.objective in ("ddpm", "flow_matching")

    def test_every_entry_of_every_preset_is_adapted(self, name):
        family, pipe = get_family(name), models.PIPELINES[name]()
        for component, presets in family.target_presets.items():
            model = getattr(pipe, component)
            for preset, endings in presets.items():
                found = family.resolve_preset(component, preset, model)
                for entry in endings:
                    spelled_out = fnmatch.filter(found, entry)
                    assert spelled_out == [entry] or ("*" in entry and len(spelled_out) > 1)
                config = GraloraConfig(r=4, gralora_k=4, target_modules=found)
                inject(model, config, f"{preset} of {component}")  # refuses what matches nothing

    def test_presets_that_do_not_fit(self, name):
        family, pipe = get_family(name), models.PIPELINES[name]()
        with pytest.raises(ValueError, match=r"has no target preset 'most'. Presets: attention"):
            family.resolve_preset(family.denoiser, "most", pipe)
        with pytest.raises(ValueError, match=r"vae of .* Presets: none"):
            family.resolve_preset("vae", "attention", pipe.vae)
        with pytest.raises(ValueError, match="this Linear has none of the layers of preset"):
            family.resolve_preset(family.denoiser, "attention", nn.Linear(2, 2))

    def test_is_complete(self, name):
        assert isinstance(get_family(name), ModelFamily)
        assert not getattr(type(get_family(name)), "__abstractmethods__", None)


def flat(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a denoiser with nested ones as a.b; empty and absent ones alike left out."""
    nested = {k: v for k, v in arguments.items() if isinstance(v, dict)}
    plain = {k: v for k, v in arguments.items() if v is not None and k not in nested}
    return plain | {f"{k}.{key}": t for k, v in nested.items() for key, t in v.items()}


@torch.no_grad()  # as the pipeline has it: T5 rounds differently with gradients
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*list_families(), "flux-schnell", "stable-diffusion-3-no-t5"])
def test_predict_gives_the_denoiser_what_the_pipeline_gives(name, dtype):
    """Every tensor that reaches the denoiser, and what is made of its prediction."""
    variants = {
        "flux-schnell": lambda: models.PIPELINES["flux"](dev=False),
        "stable-diffusion-3-no-t5": lambda: models.PIPELINES["stable-diffusion-3"](with_t5=False),
    }
    pipe = (variants | models.PIPELINES)[name]().to(dtype)
    family = get_family(pipe)
    denoiser = getattr(pipe, family.denoiser)
    names = list(inspect.signature(denoiser.forward).parameters)
    seen: list[dict[str, Any]] = []
    predicted: list[Tensor] = []

    def remember(module, args, kwargs, output):
        seen.append(flat({**dict(zip(names, args, strict=False)), **kwargs}))
        predicted.append(output[0])

    denoiser.register_forward_hook(remember, with_kwargs=True)
    prompts, sizes = ["a cat", "two dogs"], torch.tensor([[32, 16]] * 2)  # higher than wide
    calls = inspect.signature(pipe.__call__).parameters
    guidance = {} if "guidance" in name else {"guidance_scale": 1.0}
    finals: list[Tensor] = []
    pipe(
        prompt=prompts,
        height=32,
        width=16,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=lambda _pipe, _i, _t, now: finals.append(now["latents"]) or {},
        **{k: v for k, v in guidance.items() if k in calls},
    )
    (theirs,), (theirs_predicted,) = seen, predicted
    conditioning = family.encode_prompts(pipe, prompts)
    conditioning |= family.image_conditioning(pipe, sizes, torch.zeros_like(sizes), sizes, 1.0)
    assert all(len(tensor) == 2 for tensor in conditioning.values())
    timesteps = torch.as_tensor(theirs["timestep"]).float().expand(2)
    if "hidden_states" in theirs and theirs["hidden_states"].ndim == 3:
        timesteps = timesteps * 1000  # the transformers of Flux take a thousandth
        latents = unpacked(theirs["hidden_states"], family, pipe)
    else:
        latents = theirs["sample" if "sample" in theirs else "hidden_states"]
    prediction = family.predict(denoiser, latents, timesteps, conditioning)
    ours = seen[1]
    assert ours.keys() - {"return_dict"} == theirs.keys() - {"return_dict"}
    for key, tensor in theirs.items():
        if not isinstance(tensor, Tensor):
            assert ours[key] == tensor, key
            continue
        mine = ours[key].to(tensor.dtype)
        if key == "timestep":
            assert torch.allclose(
                mine, tensor.expand(2), rtol=1e-6 if dtype.itemsize == 4 else 1e-2
            )
        else:
            assert torch.equal(mine.broadcast_to(tensor.shape), tensor), key
    assert prediction.shape == latents.shape
    if dtype == torch.float32:
        packed = unpacked(theirs_predicted, family, pipe) if theirs_predicted.ndim == 3 else None
        torch.testing.assert_close(prediction, theirs_predicted if packed is None else packed)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("stable-diffusion", {}),
        ("stable-diffusion-xl", {"force_zeros_for_empty_prompt": True}),
        ("stable-diffusion-xl", {"force_zeros_for_empty_prompt": False}),
        ("stable-diffusion-3", {}),
    ],
)
def test_an_empty_prompt_is_what_the_pipeline_guides_away_from(name, config):
    """Without a negative prompt; of Flux there is a distilled guidance or no such thing."""
    pipe = models.PIPELINES[name]()
    pipe.register_to_config(**config)
    family, seen = get_family(pipe), []
    getattr(pipe, family.denoiser).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(flat(kwargs)), with_kwargs=True
    )
    pipe("a cat", height=32, width=16, num_inference_steps=1, guidance_scale=3.0)
    names = {  # in the pipeline's call of the denoiser
        "prompt_embeds": ("encoder_hidden_states",),
        "pooled_prompt_embeds": ("added_cond_kwargs.text_embeds", "pooled_projections"),
    }
    encoded = family.encode_prompts(pipe, ["", "a cat"])
    alone = [family.encode_prompts(pipe, [prompt]) for prompt in ("", "a cat")]
    for key, tensor in encoded.items():
        (theirs,) = [seen[0][n] for n in names[key] if n in seen[0]]
        assert torch.equal(torch.cat([part[key] for part in alone]), theirs), key
        torch.testing.assert_close(tensor, theirs)  # a batch rounds otherwise
    zeros = all(not tensor[0].any() for tensor in encoded.values())
    assert zeros == config.get("force_zeros_for_empty_prompt", False)


@torch.no_grad()
@pytest.mark.parametrize("name", list_families())
def test_layers_of_clip_are_skipped_as_the_pipeline_skips_them(name):
    pipe = models.PIPELINES[name]()
    family, seen = get_family(pipe), []
    taken = "clip_skip" in inspect.signature(pipe.__call__).parameters
    assert (family.skipped_layers is not None) == taken
    plain = family.encode_prompts(pipe, ["a cat"])
    skipped = family.encode_prompts(pipe, ["a cat"], clip_skip=1)
    assert torch.equal(plain["prompt_embeds"], skipped["prompt_embeds"]) != taken
    if not taken:
        return
    getattr(pipe, family.denoiser).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    mend_clip_skip(pipe)
    mend_clip_skip(pipe)
    for skip, ours in ((None, plain), (1, skipped)):
        pipe("a cat", num_inference_steps=1, guidance_scale=1.0, clip_skip=skip)
        assert torch.equal(seen.pop(), ours["prompt_embeds"])
    # it is counted from what the pipeline reads by itself
    layers = getattr(pipe, family.text_encoders[0]).config.num_hidden_layers
    most = layers - family.skipped_layers
    family.encode_prompts(pipe, ["a cat"], clip_skip=most)
    with pytest.raises(IndexError):
        family.encode_prompts(pipe, ["a cat"], clip_skip=layers + 1 - family.skipped_layers)


def unpacked(tokens: Tensor, family: ModelFamily, pipe: Any) -> Tensor:
    """Tokens (batch, h w, channels) as latents, of 32 x 16 pixels, written out plainly."""
    batch, count, channels = tokens.shape
    height, width = 32 // (2 * pipe.vae_scale_factor), 16 // (2 * pipe.vae_scale_factor)
    assert count == height * width
    grid = tokens.reshape(batch, height, width, channels)
    if family.patch_size == 1:
        return grid.permute(0, 3, 1, 2)
    latents = torch.zeros(batch, channels // 4, 2 * height, 2 * width, dtype=tokens.dtype)
    for row in range(2):
        for column in range(2):
            part = grid[..., 2 * row + column :: 4]
            latents[:, :, row::2, column::2] = part.permute(0, 3, 1, 2)
    return latents


@pytest.mark.parametrize(
    ("name", "denoiser", "scheduler", "architecture", "version"),
    [
        ("stable-diffusion", {}, {}, "stable-diffusion-v1", "sd_v1"),
        ("stable-diffusion", {"cross_attention_dim": 768}, {}, "stable-diffusion-v1", "sd_v1"),
        (
            *("stable-diffusion", {"cross_attention_dim": 1024}, {"prediction_type": "epsilon"}),
            *("stable-diffusion-v2-512", "sd_v2"),
        ),
        (
            *("stable-diffusion", {"cross_attention_dim": 1024}),
            *({"prediction_type": "v_prediction"}, "stable-diffusion-v2-768-v", "sd_v2_v"),
        ),
        ("stable-diffusion-xl", {}, {}, "stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
        ("stable-diffusion-3", {}, {}, "stable-diffusion-v3", "sd3"),
        ("stable-diffusion-3", {"qk_norm": None}, {}, "stable-diffusion-v3-medium", "sd3-medium"),
        (
            *("stable-diffusion-3", {"qk_norm": "rms_norm", "dual_attention_layers": ()}, {}),
            *("stable-diffusion-v3.5-large", "sd3-5-large"),
        ),
        (
            *("stable-diffusion-3", {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, {}),
            *("stable-diffusion-v3.5-medium", "sd3-5-medium"),
        ),
        ("flux", {}, {}, "flux-1", "flux1"),
        ("flux", {"guidance_embeds": True}, {}, "flux-1-dev", "flux1"),
        ("flux", {"guidance_embeds": False}, {}, "flux-1-schnell", "flux1"),
        ("flux2", {}, {}, "Flux.2-dev", "flux_2_dev"),
        ("flux2-klein", {}, {}, "Flux.2-klein", "flux_2_klein"),
        ("flux2-klein", {"num_attention_heads": 24}, {}, "Flux.2-klein-4b", "flux_2_klein_4b"),
        ("flux2-klein", {"num_attention_heads": 32}, {}, "Flux.2-klein-9b", "flux_2_klein_9b"),
    ],
)
def test_names_that_other_programs_know(name, denoiser, scheduler, architecture, version):
    names = get_family(name).published_names(denoiser, scheduler)
    assert (names.architecture, names.version) == (architecture, version)
    assert names.is_v2 == version.startswith("sd_v2")


class Posterior:
    """Of latents that are certain."""

    def __init__(self, mean: Tensor) -> None:
        self.mean, self.std = mean, torch.ones_like(mean)


CONFIGS: list[dict[str, Any]] = [
    {},
    {"latents_mean": [-1.6, 0.5, 0.3, 2.0], "latents_std": [8.4, 5.9, 6.0, 0.5]},
    {"latents_mean": [-1.6, 0.5, 0.3, 2.0], "latents_std": None},
    {"latents_mean": None, "latents_std": [8.4, 5.9, 6.0, 0.5]},
    {"shift_factor": 0.7},
]


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3"])
def test_latents_are_scaled_just_as_the_pipeline_scales_them_back(name, changes):
    """Whatever the VAE's config says, and whatever of it the pipeline uses."""
    pipe, generators = models.PIPELINES[name](), [torch.Generator().manual_seed(0) for _ in "12"]
    pipe.vae.register_to_config(**changes)
    decode, decoded = pipe.vae.decode, []
    pipe.vae.decode = lambda z, *args, **kwargs: decoded.append(z) or decode(z, *args, **kwargs)
    call = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 2}
    latents = pipe(**call, generator=generators[0], output_type="latent").images
    pipe(**call, generator=generators[1])
    (z,) = decoded
    assert not torch.allclose(z, latents)
    encoder = types.SimpleNamespace(
        config=pipe.vae.config,
        encode=lambda pixels: types.SimpleNamespace(latent_dist=Posterior(pixels)),
    )
    mean, std = get_family(name).encode_images(encoder, z)
    torch.testing.assert_close(mean, latents)
    moved, _ = get_family(name).encode_images(encoder, z + 1)
    torch.testing.assert_close(moved - mean, std.expand_as(mean), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
        {"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]},
        {"latents_mean": [float("nan")] * 4, "latents_std": [1.0] * 4},
        {"latents_mean": "text", "latents_std": [1.0] * 4},
        {"latents_mean": [0.0] * 4, "latents_std": []},
    ],
)
def test_statistics_of_latents_that_cannot_be_are_refused(changes):
    pipe = models.PIPELINES["stable-diffusion-xl"]()
    pipe.vae.register_to_config(**changes)
    with pytest.raises(ValueError, match=r"latents_(mean|std) in the VAE's config is"):
        get_family("stable-diffusion-xl").check_base(pipe)
