"""Loading, scaling, fusing, saving on every pipeline class of every family, image by image.

What is the same on all of them, and in particular what is refused, is in ``test_pipelines.py``.
"""

import inspect
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from safetensors.torch import load_file

from gralora_diffusion import AdapterFileError, get_family, inject, list_families
from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME, read_adapter
from gralora_diffusion.adapters.compatibility import gralora_layers
from gralora_diffusion.families import find_family
from tests.models import config, merged, structure
from tests.pipeline_classes import CLASSES, NOT_DRAWN, build, draw
from tests.reference import relative_error
from tests.tiny import PIPELINES

SCALE_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
_SD3 = get_family("stable-diffusion-3")
#: Where diffusers hands a call's scale to fewer components than hold an adapter: those it does.
SCALED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_SD3.pipeline_classes, ("transformer", "text_encoder", "text_encoder_2")),
    "StableDiffusion3ControlNetInpaintingPipeline": ("transformer",),
    "StableDiffusion3ControlNetPipeline": ("transformer",),
    "StableDiffusion3InpaintPipeline": ("transformer",),
    "StableDiffusionInstructPix2PixPipeline": ("unet",),
    "StableDiffusionLDM3DPipeline": ("unet",),
    "StableDiffusionParadigmsPipeline": ("unet",),
}


def same(one, other):
    return relative_error(one, other) < 1e-5


def apart(one, other):
    return relative_error(one, other) > 1e-3


def tiny(family):
    """The text-to-image pipeline."""
    return PIPELINES[family]()


#: Of each kind of layer, some. In a UNet, a transformer, CLIP and T5:
KINDS = ("to_q", "conv1", "ff.net.2", "to_qkv_mlp_proj", "proj_mlp")
TEXT_KINDS = ("q_proj", "v_proj", "fc2", "SelfAttention.q", "DenseReluDense.wo")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of an adapter, trained on a family's text-to-image pipeline: "a" on every model that
    may hold one, hybrid on the denoiser; "b" on a layer of the denoiser and of the last model."""

    @cache
    def save(family: str, which: str = "a") -> Path:
        pipe = tiny(family)
        torch.manual_seed(ord(which))
        denoiser, *encoders = get_family(family).components
        for component in (denoiser, *encoders):
            model, kinds = getattr(pipe, component), KINDS if component == denoiser else TEXT_KINDS
            names = [name for name, _ in model.named_modules() if name.endswith(kinds)]
            if which == "a":
                endings = [kind for kind in kinds if any(name.endswith(kind) for name in names)]
                inject(model, config(endings, hybrid_r=2 if component == denoiser else 0), "a")
            elif component in (denoiser, *encoders[-1:]):
                inject(model, config(names[-1:], r=4, gralora_k=2, alpha=9), "b")
        folder = tmp_path_factory.mktemp(f"{family}-{which}")
        pipe.save_gralora_weights(folder)
        return folder

    return save


@pytest.mark.parametrize("name", CLASSES)
def test_image_by_image(name, saved):
    family = find_family(getattr(diffusers, name)).name
    a, b = saved(family, "a"), saved(family, "b")
    reference = build(name)
    base = draw(reference)
    whole = draw(merged([(a, 1.0)], reference))
    both = draw(merged([(a, -0.5), (b, 0.7)], reference))  # so half of a is left in
    assert apart(whole, base)
    assert apart(both, base)
    assert apart(both, whole)

    pipe = build(name)
    pipe.load_gralora_weights(a, "a")
    assert same(draw(pipe), whole)
    if hasattr(pipe, "set_adapters"):
        pipe.set_adapters("a", 0.0)
        assert same(draw(pipe), base)
        call = inspect.signature(type(pipe).__call__).parameters
        argument = next((name for name in SCALE_ARGUMENTS if name in call), None)
        if argument and name != "CycleDiffusionPipeline":  # scales one of its two prompts
            trained = get_family(family).denoiser, *get_family(family).text_encoders
            scaled = SCALED.get(name, trained)  # FLUX.2 scales no language model
            pipe.set_adapters(
                "a", {c: 2.0 if c in scaled else 1.0 for c in pipe.get_list_adapters()}
            )
            assert same(draw(pipe, **{argument: {"scale": 0.5}}), whole)
        pipe.load_gralora_weights(b, "b")
        pipe.set_adapters(["a", "b"], [0.5, 0.7])
        expected = both
        assert same(draw(pipe), expected)
    else:
        expected = whole
    components = pipe.fuse_gralora()
    assert components == list(get_family(family).components)
    assert same(draw(pipe), expected)
    pipe.unfuse_gralora()
    assert same(draw(pipe), expected)
    pipe.unload_gralora_weights()
    assert same(draw(pipe), base)


def test_classes_that_are_not_drawn_are_known():
    every = {name for family in list_families() for name in get_family(family).pipeline_classes}
    assert every == {*CLASSES, *NOT_DRAWN}


def contents(path):
    """All that a file says: tensors as bytes, and configs."""
    tensors = {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}
    return tensors, {name: part.config for name, part in read_adapter(path).components.items()}


@pytest.mark.parametrize("family", list_families())
class TestDiffusersMethods:
    """diffusers' own list of components does not contain T5; its methods must reach it anyway."""

    @pytest.fixture
    def pipe(self, family, saved):
        pipe = tiny(family)
        pipe.load_gralora_weights(saved(family), "a")
        return pipe

    @pytest.fixture
    def components(self, family):
        return list(get_family(family).components)

    def test_each_component_alone(self, family, pipe, components, saved):
        for component in components:
            weights = {name: 2.0 * (name == component) for name in components}
            pipe.set_adapters("a", weights)
            assert same(draw(pipe), draw(merged([(saved(family), weights)], tiny(family))))
            assert apart(draw(pipe), draw(tiny(family)))

    def test_enable_disable_delete(self, family, pipe, components, saved):
        base, whole = draw(tiny(family)), draw(pipe)
        assert pipe.get_list_adapters() == {name: ["a"] for name in components}
        assert pipe.get_active_adapters() == ["a"]
        pipe.disable_lora()
        assert torch.equal(draw(pipe), base)
        pipe.enable_lora()
        assert torch.equal(draw(pipe), whole)
        pipe.load_gralora_weights(saved(family, "b"), "b")
        pipe.set_adapters(["a", "b"], [1.0, 0.0])
        assert same(draw(pipe), whole)
        pipe.delete_adapters("b")
        assert torch.equal(draw(pipe), whole)
        pipe.delete_adapters("a")
        assert torch.equal(draw(pipe), base)
        assert pipe.get_list_adapters() == {}

    def test_fuse(self, family, pipe, components, saved):
        whole, half = draw(pipe), draw(merged([(saved(family), 0.5)], tiny(family)))
        pipe.fuse_lora(components=components, lora_scale=0.5)
        assert pipe.fused_loras == {"a"}
        assert same(draw(pipe), half)
        pipe.unfuse_lora(components=components)
        assert pipe.num_fused_loras == 0
        pipe.set_adapters("a")
        assert same(draw(pipe), whole)

    def test_save_and_unload(self, family, pipe, components, saved, tmp_path):
        assert contents(pipe.save_gralora_weights(tmp_path)) == contents(
            saved(family) / WEIGHTS_NAME
        )
        for unload in (pipe.unload_gralora_weights, pipe.unload_lora_weights):
            unload()
            bare = tiny(family)
            assert torch.equal(draw(pipe), draw(bare))
            for name in components:
                kinds = [type(module) for module in getattr(pipe, name).modules()]
                assert kinds == [type(module) for module in getattr(bare, name).modules()]
            pipe.load_gralora_weights(saved(family), "a")

    def test_the_list_of_components_is_put_back(self, family, pipe, components):
        listed = type(pipe)._lora_loadable_modules
        assert pipe._lora_loadable_modules == [*listed, *(c for c in components if c not in listed)]
        assert tiny(family)._lora_loadable_modules is listed
        pipe.unload_gralora_weights()
        assert pipe._lora_loadable_modules is listed

    def test_pipelines_that_share_models(self, family, pipe, saved):
        names = [n for n in CLASSES if find_family(getattr(diffusers, n)).name == family]
        name = names[1 % len(names)]  # image to image, where the family has it
        shared = getattr(diffusers, name).from_pipe(pipe)
        expected = draw(merged([(saved(family), 0.5)], build(name)))
        pipe.set_adapters("a", 0.5)
        assert same(draw(shared), expected)
        shared.load_gralora_weights(saved(family, "b"), "b")
        shared.set_adapters(["a", "b"], [0.5, 0.0])  # it has its own list now
        assert same(draw(shared), expected)
        pipe.unload_gralora_weights()
        assert shared.get_list_adapters() == {}
        assert torch.equal(draw(shared), draw(build(name)))


class TestPlacement:
    """On a transformer with T5, as ``test_pipelines.py`` has it on a UNet."""

    FAMILY = "flux"

    @pytest.fixture
    def pipe(self):
        return tiny(self.FAMILY)

    @pytest.fixture(scope="class")
    def base(self):
        return draw(tiny(self.FAMILY))

    @pytest.fixture(scope="class")
    def whole(self, saved):
        return draw(merged([(saved(self.FAMILY), 1.0)], tiny(self.FAMILY)))

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_layerwise_casting(self, pipe, saved, when):
        """The base is rounded to fp8, the adapter is not."""
        storage = torch.float8_e4m3fn
        rounded, plain = tiny(self.FAMILY), tiny(self.FAMILY)
        rounded.transformer.enable_layerwise_casting(storage, torch.float32)
        state = {key: tensor.float() for key, tensor in rounded.transformer.state_dict().items()}
        plain.transformer.load_state_dict(state)
        expected = draw(merged([(saved(self.FAMILY), 1.0)], plain))
        if when == "after":
            pipe.load_gralora_weights(saved(self.FAMILY))
        pipe.transformer.enable_layerwise_casting(storage, torch.float32)
        if when == "before":
            pipe.load_gralora_weights(saved(self.FAMILY))
        dtypes = {n: p.dtype for n, p in pipe.transformer.named_parameters()}
        assert {dtype for n, dtype in dtypes.items() if "gralora_" in n} == {torch.float32}
        layers = [n.split(".gralora_A")[0] for n in dtypes if ".gralora_A." in n]
        assert {dtypes[f"{name}.base_layer.weight"] for name in layers} == {storage}
        assert same(draw(pipe), expected)
        with pytest.raises(ValueError, match=r"stored as torch\.float8_e4m3fn"):
            pipe.fuse_gralora()

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_model_offloading(self, pipe, saved, base, whole, when, tmp_path):
        if when == "before":
            pipe.enable_model_cpu_offload(device="cpu")
        pipe.load_gralora_weights(saved(self.FAMILY))
        if when == "after":
            pipe.enable_model_cpu_offload(device="cpu")
        assert same(draw(pipe), whole)
        path = pipe.save_gralora_weights(tmp_path)
        assert contents(path) == contents(saved(self.FAMILY) / WEIGHTS_NAME)
        pipe.set_adapters("default", 0.5)
        pipe.fuse_gralora(2.0)
        assert same(draw(pipe), whole)
        pipe.unfuse_gralora()
        pipe.unload_gralora_weights()
        assert all(
            hasattr(pipe.components[n], "_hf_hook") for n in ("transformer", "text_encoder_2")
        )
        assert same(draw(pipe), base)

    def test_compiled_in_place(self, pipe, saved, base, whole):
        pipe.transformer.compile(backend="eager")
        assert same(draw(pipe), base)
        pipe.load_gralora_weights(saved(self.FAMILY), "a")
        assert same(draw(pipe), whole)
        pipe.set_adapters("a", 0.0)
        assert same(draw(pipe), base)

    def test_compiled(self, pipe, saved, base, whole, tmp_path):
        """As with LoRA, diffusers' own methods do not find the adapter then; ours do."""
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        pipe.load_gralora_weights(saved(self.FAMILY), "a")
        assert same(draw(pipe), whole)
        path = pipe.save_gralora_weights(tmp_path)
        assert contents(path) == contents(saved(self.FAMILY) / WEIGHTS_NAME)
        pipe.fuse_gralora()
        assert same(draw(pipe), whole)
        pipe.unfuse_gralora()
        pipe.unload_gralora_weights()
        assert same(draw(pipe), base)


class TestOtherBases:
    @pytest.fixture(scope="class")
    def with_embedder(self, tmp_path_factory):
        """An adapter on the layer whose width distinguishes FLUX.1's bases, and on another."""
        pipe = tiny("flux")
        inject(pipe.transformer, config(["x_embedder", "proj_out"]), "a")
        folder = tmp_path_factory.mktemp("with_embedder")
        pipe.save_gralora_weights(folder)
        return folder

    def test_a_layer_of_the_same_width(self, with_embedder):
        pipe = build("FluxKontextPipeline")
        pipe.load_gralora_weights(with_embedder, "a")
        expected = draw(merged([(with_embedder, 1.0)], build("FluxKontextPipeline")))
        assert same(draw(pipe), expected)

    @pytest.mark.parametrize("name", ["FluxFillPipeline", "FluxControlPipeline"])
    def test_a_layer_of_another_width(self, with_embedder, name):
        pipe = build(name)
        width, before = pipe.transformer.config.in_channels, structure(pipe.transformer)
        text = (
            rf"does not fit {name}:\n  transformer: tensors of another shape \(1\): x_embedder\."
            rf"gralora_A has shape \(4, 4, 8\), but this base needs \(4, {width // 4}, 8\)"
        )
        with pytest.raises(AdapterFileError, match=text):
            pipe.load_gralora_weights(with_embedder)
        assert structure(pipe.transformer) == before

    def test_another_family(self, saved):
        for family in list_families():
            pipe = tiny(family)
            where, models = type(pipe).__name__, [getattr(pipe, get_family(family).denoiser)]
            before = structure(*models)
            for other in [other for other in list_families() if other != family]:
                text = (
                    f"this adapter was trained for {other}, but {where} is {family}. "
                    f"Load it into a pipeline of {other}."
                )
                with pytest.raises(AdapterFileError) as caught:
                    pipe.load_gralora_weights(saved(other))
                assert str(caught.value) == f"{saved(other) / WEIGHTS_NAME}: {text}"
            assert structure(*models) == before

    @pytest.mark.parametrize(
        ("family", "component"),
        [("stable-diffusion-3", "text_encoder_3"), ("flux", "text_encoder_2")],
    )
    def test_without_t5(self, family, component, saved):
        pipe = tiny(family)
        setattr(pipe, component, None)
        there = ", ".join(name for name in get_family(family).components if name != component)
        with pytest.raises(AdapterFileError) as caught:
            pipe.load_gralora_weights(saved(family))
        assert str(caught.value).endswith(
            f"weights for {component!r}, which this {type(pipe).__name__} does not have "
            f"(it has {there}). Load the pipeline with its {component}."
        )
        # the rest of it, by hand
        parts = read_adapter(saved(family)).components
        del parts[component]
        tensors = {f"{name}.{key}": t for name, p in parts.items() for key, t in p.tensors.items()}
        configs = {name: part.config for name, part in parts.items()}
        report = pipe.load_gralora_weights(tensors, config=configs)
        assert report.layers.keys() == parts.keys()


class TestAddedParts:
    """AnimateDiff, IP-Adapter and others add layers with the names of those that are adapted."""

    def test_motion_modules(self, saved, tmp_path):
        pipe = build("AnimateDiffSDXLPipeline")
        report = pipe.load_gralora_weights(saved("stable-diffusion-xl"), "a")
        plain = tiny("stable-diffusion-xl")
        assert report.layers == plain.load_gralora_weights(saved("stable-diffusion-xl")).layers
        assert not any("motion" in n for n, _ in pipe.unet.named_parameters() if "gralora_" in n)
        pipe.save_gralora_weights(tmp_path)
        again = tiny("stable-diffusion-xl")
        again.load_gralora_weights(tmp_path)
        assert torch.equal(draw(again), draw(plain))

    def test_an_adapter_on_them_must_be_whole(self, tmp_path):
        source = build("AnimateDiffSDXLPipeline")
        inject(source.unet, config(["to_q"]), "a")
        source.save_gralora_weights(tmp_path)
        pipe = build("AnimateDiffSDXLPipeline")
        pipe.load_gralora_weights(tmp_path)
        assert torch.equal(draw(pipe), draw(source))
        part = read_adapter(tmp_path).components["unet"]
        dropped = next(key for key in part.tensors if "motion_modules" in key)
        rest = {f"unet.{key}": t for key, t in part.tensors.items() if key != dropped}
        with pytest.raises(AdapterFileError, match=rf"missing keys \(1\): {dropped}"):
            pipe.load_gralora_weights(rest, "again", config=part.config)

    def test_image_projection(self, saved):
        pipe = tiny("stable-diffusion")
        projection = IPAdapterPlusImageProjection(32, 32, dim_head=8, heads=2, num_queries=4)
        assert any(name.endswith("to_q") for name, _ in projection.named_modules())
        pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
        report = pipe.load_gralora_weights(saved("stable-diffusion"), "a")
        plain = tiny("stable-diffusion")
        assert report.layers == plain.load_gralora_weights(saved("stable-diffusion")).layers
        assert not gralora_layers(pipe.unet.encoder_hid_proj)
