import copy
import json
from pathlib import Path

import accelerate
import peft
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DModel,
)
from diffusers.hooks import apply_layerwise_casting
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.gralora.layer import GraloraLayer as StockLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.integrations import peft as transformers_peft

import gralora_diffusion  # noqa: F401  gives pipelines their methods
from gralora_diffusion import AdapterFileError, inject
from gralora_diffusion.adapters.adapter_file import METADATA_KEY, WEIGHTS_NAME, read_adapter
from gralora_diffusion.adapters.compatibility import gralora_layers
from gralora_diffusion.adapters.layers import GraloraLayer
from tests import models
from tests.adapters.test_injection import lora
from tests.models import TEXT_TARGETS, adapt, config, draw, merged, stable_diffusion, structure
from tests.offloading import offload_groups, two_memories
from tests.reference import dense_update, relative_error

BOTH = ["unet", "text_encoder"]


def assert_stored_as(path: Path, folder: Path) -> None:
    stored, expected = load_file(path), load_file(folder / WEIGHTS_NAME)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in expected.items())


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return relative_error(one, other) < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved adapter of UNet and text encoder, hybrid and on convolutions too."""
    folder = tmp_path_factory.mktemp("adapter")
    adapt(stable_diffusion()).save_gralora_weights(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another one, on other layers of the UNet alone."""
    pipe = stable_diffusion()
    torch.manual_seed(2)
    inject(pipe.unet, config(["to_q", "ff.net.2"], r=4, gralora_k=2, alpha=3), "b")
    folder = tmp_path_factory.mktemp("other")
    pipe.save_gralora_weights(folder)
    return folder


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    """A LoRA that diffusers itself wrote."""
    source = stable_diffusion()
    torch.manual_seed(3)
    source.unet.add_adapter(lora(target_modules=["to_q", "conv1"]), "x")
    source.text_encoder.add_adapter(lora(target_modules=["q_proj"]), "x")
    path = tmp_path_factory.mktemp("lora")
    source.save_lora_weights(
        path,
        get_peft_model_state_dict(source.unet, adapter_name="x"),
        get_peft_model_state_dict(source.text_encoder, adapter_name="x"),
        unet_lora_adapter_metadata=source.unet.peft_config["x"].to_dict(),
        text_encoder_lora_adapter_metadata=source.text_encoder.peft_config["x"].to_dict(),
    )
    return path


@pytest.fixture
def pipe():
    return stable_diffusion()


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    return draw(stable_diffusion())


@pytest.fixture(scope="module")
def adapted(folder, base) -> torch.Tensor:
    image = draw(merged([(folder, 1.0)]))
    assert relative_error(image, base) > 0.01
    return image


class TestLoad:
    def test_a_file(self, pipe, folder, adapted):
        report = pipe.load_gralora_weights(folder / WEIGHTS_NAME)
        assert report.adapter_name == "default"
        assert report.family == "stable-diffusion"
        assert report.layers == {"unet": 44, "text_encoder": 4}
        assert report.tensors == {"unet": 176, "text_encoder": 8}
        assert str(report).endswith(": 44 layers of unet, 4 layers of text_encoder")
        assert same(draw(pipe), adapted)
        assert not any(p.requires_grad for p in pipe.unet.parameters())

    def test_other_sources(self, folder, adapted, tmp_path):
        source = adapt(stable_diffusion())
        peft = source.save_gralora_weights(tmp_path / "peft", peft_format=True)
        named = source.save_gralora_weights(tmp_path, weight_name="cat.safetensors")
        state = load_file(folder / WEIGHTS_NAME)
        configs = {c: getattr(source, c).peft_config["a"] for c in BOTH}
        commit = tmp_path / "hub" / "models--me--cat" / "snapshots" / ("0" * 40)
        source.save_gralora_weights(commit / "deep")
        (commit.parent.parent / "refs").mkdir()
        (commit.parent.parent / "refs" / "main").write_text(commit.name)
        hub = {"cache_dir": tmp_path / "hub", "subfolder": "deep", "revision": "main"}
        for arguments, options in [
            ((str(folder),), {}),
            ((peft,), {}),
            ((named,), {}),
            ((tmp_path,), {"weight_name": "cat.safetensors"}),
            ((tmp_path,), {"subfolder": "peft"}),
            ((state,), {"config": configs}),
            ((read_adapter(folder),), {}),
            (("me/cat",), hub),
        ]:
            pipe = stable_diffusion()
            report = pipe.load_gralora_weights(*arguments, **options)
            assert report.layers == {"unet": 44, "text_encoder": 4}
            assert same(draw(pipe), adapted), arguments

    def test_a_state_dict_names_its_layers_itself(self, pipe, folder, adapted):
        part = read_adapter(folder).components
        state = {f"{name}.{key}": t for name, p in part.items() for key, t in p.tensors.items()}
        configs = {
            "unet": config(None, hybrid_r=2),
            "text_encoder": {"r": 8, "gralora_k": 4, "alpha": 16},
        }
        pipe.load_gralora_weights(state, config=configs)
        assert same(draw(pipe), adapted)
        again = stable_diffusion()
        for name, p in part.items():
            again.load_gralora_weights(
                {f"{name}.{key}": t for key, t in p.tensors.items()}, f"of {name}", config=p.config
            )
        again.set_adapters(["of unet", "of text_encoder"])
        assert same(draw(again), adapted)

    @pytest.mark.parametrize("component", BOTH)
    def test_a_lone_peft_folder_goes_where_its_name_says(self, component, folder, tmp_path):
        adapt(stable_diffusion()).save_gralora_weights(tmp_path, peft_format=True)
        expected = draw(merged([(folder, {c: float(c == component) for c in BOTH})]))
        for renamed in (False, True):
            source, pipe = tmp_path / component, stable_diffusion()
            if renamed:
                source = source.rename(tmp_path / "cat")
            if renamed and component == "text_encoder":
                with pytest.raises(AdapterFileError, match=r"unet: .*q_proj"):
                    pipe.load_gralora_weights(source)
                continue
            assert list(pipe.load_gralora_weights(source).layers) == [component]
            assert same(draw(pipe), expected)

    def test_stock_peft_to_ours_and_back(self, pipe, tmp_path):
        torch.manual_seed(1)
        linear = ["to_q", "to_k", "to_out.0"]
        unet = get_peft_model(stable_diffusion().unet, config(linear, hybrid_r=2)).eval()
        stock = stable_diffusion()
        stock.unet = unet.base_model.model
        expected = draw(stock)
        unet.save_pretrained(tmp_path / "stock")
        pipe.load_gralora_weights(tmp_path / "stock")
        # the layers sum in another order: 1e-5 in fp32 (tests/test_fused_linear.py)
        assert relative_error(draw(pipe), expected) < 1e-5
        pipe.save_gralora_weights(tmp_path / "ours", peft_format=True)
        back = stable_diffusion()
        back.unet = PeftModel.from_pretrained(back.unet, tmp_path / "ours" / "unet").eval()
        back.unet = back.unet.base_model.model
        assert torch.equal(draw(back), expected)

    @pytest.mark.parametrize(
        ("alpha", "pattern"), [(16, {"to_q": 4, r"attn2\.to_k": 3.5}), (0, {"to_q": 4}), (16, {})]
    )
    def test_alphas_and_exclusions_reach_stock_peft(self, pipe, tmp_path, alpha, pattern):
        torch.manual_seed(1)
        excluded = r"mid_block\..*to_v"
        ours = config(
            ["to_q", "to_k", "to_v"],
            hybrid_r=2,
            alpha=alpha,
            alpha_pattern=pattern,
            exclude_modules=excluded,
        )
        inject(pipe.unet, ours, "a")
        expected = draw(pipe)
        pipe.save_gralora_weights(tmp_path, peft_format=True)
        stock = stable_diffusion()
        stock.unet = PeftModel.from_pretrained(stock.unet, tmp_path / "unet").eval()
        adapted = {name for name, m in stock.unet.named_modules() if isinstance(m, StockLayer)}
        assert len(adapted) == 3 * 8 - 2  # two layers were excluded
        stock.unet = stock.unet.base_model.model
        assert relative_error(draw(stock), expected) < 1e-5
        back = stable_diffusion()
        back.load_gralora_weights(tmp_path)
        assert relative_error(draw(back), expected) < 1e-5

    def test_a_stock_config_may_name_what_is_not_there(self, pipe, tmp_path):
        """PEFT lets a pattern match nothing; what counts is that the file is whole."""
        unet = get_peft_model(pipe.unet, config(["to_q", "qkv_proj"]))
        unet.save_pretrained(tmp_path)
        assert stable_diffusion().load_gralora_weights(tmp_path).layers == {"unet": 8}

    def test_keys_of_transformers_4(self, pipe, folder, adapted, tmp_path):
        """There CLIPTextModel had one more level; patterns may name it, too."""
        for targets in (TEXT_TARGETS, r"text_model\.encoder\..*\.(q|v)_proj", "all"):
            state, metadata = load_file(folder / WEIGHTS_NAME), {}
            old = {
                k.replace("text_encoder.", "text_encoder.text_model."): t for k, t in state.items()
            }
            with safe_open(folder / WEIGHTS_NAME, "pt") as file:
                metadata = file.metadata()
            described = json.loads(metadata[METADATA_KEY])
            if targets == "all":
                paths = {k.split(".", 1)[1].rsplit(".gra", 1)[0] for k in old if "text_" in k}
                targets = sorted(paths)
            described["components"]["text_encoder"]["target_modules"] = targets
            save_file(old, tmp_path / "old", {METADATA_KEY: json.dumps(described)})
            pipe = stable_diffusion()
            pipe.load_gralora_weights(tmp_path / "old")
            assert same(draw(pipe), adapted)
            again = stable_diffusion()
            again.load_gralora_weights(pipe.save_gralora_weights(tmp_path / "again"))
            assert torch.equal(draw(again), draw(pipe))

    def test_pipelines_that_share_models(self, pipe, folder, base, adapted):
        for pipeline_class in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline):
            shared = pipeline_class(**pipe.components)
            shared.load_gralora_weights(folder)
            assert same(draw(pipe), adapted)
            assert shared.get_active_adapters() == ["default"]
            assert pipe.unload_gralora_weights() == ["default"]
            assert shared.get_list_adapters() == {}
            assert torch.equal(draw(pipe), base)

    def test_names(self, pipe, folder, base, adapted):
        assert [pipe.load_gralora_weights(folder).adapter_name for _ in range(3)] == [
            "default",
            "default_1",
            "default_2",
        ]
        assert pipe.load_gralora_weights(folder, "a cat's").adapter_name == "a cat's"
        assert pipe.get_active_adapters() == ["a cat's"]
        assert same(draw(pipe), adapted)

    def test_nothing_is_drawn_and_the_state_dict_stays_the_callers(self, pipe, folder):
        part = read_adapter(folder).components["unet"]
        given = {key: tensor.clone() for key, tensor in part.tensors.items()}
        state = torch.get_rng_state()
        pipe.load_gralora_weights(given, config=part.config)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.no_grad():
            for layer in gralora_layers(pipe.unet):
                for parameter in layer.parameters():
                    parameter.zero_()
        assert all(torch.equal(given[key], tensor) for key, tensor in part.tensors.items())

    def test_on_a_base_without_values(self, folder):
        pipe = stable_diffusion()
        pipe.unet.to("meta")
        pipe.load_gralora_weights(folder)
        factor = gralora_layers(pipe.unet)[0].gralora_A["default"]
        assert factor.device.type == "cpu"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, folder, dtype, adapted):
        pipe = stable_diffusion().to(dtype)
        pipe.load_gralora_weights(folder)
        assert {p.dtype for c in BOTH for p in getattr(pipe, c).parameters()} == {dtype}
        assert relative_error(draw(pipe), adapted) < 64 * torch.finfo(dtype).eps
        pipe.load_gralora_weights(folder, "exact", adapter_dtype=torch.float32)
        layer = pipe.unet.get_submodule("mid_block.resnets.0.conv1")
        stored = load_file(folder / WEIGHTS_NAME)["unet.mid_block.resnets.0.conv1.gralora_A"]
        assert torch.equal(layer.gralora_A["exact"], stored)
        assert layer.gralora_A["default"].dtype == dtype
        assert relative_error(draw(pipe), adapted) < 64 * torch.finfo(dtype).eps

    def test_biases_and_saved_modules_take_the_dtype_of_the_base(self, tmp_path):
        source = stable_diffusion()
        inject(source.unet, config(["to_q", "conv1"], bias="all", modules_to_save=["conv_out"]))
        with torch.no_grad():
            for parameter in source.unet.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        expected = draw(source)
        for peft_format in (False, True):
            source.save_gralora_weights(tmp_path, peft_format=peft_format)
            pipe = stable_diffusion()
            pipe.load_gralora_weights(tmp_path)
            assert torch.equal(draw(pipe), expected)
            half = stable_diffusion().to(torch.bfloat16)
            half.load_gralora_weights(tmp_path)
            assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}
            assert relative_error(draw(half), expected) < 0.2
            half.unload_gralora_weights()
            assert {type(m) for m in half.unet.modules()} == {
                type(m) for m in stable_diffusion().unet.modules()
            }
            (tmp_path / WEIGHTS_NAME).unlink(missing_ok=True)

    def test_any_other_pipeline(self, tmp_path):
        """Families are needed for training; loading takes any pipeline that has models."""
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
        source = DDPMPipeline(copy.deepcopy(unet), DDPMScheduler())
        inject(source.unet, config(["to_q", "conv1"]))
        source.save_gralora_weights(tmp_path)
        pipe = DDPMPipeline(unet, DDPMScheduler())
        report = pipe.load_gralora_weights(tmp_path)
        assert report.family is None
        x = torch.randn(1, 3, 8, 8)
        assert torch.equal(pipe.unet(x, 3).sample, source.unet(x, 3).sample)

    def test_into_a_compiled_unet(self, pipe, folder, base, adapted, tmp_path):
        bare, pipe.unet = pipe.unet, torch.compile(pipe.unet)
        pipe.load_gralora_weights(folder)
        assert_stored_as(pipe.save_gralora_weights(tmp_path), folder)
        compiled, pipe.unet = pipe.unet, bare  # compiling a UNet takes long
        assert same(draw(pipe), adapted)
        pipe.unet = compiled
        pipe.unload_gralora_weights()
        pipe.unet = bare
        assert torch.equal(draw(pipe), base)

    def test_after_disabling(self, pipe, folder, other):
        pipe.load_gralora_weights(other, "b")
        pipe.disable_lora()
        pipe.load_gralora_weights(folder, "a")
        pipe.set_adapters(["a", "b"], [1.0, 0.5])
        assert same(draw(pipe), draw(merged([(folder, 1.0), (other, 0.5)])))

    def test_options_that_do_not_exist(self, pipe, folder):
        with pytest.raises(TypeError, match="adapter_nam"):
            pipe.load_gralora_weights(folder, adapter_nam="cat")
        with pytest.raises(ValueError, match="`config` is only allowed with a state dict"):
            pipe.load_gralora_weights(folder, config=config())


def test_fused_weights_whose_projections_were_fused_stay(pipe, folder, base):
    """Else the update would stay in the joined projection for good, and nothing would say so."""
    pipe.load_gralora_weights(folder)
    pipe.fuse_gralora()
    fused = draw(pipe)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"fused projections have replaced \d+ .*unfuse_qkv"):
        pipe.unfuse_gralora()
    assert same(draw(pipe), fused)
    pipe.unet.unfuse_qkv_projections()
    pipe.unfuse_gralora()
    pipe.unload_gralora_weights()
    assert same(draw(pipe), base)


class TestPatterns:
    """Layers of another rank, k and alpha, image for image."""

    PATTERNS = {  # noqa: RUF012
        "unet": {
            "rank_pattern": {"to_q": 4, r"attn2\.to_[qk]": 16},  # sorted: another adapter
            "k_pattern": {r"^mid_block\..*": 2, "to_v": 1},
            "alpha_pattern": {"conv1": 3.5, r"attn1\..*": 20},
        },
        "text_encoder": {
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 16},
            "k_pattern": {r"^encoder\.layers\.0\..*": 2},
            "alpha_pattern": {"v_proj": 5},
        },
    }

    @staticmethod
    def expected(component: str, path: str) -> tuple[int, int, float]:
        """Rank, k and alpha / (rank + hybrid rank) of a layer, spelled out."""
        end = path.rsplit(".", 1)[-1]
        if component == "text_encoder":
            r = 16 if path == "encoder.layers.1.self_attn.q_proj" else 8
            return r, 2 if ".0." in path else 4, (5 if end == "v_proj" else 16) / r
        r = 4 if end == "to_q" else 16 if path.endswith("attn2.to_k") else 8
        k = 2 if path.startswith("mid_block.") else 1 if end == "to_v" else 4
        return r, k, (3.5 if end == "conv1" else 20 if ".attn1." in path else 16) / (r + 2)

    @pytest.fixture
    def source(self):
        pipe = stable_diffusion()
        torch.manual_seed(1)
        inject(pipe.unet, config(hybrid_r=2, **self.PATTERNS["unet"]), "a")
        inject(pipe.text_encoder, config(TEXT_TARGETS, **self.PATTERNS["text_encoder"]), "a")
        return pipe

    @pytest.fixture
    def image(self, source):
        """Drawn with the updates by the definition in the weights of a bare pipeline."""
        pipe, seen = stable_diffusion(), set()
        for component in BOTH:
            model = getattr(pipe, component)
            for path, layer in list(getattr(source, component).named_modules()):
                if not isinstance(layer, GraloraLayer):
                    continue
                r, k, scaling = self.expected(component, path)
                A, B = layer.gralora_A["a"], layer.gralora_B["a"]
                assert (A.shape[0], A.shape[2], *B.shape[:2]) == (k, r, k, r), path
                update = dense_update(A, B)
                if component == "unet":
                    down, up = (getattr(layer, f"gralora_{n}_general").a.weight for n in "AB")
                    update += torch.einsum("or,ri...->oi...", up.double().flatten(1), down.double())
                weight = model.get_submodule(path).weight
                weight.data = (weight.double() + scaling * update).to(weight.dtype)
                seen.add((component, r, k))
        assert len(seen) > 8
        return draw(pipe)

    @pytest.mark.parametrize("name", ["native", "peft"])
    def test_save_load_fuse(self, source, image, pipe, base, tmp_path, name):
        assert relative_error(image, base) > 0.01
        assert same(draw(source), image)
        native = source.save_gralora_weights(tmp_path / "native")
        source.save_gralora_weights(tmp_path / "peft", peft_format=True)
        report = pipe.load_gralora_weights(tmp_path / name)
        assert report.layers == {"unet": 44, "text_encoder": 4}
        assert torch.equal(draw(pipe), draw(source))
        assert pipe.save_gralora_weights(tmp_path / "again").read_bytes() == native.read_bytes()
        pipe.fuse_gralora()
        assert same(draw(pipe), image)
        pipe.unfuse_gralora()
        assert same(draw(pipe), image)
        pipe.unload_gralora_weights()
        assert same(draw(pipe), base)

    def test_set_adapters(self, source, image, pipe, folder, tmp_path):
        pipe.load_gralora_weights(source.save_gralora_weights(tmp_path), "a")
        pipe.load_gralora_weights(folder, "b")
        pipe.set_adapters(["a", "b"], [1.0, 0.0])
        assert same(draw(pipe), image)
        pipe.set_adapters("a", 0.25)
        for component in BOTH:
            for path, layer in getattr(pipe, component).named_modules():
                if isinstance(layer, GraloraLayer):
                    scaling = self.expected(component, path)[2]
                    assert layer.scaling["a"] == pytest.approx(0.25 * scaling)

    def test_a_state_dict_with_its_configs(self, source, image, pipe, tmp_path):
        state = load_file(source.save_gralora_weights(tmp_path))
        configs = {
            "unet": config(hybrid_r=2, **self.PATTERNS["unet"]),
            "text_encoder": {"r": 8, "gralora_k": 4, "alpha": 16, **self.PATTERNS["text_encoder"]},
        }
        pipe.load_gralora_weights(state, config=configs)
        assert same(draw(pipe), image)

    @pytest.mark.parametrize("targets", [TEXT_TARGETS, r"text_model\..*(q|v)_proj", None])
    def test_keys_of_transformers_4(self, source, image, pipe, tmp_path, targets):
        """There CLIPTextModel had one more level, which patterns may name."""

        def older(tensors, description):
            for key in [key for key in tensors if key.startswith("text_encoder.")]:
                new = key.replace("text_encoder.", "text_encoder.text_model.")
                tensors[new] = tensors.pop(key)
            text = description["components"]["text_encoder"]
            text["target_modules"] = targets
            text["k_pattern"] = {r"^text_model\.encoder\.layers\.0\..*": 2}
            text["rank_pattern"] = {r"text_model\.encoder\.layers\.1\.self_attn\.q_proj": 16}

        source.save_gralora_weights(tmp_path)
        pipe.load_gralora_weights(edit(older)(tmp_path, tmp_path / "old"))
        assert same(draw(pipe), image)
        again = stable_diffusion()
        again.load_gralora_weights(pipe.save_gralora_weights(tmp_path / "again"))
        assert torch.equal(draw(again), draw(pipe))

    @pytest.mark.parametrize("name", ["rank_pattern", "k_pattern"])
    def test_without_its_patterns_a_file_does_not_fit(self, source, pipe, name, tmp_path):
        source.save_gralora_weights(tmp_path)
        path = edit(lambda t, d: d["components"]["unet"].pop(name))(tmp_path, tmp_path / "changed")
        before = structure(pipe.unet, pipe.text_encoder)
        with pytest.raises(AdapterFileError, match=r"unet: tensors of another shape \(\d+\)"):
            pipe.load_gralora_weights(path)
        assert structure(pipe.unet, pipe.text_encoder) == before


class TestSave:
    def test_all_keys_are_the_modules_of_the_bare_pipeline(self, pipe, folder):
        stored = load_file(folder / WEIGHTS_NAME)
        for component in BOTH:
            model = getattr(pipe, component)
            targets = models.UNET_TARGETS if component == "unet" else TEXT_TARGETS
            paths = [n for n, _ in model.named_modules() if n.endswith(tuple(targets))]
            suffixes = ["gralora_A", "gralora_B"]
            if component == "unet":
                suffixes += ["gralora_A_general.weight", "gralora_B_general.weight"]
            assert {k for k in stored if k.startswith(f"{component}.")} == {
                f"{component}.{path}.{suffix}" for path in paths for suffix in suffixes
            }

    def test_round_trip_is_exact(self, pipe, folder, tmp_path):
        pipe.load_gralora_weights(folder)
        path = pipe.save_gralora_weights(tmp_path, metadata={"modelspec.title": "cat"})
        assert path == tmp_path / WEIGHTS_NAME
        assert_stored_as(path, folder)
        assert read_adapter(path).metadata == {"modelspec.title": "cat"}
        assert (
            read_adapter(path).components["unet"].config
            == read_adapter(folder).components["unet"].config
        )

    def test_dtype(self, pipe, folder, tmp_path):
        pipe.load_gralora_weights(folder)
        path = pipe.save_gralora_weights(tmp_path, dtype=torch.bfloat16)
        assert {t.dtype for t in load_file(path).values()} == {torch.bfloat16}

    def test_which_adapter(self, pipe, folder, other, tmp_path):
        with pytest.raises(
            ValueError, match=r"pass `adapter_name`.*attached GraLoRA adapters: none"
        ):
            pipe.save_gralora_weights(tmp_path)
        pipe.load_gralora_weights(folder, "a")
        pipe.load_gralora_weights(other, "b")
        with pytest.raises(
            ValueError, match=r"pass `adapter_name` .*attached GraLoRA adapters: a, b"
        ):
            pipe.save_gralora_weights(tmp_path)
        with pytest.raises(ValueError, match=r"no adapter is named 'c'; attached .*adapters: a, b"):
            pipe.save_gralora_weights(tmp_path, "c")
        for name, source in (("a", folder), ("b", other)):
            assert_stored_as(pipe.save_gralora_weights(tmp_path, name), source)
        with pytest.raises(ValueError, match="is a file; `save_directory` must be a folder"):
            pipe.save_gralora_weights(tmp_path / WEIGHTS_NAME, "a")

    @pytest.mark.parametrize("bias", ["none", "gralora_only", "all"])
    def test_beside_a_lora_in_any_order(self, bias, tmp_path):
        """LoRA layers around ours, and ours around LoRA's, do not show in the file."""
        expected = None
        for order in (["ours"], ["lora", "ours"], ["ours", "lora"]):
            pipe = stable_diffusion()
            for name in order:
                torch.manual_seed(1)
                if name == "ours":
                    inject(pipe.unet, config(["to_q", "conv1"], bias=bias), "ours")
                else:
                    inject_adapter_in_model(
                        lora(target_modules=["to_q", "conv2"]), pipe.unet, "lora"
                    )
            stored = load_file(pipe.save_gralora_weights(tmp_path, "ours"))
            expected = expected or stored
            assert stored.keys() == expected.keys()
            assert all(torch.equal(tensor, stored[key]) for key, tensor in expected.items())
            pipe.unload_gralora_weights()
            pipe.load_gralora_weights(tmp_path, "again")
            again = load_file(pipe.save_gralora_weights(tmp_path, "again"))
            assert all(torch.equal(tensor, again[key]) for key, tensor in expected.items())


class TestBesideLora:
    @pytest.mark.parametrize("first", ["lora", "ours"])
    def test_together(self, pipe, folder, base, adapted, lora_file, first):
        alone = stable_diffusion()
        alone.load_lora_weights(lora_file, adapter_name="lora")
        with_lora = draw(alone)
        alone.fuse_lora(components=BOTH)
        alone.unload_lora_weights()
        together = draw(merged([(folder, 1.0)], alone))
        for name in (first, "lora", "ours"):
            if name == "lora" and "lora" not in str(pipe.get_list_adapters()):
                pipe.load_lora_weights(lora_file, adapter_name="lora")
            elif name == "ours" and "ours" not in str(pipe.get_list_adapters()):
                pipe.load_gralora_weights(folder, "ours")
        pipe.set_adapters(["lora", "ours"])
        assert same(draw(pipe), together)
        pipe.set_adapters("ours")
        assert same(draw(pipe), adapted)
        pipe.set_adapters("lora")
        assert same(draw(pipe), with_lora)
        pipe.set_adapters(["lora", "ours"], [0.0, 1.0])
        assert same(draw(pipe), adapted)
        pipe.set_adapters(["lora", "ours"])
        pipe.fuse_gralora()
        assert pipe.fused_loras == {"ours"}
        assert same(draw(pipe), together)
        pipe.unfuse_gralora()
        pipe.fuse_lora(components=BOTH)
        assert pipe.fused_loras == {"lora", "ours"}
        assert same(draw(pipe), together)
        pipe.unfuse_lora(components=BOTH)
        assert pipe.unload_gralora_weights() == ["ours"]
        assert pipe.get_list_adapters() == {"unet": ["lora"], "text_encoder": ["lora"]}
        assert same(draw(pipe), with_lora)
        pipe.load_gralora_weights(folder, "ours")
        pipe.delete_adapters("lora")
        pipe.set_adapters("ours")
        assert same(draw(pipe), adapted)
        pipe.unload_lora_weights()
        assert same(draw(pipe), base)

    def test_a_lora_of_the_same_name_elsewhere(self, pipe):
        """On another component it is another adapter, and stays whole."""
        pipe.text_encoder.add_adapter(lora(target_modules=["q_proj"]), "dog")
        alone, record = draw(pipe), pipe.text_encoder.peft_config["dog"]
        inject(pipe.unet, config(), "dog")
        assert not same(draw(pipe), alone)
        assert pipe.unload_gralora_weights() == ["dog"]
        assert pipe.text_encoder.peft_config == {"dog": record}
        assert not getattr(pipe.unet, "peft_config", None)
        assert same(draw(pipe), alone)
        pipe.set_adapters("dog", 0.5)
        pipe.delete_adapters("dog")
        assert not any("lora" in name for name, _ in pipe.text_encoder.named_parameters())

    def test_transformers_that_requires_a_newer_peft(
        self, pipe, folder, other, adapted, lora_file, monkeypatch, recwarn
    ):
        monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "1000.0")
        pipe.load_gralora_weights(other, "unet alone")
        assert not [w for w in recwarn if "requires PEFT" in str(w.message)]
        pipe.unload_gralora_weights()
        with pytest.warns(
            UserWarning, match=rf"requires PEFT 1000.0, and PEFT {peft.__version__} "
        ):
            pipe.load_gralora_weights(folder, "ours")
        with pytest.raises(ValueError, match="version of PEFT"):
            pipe.text_encoder.disable_adapters()
        pipe.load_lora_weights(lora_file, adapter_name="lora")
        pipe.set_adapters("ours")
        assert same(draw(pipe), adapted)
        pipe.delete_adapters("lora")
        assert same(draw(pipe), adapted)


class TestDiffusersMethods:
    @pytest.fixture
    def pipe(self, folder, other):
        pipe = stable_diffusion()
        pipe.load_gralora_weights(folder, "a")
        pipe.load_gralora_weights(other, "b")
        return pipe

    def test_set_adapters(self, pipe, folder, other, base, adapted):
        pipe.set_adapters("a")
        assert same(draw(pipe), adapted)
        pipe.set_adapters(["a", "b"], [0.5, -0.8])
        assert same(draw(pipe), draw(merged([(folder, 0.5), (other, -0.8)])))
        pipe.set_adapters("a", 0.0)
        assert torch.equal(draw(pipe), base)
        pipe.set_adapters("a")
        assert same(draw(pipe), adapted)

    def test_what_is_loaded_last_is_the_only_active_one(self, folder, tmp_path):
        """Also on a component that it has no part for."""
        unet_only = stable_diffusion()
        inject(unet_only.unet, config(["to_v"]), "x")
        unet_only.save_gralora_weights(tmp_path)
        pipe = stable_diffusion()
        pipe.load_gralora_weights(tmp_path, adapter_name="b")
        expected = draw(pipe)
        pipe = stable_diffusion()
        pipe.load_gralora_weights(folder, adapter_name="a")
        pipe.load_gralora_weights(tmp_path, adapter_name="b")
        assert pipe.get_active_adapters() == ["b"]
        assert torch.equal(draw(pipe), expected)
        pipe.fuse_gralora()
        assert pipe.fused_loras == {"b"}
        pipe.unfuse_gralora()
        pipe.set_adapters("a")
        assert relative_error(draw(pipe), expected) > 1e-3

    def test_set_adapters_by_component_and_block(self, pipe, folder):
        pipe.set_adapters("a", {"unet": 0.3, "text_encoder": 0.6})
        assert same(draw(pipe), draw(merged([(folder, {"unet": 0.3, "text_encoder": 0.6})])))
        pipe.set_adapters("a", {"unet": {"down": 0.5, "mid": 0.0}})
        scales = {
            name.split("_")[0]: module.scaling["a"]
            for name, module in pipe.unet.named_modules()
            if "a" in getattr(module, "scaling", {}) and ".attentions." in name
        }
        assert scales == pytest.approx({"down": 0.8, "mid": 0.0, "up": 1.6})

    def test_scale_at_run_time(self, pipe, folder, base, adapted):
        pipe.set_adapters("a")
        image = draw(pipe, cross_attention_kwargs={"scale": 0.5})
        assert same(image, draw(merged([(folder, 0.5)])))
        assert torch.equal(draw(pipe, cross_attention_kwargs={"scale": 0.0}), base)
        assert same(draw(pipe), adapted)

    def test_enable_disable_delete(self, pipe, base, adapted):
        pipe.set_adapters("a")
        pipe.disable_lora()
        assert torch.equal(draw(pipe), base)
        pipe.enable_lora()
        assert same(draw(pipe), adapted)
        assert pipe.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["a"]}
        assert pipe.get_active_adapters() == ["a"]
        pipe.unet.disable_adapters()
        pipe.unet.enable_adapters()
        pipe.delete_adapters("b")
        assert pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]}
        assert same(draw(pipe), adapted)
        pipe.delete_adapters(["a"])
        assert pipe.get_list_adapters() == {}
        assert torch.equal(draw(pipe), base)
        assert pipe.unload_gralora_weights() == []
        assert not any("gralora" in repr(type(module)) for module in pipe.unet.modules())

    def test_loading_again_after_deleting(self, pipe, folder, adapted):
        pipe.delete_adapters(["a", "b"])
        pipe.load_gralora_weights(folder, "a")
        assert same(draw(pipe), adapted)

    def test_fuse_and_unfuse(self, pipe, folder, other, base, adapted):
        pipe.set_adapters("a")
        pipe.fuse_lora(components=BOTH, safe_fusing=True)
        assert pipe.num_fused_loras == 1
        assert same(draw(pipe), adapted)
        pipe.unfuse_lora(components=BOTH)
        assert pipe.num_fused_loras == 0
        assert same(draw(pipe), adapted)
        pipe.fuse_lora(components=BOTH, lora_scale=0.5)
        assert same(draw(pipe), draw(merged([(folder, 0.5)])))
        pipe.unfuse_lora(components=BOTH)
        pipe.set_adapters(["a", "b"], [0.5, 0.7])
        pipe.fuse_lora(components=BOTH, adapter_names=["a", "b"])
        assert pipe.fused_loras == {"a", "b"}
        assert same(draw(pipe), draw(merged([(folder, 0.5), (other, 0.7)])))
        pipe.unfuse_lora(components=BOTH)
        pipe.disable_lora()
        assert same(draw(pipe), base)

    def test_unload(self, pipe, base):
        bare = stable_diffusion()
        pipe.unload_lora_weights()
        assert torch.equal(draw(pipe), base)
        for component in BOTH:
            kinds = [type(m) for m in getattr(pipe, component).modules()]
            assert kinds == [type(m) for m in getattr(bare, component).modules()]
        assert pipe.get_list_adapters() == {}


class TestFuse:
    def test_at_a_scale(self, pipe, folder, base, adapted):
        pipe.load_gralora_weights(folder)
        assert pipe.fuse_gralora() == BOTH
        assert pipe.fused_loras == {"default"}
        assert same(draw(pipe), adapted)
        with pytest.raises(ValueError, match=r"already fused: default\. Call `unfuse_gralora"):
            pipe.fuse_gralora(0.5)
        assert pipe.unfuse_gralora() == BOTH
        assert pipe.num_fused_loras == 0
        assert same(draw(pipe), adapted)
        assert pipe.fuse_gralora(0.5) == BOTH
        assert same(draw(pipe), draw(merged([(folder, 0.5)])))
        pipe.unfuse_gralora()
        assert same(draw(pipe), adapted)  # the scale was for that fusion alone
        pipe.unload_gralora_weights()
        assert same(draw(pipe), base)

    def test_components_and_adapters(self, pipe, folder, other):
        pipe.load_gralora_weights(folder, "a")
        pipe.load_gralora_weights(other, "b")
        pipe.set_adapters(["a", "b"], [0.5, 0.7])
        expected = draw(merged([(folder, 0.5), (other, 0.7)]))
        assert pipe.fuse_gralora(components=["text_encoder"]) == ["text_encoder"]
        assert same(draw(pipe), expected)
        assert pipe.fuse_gralora(adapter_names="b") == ["unet"]
        assert pipe.fused_loras == {"a", "b"}
        assert same(draw(pipe), expected)
        assert pipe.unfuse_gralora(components=["text_encoder"]) == ["text_encoder"]
        assert pipe.fused_loras == {"b"}
        assert same(draw(pipe), expected)

    def test_loading_another_on_top(self, pipe, folder, other, adapted):
        pipe.load_gralora_weights(folder, "a")
        pipe.fuse_gralora()
        pipe.load_gralora_weights(other, "b")
        assert pipe.fused_loras == {"a"}
        assert same(draw(pipe), draw(merged([(folder, 1.0), (other, 1.0)])))
        pipe.set_adapters("b", 0.0)
        assert same(draw(pipe), adapted)
        pipe.unload_gralora_weights()
        assert same(draw(pipe), adapted)  # as with LoRA, what was fused stays

    def test_a_fused_adapter_that_is_deleted_or_disabled(self, pipe, folder, other, base):
        pipe.load_gralora_weights(folder, "a")
        pipe.load_gralora_weights(other, "b")
        pipe.set_adapters(["a", "b"])
        pipe.fuse_gralora()
        copied = copy.deepcopy(pipe)
        pipe.delete_adapters("a")
        assert pipe.fused_loras == {"b"}
        assert same(draw(pipe), draw(merged([(other, 1.0)])))
        pipe.disable_lora()
        assert same(draw(pipe), base)
        assert pipe.num_fused_loras == 0
        pipe.enable_lora()
        pipe.fuse_lora(components=BOTH)
        assert pipe.fused_loras == {"b"}
        pipe.delete_adapters("b")
        assert pipe.fused_loras == set()
        assert copied.fused_loras == {"a", "b"}

    def test_refusals(self, pipe, folder):
        with pytest.raises(ValueError, match="no GraLoRA adapter is attached"):
            pipe.fuse_gralora()
        with pytest.raises(ValueError, match="no GraLoRA adapter is attached"):
            pipe.unfuse_gralora()
        pipe.load_gralora_weights(folder)
        with pytest.raises(ValueError, match="no adapter is named x; attached adapters: default"):
            pipe.fuse_gralora(adapter_names=["x"])
        with pytest.raises(
            ValueError, match="no component is named vae; choose from unet, text_encoder"
        ):
            pipe.fuse_gralora(components=["vae"])
        for layer in [*gralora_layers(pipe.unet), *gralora_layers(pipe.text_encoder)]:
            layer.set_adapter([])
        with pytest.raises(ValueError, match="no adapter is active; attached adapters: default"):
            pipe.fuse_gralora()

    @pytest.mark.parametrize("failure", ["nan", "overflow", "fp8"])
    def test_all_layers_or_none(self, pipe, folder, other, failure):
        pipe.load_gralora_weights(other, "b")
        pipe.fuse_gralora()
        pipe.load_gralora_weights(folder)
        layer = pipe.text_encoder.get_submodule("encoder.layers.1.self_attn.v_proj")
        if failure == "nan":
            layer.gralora_B["default"].data[0, 0, 0] = torch.nan
        elif failure == "overflow":
            pipe.text_encoder.half()
            layer.set_scale("default", 1e7)
        else:
            weight = layer.base_layer.weight
            weight.data = weight.to(torch.float8_e4m3fn)
        before = structure(pipe.unet, pipe.text_encoder)
        text = r"encoder\.layers\.1\.self_attn\.v_proj: .*(NaN or infinite|stored as torch.float8)"
        with pytest.raises(ValueError, match=text):
            pipe.fuse_gralora()
        assert str(structure(pipe.unet, pipe.text_encoder)) == str(before)
        assert pipe.fused_loras == {"b"}

    def test_half_precision_is_rounded_once(self, folder):
        pipe = stable_diffusion().to(torch.bfloat16)
        pipe.load_gralora_weights(folder, adapter_dtype=torch.float32)
        pipe.fuse_gralora()
        pipe.unload_gralora_weights()
        exact = merged([(folder, 1.0)], stable_diffusion().to(torch.bfloat16).to(torch.float32))
        for component in BOTH:
            for name, weight in getattr(exact, component).named_parameters():
                fused = getattr(pipe, component).get_parameter(name)
                unit = torch.finfo(torch.bfloat16).eps * weight.abs()
                assert ((fused - weight).abs() <= 0.51 * unit).all(), name


class TestPlacement:
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_layerwise_casting(self, pipe, folder, when):
        """The base is rounded to fp8, the adapter is not."""
        rounded = stable_diffusion()
        rounded.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        plain = stable_diffusion()
        state = {key: tensor.float() for key, tensor in rounded.unet.state_dict().items()}
        plain.unet.load_state_dict(state)
        expected = draw(merged([(folder, 1.0)], plain))
        if when == "after":
            pipe.load_gralora_weights(folder)
        pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        if when == "before":
            pipe.load_gralora_weights(folder)
        ours = {n: p.dtype for n, p in pipe.unet.named_parameters() if "gralora_" in n}
        assert set(ours.values()) == {torch.float32}
        bases = [n for n in ours if n.endswith("gralora_A.default")]
        for name in bases:
            path = name.removesuffix("gralora_A.default")
            assert pipe.unet.get_parameter(f"{path}base_layer.weight").dtype == torch.float8_e4m3fn
        assert same(draw(pipe), expected)
        with pytest.raises(ValueError, match=r"stored as torch\.float8_e4m3fn"):
            pipe.fuse_gralora()

    def test_a_base_stored_in_fp8(self, pipe, folder):
        """Whatever casts it for computing: its storage dtype is not one for factors."""
        apply_layerwise_casting(pipe.text_encoder, torch.float8_e4m3fn, torch.float32)
        assert pipe.text_encoder.dtype == torch.float8_e4m3fn
        pipe.load_gralora_weights(folder)
        ours = {p.dtype for n, p in pipe.text_encoder.named_parameters() if "gralora_" in n}
        assert ours == {torch.float32}

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_model_offloading(self, pipe, folder, base, adapted, when, tmp_path):
        if when == "before":
            pipe.enable_model_cpu_offload(device="cpu")
        pipe.load_gralora_weights(folder)
        if when == "after":
            pipe.enable_model_cpu_offload(device="cpu")
        assert same(draw(pipe), adapted)
        assert_stored_as(pipe.save_gralora_weights(tmp_path), folder)
        pipe.set_adapters("default", 0.5)
        pipe.fuse_gralora(2.0)
        assert same(draw(pipe), adapted)
        pipe.unfuse_gralora()
        pipe.unload_gralora_weights()
        assert hasattr(pipe.unet, "_hf_hook")
        assert same(draw(pipe), base)

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("fused", [False, True])
    def test_sequential_offloading(self, pipe, folder, adapted, when, fused, tmp_path):
        """To "cpu:0", which accelerate cannot run on: drawn after the hooks are gone."""
        if when == "before":
            pipe.enable_sequential_cpu_offload(device="cpu")
        pipe.load_gralora_weights(folder)
        if when == "after":
            pipe.enable_sequential_cpu_offload(device="cpu")
        if fused:
            pipe.fuse_gralora()
        assert_stored_as(pipe.save_gralora_weights(tmp_path), folder)
        for component in BOTH:
            parameters = dict(getattr(pipe, component).named_parameters())
            assert {p.device.type for p in parameters.values()} == {"meta"}
            if fused:
                pipe.unload_gralora_weights()
        pipe.remove_all_hooks()
        assert same(draw(pipe), adapted)

    def test_accelerate_offloading(self, pipe, folder, adapted):
        pipe.load_gralora_weights(folder)
        accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
        assert {p.device.type for p in pipe.unet.parameters()} == {"meta"}
        assert same(draw(pipe), adapted)

    @pytest.mark.parametrize("level", ["leaf_level", "block_level"])
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("when", ["before", "after"])
    def test_group_offloading(self, pipe, folder, base, adapted, level, stream, when, tmp_path):
        def enable():
            offload_groups(pipe.unet, level, stream)
            offload_groups(pipe.text_encoder, level, stream)

        def drawn():
            with two_memories():
                return draw(pipe)

        if when == "before":
            enable()
        pipe.load_gralora_weights(folder)
        if when == "after":
            enable()
        assert same(drawn(), adapted)
        assert_stored_as(pipe.save_gralora_weights(tmp_path), folder)
        pipe.fuse_gralora()
        assert same(drawn(), adapted)
        pipe.unfuse_gralora()
        pipe.unload_gralora_weights()
        assert same(drawn(), base)

    @pytest.mark.parametrize("level", ["leaf_level", "block_level"])
    def test_group_offloading_to_disk(self, pipe, folder, adapted, level, tmp_path):
        """After it, nothing can be read or changed: diffusers leaves memory of any content."""
        refused = pytest.raises(ValueError, match="UNet2DConditionModel is offloaded to disk")
        pipe.load_gralora_weights(folder)
        offload_groups(pipe.unet, level, disk=tmp_path / "loaded")
        assert same(draw(pipe), adapted)
        for call in (
            pipe.fuse_gralora,
            pipe.unfuse_gralora,
            pipe.unload_gralora_weights,
            lambda: pipe.save_gralora_weights(tmp_path),
            lambda: pipe.load_gralora_weights(folder, "b"),
        ):
            with refused:
                call()
        assert not list(tmp_path.glob("*.safetensors"))
        assert same(draw(pipe), adapted)

        bare = stable_diffusion()
        offload_groups(bare.unet, level, disk=tmp_path / "bare")
        with refused:
            bare.load_gralora_weights(folder)

    @pytest.mark.gpu
    @pytest.mark.parametrize("level", ["leaf_level", "block_level"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_group_offloading_on_a_gpu(self, pipe, folder, level, stream, monkeypatch):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        whole = stable_diffusion().to("cuda")
        whole.load_gralora_weights(folder)
        expected = draw(whole).cpu()
        pipe.load_gralora_weights(folder)
        pipe.enable_group_offload(
            torch.device("cuda"), offload_type=level, num_blocks_per_group=1, use_stream=stream
        )
        for _ in range(2):
            assert same(draw(pipe).cpu(), expected)
        pipe.fuse_gralora()
        assert same(draw(pipe).cpu(), expected)


def edit(change):
    """Damage a saved adapter: ``change(tensors, description)``."""

    def write(folder: Path, target: Path) -> Path:
        tensors = load_file(folder / WEIGHTS_NAME)
        with safe_open(folder / WEIGHTS_NAME, "pt") as file:
            metadata = file.metadata()
        description = json.loads(metadata[METADATA_KEY])
        change(tensors, description)
        metadata[METADATA_KEY] = json.dumps(description)
        save_file(tensors, target, metadata)
        return target

    return write


Q_PROJ = "text_encoder.encoder.layers.1.self_attn.q_proj"


def missing(tensors, _):
    del tensors[f"{Q_PROJ}.gralora_B"]


def missing_layer(tensors, _):
    del tensors[f"{Q_PROJ}.gralora_A"], tensors[f"{Q_PROJ}.gralora_B"]


def unexpected(tensors, _):
    tensors["text_encoder.encoder.layers.9.q_proj.gralora_A"] = torch.ones(2)


def misshapen(tensors, _):
    tensors[f"{Q_PROJ}.gralora_A"] = torch.ones(4, 8, 9)


def not_finite(tensors, _):
    tensors[f"{Q_PROJ}.gralora_A"][0, 0, 0] = torch.inf


def not_real(tensors, _):
    tensors[f"{Q_PROJ}.gralora_A"] = tensors[f"{Q_PROJ}.gralora_A"] + 1j


def whole_numbers(tensors, _):
    tensors[f"{Q_PROJ}.gralora_B"] = tensors[f"{Q_PROJ}.gralora_B"].view(torch.int32)


def another_family(_, description):
    description["family"] = "flux"


def another_component(tensors, description):
    description["components"]["text_encoder_2"] = description["components"].pop("text_encoder")
    for key in [key for key in tensors if key.startswith("text_encoder.")]:
        tensors[key.replace("text_encoder", "text_encoder_2", 1)] = tensors.pop(key)


def other_widths(_, description):
    description["components"]["text_encoder"].update(gralora_k=3, r=9)


def other_targets(_, description):
    description["components"]["text_encoder"]["target_modules"] = ["query"]


def empty(tensors, description):
    tensors.clear()
    description["components"] = {}


REFUSED = [
    (
        missing,
        r"text_encoder: missing keys \(1\): encoder\.layers\.1\.self_attn\.q_proj\.gralora_B",
    ),
    (missing_layer, r"missing keys \(2\): .*q_proj\.gralora_A, .*q_proj\.gralora_B"),
    (unexpected, r"unexpected keys \(1\): encoder\.layers\.9\.q_proj\.gralora_A"),
    (misshapen, r"q_proj\.gralora_A has shape \(4, 8, 9\), but this base needs \(4, 8, 8\)"),
    (not_real, r"without real numbers \(1\): .*q_proj\.gralora_A is torch\.complex64"),
    (whole_numbers, r"without real numbers \(1\): .*q_proj\.gralora_B is torch\.int32"),
    (not_finite, r"NaN or infinite values in tensors \(1\): .*q_proj\.gralora_A"),
    (
        another_family,
        "this adapter was trained for flux, but StableDiffusionPipeline is stable-diffusion",
    ),
    (another_component, r"weights for 'text_encoder_2', which .* \(it has unet, text_encoder\)"),
    (other_widths, "4 of 4 target layers cannot take GraLoRA of r=9, gralora_k=3"),
    (other_targets, r"unexpected keys \(8\)"),
    (empty, "the adapter has no weights"),
]


class TestRefusals:
    @pytest.mark.parametrize(("change", "text"), REFUSED)
    @pytest.mark.parametrize("occupied", [False, True])
    def test_leaves_the_pipeline_as_it_was(self, pipe, folder, tmp_path, change, text, occupied):
        if occupied:
            pipe.load_gralora_weights(folder, "first")
            pipe.set_adapters("first", 0.5)
        path = edit(change)(folder, tmp_path / "damaged.safetensors")
        before, image = structure(pipe.unet, pipe.text_encoder), draw(pipe)
        with pytest.raises(AdapterFileError, match=text) as caught:
            pipe.load_gralora_weights(path, "second")
        assert str(path) in str(caught.value)
        assert structure(pipe.unet, pipe.text_encoder) == before
        assert torch.equal(draw(pipe), image)
        assert pipe.load_gralora_weights(folder, "second").adapter_name == "second"

    def test_everything_wrong_is_said_at_once(self, pipe, folder, tmp_path):
        def change(tensors, description):
            for damage in (missing, unexpected, not_finite):
                damage(tensors, description)
            tensors["unet.x.gralora_A"] = torch.ones(1)

        path = edit(change)(folder, tmp_path / "damaged.safetensors")
        with pytest.raises(AdapterFileError) as caught:
            pipe.load_gralora_weights(path)
        for text in (
            "missing keys (1)",
            "unexpected keys (1): enc",
            "NaN",
            "unet: unexpected keys (1): x.g",
        ):
            assert text in str(caught.value)

    def test_another_size_of_base(self, folder):
        wide = stable_diffusion(block_out_channels=(32, 64), cross_attention_dim=64)
        before = structure(wide.unet, wide.text_encoder)
        with pytest.raises(
            AdapterFileError, match=r"tensors of another shape .*but this base needs"
        ):
            wide.load_gralora_weights(folder)
        assert structure(wide.unet, wide.text_encoder) == before

    def test_a_component_that_was_left_out(self, pipe, folder):
        pipe.text_encoder = None
        with pytest.raises(AdapterFileError, match=r"'text_encoder', which .* \(it has unet\)"):
            pipe.load_gralora_weights(folder)

    @pytest.mark.parametrize("name", ["a.b", "", "to_q", "first", "keys"])
    def test_names(self, pipe, folder, name):
        pipe.load_gralora_weights(folder, "first")
        before = structure(pipe.unet, pipe.text_encoder)
        with pytest.raises(ValueError, match=r"adapter_name|already has an adapter named 'first'"):
            pipe.load_gralora_weights(folder, name)
        assert structure(pipe.unet, pipe.text_encoder) == before

    def test_a_failure_while_attaching(self, pipe, folder, monkeypatch):
        """An interrupt when the UNet is done and the text encoder half done."""
        pipe.load_gralora_weights(folder, "first")
        before, image = structure(pipe.unet, pipe.text_encoder), draw(pipe)
        update_layer = GraloraLayer.update_layer

        def interrupted(self, adapter_name, module_name, *args):
            if module_name == "encoder.layers.1.self_attn.v_proj":
                raise KeyboardInterrupt
            update_layer(self, adapter_name, module_name, *args)

        monkeypatch.setattr(GraloraLayer, "update_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipe.load_gralora_weights(folder, "second")
        assert structure(pipe.unet, pipe.text_encoder) == before
        assert torch.equal(draw(pipe), image)


def test_every_pipeline_has_the_methods():
    for name in ("load", "save", "unload"):
        assert callable(getattr(DiffusionPipeline, f"{name}_gralora_weights"))
    assert callable(DiffusionPipeline.fuse_gralora)
    assert callable(DiffusionPipeline.unfuse_gralora)
