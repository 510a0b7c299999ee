"""PEFT's methods on UNet and DiT: parameters, updates, files, refusals; and the base afterwards."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from gralora_diffusion import get_family
from gralora_diffusion.adapters.placement.targets import base_of
from gralora_diffusion.benchmark.diagnostics import DenseUpdate, update_norm
from gralora_diffusion.benchmark.methods import Method, bare_afterwards
from gralora_diffusion.benchmark.rivals import LEAST_SCALE, channel_scales, unadaptable
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.optimization.adapters import second_factors
from gralora_diffusion.training.optimization.optimizers import build_optimizer
from tests.models import PIPELINES, stable_diffusion
from tests.reference import relative_error
from tests.training.runs import config as training_config

#: Method -> its parameters on a layer of these widths; the blocks and factors divide them.
PARAMETERS = {
    "rslora-r4": lambda i, o: 4 * (i + o),
    "pissa-r4": lambda i, o: 4 * (i + o),
    "scaledlora-r4": lambda i, o: 4 * (i + o),
    "loraplus-r4-x16": lambda i, o: 4 * (i + o),
    "dora-r4": lambda i, o: 4 * (i + o) + o,
    "lokr-r2-f2": lambda i, o: 2 * 2 + 2 * (i // 2 + o // 2),
    "lokr-r99-f2": lambda i, o: 2 * 2 + i // 2 * (o // 2),  # the second matrix as a whole
    "oft-b8": lambda i, o: i * (8 - 1) // 2,
    "boft-b8-m1": lambda i, o: 8 * i + o,
}
RIVALS = list(PARAMETERS)
LINEAR = "to_q,to_k,to_v,to_out.0"


def attached(name: str, pipe: Any, **options: Any) -> nn.Module:
    """The pipeline's denoiser with a method that has learned something."""
    method, family = Method.parse(name), get_family(pipe)
    denoiser = getattr(pipe, family.denoiser).requires_grad_(False)
    chosen = method.configured(training_config(instance_data_dir="x", **options))
    assert method.attach(pipe, family, chosen) == (family.denoiser,)
    return denoiser


def shake(model: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def adapters(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


@torch.no_grad()
def applied(layer: nn.Module) -> Tensor:
    """The weight that a layer's forward pass applies, found out by unit inputs."""
    base: Any = base_of(layer)
    if isinstance(base, nn.Linear):
        probe = torch.eye(base.in_features, dtype=base.weight.dtype)
        return (layer(probe) - layer(torch.zeros_like(probe))).T
    probe = torch.zeros(base.in_channels, base.in_channels, 5, 5, dtype=base.weight.dtype)
    probe[range(base.in_channels), range(base.in_channels), 2, 2] = 1
    found = layer(probe) - layer(torch.zeros_like(probe))  # (in, out, 5, 5)
    reach = base.kernel_size[0] // 2
    middle = found[:, :, 2 - reach : 3 + reach, 2 - reach : 3 + reach]
    return middle.flip(2, 3).transpose(0, 1)


@pytest.mark.parametrize("name", RIVALS)
def test_parameters_update_and_file_on_a_dit(name: str, tmp_path: Any) -> None:
    """On FLUX's transformer, whose base has its own weights afterwards, bit for bit."""
    pipe = PIPELINES["flux"]()
    family, method = get_family(pipe), Method.parse(name)
    weights = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    with bare_afterwards(pipe, ("transformer",), method):
        model = attached(name, pipe)
        layers = adapters(model)
        assert len(layers) > 8
        for path, layer in layers.items():
            outputs, inputs = layer.get_base_layer().weight.shape
            count = sum(p.numel() for p in layer.parameters() if p.requires_grad)
            assert count == PARAMETERS[name](inputs, outputs), path
            start = applied(layer) - weights[f"{path}.weight"]
            assert start.abs().max() < 1e-5, path
        shake(model)
        updates = {p: applied(layer) - weights[f"{p}.weight"] for p, layer in layers.items()}
        for path, layer in layers.items():
            assert relative_error(DenseUpdate(layer)().detach(), updates[path]) < 1e-4, path
        expected = float(torch.stack([u.double().norm() for u in updates.values()]).norm())
        assert update_norm([model]) == pytest.approx(expected, rel=1e-4)
        method.save(pipe, family, ("transformer",), tmp_path)
    assert all(torch.equal(v, weights[k]) for k, v in pipe.transformer.state_dict().items())
    assert pipe.transformer.state_dict().keys() == weights.keys()
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert {key.split(".")[0] for key in tensors} == {"transformer"}
    if method.kind in ("pissa", "scaledlora", "loraplus"):
        for path, update in updates.items():
            A, B = (tensors[f"transformer.{path}.lora_{part}.weight"] for part in "AB")
            assert len(A) == method.update_rank
            assert relative_error(B @ A, update) < 1e-4, path
        assert len(tensors) == 2 * len(updates)


@pytest.mark.parametrize("name", ["rslora-r4", "scaledlora-r4", "lokr-r2-f2", "boft-b8-m1"])
def test_update_of_convolutions(name: str) -> None:
    pipe = stable_diffusion()
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    model = attached(name, pipe, lora_layers="conv1,proj_in")
    shake(model)
    kernels = set()
    for path, layer in adapters(model).items():
        update = applied(layer) - weights[f"{path}.weight"]
        assert relative_error(DenseUpdate(layer)().detach(), update) < 1e-4, path
        kernels.add(tuple(update.shape[2:]))
    assert kernels >= {(3, 3)}


@pytest.mark.parametrize("name", ["pissa-r4", "oft-b8", "boft-b8-m1", "lokr-r2-f2"])
def test_gradient_of_the_update(name: str) -> None:
    """By central differences in float64."""
    pipe = stable_diffusion()
    model = attached(name, pipe, lora_layers=LINEAR).double()
    shake(model)
    (layer,) = list(adapters(model).values())[:1]
    trained = [p for p in layer.parameters() if p.requires_grad]
    for number, parameter in enumerate(trained):
        torch.manual_seed(number)
        parameter.grad = torch.randn_like(parameter)
    gradient = DenseUpdate(layer).gradient()
    moved, h = [], 1e-5
    starts = [p.detach().clone() for p in trained]
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, start in zip(trained, starts, strict=True):
                parameter.copy_(start + sign * h * parameter.grad)
        moved.append(applied(layer))
    assert relative_error(gradient, (moved[0] - moved[1]) / (2 * h)) < 1e-6


def test_ranks_of_learned_updates() -> None:
    for name in ("pissa-r4", "rslora-r4", "lokr-r2-f2"):
        pipe = stable_diffusion()
        weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
        model = attached(name, pipe, lora_layers="to_q")
        shake(model)
        for path, layer in adapters(model).items():
            update = (applied(layer) - weights[f"{path}.weight"]).double()
            limit = Method.parse(name).update_rank
            values = torch.linalg.svdvals(update)
            assert int((values > 1e-4 * values[0]).sum()) == limit, (name, path)
            ours = DenseUpdate(layer).singular_values()
            assert ours is not None
            scaling = layer.scaling["default"] if name == "rslora-r4" else 1  # left out of factors
            count = min(len(ours), len(values))
            assert relative_error(scaling * torch.from_numpy(ours[:count]), values[:count]) < 1e-3


# -- PiSSA -----------------------------------------------------------------------------------------


def test_pissa_takes_the_largest_part_out_of_the_base() -> None:
    pipe = stable_diffusion()
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    model = attached("pissa-r4", pipe, lora_layers=LINEAR)
    for path, layer in adapters(model).items():
        weight = weights[f"{path}.weight"]
        residual = layer.get_base_layer().weight
        left = torch.linalg.svdvals(residual.double())
        expected = torch.linalg.svdvals(weight.double())
        assert relative_error(left[: len(left) - 4], expected[4:]) < 1e-4, path
        assert not torch.equal(residual, weight)


def test_a_failed_start_leaves_the_base_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers before the one that fails have had their weights replaced."""
    pipe = stable_diffusion()
    method = Method.parse("pissa-r4")
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    true, calls = torch.linalg.svd, []

    def third_fails(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return true(*arguments, **options)

    monkeypatch.setattr(torch.linalg, "svd", third_fails)
    with pytest.raises(KeyboardInterrupt), bare_afterwards(pipe, ("unet",), method):
        attached("pissa-r4", pipe)
    assert pipe.unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())


# -- LoRA+ and scaled channels ---------------------------------------------------------------------


def test_second_factors_of_lora_have_their_own_rate() -> None:
    pipe = stable_diffusion()
    chosen = Method.parse("loraplus-r4-x16-lr1e-3").configured(
        training_config(instance_data_dir="x")
    )
    assert (chosen.loraplus_lr_ratio, chosen.learning_rate) == (16, 1e-3)
    model = attached("loraplus-r4-x16-lr1e-3", pipe)
    parameters = [p for p in model.parameters() if p.requires_grad]
    second = second_factors(pipe, "unet")
    named = {id(p): name for name, p in model.named_parameters()}
    assert {re.search(r"lora_(.)", named[id(p)])[1] for p in second} == {"B"}
    assert len(second) == len(parameters) // 2
    chosen.adam_weight_decay = 0.0
    groups = build_optimizer(chosen, parameters, second_factors=second).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 16e-3])
    assert {*map(id, groups[1]["params"])} == {*map(id, second)}
    assert Method.parse("lora-r4").configured(chosen).loraplus_lr_ratio == 16  # the run's own


@pytest.mark.parametrize("targets", ["to_q", "conv1"])
def test_scales_are_those_of_the_first_training_batch(targets: str) -> None:
    pipe = stable_diffusion()
    model = attached("scaledlora-r4", pipe, lora_layers=targets)
    (path, layer), *_ = adapters(model).items()
    base = layer.get_base_layer()
    torch.manual_seed(0)
    is_linear = isinstance(base, nn.Linear)
    x = torch.randn(2, 5, base.in_features) if is_linear else torch.randn(2, base.in_channels, 4, 4)
    channels = x if is_linear else x.movedim(1, -1)
    channels *= torch.logspace(-1, 1, channels.shape[-1])  # in place, of x
    channels[..., 0] = 0
    model.eval()
    layer(x)
    first = layer.lora_A["default"]
    raw = first.parametrizations.weight.original.detach().clone()
    assert torch.equal(first.weight, raw)  # not a training
    model.train()
    layer(x)
    rms = channels.reshape(-1, channels.shape[-1]).square().mean(0).sqrt()
    scale = (rms / rms.square().mean().sqrt()).clamp(min=LEAST_SCALE)
    expected = raw / scale.view(1, -1, *[1] * (raw.ndim - 2))
    torch.testing.assert_close(first.weight, expected)
    layer(torch.randn_like(x))  # a later batch changes nothing
    torch.testing.assert_close(first.weight, expected)
    assert path in adapters(model)


def test_scaled_channels_have_the_energy_of_all() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 8) * torch.tensor([1, 1, 1, 1, 1, 1, 1, 100.0])
    scaled = x / channel_scales(x)
    energy = scaled.square().mean(0)
    torch.testing.assert_close(energy, x.square().mean().expand(8), rtol=1e-4, atol=0)
    assert torch.equal(channel_scales(torch.zeros(3, 4)), torch.ones(4))
    assert channel_scales(torch.tensor([[1.0, 1e-6]]))[1] == pytest.approx(LEAST_SCALE)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        ("pissa-r4", nn.Conv2d(8, 8, 1), "PEFT has no PiSSA for convolutions"),
        ("pissa-r9", nn.Linear(8, 12), r"fewer singular values \(8\) than the rank"),
        ("oft-b8", nn.Conv2d(8, 8, 3), "PEFT's OFT is wrong for kernels of 3x3"),
        ("oft-b8", nn.Linear(12, 8), "its 12 inputs cannot be split into blocks of 8"),
        ("boft-b8-m1", nn.Conv2d(8, 8, 3, bias=False), "needs a convolution with a bias"),
        ("boft-b8-m1", nn.Conv2d(8, 8, (3, 1)), "needs square convolutions"),
        ("boft-b8-m1", nn.Conv2d(8, 8, 3, dilation=2), "needs a dilation of 1"),
        ("boft-b10-m1", nn.Conv2d(8, 8, 3), "its 72 inputs cannot be split into blocks of 10"),
    ],
)
def test_layers_that_peft_cannot_adapt(name: str, layer: nn.Module, why: str) -> None:
    assert re.search(why, unadaptable(layer, Method.parse(name)) or "")


def test_every_such_layer_is_named_before_anything_is_attached() -> None:
    pipe = stable_diffusion()
    with pytest.raises(ConfigError) as caught:
        attached("oft-b8", pipe, lora_layers="to_q,conv1")
    (problem,) = caught.value.problems
    convolutions = [path for path, _ in pipe.unet.named_modules() if path.endswith("conv1")]
    assert f"oft-b8 cannot adapt {len(convolutions)} of " in problem
    assert f"{convolutions[0]}: PEFT's OFT is wrong for kernels of 3x3" in problem
    assert "--exclude_modules" in problem
    assert not adapters(pipe.unet)


def test_oft_refuses_a_dropout_that_it_would_ignore() -> None:
    with pytest.raises(ConfigError, match=r"oft-b8 has no dropout\. Leave out --lora_dropout"):
        attached("oft-b8", stable_diffusion(), lora_dropout=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the extension may be built here")
def test_butterflies_are_not_left_out_without_a_word() -> None:
    with pytest.raises(ConfigError, match="several butterfly factors needs its CUDA extension"):
        attached("boft-b4-m2", stable_diffusion())
