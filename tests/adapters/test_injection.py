import re
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from torch import nn
from transformers import GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

from gralora_diffusion import (
    GraloraConfig,
    GraloraConv2d,
    GraloraLinear,
    GraloraTuner,
    TargetError,
    eject,
    inject,
)
from gralora_diffusion.adapters.layers import GraloraLayer
from tests import models
from tests.models import config, structure
from tests.reference import dense_update, relative_error


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, GraloraLayer)]


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def encode(model: nn.Module) -> torch.Tensor:
    return model(torch.arange(12).reshape(2, 6) % 7).last_hidden_state


def denoise(model: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    return model(latents, 5, torch.randn(2, 6, 32, generator=generator)).sample


def gpt2() -> GPT2Model:
    return GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16))


class TestTargets:
    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"target_modules": ["q_proj", "fc1"]}, r"layers\.[01]\.(self_attn\.q_proj|mlp\.fc1)"),
            ({"target_modules": ["0.mlp.fc1"]}, r"layers\.0\.mlp\.fc1"),
            ({"target_modules": r".*layers\.1\..*(k|v)_proj"}, r"layers\.1\.self_attn\.[kv]_proj"),
            ({"target_modules": "all-linear"}, r"layers\.\d\.(self_attn\..*_proj|mlp\.fc\d)"),
            (
                {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [1]},
                r"layers\.1\.(self_attn\.q_proj|mlp\.fc1)",
            ),
            (
                {
                    "target_modules": ["q_proj"],
                    "layers_to_transform": 0,
                    "layers_pattern": "layers",
                },
                r"layers\.0\.self_attn\.q_proj",
            ),
        ],
    )
    def test_which_layers(self, changes, expected):
        """As the pattern says, and as stock PEFT chooses."""
        config = GraloraConfig(r=4, gralora_k=2, **changes)
        model = inject(models.text_encoder(), config)
        assert adapted(model) == [
            name
            for name, module in models.text_encoder().named_modules()
            if isinstance(module, nn.Linear) and re.fullmatch(rf"encoder\.{expected}", name)
        ]
        stock = inject_adapter_in_model(config, models.text_encoder())
        assert get_peft_model_state_dict(stock).keys() == get_peft_model_state_dict(model).keys()

    def test_the_config_given_is_not_changed(self):
        given = GraloraConfig(r=4, target_modules="all-linear")
        inject(models.text_encoder(), given)
        inject(gpt2(), given)
        assert (given.target_modules, given.fan_in_fan_out) == ("all-linear", False)

    def test_the_kind_of_layer(self):
        unet = inject(models.unet(), config(["conv1", "to_q"]))
        kinds = {type(m) for m in unet.modules() if isinstance(m, GraloraLayer)}
        assert kinds == {GraloraLinear, GraloraConv2d}

    @pytest.mark.parametrize("fan_in_fan_out", [True, False])
    def test_fan_in_fan_out_is_set_right(self, fan_in_fan_out):
        wrong = config(["c_attn"], fan_in_fan_out=fan_in_fan_out)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = inject(gpt2(), wrong)
            linear = inject(models.text_encoder(), config(["fc1"], fan_in_fan_out=fan_in_fan_out))
        assert model.peft_config["default"].fan_in_fan_out
        assert not linear.peft_config["default"].fan_in_fan_out
        told = [str(w.message) for w in caught if "fan_in_fan_out is set to" in str(w.message)]
        assert len(told) == 1
        assert ("`Conv1D`" if not fan_in_fan_out else "`Linear`") in told[0]
        layer = model.get_submodule("h.0.attn.c_attn")
        assert isinstance(layer.base_layer, Conv1D)
        assert layer.get_delta_weight("default").shape == layer.weight.shape == (32, 96)


class TestPatterns:
    TARGETS = ("to_q", "to_v", "conv1", "conv_in")
    PATTERNS = {  # noqa: RUF012
        "rank_pattern": {"to_q": 4, r"mid_block\..*to_[qv]": 12, "conv_in": 6},
        "k_pattern": {r"attn2\.to_v": 2, "^conv_in": 2},
        "alpha_pattern": {"conv1": 2.5},
    }

    @staticmethod
    def expected(path: str) -> tuple[int, int, float]:
        """Rank, k and alpha that these patterns give a layer, spelled out."""
        end = path.rsplit(".", 1)[-1]
        r = {"to_q": 4, "conv_in": 6}.get(end, 12 if "mid_block" in path and end == "to_v" else 8)
        k = 2 if path.endswith("attn2.to_v") or end == "conv_in" else 4
        return r, k, 2.5 if end == "conv1" else 16

    def test_shapes_scaling_and_output(self):
        model = inject(models.unet(), config(list(self.TARGETS), hybrid_r=2, **self.PATTERNS))
        bare = models.unet()
        state = {
            key.replace(".base_layer", ""): tensor.double()
            for key, tensor in model.state_dict().items()
            if "gralora_" not in key
        }
        paths = adapted(model)
        assert {self.expected(path)[0] for path in paths} == {4, 6, 8, 12}
        for path in paths:
            layer, (r, k, alpha) = model.get_submodule(path), self.expected(path)
            A, B = layer.gralora_A["default"], layer.gralora_B["default"]
            assert (A.shape[0], A.shape[2], *B.shape[:2]) == (k, r, k, r), path
            assert layer.scaling == {"default": alpha / (r + 2)}, path
            layer.set_scale("default", 0.5)
            assert layer.scaling == {"default": 0.5 * alpha / (r + 2)}, path
            down, up = (getattr(layer, f"gralora_{n}_general").default.weight for n in "AB")
            update = dense_update(A, B)
            update += torch.einsum("or,ri...->oi...", up.double().flatten(1), down.double())
            state[f"{path}.weight"] += 0.5 * alpha / (r + 2) * update
        bare.load_state_dict(state)
        assert relative_error(denoise(model), denoise(bare)) < 1e-5

    def test_a_second_adapter_on_the_same_layers_has_its_own(self):
        model = inject(models.unet(), config(["to_q"]), "first")
        inject(model, config(["to_q"], r=6, gralora_k=2, rank_pattern={"attn1.to_q": 10}), "second")
        for path in adapted(model):
            layer = model.get_submodule(path)
            assert layer.r == {"first": 8, "second": 10 if "attn1" in path else 6}
            assert layer.gralora_k == {"first": 4, "second": 2}

    def test_through_peft(self, monkeypatch, tmp_path):
        """PeftModel with our tuner saves and loads them; a config read by PEFT has lost them."""
        mapping = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
        monkeypatch.setitem(mapping, peft.PeftType.GRALORA, GraloraTuner)
        torch.manual_seed(0)
        patterned = config(["fc1", "fc2"], rank_pattern={"fc1": 4, "0.mlp.fc[12]": 16})
        model = peft.get_peft_model(models.text_encoder(), patterned).eval()
        expected = encode(model)
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(
            models.text_encoder(), tmp_path, config=GraloraConfig.from_pretrained(tmp_path)
        )
        assert torch.equal(encode(loaded.eval()), expected)
        with (
            pytest.warns(UserWarning, match="rank_pattern.*ignored"),
            pytest.raises(RuntimeError, match="size mismatch"),
        ):
            PeftModel.from_pretrained(models.text_encoder(), tmp_path)


class TestOptions:
    @pytest.mark.parametrize("bias", ["none", "all", "gralora_only"])
    def test_bias(self, bias):
        ours = inject(models.text_encoder(), config(["q_proj"], bias=bias))
        stock = inject_adapter_in_model(config(["q_proj"], bias=bias), models.text_encoder())
        assert trained(ours) == trained(stock)
        assert get_peft_model_state_dict(ours).keys() == get_peft_model_state_dict(stock).keys()
        biases = {name for name in trained(ours) if name.endswith(".bias")}
        assert len(biases) == {"none": 0, "all": 17, "gralora_only": 2}[bias]

    def test_modules_to_save(self):
        changes = {"modules_to_save": ["final_layer_norm"]}
        model = inject(models.text_encoder(), config(["q_proj"], **changes))
        saved = {n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
        assert saved == {"final_layer_norm"}
        assert {n for n in trained(model) if "gralora" not in n} == {
            "final_layer_norm.modules_to_save.default.weight",
            "final_layer_norm.modules_to_save.default.bias",
        }
        model.final_layer_norm.modules_to_save["default"].weight.data.zero_()
        assert torch.equal(encode(model), torch.zeros(2, 6, 32))
        eject(model, "default")
        assert isinstance(model.final_layer_norm, nn.LayerNorm)

    def test_init_weights_alpha_and_dropout(self):
        model = models.text_encoder()
        before = encode(model)
        inject(model, config(["q_proj"], init_weights=True, gralora_dropout=0.5, alpha=4), "zero")
        assert torch.equal(encode(model), before)
        layer = model.get_submodule("encoder.layers.0.self_attn.q_proj")
        assert isinstance(layer.gralora_dropout["zero"], nn.Dropout)
        assert layer.gralora_dropout["zero"].p == 0.5
        assert layer.scaling == {"zero": 0.5}
        inject(model, config(["q_proj"], init_weights=False, hybrid_r=8), "random")
        assert layer.scaling["random"] == 1.0
        assert not torch.equal(encode(model), before)

    def test_low_cpu_mem_usage_and_state_dict(self):
        source = inject(models.text_encoder(), config(["q_proj", "fc2"]))
        state = {
            key: tensor
            for key, tensor in get_peft_model_state_dict(source).items()
            if ".0." in key  # the keys tell the layers, not the config
        }
        model = models.text_encoder()
        with pytest.warns(RuntimeWarning, match="inconsistency"):
            inject(model, config(["q_proj", "fc2"]), low_cpu_mem_usage=True, state_dict=state)
        assert adapted(model) == [name for name in adapted(source) if ".0." in name]
        assert {p.device.type for n, p in model.named_parameters() if "gralora_" in n} == {"meta"}
        peft.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
        for key, tensor in get_peft_model_state_dict(model).items():
            assert torch.equal(tensor, state[key]), key
        keys = {"encoder.layers.7.fc.gralora_A": torch.zeros(1)}
        with pytest.raises(TargetError, match=r"not in the model: encoder\.layers\.7\.fc\."):
            inject(models.text_encoder(), config(["q_proj"]), state_dict=keys)

    def test_half_precision_base(self):
        model = inject(models.text_encoder().half(), config(["q_proj"], hybrid_r=2))
        assert {p.dtype for p in model.parameters()} == {torch.float16}

    def test_same_seed_same_factors_as_stock(self):
        states = []
        for put in (inject_adapter_in_model, lambda c, m: inject(m, c)):
            torch.manual_seed(4)
            model = models.text_encoder()
            states.append(get_peft_model_state_dict(put(config(["q_proj"], hybrid_r=2), model)))
        for key, tensor in states[0].items():
            assert torch.equal(states[1][key], tensor), key


REFUSED = [
    (
        config(["to_q", "conv_in", "conv1"], r=12, gralora_k=3),
        # conv_in 4 -> 16; conv1 and to_q 16 and 32 wide: k=3 fits none, 1, 2 and 4 divide all
        [r"conv_in: in_features=4 and out_features=16 not divisible", "17 of 17 target layers"],
    ),
    (
        config(["conv_in", "to_q"], r=16, gralora_k=8),
        [r"conv_in: in_features=4 not divisible", "Choose gralora_k=1 or 2 or 4, or targets"],
    ),
    (config(["to_q", "norm1"]), [r"norm1: a GroupNorm, which is not supported \(torch.nn.Linear"]),
    (config(["to_q", "nowhere", "tyop"]), ["match no layer: nowhere, tyop", r"to_q \(8\)"]),
    (config(["nowhere"]), ["nowhere not found in the model", r"proj_in \(\d\), to_q"]),
    (config([]), [r"\(empty\) not found"]),
    (config(".*nowhere"), ["'.*nowhere' not found", "regular expression"]),
    (config("*to_q"), [r"'\*to_q' is not a regular expression"]),
    (config(["to_q"], layers_to_transform=[7]), ["layers_to_transform=.7. not found"]),
    (config(".*to_q", layers_to_transform=[0]), ["layers_to_transform needs a list"]),
    (config(["to_q"], layers_pattern="blocks"), ["layers_pattern needs layers_to_transform"]),
    (config(["to_q"], modules_to_save=["conv_outt"]), ["modules_to_save match no module: conv_ou"]),
    (config(["to_q"], bias="some"), ["`bias` should be one of none, all, gralora_only"]),
    (config(["to_q"], r=0), ["`r` should be a positive integer"]),
    (config(["to_q"], hybrid_r=-1), ["`hybrid_r` should be a non-negative"]),
    (config(["to_q"], rank_pattern={"to_[q": 4}), ["`rank_pattern` 'to_.q': not a regular expr"]),
    (config(["to_q"], alpha_pattern={"to_q": None}), ["'to_q' should give a finite number"]),
    (
        config(["to_q", "nowhere", "conv_in"], r=8, rank_pattern={"to_v": 4}, k_pattern={"to": 2}),
        [
            "match no layer: nowhere",
            "rank_pattern 'to_v' matches none of the 9 target layers, such as conv_in",
            "k_pattern 'to' matches none",
        ],
    ),
    (
        config(["to_q", "conv_in"], k_pattern={"conv_in": 8}, rank_pattern={"attn1.to_q": 6}),
        [
            "5 of 9 target layers cannot take GraLoRA of the r and gralora_k that the config gives",
            "conv_in: in_features=4 not divisible by gralora_k=8 .*: 4",
            "attn1.to_q: r=6 not divisible by gralora_k=4 .*: 2",
            "another k for these layers in k_pattern",
        ],
    ),
    (config(["to_q"], gralora_dropout=1.5), [r"`gralora_dropout` should be in \[0, 1\)"]),
    (
        config(["conv_in", "norm1", "nowhere"], r=8, gralora_k=8),
        ["match no layer: nowhere", "conv_in: in", "norm1: a GroupNorm", "gralora_k=1 or 2 or 4"],
    ),
]


class TestRefusals:
    @pytest.mark.parametrize(("wrong", "texts"), REFUSED)
    def test_names_everything_and_changes_nothing(self, wrong, texts):
        unet = models.unet()
        for model in (unet, inject(models.unet(), config(["to_k"]), "first")):
            before = structure(model)
            with pytest.raises(TargetError) as caught:
                inject(model, wrong, "second")
            for text in texts:
                assert re.search(text, str(caught.value)), str(caught.value)
            assert structure(model) == before
            inject(model, config(["to_q"]), "second")

    def test_every_layer_is_listed_and_the_advice_holds(self):
        wrong = config(["conv_in", "conv_out", "to_q", "conv1"], r=16, gralora_k=8)
        with pytest.raises(TargetError) as caught:
            inject(models.unet(), wrong)
        listed = set(re.findall(r"^  (\S+): ", str(caught.value), re.MULTILINE))
        assert listed == {"conv_in", "conv_out"}
        advice = re.search(r"Choose gralora_k=(.*), or targets", str(caught.value)).group(1)
        good = [int(k) for k in advice.split(" or ")]
        for k in range(1, 17):
            right = config(["conv_in", "conv_out", "to_q", "conv1"], r=16 * k, gralora_k=k)
            if k in good:
                inject(models.unet(), right)
            else:
                with pytest.raises(TargetError):
                    inject(models.unet(), right)

    def test_grouped_convolutions(self):
        model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
        with pytest.raises(TargetError, match="0: a convolution with groups=8, not supported"):
            inject(model, config(["0"]))

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.b", "without a dot"),
            ("", "at least one character"),
            (3, "must be a string"),
            ("to_q", "a layer or weight of UNet2DConditionModel has that name"),
            ("0", "a layer or weight of UNet2DConditionModel has that name"),
            ("weight", "a layer or weight of UNet2DConditionModel has that name"),
            ("keys", "an attribute of torch's modules has that name"),
            ("training", "an attribute of torch's modules has that name"),
            ("first", "already has an adapter named 'first'"),
        ],
    )
    def test_names(self, name, text):
        model = inject(models.unet(), config(["to_k"]), "first")
        before = structure(model)
        with pytest.raises(ValueError, match=text):
            inject(model, config(["to_q"]), name)
        assert structure(model) == before

    def test_second_adapter_with_bias(self):
        model = inject(models.unet(), config(["to_k"], bias="all"), "first")
        before = structure(model)
        with pytest.raises(ValueError, match="only 1 adapter with bias"):
            inject(model, config(["to_q"], bias="all"), "second")
        assert structure(model) == before

    def test_modules_to_save_that_peft_refuses_at_the_very_end(self):
        """When the layers are in, the others inactive, and the base is frozen."""
        model = inject(models.unet(), config(["to_k"]), "first")
        model.set_adapters("first", 0.5)
        model.conv_in.requires_grad_(True)
        before, expected = structure(model), denoise(model)
        with pytest.raises(TypeError, match=r"modules_to_save cannot be applied to .*ModuleList"):
            inject(model, config(["to_q"], modules_to_save=["resnets"]), "second")
        assert structure(model) == before
        assert torch.equal(denoise(model), expected)

    @pytest.mark.parametrize("first", [True, False])
    def test_an_interrupt_half_way_leaves_nothing(self, first, monkeypatch):
        model = models.unet()
        if not first:
            inject(model, config(["to_k", "to_q"]), "first")
        before = structure(model)
        update_layer = GraloraLayer.update_layer

        def interrupted(self, adapter_name, module_name, *args):
            update_layer(self, adapter_name, module_name, *args)
            if module_name == "mid_block.attentions.0.transformer_blocks.0.attn1.to_q":
                raise KeyboardInterrupt

        monkeypatch.setattr(GraloraLayer, "update_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            inject(model, config(["to_k", "to_q", "conv1"], bias="gralora_only"), "second")
        assert structure(model) == before

    def test_making_an_adapter_anew_in_vain_keeps_the_old_one(self):
        model = inject(models.unet(), config(["to_k"]), "first")
        expected = denoise(model)
        with pytest.raises(TargetError), pytest.warns(UserWarning, match="peft_config"):
            GraloraTuner(model, config(["nowhere"]), "first")
        assert torch.equal(denoise(model), expected)
        assert adapted(model)


def test_gradient_checkpointing():
    unet = inject(models.unet(), config(hybrid_r=2, gralora_dropout=0.2)).train()
    gradients = []
    for _ in range(2):
        unet.zero_grad()
        torch.manual_seed(5)
        denoise(unet).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in unet.named_parameters() if p.requires_grad})
        unet.enable_gradient_checkpointing()
    assert len(gradients[0]) == 44 * 4
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        assert torch.equal(gradients[1][name], gradient), name


class TestEject:
    def test_gives_the_model_back(self):
        model = models.unet()
        before = structure(model)
        expected = denoise(model)
        inject(model, config(hybrid_r=2, modules_to_save=["conv_out"]), "a")
        inject(model, config(["to_q", "conv2"]), "b")
        assert not torch.equal(denoise(model), expected)
        eject(model, "b")
        assert list(model.peft_config) == ["a"]
        eject(model, "a")
        model.requires_grad_(True)
        assert structure(model) == before
        assert torch.equal(denoise(model), expected)
        assert not hasattr(model, "peft_config")

    def test_the_other_adapters_keep_their_state(self):
        model = inject(models.unet(), config(["to_q"]), "a")
        inject(model, config(["to_q"]), "b")
        model.set_adapter("a")
        expected, parameters = denoise(model), trained(model)
        eject(model, "b")
        assert torch.equal(denoise(model), expected)
        assert trained(model) == parameters
        assert model.active_adapters() == ["a"]
        eject(model, "a", "unknown")
        assert adapted(model) == []

    def test_no_other_adapter_becomes_active(self):
        model = models.unet()
        expected = denoise(model)
        for name in ("a", "b"):
            inject(model, config(["to_q"]), name)
        model.set_adapter("a")
        eject(model, "a")
        assert torch.equal(denoise(model), expected)
        assert trained(model) == set()

    def test_what_was_merged_stays_merged(self):
        model = inject(models.unet(), config(), "a")
        for layer in model.modules():
            if isinstance(layer, GraloraLayer):
                layer.merge()
        expected = denoise(model)
        eject(model, "a")
        assert torch.equal(denoise(model), expected)

    def test_a_merged_adapter_that_is_made_anew_leaves_the_base_weight(self):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        base = [layer.weight.detach().clone() for layer in model]
        tuner = GraloraTuner(model, config(["0", "1"]), "a")
        inject(model, config(["1"]), "kept")
        model[1].merge(adapter_names=["kept"])
        beside = model[1].base_layer.weight.detach().clone()
        for layer in model:
            layer.merge(adapter_names=["a"])
        assert relative_error(model[0].base_layer.weight, base[0]) > 0.1
        tuner.inject_adapter(model, "a")
        assert [layer.merged_adapters for layer in model] == [[], ["kept"]]
        assert relative_error(model[0].base_layer.weight, base[0]) < 1e-6
        assert relative_error(model[1].base_layer.weight, beside) < 1e-6

    def test_layers_left_empty_by_delete_adapters_go_too(self):
        model = inject(models.unet(), config(), "a")
        model.delete_adapters("a")
        assert adapted(model)
        eject(model)
        assert adapted(model) == []


def lora(**changes) -> LoraConfig:
    values = {"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "conv1"]}
    return LoraConfig(**{**values, "init_lora_weights": False, **changes})


@pytest.mark.parametrize("order", [("lora", "ours"), ("ours", "lora"), ("ours", "lora", "more")])
class TestBesideLora:
    """The same adapters in any order: the sum of their updates."""

    @pytest.fixture
    def model(self, order):
        model = models.unet()
        for seed, name in enumerate(order):
            torch.manual_seed(seed)
            if name == "lora":
                inject_adapter_in_model(lora(), model, "lora")
            else:
                inject(model, config(["to_q", "conv1", "to_k"], hybrid_r=2), name)
        return model

    @staticmethod
    def merged(model, weights):
        """A bare UNet with the updates of all adapters, at these weights, in its weights."""
        bare = models.unet()
        state = {
            key.replace(".base_layer", ""): tensor.double()
            for key, tensor in model.state_dict().items()
            if "lora_" not in key
        }
        for name, module in model.named_modules():
            path = name.replace(".base_layer", "")
            for adapter, weight in weights.items():
                if adapter in getattr(module, "gralora_A", {}) or adapter in getattr(
                    module, "lora_A", {}
                ):
                    module.set_scale(adapter, 1.0)
                    state[f"{path}.weight"] += weight * module.get_delta_weight(adapter)
        bare.load_state_dict(state)
        return bare.eval()

    def test_weights(self, model, order):
        for weights in ([0.5, -0.7, 0.3], [1.0, 0.0, 2.0]):
            chosen = dict(zip(order, weights, strict=False))
            expected = denoise(self.merged(model, chosen))
            model.set_adapters(list(chosen), list(chosen.values()))
            assert relative_error(denoise(model), expected) < 1e-5
        model.set_adapters("ours")
        assert relative_error(denoise(model), denoise(self.merged(model, {"ours": 1.0}))) < 1e-5

    def test_taking_ours_out(self, model, order):
        expected = denoise(self.merged(model, {"lora": 1.0}))
        eject(model, *{"ours", "more"} & set(order))
        model.set_adapters("lora")
        assert adapted(model) == []
        assert list(model.peft_config) == ["lora"]
        assert relative_error(denoise(model), expected) < 1e-5

    def test_diffusers_removes_both(self, model, order):
        model.unload_lora()
        kinds = {type(module).__module__.split(".")[0] for module in model.modules()}
        assert kinds == {"torch", "diffusers"}


class TestStockPeft:
    """Through ``PeftModel``, with the tuner in PEFT's place."""

    @pytest.fixture(params=[True, False], ids=["ours-first", "stock-first"])
    def tuners(self, request, monkeypatch):
        mapping = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING

        def use(tuner):
            monkeypatch.setitem(mapping, peft.PeftType.GRALORA, tuner)

        pair = [lambda: use(GraloraTuner), lambda: use(peft.GraloraModel)]
        return pair if request.param else pair[::-1]

    @pytest.mark.parametrize(
        "changes",
        [
            {"targets": ["q_proj", "fc1"]},
            {"targets": "all-linear", "hybrid_r": 2},
            {"targets": ["v_proj"], "bias": "all"},
            {"targets": ["v_proj"], "bias": "gralora_only", "modules_to_save": ["fc2"]},
        ],
    )
    def test_save_and_load(self, tuners, changes, tmp_path):
        write, read = tuners
        write()
        torch.manual_seed(0)
        model = peft.get_peft_model(models.text_encoder(), config(**changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        expected = encode(model)
        model.save_pretrained(tmp_path)
        read()
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(models.text_encoder(), tmp_path).eval()
        assert relative_error(encode(loaded), expected) < 1e-6
        ours = [module for module in loaded.modules() if isinstance(module, GraloraLayer)]
        assert bool(ours) != any(isinstance(m, GraloraLayer) for m in model.modules())

    def test_merge_and_unload(self, monkeypatch):
        monkeypatch.setitem(
            peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.GRALORA, GraloraTuner
        )
        model = peft.get_peft_model(models.unet(), config(hybrid_r=2)).eval()
        expected = denoise(model)
        bare = model.merge_and_unload()
        assert type(bare) is type(models.unet())
        assert adapted(bare) == []
        assert relative_error(denoise(bare), expected) < 1e-5


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern", "k_pattern"])
def test_patterns_are_not_left_to_peft(name, monkeypatch):
    """PEFT matches those of rank and alpha by ``re``, which some would keep busy for ever."""
    matched = []
    match = re.match

    def recorded(pattern, text, flags=0):
        matched.append(pattern)
        return match(pattern, text, flags)

    monkeypatch.setattr("peft.tuners.tuners_utils.re.match", recorded)
    given = config(
        ["to_q"],
        r=4,
        gralora_k=2,
        **{name: {"(?:attn1[.]to_q|(?:x+)+y)": 1 if name == "k_pattern" else 2}},
    )
    model = inject(models.unet(), given)
    assert not [pattern for pattern in matched if "attn1" in str(pattern)]
    kept = model.peft_config["default"]
    assert getattr(kept, name) == getattr(given, name) != {}
    layers = {path: layer for path, layer in model.named_modules() if path in set(adapted(model))}
    assert any("attn1" in path for path in layers)
    for path, layer in layers.items():
        special = "attn1" in path
        rank, k = layer.gralora_A["default"].shape[2], layer.gralora_A["default"].shape[0]
        assert rank == (2 if special and name == "rank_pattern" else 4)
        assert k == (1 if special and name == "k_pattern" else 2)
        alpha = 2 if special and name == "alpha_pattern" else given.alpha
        assert layer.scaling["default"] == alpha / rank
