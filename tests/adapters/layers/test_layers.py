"""Our layers against stock PEFT's, where it has one, and against the dense update where not."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import GraloraConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from gralora_diffusion import GraloraConfig as PatternedConfig
from gralora_diffusion import GraloraConv2d, GraloraLinear, inject
from gralora_diffusion.adapters.layers.fused_linear import Backend
from gralora_diffusion.adapters.layers.linear import Separate
from tests.reference import dense_update, relative_error


class Net(nn.Module):
    """Widths that differ, so that no wrong exchange has the right shape."""

    def __init__(self, linear: type = nn.Linear) -> None:
        super().__init__()
        self.up = linear(24, 40) if linear is nn.Linear else Conv1D(40, 24)
        self.down = linear(40, 16, bias=False) if linear is nn.Linear else Conv1D(16, 40)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class ConvNet(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, **{"kernel_size": 3, "padding": 1, **options})

    def forward(self, x):
        return self.conv(x)


def config(**changes) -> GraloraConfig:
    values = {"r": 8, "gralora_k": 4, "alpha": 12, "target_modules": ["up", "down", "conv"]}
    if "target_modules" not in changes:
        values["target_modules"] = changes.pop("targets", ["up", "down"])
    return GraloraConfig(**{**values, "init_weights": False, **changes})


def pair(linear: type = nn.Linear, **changes) -> tuple[nn.Module, nn.Module]:
    """The same adapted net, stock and ours."""
    changes.setdefault("fan_in_fan_out", linear is Conv1D)
    base = Net(linear)
    stock = inject_adapter_in_model(config(**changes), copy.deepcopy(base))
    ours = inject(base, config(**changes))
    result: Any = set_peft_model_state_dict(ours, get_peft_model_state_dict(stock))
    assert not result.unexpected_keys
    return stock, ours


def conv(names=("default",), base: nn.Module | None = None, **changes) -> nn.Module:
    net = base or ConvNet()
    for name in names:
        inject(net, config(targets=["conv"], **changes), name)
    return net.eval()


@pytest.fixture
def process_group():
    """A mesh of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def factors(layer, name="default"):
    return layer.gralora_A[name].detach(), layer.gralora_B[name].detach()


def dense(layer, name="default"):
    """The layer's whole update before scaling, by the definition."""
    update = dense_update(*factors(layer, name))
    if name in layer.gralora_A_general:
        down = layer.gralora_A_general[name].weight.detach().double()
        up = layer.gralora_B_general[name].weight.detach().double()
        update = update + torch.einsum("or,ri...->oi...", up.flatten(1), down)
    return update


@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize("linear", [nn.Linear, Conv1D])
class TestAgainstStock:
    def test_forward_and_gradients(self, linear, hybrid_r):
        stock, ours = pair(linear, hybrid_r=hybrid_r)
        x = torch.randn(3, 5, 24)
        expected, actual = stock(x), ours(x)
        assert relative_error(actual, expected) < 1e-6
        expected.square().mean().backward()
        actual.square().mean().backward()
        theirs, mine = dict(stock.named_parameters()), dict(ours.named_parameters())
        trained = {name for name, p in theirs.items() if p.requires_grad}
        assert trained == {name for name, p in mine.items() if p.requires_grad}
        assert len(trained) == (8 if hybrid_r else 4)
        for name in trained:
            assert relative_error(mine[name].grad, theirs[name].grad) < 5e-6, name

    def test_state_dict_goes_both_ways(self, linear, hybrid_r):
        stock, ours = pair(linear, hybrid_r=hybrid_r)
        theirs, mine = get_peft_model_state_dict(stock), get_peft_model_state_dict(ours)
        assert theirs.keys() == mine.keys()
        for key, tensor in theirs.items():
            assert torch.equal(mine[key], tensor), key
        fresh = inject_adapter_in_model(
            config(hybrid_r=hybrid_r, fan_in_fan_out=linear is Conv1D), Net(linear)
        )
        result: Any = set_peft_model_state_dict(fresh, mine)
        assert not [key for key in result.missing_keys if "gralora" in key]
        assert torch.equal(get_peft_model_state_dict(fresh)["up.gralora_B"], mine["up.gralora_B"])

    def test_delta_weight_and_merge(self, linear, hybrid_r):
        stock, ours = pair(linear, hybrid_r=hybrid_r)
        for name in ("up", "down"):
            theirs, mine = getattr(stock, name), getattr(ours, name)
            expected = theirs.get_delta_weight("default")
            assert relative_error(mine.get_delta_weight("default"), expected) < 1e-6
            theirs.merge()
            mine.merge()
            assert relative_error(mine.weight, theirs.weight) < 1e-6

    def test_same_seed_gives_the_same_initial_factors(self, linear, hybrid_r):
        changes = {"hybrid_r": hybrid_r, "fan_in_fan_out": linear is Conv1D}
        for init_weights in (True, False):
            changes["init_weights"] = init_weights
            torch.manual_seed(3)
            stock = inject_adapter_in_model(config(**changes), Net(linear))
            torch.manual_seed(3)
            ours = inject(Net(linear), config(**changes))
            for key, tensor in get_peft_model_state_dict(stock).items():
                assert torch.equal(get_peft_model_state_dict(ours)[key], tensor), key


def test_dropout_draws_one_mask_for_both_branches():
    _, ours = pair(hybrid_r=2, gralora_dropout=0.4)
    layer, x = ours.train().up, torch.randn(6, 24)
    torch.manual_seed(5)
    actual = layer(x) - layer.base_layer(x)
    torch.manual_seed(5)
    masked = F.dropout(x, 0.4).double()
    assert relative_error(actual, layer.scaling["default"] * masked @ dense(layer).T) < 1e-5
    assert not torch.equal(actual, layer(x) - layer.base_layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize("shape", [(24,), (0, 24), (5, 24), (2, 5, 24), (2, 3, 5, 24), (0, 5, 24)])
def test_linear_inputs_of_any_rank(shape):
    _, ours = pair(hybrid_r=2)
    layer, x = ours.up, torch.randn(shape)
    expected = layer.base_layer(x) + (x.double() @ dense(layer).T * 1.2).float()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 1, "padding": 0},
        {"stride": 2, "dilation": 2, "padding": (2, 1), "bias": False},
        {"padding": "same", "kernel_size": (3, 5)},
        {"padding_mode": "circular"},
        {"padding_mode": "reflect", "padding": (1, 2), "stride": (2, 1)},
        {"padding_mode": "replicate", "padding": "same"},
    ],
)
def test_convolutions(options, hybrid_r):
    net = conv(base=ConvNet(**options), hybrid_r=hybrid_r)
    layer = net.conv
    whole = ConvNet(**options).double()
    whole.load_state_dict(net.conv.base_layer.state_dict(prefix="conv."))
    scaling = 12 / (8 + hybrid_r)
    whole.conv.weight.data += scaling * dense(layer)
    x = torch.randn(2, 8, 9, 7)
    assert isinstance(layer, GraloraConv2d)
    assert relative_error(net(x), whole(x.double())) < 1e-5
    assert relative_error(net(x[1]), whole(x[1].double())) < 1e-5
    assert net(x[:0]).shape == whole(x[:0].double()).shape
    layer.merge()
    assert relative_error(layer.weight, whole.conv.weight) < 1e-6
    assert relative_error(net(x), whole(x.double())) < 1e-5


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_fp32_factors_on_a_half_precision_base(self, dtype):
        """The update is that of fp32, rounded once; it does not change the dtype of the output."""
        net = pair()[1].to(dtype)
        layer = net.up
        layer.cast_adapter("default", torch.float32)
        x = torch.randn(5, 24, dtype=dtype)
        update = 1.5 * x.double() @ dense(layer).T
        expected = layer.base_layer(x) + update.to(dtype)
        assert layer(x).dtype == dtype
        assert torch.equal(layer(x), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_throughout(self, dtype):
        net = pair(hybrid_r=2)[1]
        x = torch.randn(5, 24)
        expected = net(x)
        actual = net.to(dtype)(x.to(dtype))
        assert actual.dtype == dtype
        assert relative_error(actual, expected) < 16 * torch.finfo(dtype).eps

    def test_autocast(self):
        net = pair(hybrid_r=2)[1]
        x = torch.randn(5, 24)
        expected = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            actual = net(x)
        assert actual.dtype == torch.bfloat16
        assert relative_error(actual, expected) < 16 * torch.finfo(torch.bfloat16).eps
        actual.float().square().mean().backward()
        assert net.up.gralora_A["default"].grad.dtype == torch.float32
        image = torch.randn(1, 8, 6, 6)
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(hybrid_r=2)(image).dtype == torch.bfloat16

    def test_casting_the_factors_keeps_what_is_trained(self):
        layer = pair(hybrid_r=2)[1].up
        for trained in (True, False):
            layer.set_requires_grad("default", trained)
            layer.cast_adapter("default", torch.bfloat16)
            layer.cast_adapter("default", torch.float32)
            ours = [p for name, p in layer.named_parameters() if "gralora_" in name]
            assert len(ours) == 4
            assert {(p.dtype, p.requires_grad) for p in ours} == {(torch.float32, trained)}

    def test_meta_device(self):
        with torch.device("meta"):
            net = inject(Net(), config(hybrid_r=2))
            assert net(torch.empty(5, 24)).shape == (5, 16)
            assert net.to(torch.bfloat16)(torch.empty(5, 24, dtype=torch.float16)).is_meta
            image = torch.empty(2, 8, 6, 6)
            assert inject(ConvNet(), config(targets=["conv"]))(image).shape == (2, 12, 6, 6)


def hooked(net):
    net.up.base_layer.register_forward_hook(lambda *_: None)
    return net


def offloaded(net):
    add_hook_to_module(net.up.base_layer, ModelHook())
    return net


def trained(net):
    net.up.base_layer.weight.requires_grad_(True)
    return net


def under_lora(net):
    net.up.base_layer = LoraLinear(net.up.base_layer, "lora", LoraConfig(r=2), r=2)
    return net.requires_grad_(True)


def backward_hooked(net):
    net.up.base_layer.register_full_backward_pre_hook(lambda module, gradient: None)
    return net


def test_hooks_of_every_module_reach_the_base_layer():
    net = pair()[1]
    called = []
    handle = register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        net.up(torch.randn(2, 5, 24))
    finally:
        handle.remove()
    assert net.up.base_layer in called
    net.up(torch.randn(2, 5, 24))
    assert net.up.backend is Backend.DENSE


class TestBackends:
    """How a forward is computed, and that its result and gradients do not depend on it."""

    @pytest.mark.parametrize(
        ("change", "backend"),
        [
            (lambda net: net, Backend.DENSE),
            (hooked, Separate.HOOKS),
            (backward_hooked, Separate.HOOKS),
            (offloaded, Separate.BASE_LAYER),
            (trained, Separate.TRAINED),
            (under_lora, Separate.BASE_LAYER),
        ],
    )
    @pytest.mark.parametrize("hybrid_r", [0, 2])
    def test_every_backend_is_the_same(self, change, backend, hybrid_r):
        net = pair(hybrid_r=hybrid_r)[1]
        inject(net, config(alpha=5), "second")
        net.up.set_adapter(["default", "second"])
        x = torch.randn(2, 5, 24, requires_grad=True)
        whole = net.up.get_base_layer().weight.double()
        for name in ("default", "second"):
            whole = whole + net.up.scaling[name] * dense(net.up, name)
        expected = F.linear(x.double(), whole, net.up.get_base_layer().bias.double())
        (exact,) = torch.autograd.grad(expected.square().sum(), x)
        layer = change(net).up
        actual = layer(x)
        assert layer.backend is backend
        assert relative_error(actual, expected) < 1e-5
        (gradient,) = torch.autograd.grad(actual.square().sum(), x)
        assert relative_error(gradient, exact) < 1e-5

    def test_how_often_weights_are_formed_depends_on_the_tokens(self):
        layer = pair(hybrid_r=2, r=4, gralora_k=2)[1].up
        few, many = torch.randn(5, 24), torch.randn(3, 20_000, 24)
        for x, trained, backend in (
            (few, True, Backend.DENSE),
            (few, False, Backend.ADDED),
            (many, False, Backend.MERGED),
        ):
            update = x.double() @ (layer.scaling["default"] * dense(layer)).T
            with torch.set_grad_enabled(trained):
                assert relative_error(layer(x) - layer.base_layer(x), update) < 1e-5
            assert layer.backend is backend
        with torch.autocast("cpu", torch.bfloat16):
            layer(many)
        assert layer.backend is Backend.ADDED

    def test_other_reasons(self):
        layer, x = pair(gralora_dropout=0.5)[1].up, torch.randn(5, 24)
        layer.train()(x)
        assert layer.backend is Separate.DROPOUT
        layer.eval()(x)
        assert layer.backend is Backend.DENSE
        jvp(layer, (x,), (x,))
        assert layer.backend is Separate.TRANSFORMS
        layer.to(torch.bfloat16).cast_adapter("default", torch.float32)
        layer(x.bfloat16())
        assert layer.backend is Separate.DTYPE
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        assert layer.backend is Backend.ADDED
        layer.base_layer.weight.data = layer.base_layer.weight.data.to(torch.float8_e4m3fn)
        layer.base_layer.forward = lambda x: x @ layer.base_layer.weight.to(x.dtype).T
        layer(x.bfloat16())
        assert layer.backend is Separate.BASE_LAYER

    def test_autocast_converts_no_input_twice(self):
        """Nothing of the size of input or output is converted, but what the products need."""
        layer = pair(hybrid_r=2)[1].up
        layer.base_layer.to(torch.bfloat16)

        class Conversions(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                if function is torch.ops.aten._to_copy.default and result.numel() >= 50 * 24:
                    seen.append((args[0].dtype, result.dtype))
                return result

        half, single = torch.bfloat16, torch.float32
        for dtype, conversions in ((half, []), (single, [(single, half)])):
            x = torch.randn(50, 24, dtype=dtype, requires_grad=True)
            seen: list = []
            with torch.autocast("cpu", half), Conversions():
                result = layer(x)
            assert seen == conversions
            seen.clear()
            with Conversions():
                result.backward(torch.ones_like(result))
            # backwards the input again, which was kept as it came, and the gradient to its dtype
            assert sorted(map(str, seen)) == sorted(
                map(str, conversions + [pair[::-1] for pair in conversions])
            )


@pytest.mark.parametrize("kind", ["linear", "conv"])
class TestTransforms:
    """A layer with two hybrid adapters, and the same by the definition; in float64."""

    @staticmethod
    def functions(kind):
        """Both as functions of the trained factors, by name, and of an input; and those."""
        names = ["default", "second"]
        if kind == "linear":
            net = pair(hybrid_r=2)[1]
            layer = inject(net, config(hybrid_r=2, alpha=5), "second").up
            product, x = F.linear, torch.randn(4, 5, 24)
        else:
            net = conv(names, ConvNet(stride=2, dilation=2), hybrid_r=2)
            layer, x = net.conv, torch.randn(4, 1, 8, 9, 7)
            product = functools.partial(F.conv2d, stride=2, padding=1, dilation=2)
        layer.double().set_adapter(names)
        layer.set_scale("second", -0.7)
        base = layer.base_layer

        def by_definition(factors, x):
            weight = base.weight
            for name in names:
                A, B, down, up = (
                    factors[path.format(name)]
                    for path in (
                        "gralora_A.{}",
                        "gralora_B.{}",
                        "gralora_A_general.{}.weight",
                        "gralora_B_general.{}.weight",
                    )
                )
                update = dense_update(A, B) + torch.einsum("or,ri...->oi...", up.flatten(1), down)
                weight = weight + layer.scaling[name] * update
            return product(x, weight, base.bias)

        factors = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        assert len(factors) == 8
        return (
            lambda factors, x: functional_call(layer, factors, x),
            by_definition,
            factors,
            x.double(),
        )

    def test_values_and_gradients_of_gradients(self, kind):
        results = []
        *functions, factors, x = self.functions(kind)
        inputs = [x.requires_grad_(), *factors.values()]
        for function in functions:
            result = function(factors, x.flatten(0, -4) if kind == "conv" else x)
            first = torch.autograd.grad(result.square().sum(), inputs, create_graph=True)
            penalty = torch.stack([gradient.square().sum() for gradient in first]).sum()
            results.append([result, *first, *torch.autograd.grad(penalty, inputs)])
        for actual, exact in zip(*results, strict=True):
            assert relative_error(actual, exact) < 1e-12

    def test_gradients_of_each_sample(self, kind):
        function, by_definition, factors, x = self.functions(kind)

        def loss(factors, x):
            return function(factors, x).square().sum()

        frozen = {name: factor.detach() for name, factor in factors.items()}
        each = vmap(grad(loss), (None, 0))(frozen, x)
        for n, sample in enumerate(x):
            result = by_definition(factors, sample).square().sum()
            for name, exact in zip(
                factors, torch.autograd.grad(result, list(factors.values())), strict=True
            ):
                assert relative_error(each[name][n], exact) < 1e-12, name

    def test_tangents_are_those_of_finite_differences(self, kind):
        function, by_definition, factors, x = self.functions(kind)
        at = ({name: factor.detach() for name, factor in factors.items()}, x[0])
        along = ({name: torch.randn_like(factor) for name, factor in at[0].items()}, x[1])
        step = 1e-4

        def moved(step):
            factors = {name: factor + step * along[0][name] for name, factor in at[0].items()}
            return by_definition(factors, at[1] + step * along[1])

        result, tangent = jvp(function, at, along)
        assert relative_error(result, by_definition(*at)) < 1e-12
        assert relative_error(tangent, (moved(step) - moved(-step)) / (2 * step)) < 1e-6

    def test_hessian(self, kind):
        function, by_definition, factors, x = self.functions(kind)
        at = {name: factor.detach() for name, factor in factors.items()}
        A = "gralora_A.default"

        def loss(function):
            return lambda A_: function({**at, A: A_}, x[0]).square().sum()

        exact = torch.autograd.functional.hessian(loss(by_definition), at[A])
        assert relative_error(hessian(loss(function))(at[A]), exact) < 1e-12


class TestScale:
    @pytest.fixture
    def layers(self):
        """Our layer and a LoRA layer, two adapters each; LoRA's scaling is alpha / r."""
        ours, lora = Net(), Net()
        for name, alpha in (("a", 12), ("b", 4)):
            inject(ours, config(alpha=alpha, hybrid_r=2), name)
            inject_adapter_in_model(
                LoraConfig(r=10, lora_alpha=alpha, target_modules=["up", "down"]), lora, name
            )
        return ours.up, lora.up

    @pytest.mark.parametrize("active", [["a"], ["b"], ["a", "b"], ["b", "elsewhere"], []])
    def test_means_what_it_means_for_lora(self, layers, active):
        calls = [
            lambda layer: layer.scale_layer(0.5),
            lambda layer: layer.scale_layer(3.0),
            lambda layer: layer.unscale_layer(3.0),
            lambda layer: layer.set_scale("a", 0.25),
            lambda layer: layer.set_scale("unknown", 0.25),
            lambda layer: layer.scale_layer(0.0),
            lambda layer: layer.unscale_layer(),
            lambda layer: layer.set_scale("b", -1.0),
        ]
        for layer in layers:
            layer.set_adapter(active)
        for call in calls:
            for layer in layers:
                call(layer)
            assert layers[0].scaling == pytest.approx(layers[1].scaling)

    def test_scales_the_output(self, layers):
        layer, x = layers[0].eval(), torch.randn(4, 24)
        base = layer.base_layer(x)
        layer.set_adapter(["a", "b"])
        layer.set_scale("a", 0.5)
        update = 0.5 * 1.2 * dense(layer, "a") + 0.4 * dense(layer, "b")
        assert relative_error(layer(x) - base, x.double() @ update.T) < 1e-5
        layer.set_adapter(["b"])
        assert relative_error(layer(x) - base, x.double() @ (0.4 * dense(layer, "b")).T) < 1e-5
        layer.set_scale("b", 0.0)
        assert torch.equal(layer(x), base)


class TestAdapters:
    def test_disable_and_enable(self):
        net, x = pair()[1], torch.randn(4, 24)
        adapted = net.up(x)
        net.up.enable_adapters(False)
        assert torch.equal(net.up(x), net.up.base_layer(x))
        net.up.enable_adapters(True)
        assert torch.equal(net.up(x), adapted)

    def test_disabling_unmerges(self):
        layer, x = pair()[1].up, torch.randn(4, 24)
        base = layer.base_layer(x)
        layer.merge()
        layer.enable_adapters(False)
        assert relative_error(layer(x), base) < 1e-6
        assert not layer.merged

    def test_replacing_an_adapter_leaves_nothing_of_the_old_one(self):
        net = inject(Net(), config(hybrid_r=2, gralora_dropout=0.1))
        layer = net.eval().up
        before = layer.weight.clone()
        layer.merge()
        layer.update_layer("default", "up", config(r=4, gralora_k=2, alpha=4))
        assert relative_error(layer.weight, before) < 1e-6
        assert not layer.merged
        assert {n for n, _ in layer.named_parameters() if "gralora" in n} == {
            "gralora_A.default",
            "gralora_B.default",
        }
        x = torch.randn(3, 24)
        update = x.double() @ dense(layer).T
        assert relative_error(layer(x) - layer.base_layer(x), update) < 1e-5

    def test_deleting_while_merged_gives_the_base_back(self):
        net = conv(["a", "b"])
        layer, before = net.conv, net.conv.weight.clone()
        layer.set_adapter(["a", "b"])
        layer.merge()
        layer.delete_adapter("a")
        expected = before.double() + 1.5 * dense(layer, "b")
        assert relative_error(layer.weight, expected) < 1e-6
        assert layer.merged_adapters == ["b"]
        assert layer.active_adapters == ["b"]
        layer.delete_adapter("b")
        assert relative_error(layer.weight, before) < 1e-6
        assert torch.equal(net(torch.ones(1, 8, 4, 4)), layer.base_layer(torch.ones(1, 8, 4, 4)))

    def test_patterns_know_the_layer_by_its_path(self):
        patterned = PatternedConfig(
            **config().to_dict(),
            rank_pattern={r"block\.up": 6},
            k_pattern={"up": 2, "down": 1},
            alpha_pattern={"up": 3},
        )
        for path, r, scaling in (("block.up", 6, 0.5), ("up", 8, 3 / 8), ("block.u", 8, 12 / 8)):
            layer = GraloraLinear(nn.Linear(24, 16), "a", path, patterned)
            k = 2 if path.endswith("up") else 4
            assert layer.gralora_A["a"].shape == (k, 24 // k, r)
            assert layer.gralora_B["a"].shape == (k, r, 16 // k)
            assert layer.scaling["a"] == scaling

    @pytest.mark.parametrize("values", [{"gralora_k": 3, "r": 6}, {"r": 0}, {"hybrid_r": -1}])
    def test_refuses_what_cannot_be(self, values):
        with pytest.raises(ValueError, match=r"block\.up: .*(gralora_k=3|`r`|`hybrid_r`)"):
            GraloraLinear(nn.Linear(8, 16), "a", "block.up", config(**values))


class TestMerging:
    def test_several_adapters_at_their_scales(self):
        net = conv(["a", "b", "c"], hybrid_r=2)
        layer, before, x = net.conv, net.conv.weight.clone(), torch.randn(1, 8, 5, 5)
        layer.set_adapter(["a", "b"])
        layer.set_scale("b", -0.5)
        adapted = net(x)
        layer.merge()
        expected = before.double() + 1.2 * dense(layer, "a") - 0.6 * dense(layer, "b")
        assert relative_error(layer.weight, expected) < 1e-6
        assert relative_error(net(x), adapted) < 1e-5
        layer.set_scale("a", 7.0)  # of no effect on what is merged, nor on its unmerging
        with pytest.warns(UserWarning, match="additionally merging c"):
            layer.merge(adapter_names=["c"], scale=2.0)
        assert layer.merged_adapters == ["a", "b", "c"]
        assert relative_error(layer.weight, expected + 2.4 * dense(layer, "c")) < 1e-6
        layer.unmerge(["a"])
        assert layer.merged_adapters == ["b", "c"]
        layer.unmerge()
        assert relative_error(layer.weight, before) < 1e-6
        assert not layer.merged

    def test_what_is_active_but_not_merged_still_counts(self):
        net, x = conv(["a", "b"]), torch.randn(1, 8, 5, 5)
        net.conv.set_adapter(["a", "b"])
        adapted = net(x)
        net.conv.merge(adapter_names=["a"])
        assert relative_error(net(x), adapted) < 1e-5

    def test_merges_once(self):
        layer = conv().conv
        layer.merge()
        merged = layer.weight.clone()
        with pytest.warns(UserWarning, match="already merged"):
            layer.merge()
        assert torch.equal(layer.weight, merged)
        layer.unmerge()
        with pytest.warns(UserWarning, match="Already unmerged"):
            layer.unmerge()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_safe_merge_that_fails_leaves_the_base_alone(self, dtype):
        layer = conv(["a", "b"]).to(dtype).conv
        before = layer.weight.clone()
        layer.set_adapter(["a", "b"])
        if dtype is torch.float32:
            layer.gralora_B["b"].data[0, 0, 0] = torch.nan
        else:
            layer.set_scale("b", 1e6)  # finite in fp32, not in fp16
        with pytest.raises(ValueError, match="conv: merging adapter a, b gives NaN or infinite"):
            layer.merge(safe_merge=True)
        with pytest.raises(ValueError, match="gives NaN or infinite"):
            layer.check_merge(["b"])
        assert torch.equal(layer.weight, before)
        assert not layer.merged

    def test_half_precision_is_rounded_once(self):
        layer = pair(hybrid_r=2)[1].to(torch.bfloat16).up
        exact = layer.weight.double() + 1.2 * dense(layer)
        layer.merge()
        # fp32 arithmetic, then one rounding: at most half a unit in the last place, ties aside
        unit = torch.finfo(torch.bfloat16).eps * exact.abs()
        assert ((layer.weight.double() - exact).abs() <= 0.51 * unit).all()

    def test_refuses_weights_that_cannot_take_a_sum(self):
        layer = conv().conv
        for weight in (torch.empty(12, 8, 3, 3, device="meta"), torch.zeros(12, 8, 3, 3)):
            stored = weight if weight.is_meta else weight.to(torch.float8_e4m3fn)
            layer.base_layer.weight = nn.Parameter(stored, requires_grad=False)
            with pytest.raises(ValueError, match=r"conv: .*(not in memory|stored as torch.float8)"):
                layer.merge()


class TestTorchMachinery:
    def test_gradient_checkpointing(self):
        net = pair(hybrid_r=2, gralora_dropout=0.3)[1].train()
        x = torch.randn(5, 24, requires_grad=True)
        gradients = []
        for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
            net.zero_grad()
            torch.manual_seed(1)
            run(x).square().mean().backward()
            gradients.append({n: p.grad for n, p in net.named_parameters() if p.requires_grad})
        assert len(gradients[0]) == 8
        for name, gradient in gradients[0].items():
            assert torch.equal(gradients[1][name], gradient), name

    @pytest.mark.parametrize("kind", ["linear", "conv"])
    def test_compiles_without_a_graph_break(self, kind):
        net = pair(hybrid_r=2)[1] if kind == "linear" else conv(hybrid_r=2)
        x = torch.randn(5, 24) if kind == "linear" else torch.randn(2, 8, 6, 6)
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), net(x))
        for layer in net.children():
            layer.set_scale("default", 0.5)
        torch.testing.assert_close(compiled(x), net(x))
        compiled(x).sum().backward()
        assert all(p.grad is not None for p in net.parameters() if p.requires_grad)

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
    def test_distributed(self, process_group, wrap, autocast):
        """In one process: gathering weights and averaging gradients must leave them as they are."""
        alone = pair(hybrid_r=2)[1]
        net = copy.deepcopy(alone)
        if wrap is fully_shard:
            for layer in net.children():
                fully_shard(layer, mesh=process_group)
            wrapped = fully_shard(net, mesh=process_group)
        else:
            wrapped = wrap(net)
        x = torch.randn(5, 24)
        for model in (alone, wrapped):
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    result = model(x)
                result.float().square().mean().backward()
        theirs = dict(net.named_parameters())
        trained = {n: p.grad for n, p in alone.named_parameters() if p.requires_grad}
        assert len(trained) == 8
        for name, gradient in trained.items():
            given = theirs[name].grad
            given = given.full_tensor() if wrap is fully_shard else given
            assert relative_error(given, gradient) < 1e-6, name
        assert net.up.backend is (Backend.ADDED if autocast else Backend.DENSE)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_are_whole_and_independent(self, duplicate):
        net, x = pair(hybrid_r=2)[1], torch.randn(5, 24)
        twin = duplicate(net)
        expected = net(x)
        assert torch.equal(twin(x), expected)
        twin.up.set_scale("default", 0.0)
        twin.down.gralora_A["default"].data.zero_()
        assert torch.equal(net(x), expected)
        assert not torch.equal(twin(x), expected)

    def test_not_a_linear_layer_itself(self):
        """Or casting and quantizing would stop at the wrapper and take the factors along."""
        net = pair(hybrid_r=2)[1]
        assert [n for n, m in net.named_modules() if isinstance(m, nn.Linear)] == [
            "up.base_layer",
            "down.base_layer",
        ]
        assert repr(net.up).startswith("gralora.GraloraLinear(")
