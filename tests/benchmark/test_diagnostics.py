"""The log of the mechanism, against what the layers really do: their forward passes, by probes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from gralora_diffusion import get_family
from gralora_diffusion.adapters.placement.targets import base_of, find_targets
from gralora_diffusion.benchmark.diagnostics import DenseUpdate, DiagnosticsLog, block_norms
from gralora_diffusion.benchmark.evaluation.results import (
    ALIGNMENT,
    Diagnostics,
    read_result,
    write_result,
)
from gralora_diffusion.benchmark.methods import Method
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.data.data_module import find_images
from gralora_diffusion.training.loop import Trainer
from gralora_diffusion.training.optimization.adapters import (
    ADAPTER_NAME,
    adapter_configs,
    adapter_parameters,
    inference_weights,
)
from gralora_diffusion.training.runtime.acceleration import make_accelerator
from tests.benchmark.trials import keys, trial
from tests.models import stable_diffusion, structure
from tests.reference import dense_update, relative_error
from tests.training.runs import config as training_config
from tests.training.runs import make_images

METHODS = [
    *("lora-r4", "dora-r4", "loha-r2", "gralora-r4-k2", "gralora-r4-k4", "gralora-r4-k2-h2"),
    "full",
]
TARGETS = "to_q,to_k,to_out.0,conv1"


def attach(method: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[str]]:
    """A tiny UNet with the method on linear layers and convolutions, and their paths."""
    pipe = stable_diffusion()
    pipe.unet.requires_grad_(False).to(dtype)
    chosen, family = Method.parse(method), get_family(pipe)
    options = training_config(instance_data_dir="x", lora_layers=TARGETS)
    options = chosen.configured(options)
    (adapter,) = adapter_configs({"unet": pipe.unet}, family, options).values()
    paths = list(find_targets(pipe.unet, adapter))
    chosen.attach(pipe, family, options)
    pipe.unet.to(dtype).train()
    return pipe.unet, paths


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    """Of a forward pass on inputs that depend on the seed."""
    random = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x, text, target = (
        torch.randn(shape, generator=random).to(dtype)
        for shape in ((2, 4, 8, 8), (2, 5, 32), (2, 4, 8, 8))
    )
    prediction = model(x, torch.tensor([10, 500]), text).sample
    return (prediction - target).square().mean()


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def applied_weight(layer: nn.Module) -> Tensor:
    """The weight that the forward pass of a layer applies, found out by unit inputs."""
    base: Any = base_of(layer)
    if isinstance(base, nn.Linear):
        probe = torch.eye(base.in_features, dtype=base.weight.dtype)
        return (layer(probe) - layer(torch.zeros_like(probe))).T
    assert base.kernel_size == (3, 3)
    assert base.stride == base.padding == (1, 1)
    probe = torch.zeros(base.in_channels, base.in_channels, 3, 3, dtype=base.weight.dtype)
    probe[range(base.in_channels), range(base.in_channels), 1, 1] = 1
    return (layer(probe) - layer(torch.zeros_like(probe))).flip(2, 3).transpose(0, 1)


def shake(model: nn.Module) -> None:
    """Give the adapters an update that is not zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.05 * torch.randn_like(parameter))


def blocks_by_hand(update: Tensor, k: int) -> Tensor:
    norms = torch.empty(k, k, dtype=update.dtype)
    rows, columns = update.shape[0] // k, update.shape[1] // k
    for j in range(k):
        for n in range(k):
            block = update[j * rows : (j + 1) * rows, n * columns : (n + 1) * columns]
            norms[j, n] = block.square().sum().sqrt()
    return norms


def rank_by_hand(update: Tensor) -> float:
    p = torch.linalg.svdvals(update.flatten(1))
    p = p[p > 1e-5 * p[0]] / p[p > 1e-5 * p[0]].sum()
    return float((-p * p.log()).sum().exp())


# -- the update and its gradient -------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_how_a_step_moves_the_weight_that_is_applied(method: str) -> None:
    """By central differences in float64, of every kind of layer."""
    model, paths = attach(method, torch.float64)
    shake(model)
    loss_of(model).backward()
    layers = {path: model.get_submodule(path) for path in paths}
    gradients = {path: DenseUpdate(layer).gradient() for path, layer in layers.items()}
    moved, h = [], 1e-4
    starts = [p.detach().clone() for p in trained(model)]
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, start in zip(trained(model), starts, strict=True):
                if parameter.grad is not None:
                    parameter.copy_(start + sign * h * parameter.grad)
        moved.append({path: applied_weight(layer) for path, layer in layers.items()})
    assert {gradient.ndim for gradient in gradients.values()} == {2, 4}
    for path, gradient in gradients.items():
        assert gradient.dtype == torch.float64
        expected = (moved[0][path] - moved[1][path]) / (2 * h)
        assert expected.any()
        assert relative_error(gradient, expected) < 1e-6, path


def test_gradient_of_full_fine_tuning_is_that_of_the_weight() -> None:
    model, paths = attach("full")
    loss_of(model).backward()
    for path in paths:
        layer: Any = model.get_submodule(path)
        assert torch.equal(DenseUpdate(layer).gradient(), layer.weight.grad)


@pytest.mark.parametrize("method", ["lora-r4", "gralora-r4-k2"])
def test_gradient_is_the_product_rule_of_the_paper(method: str) -> None:
    model, paths = attach(method)
    shake(model)
    loss_of(model).backward()
    for path in paths:
        layer: Any = model.get_submodule(path)
        if method == "lora-r4":
            A, B = (part[ADAPTER_NAME].weight for part in (layer.lora_A, layer.lora_B))
            # a LoRA is a GraLoRA of one block
            A, B, dA, dB = (
                *(A.transpose(0, 1)[None], B.flatten(1).T[None]),
                *(A.grad.transpose(0, 1)[None], B.grad.flatten(1).T[None]),
            )
        else:
            A, B = layer.gralora_A[ADAPTER_NAME], layer.gralora_B[ADAPTER_NAME]
            dA, dB = A.grad, B.grad
        expected = dense_update(dA, B.detach()) + dense_update(A.detach(), dB)
        assert relative_error(DenseUpdate(layer).gradient(), expected) < 1e-5, path


@pytest.mark.parametrize("method", METHODS)
def test_update_is_what_is_applied_beyond_the_base(method: str) -> None:
    """And exactly zero before the first step, of DoRA too."""
    model, paths = attach(method)
    updates = {path: DenseUpdate(model.get_submodule(path)) for path in paths}
    before = {path: applied_weight(model.get_submodule(path)) for path in paths}
    assert not any(update().any() for update in updates.values())
    assert not any(update.singular_values().any() for update in updates.values())
    shake(model)
    for path in paths:
        expected = applied_weight(model.get_submodule(path)) - before[path]
        assert relative_error(updates[path](), expected) < 1e-5, path


def test_blocks_of_linear_layers_and_convolutions() -> None:
    torch.manual_seed(0)
    for shape, k in (((8, 12), 4), ((6, 9), 3), ((8, 12, 3, 3), 2), ((5, 7), 1)):
        update = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(block_norms(update, k), blocks_by_hand(update, k))


# -- the log ---------------------------------------------------------------------------------------


@contextmanager
def gradients_of_steps(model: nn.Module, paths: list[str], optimizer: Any) -> Iterator[list[Any]]:
    """Gather the dense gradients of every step, from a copy of the model that plain descent moves.

    What is applied is at most of second degree in a step of the methods that this is used for, so
    that the central difference is exact.
    """
    found: list[dict[str, Tensor]] = []

    def before(*_: Any) -> None:
        moved = []
        for sign in (1, -1):
            twin = copy.deepcopy(model)
            twin.double()
            with torch.no_grad():
                for theirs, ours in zip(trained(twin), trained(model), strict=True):
                    if ours.grad is not None:
                        theirs.add_(sign * ours.grad.double())
            moved.append({path: applied_weight(twin.get_submodule(path)) for path in paths})
        found.append({path: (moved[0][path] - moved[1][path]) / 2 for path in paths})

    with optimizer.register_step_pre_hook(before):
        yield found


@pytest.mark.parametrize("method", ["lora-r4", "gralora-r4-k2-h2", "full"])
def test_norms_of_the_steps_that_are_wanted(method: str, tmp_path: Path) -> None:
    model, paths = attach(method)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    # first, so that the hooks of the log are not copied with the model
    log = DiagnosticsLog(model, paths, 2, steps=range(1, sys.maxsize, 2))
    with gradients_of_steps(model, paths, optimizer) as gradients, log.watch(optimizer):
        train(model, optimizer, 4)
    mechanism = log.result()
    assert list(mechanism.gradient_norms) == paths
    for path, logged in mechanism.gradient_norms.items():
        assert logged["steps"] == [1, 3]
        for step, norms in zip((0, 2), logged["norms"], strict=True):
            expected = blocks_by_hand(gradients[step][path], 2)
            assert relative_error(torch.tensor(norms), expected) < 1e-4, path
    key = keys()[0]
    written = write_result(replace(trial(key), mechanism=mechanism), tmp_path / key.path)
    assert read_result(written).mechanism == mechanism


RIVALS = ["scaledlora-r4", "lokr-r4-f2", "boft-b8-m1"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", [*METHODS, *RIVALS])
def test_steps_and_full_gradients(method: str, checkpointing: bool) -> None:
    """By probes of the applied weight before and after the step, and a bare copy of the model.

    The copy applies the same weights as ordinary parameters, so autograd gives their gradient.
    """
    if checkpointing and method not in ("lora-r4", "gralora-r4-k2"):
        pytest.skip("two methods are enough")
    model, paths = attach(method, torch.float64)
    shake(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    log = DiagnosticsLog(model, paths, 2, steps=[2])
    with log.watch(optimizer):
        train(model, optimizer, 1)
        for seed in (7, 8):  # accumulated
            loss_of(model, seed).backward()
        before = {path: applied_weight(model.get_submodule(path)) for path in paths}
        full = full_gradients(model, paths, before, (7, 8))
        gradients = {path: DenseUpdate(model.get_submodule(path)).gradient() for path in paths}
        inputs = inputs_of(model, paths, (7, 8))
        optimizer.step()
        optimizer.zero_grad()
        after = {path: applied_weight(model.get_submodule(path)) for path in paths}
    mechanism = log.result()
    assert set(mechanism.step_norms) == set(mechanism.alignment) == set(paths)
    for path in paths:
        step = before[path] - after[path]
        (norms,) = mechanism.step_norms[path]["norms"]
        assert mechanism.step_norms[path]["steps"] == [2]
        assert relative_error(torch.tensor(norms), blocks_by_hand(step, 2)) < 1e-6, path
        outlier = int(inputs[path].argmax())
        expected = {}
        for name, change in {
            "full": full[path],
            "gradient": gradients[path],
            "step": step,
        }.items():
            change = change.detach()
            energy = change.square().sum()
            expected[f"{name}_share"] = change.shape[1] * change[:, outlier].square().sum() / energy
            inner = (change * full[path]).sum()
            expected[f"{name}_cosine"] = inner / (energy.sqrt() * full[path].norm())
        assert expected.pop("full_cosine") == pytest.approx(1)
        found = mechanism.alignment[path]
        assert found.keys() == expected.keys() == ALIGNMENT.keys()
        for name, value in expected.items():
            assert found[name]["steps"] == [2]
            assert found[name]["values"] == [pytest.approx(float(value), rel=1e-5, abs=1e-8)], path


def full_gradients(
    model: nn.Module, paths: list[str], weights: dict[str, Tensor], seeds: tuple[int, ...]
) -> dict[str, Tensor]:
    """The gradient of the loss by the weights that the layers apply, from a model without adapters.

    An attached layer's bias and place in the model are those of its base layer.
    """
    bare = copy.deepcopy(model)
    for path in paths:
        base: Any = base_of(bare.get_submodule(path))
        twin = copy.deepcopy(base)
        twin.weight = nn.Parameter(weights[path].clone())
        parent, _, name = path.rpartition(".")
        setattr(bare.get_submodule(parent), name, twin)
    for seed in seeds:
        loss_of(bare, seed).backward()
    return {path: bare.get_submodule(path).weight.grad for path in paths}


def inputs_of(model: nn.Module, paths: list[str], seeds: tuple[int, ...]) -> dict[str, Tensor]:
    """The squared norm of each input channel of the layers."""
    found: dict[str, Any] = dict.fromkeys(paths, 0.0)

    def see(path: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        found[path] = found[path] + (
            x.square().sum((0, 2, 3)) if x.ndim == 4 else x.flatten(0, -2).square().sum(0)
        )

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(see, path)) for path in paths
    ]
    with torch.no_grad():
        for seed in seeds:
            loss_of(model, seed)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_effective_rank_is_of_the_learned_update(method: str) -> None:
    model, paths = attach(method)
    before = {path: applied_weight(model.get_submodule(path)).double() for path in paths}
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    log = DiagnosticsLog(model, paths, 2, steps=())
    with log.watch(optimizer):
        train(model, optimizer, 5)
        assert log.result().effective_rank == {}
    ranks, stable = log.result().effective_rank, log.result().stable_rank
    assert list(ranks) == list(stable) == paths
    assert log.result().gradient_norms == log.result().input_outliers == {}
    for path in paths:
        update = applied_weight(model.get_submodule(path)).double() - before[path]
        assert ranks[path] == pytest.approx(rank_by_hand(update), rel=2e-3), path
        squares = torch.linalg.svdvals(update.flatten(1)).square()
        assert stable[path] == pytest.approx(float(squares.sum() / squares[0]), rel=2e-3), path
        limit = Method.parse(method).update_rank or min(update.flatten(1).shape)
        if "dora" not in method:  # the magnitude is of full rank
            assert ranks[path] <= limit


@pytest.mark.parametrize("method", ["lora-r4", "gralora-r4-k2-h2", "full"])
def test_effective_rank_is_of_the_average_where_that_is_used(method: str) -> None:
    model, paths = attach(method)
    before = {path: applied_weight(model.get_submodule(path)).double() for path in paths}
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ema = EMAModel(parameters, decay=0.9)
    in_use = partial(inference_weights, parameters, optimizer, ema)
    log = DiagnosticsLog(model, paths, 2, steps=())
    with log.watch(optimizer, in_use):
        for _ in range(4):
            train(model, optimizer, 1)
            ema.step(parameters)
    ranks = log.result().effective_rank
    differing = 0
    for path in paths:
        layer = model.get_submodule(path)
        raw = rank_by_hand(applied_weight(layer).double() - before[path])
        with in_use():
            averaged = rank_by_hand(applied_weight(layer).double() - before[path])
        assert ranks[path] == pytest.approx(averaged, rel=2e-3), path
        differing += abs(averaged / raw - 1) > 4e-3
    assert differing > len(paths) / 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_outliers_are_those_of_the_inputs(checkpointing: bool, autocast: bool) -> None:
    model, paths = attach("gralora-r4-k2")
    if checkpointing:
        model.enable_gradient_checkpointing()
    casting = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    log = DiagnosticsLog(model, paths, 2, steps=(1, 3))
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    with log.watch(optimizer):
        for step in range(3):
            hooks = [
                model.get_submodule(path).register_forward_pre_hook(
                    lambda _, inputs, path=path: seen[path].append(inputs[0].detach().double())
                )
                for path in paths
                if step != 1
            ]
            with casting:
                loss = loss_of(model, step)
            for hook in hooks:
                hook.remove()
            loss.backward()
            with torch.no_grad():
                loss_of(model, 99)  # as an image that is drawn meanwhile
            optimizer.step()
            optimizer.zero_grad()
    outliers = log.result().input_outliers
    assert set(outliers) == set(paths)
    for path, inputs in seen.items():
        assert len(inputs) == 2
        squares = torch.tensor(0.0)
        for x in inputs:
            channels = x.transpose(0, 1).flatten(1) if x.ndim == 4 else x.flatten(0, -2).T
            squares = squares + channels.square().sum(1)
        norms = sorted(squares.sqrt().tolist())
        middle = len(norms) // 2
        expected = norms[-1] / ((norms[middle - 1] + norms[middle]) / 2)
        assert outliers[path] == pytest.approx(expected, rel=1e-4), path


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_with_and_without(method: str) -> None:
    """Bit for bit, the generators of random numbers too; and nothing of it stays behind."""
    results, states = [], []
    for logged in (False, True):
        model, paths = attach(method)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        torch.manual_seed(0)
        log = DiagnosticsLog(model, paths, 2, steps=(1, 2, 4))
        with log.watch(optimizer) if logged else nullcontext():
            train(model, optimizer, 4)
        results.append([p.detach().clone() for p in trained(model)])
        states.append(torch.get_rng_state())
        assert not optimizer._optimizer_step_pre_hooks
        assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(map(torch.equal, *results))
    assert torch.equal(*states)
    assert log.result().gradient_norms[paths[0]]["steps"] == [1, 2, 4]


def test_the_trainer_with_accumulation(tmp_path: Path) -> None:
    """Its own loop, unchanged: steps are those of the optimizer, gradients clipped and complete."""
    stable_diffusion().save_pretrained(tmp_path / "base")
    results = []
    for logged in (False, True):
        chosen = training_config(
            pretrained_model_name_or_path=tmp_path / "base",
            instance_data_dir=make_images(tmp_path / "pictures"),
            output_dir=tmp_path / "out",
            lora_layers=TARGETS,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            max_train_steps=3,
            max_grad_norm=1e-3,
        )
        trainer = Trainer(
            *(chosen, get_family("stable-diffusion"), find_images(chosen), []),
            *(make_accelerator(chosen), CheckpointStore(chosen.output_dir, None)),
        )
        trainer.set_up()
        model = trainer.pipe.unet
        paths = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
        log = DiagnosticsLog(model, paths, 4, steps=range(2, 100))
        with log.watch(trainer.optimizer) if logged else nullcontext():
            assert list(trainer.steps()) == [1, 2, 3]
        results.append([p.detach().clone() for p in adapter_parameters(trainer.pipe, "unet")])
    assert all(map(torch.equal, *results))
    mechanism = log.result()
    assert len(paths) > 8
    assert set(mechanism.gradient_norms) == set(mechanism.input_outliers) == set(paths)
    assert all(logged["steps"] == [2, 3] for logged in mechanism.gradient_norms.values())


def test_gradients_are_those_that_the_step_takes() -> None:
    """Complete when accelerate accumulates, and clipped: plain descent moves the weight by them."""
    model, paths = attach("full")
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = accelerator.prepare(torch.optim.SGD(trained(model), lr=1.0))
    log = DiagnosticsLog(model, paths, 2, steps=range(1, 9))
    weights = [{path: layer.weight.detach().clone() for path, layer in layers.items()}]
    with log.watch(optimizer):
        for seed in range(4):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, seed))
                if accelerator.sync_gradients:
                    assert accelerator.clip_grad_norm_(model.parameters(), 0.1) > 0.2
                optimizer.step()
                optimizer.zero_grad()
            weights.append({path: layer.weight.detach().clone() for path, layer in layers.items()})
    for path, logged in log.result().gradient_norms.items():
        assert logged["steps"] == [1, 2]
        for step, norms in enumerate(logged["norms"]):
            moved = weights[2 * step][path] - weights[2 * step + 2][path]
            expected = blocks_by_hand(moved, 2)
            assert relative_error(torch.tensor(norms), expected) < 1e-3, path


# -- what is left out, what is refused -------------------------------------------------------------


class Two(nn.Module):
    """Layers of widths (8, 12) and (12, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def logged(model: nn.Module, x: Tensor, k: int = 8) -> Diagnostics:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    log = DiagnosticsLog(model, ["first", "last"], k, steps=[1])
    with log.watch(optimizer):
        model(x).square().sum().backward()
        optimizer.step()
    return log.result()


def test_k_is_lowered_to_what_divides_the_widths() -> None:
    norms = logged(Two(), torch.randn(3, 8)).gradient_norms
    assert {path: len(log["norms"][0]) for path, log in norms.items()} == {"first": 4, "last": 1}


def test_no_ratio_to_a_median_of_zero() -> None:
    x = torch.randn(3, 8)
    x[:, :5] = 0
    mechanism = logged(Two(), x)
    assert list(mechanism.input_outliers) == ["last"]
    assert set(mechanism.gradient_norms) == set(mechanism.effective_rank) == {"first", "last"}
    assert logged(Two(), torch.zeros(3, 8)).input_outliers.keys() == {"last"}


def test_only_finite_numbers() -> None:
    """An infinite weight makes every gradient so, and with the step every weight; no input."""
    torch.manual_seed(0)
    model, x = Two(), torch.randn(3, 8)
    outliers = logged(copy.deepcopy(model), x).input_outliers
    with torch.no_grad():
        model.last.weight[0, 0] = torch.inf
    assert logged(model, x) == Diagnostics(input_outliers=outliers)
    assert set(outliers) == {"first", "last"}


def test_an_error_ends_it_without_a_trace() -> None:
    model, paths = attach("dora-r4")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    before = structure(model)
    log = DiagnosticsLog(model, paths, 2, steps=[1])
    with pytest.raises(KeyboardInterrupt), log.watch(optimizer):
        raise KeyboardInterrupt
    assert structure(model) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert log.result() == Diagnostics()


def test_watching_again_starts_anew() -> None:
    model, paths = attach("full")
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    log = DiagnosticsLog(model, paths[:1], 2, steps=[1])
    with log.watch(optimizer):
        train(model, optimizer, 2)
    first = log.result()
    with log.watch(optimizer):
        train(model, optimizer, 1)
    assert log.result() == first
    assert first.effective_rank == first.stable_rank == {paths[0]: 0.0}


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("nowhere", "the model has no layer at this path"),
        ("norm", "it is a GroupNorm; only Linear"),
        ("grouped", "it is a Conv2d; only Linear, and Conv2d with groups=1"),
        ("frozen", "none of its parameters is trained; attach a method first"),
    ],
)
def test_layers_that_cannot_be_logged(path: str, why: str) -> None:
    model = nn.ModuleDict(
        {
            "norm": nn.GroupNorm(2, 4),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    with pytest.raises(ValueError, match=f"does not support layer '{path}': {why}"):
        DiagnosticsLog(model, [path], 2, steps=[1])


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="needs k of at least 1, but k is 0"):
        DiagnosticsLog(Two(), ["first"], 0, steps=[1])
