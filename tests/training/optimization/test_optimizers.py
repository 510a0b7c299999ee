"""Optimizers: they learn, they continue exactly from a saved state, and their settings arrive."""

from __future__ import annotations

import copy
import importlib.util
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from gralora_diffusion.training.config.training_config import TrainingConfig
from gralora_diffusion.training.optimization.optimizers import (
    build_lr_scheduler,
    build_optimizer,
    evaluating,
)
from tests.training.runs import adapter, metrics, run

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
OPTIMIZERS = [
    "adamw",
    "prodigy",
    "adafactor",
    "schedulefree",
    pytest.param("adamw8bit", marks=needs_bitsandbytes),
]
# 8-bit states are used from 4096 elements on; factors of the adapter have three axes
SHAPE = (2, 48, 64)


def make_config(optimizer: str, **options: Any) -> TrainingConfig:
    options = {"text_encoder_lr": 0.03, "adam_weight_decay": 0.0, **options}
    if optimizer == "prodigy":
        options.pop("text_encoder_lr")
    else:
        options.setdefault("learning_rate", 0.03)
    return TrainingConfig(optimizer=optimizer, **options).with_defaults({})


class Quadratic:
    """The mean squared distance of two parameters, one of which starts at zero, to two targets."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.denoiser = Parameter(torch.zeros(SHAPE))
        self.text_encoder = Parameter(torch.randn(SHAPE, generator=generator))
        self.targets = torch.randn((2, *SHAPE), generator=generator)

    def loss(self) -> Tensor:
        return (torch.stack([self.denoiser, self.text_encoder]) - self.targets).square().mean()

    def optimizer(self, config: TrainingConfig) -> Optimizer:
        return build_optimizer(config, [self.denoiser], [self.text_encoder])

    def train(self, optimizer: Optimizer, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            self.loss().backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns(name: str) -> None:
    problem = Quadratic()
    before = problem.loss().item()
    optimizer = problem.optimizer(make_config(name))
    problem.train(optimizer, None, 100)
    with evaluating(optimizer):
        after = problem.loss().item()
    assert after < 0.2 * before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_continues_bit_for_bit(name: str) -> None:
    config = make_config(
        name, lr_scheduler="constant" if name == "schedulefree" else "cosine", lr_warmup_steps=2
    )
    straight = Quadratic()
    optimizer = straight.optimizer(config)
    scheduler = build_lr_scheduler(config, optimizer, 12)
    straight.train(optimizer, scheduler, 5)
    file = io.BytesIO()
    state = {
        "weights": [straight.denoiser.detach(), straight.text_encoder.detach()],
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler and scheduler.state_dict(),
    }
    torch.save(state, file)
    straight.train(optimizer, scheduler, 7)

    resumed = Quadratic()
    again = resumed.optimizer(config)
    scheduler_again = build_lr_scheduler(config, again, 12)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    with torch.no_grad():
        resumed.denoiser.copy_(loaded["weights"][0])
        resumed.text_encoder.copy_(loaded["weights"][1])
    again.load_state_dict(loaded["optimizer"])
    if scheduler_again is not None:
        scheduler_again.load_state_dict(loaded["scheduler"])
    resumed.train(again, scheduler_again, 7)
    assert torch.equal(resumed.denoiser, straight.denoiser)
    assert torch.equal(resumed.text_encoder, straight.text_encoder)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_torchs(fused: bool) -> None:
    problem, reference = Quadratic(), Quadratic()
    config = make_config("adamw", adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3)
    config.adam_weight_decay, config.adam_weight_decay_text_encoder = 0.5, 0.25
    config.text_encoder_lr = 0.01
    expected = torch.optim.AdamW(
        [
            {"params": [reference.denoiser], "lr": 0.03, "weight_decay": 0.5},
            {"params": [reference.text_encoder], "lr": 0.01, "weight_decay": 0.25},
        ],
        betas=(0.8, 0.9),
        eps=1e-3,
        fused=fused,
    )
    problem.train(problem.optimizer(config), None, 5)
    reference.train(expected, None, 5)
    # the plain one rounds at other places
    tolerance = {"rtol": 0.0, "atol": 0.0} if fused else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(problem.denoiser, reference.denoiser, **tolerance)
    torch.testing.assert_close(problem.text_encoder, reference.text_encoder, **tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_have_their_own_rate_and_decay(name: str) -> None:
    config = make_config(name, adam_weight_decay=0.5)
    frozen = Parameter(torch.zeros(2), requires_grad=False)
    trained = Parameter(torch.zeros(2))
    optimizer = build_optimizer(config, [frozen, trained], [Parameter(torch.zeros(3))])
    unet, text = optimizer.param_groups
    assert [unet["name"], text["name"]] == ["denoiser", "text_encoder"]
    assert len(unet["params"]) == 1
    assert unet["params"][0] is trained
    assert (unet["lr"], text["lr"]) == ((1.0, 1.0) if name == "prodigy" else (0.03, 0.03))
    assert (unet["weight_decay"], text["weight_decay"]) == (0.5, 1e-3)
    (only,) = build_optimizer(config, [trained]).param_groups
    assert only["name"] == "denoiser"


def test_settings_of_prodigy_arrive() -> None:
    config = make_config("prodigy", prodigy_beta3=0.5, prodigy_decouple=False)
    config.prodigy_use_bias_correction = config.prodigy_safeguard_warmup = False
    (group,) = build_optimizer(config, [Parameter(torch.zeros(1))]).param_groups
    assert group["beta3"] == 0.5
    names = ("decouple", "use_bias_correction", "safeguard_warmup")
    assert [group[name] for name in names] == [False] * 3
    (group,) = build_optimizer(make_config("prodigy"), [Parameter(torch.zeros(1))]).param_groups
    assert [group[name] for name in names] == [True] * 3


def test_scale_lr() -> None:
    config = make_config("adamw", scale_lr=True)
    groups = build_optimizer(
        config, [Parameter(torch.zeros(1))], [Parameter(torch.zeros(1))], samples_per_step=24
    ).param_groups
    assert [group["lr"] for group in groups] == [0.03 * 24, 0.03 * 24]


def test_what_cannot_be_built() -> None:
    parameters = [Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(make_config("adamw"), [])
    with pytest.raises(ValueError, match=r"denoiser are not set.*with_defaults"):
        build_optimizer(TrainingConfig(), parameters)
    with pytest.raises(
        ValueError, match="'sgd' is unknown; it must be one of adamw, adamw8bit, prodigy"
    ):
        build_optimizer(make_config("sgd"), parameters)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"
)
def test_a_missing_library_is_named() -> None:
    with pytest.raises(ImportError, match="adamw8bit needs bitsandbytes: pip install bitsandbytes"):
        build_optimizer(make_config("adamw8bit"), [Parameter(torch.zeros(1))])


# ---------------------------------------------------------------- schedules

STEPS, WARMUP = 20, 4


def ramp(step: int) -> float:
    return min(1.0, step / WARMUP)


def progress(step: int) -> float:
    return max(0.0, (step - WARMUP) / (STEPS - WARMUP))


# multiple of the learning rate in a step, written down from the schedules' definitions
SCHEDULES = {
    "constant": lambda s: 1.0,
    "constant_with_warmup": ramp,
    "linear": lambda s: ramp(s) * (1 - progress(s)),
    "cosine": lambda s: ramp(s) * (1 + math.cos(math.pi * progress(s))) / 2,
    "cosine_with_restarts": lambda s: ramp(s) * (1 + math.cos(math.pi * (progress(s) * 2 % 1))) / 2,
    # diffusers' polynomial ends at 1e-7, not at zero
    "polynomial": lambda s: (
        ramp(s) if s < WARMUP else ((0.03 - 1e-7) * (1 - progress(s)) ** 2 + 1e-7) / 0.03
    ),
    "piecewise_constant": lambda s: 1.0 if s < 5 else 0.5 if s < 10 else 0.1,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_in_optimizer_steps(name: str) -> None:
    config = make_config(
        "adamw",
        lr_scheduler=name,
        lr_warmup_steps=WARMUP,
        lr_num_cycles=2,
        lr_power=2.0,
        lr_step_rules="1:5,0.5:10,0.1",
        gradient_accumulation_steps=4,
    )
    problem = Quadratic()
    optimizer = problem.optimizer(config)
    scheduler = build_lr_scheduler(config, optimizer, STEPS)
    rates = []
    for _ in range(STEPS):
        rates.append([group["lr"] for group in optimizer.param_groups])
        problem.train(optimizer, scheduler, 1)
    expected = [[0.03 * SCHEDULES[name](step)] * 2 for step in range(STEPS)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))


def test_prodigy_survives_a_warmup_from_zero() -> None:
    config = make_config("prodigy", lr_scheduler="constant_with_warmup", lr_warmup_steps=3)
    problem = Quadratic()
    before = problem.loss().item()
    optimizer = problem.optimizer(config)
    problem.train(optimizer, build_lr_scheduler(config, optimizer, 100), 100)
    assert problem.loss().item() < 0.2 * before


def test_schedulefree_takes_the_warmup_itself() -> None:
    config = make_config("schedulefree", lr_warmup_steps=7)
    problem = Quadratic()
    optimizer = problem.optimizer(config)
    assert build_lr_scheduler(config, optimizer, 20) is None
    assert [group["warmup_steps"] for group in optimizer.param_groups] == [7, 7]


# ---------------------------------------------------------------- weights to train, weights to use


def test_evaluating_shows_the_average_and_gives_the_weights_back() -> None:
    config = make_config("schedulefree")
    problem, undisturbed = Quadratic(), Quadratic()
    optimizer, other = problem.optimizer(config), undisturbed.optimizer(config)
    problem.train(optimizer, None, 10)
    undisturbed.train(other, None, 10)

    trained = problem.denoiser.detach().clone()
    z = optimizer.state[problem.denoiser]["z"].clone()
    with evaluating(optimizer):
        # y = beta x + (1 - beta) z, solved for x, the average that schedule-free is about
        torch.testing.assert_close(problem.denoiser.detach(), (trained - 0.1 * z) / 0.9)
        with evaluating(optimizer):  # within itself: nothing more happens
            pass
        assert not torch.equal(problem.denoiser, trained)
    assert torch.equal(problem.denoiser, trained)

    problem.train(optimizer, None, 10)
    undisturbed.train(other, None, 10)
    assert torch.equal(problem.denoiser, undisturbed.denoiser)
    assert torch.equal(problem.text_encoder, undisturbed.text_encoder)


def test_evaluating_gives_the_weights_back_after_an_error() -> None:
    problem = Quadratic()
    optimizer = problem.optimizer(make_config("schedulefree"))
    problem.train(optimizer, None, 3)
    trained = problem.denoiser.detach().clone()
    with pytest.raises(RuntimeError, match="no validation"), evaluating(optimizer):
        raise RuntimeError("no validation")
    assert torch.equal(problem.denoiser, trained)
    problem.train(optimizer, None, 1)


@pytest.mark.parametrize("name", ["adamw", "prodigy", "adafactor"])
def test_evaluating_leaves_other_optimizers_alone(name: str) -> None:
    problem = Quadratic()
    optimizer = problem.optimizer(make_config(name))
    problem.train(optimizer, None, 3)
    weights, state = problem.denoiser.detach().clone(), copy.deepcopy(optimizer.state_dict())
    with evaluating(optimizer):
        assert torch.equal(problem.denoiser, weights)
    assert str(optimizer.state_dict()) == str(state)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests have their own settings


@pytest.mark.parametrize("name", ["adamw", "schedulefree"])
def test_accelerates_wrapper_is_understood(accelerator: Accelerator, name: str) -> None:
    problem = Quadratic()
    optimizer = accelerator.prepare(problem.optimizer(make_config(name)))
    problem.train(optimizer, None, 3)
    trained = problem.denoiser.detach().clone()
    with evaluating(optimizer):
        assert torch.equal(problem.denoiser, trained) == (name == "adamw")
    assert torch.equal(problem.denoiser, trained)


def test_second_factors_have_their_own_rate(base: Path, images: Path, tmp_path: Path) -> None:
    """LoRA+. After one step of Adam, the second factors, which were zero, are that much larger."""
    data = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    options = {
        **data,
        "max_train_steps": 1,
        "checkpointing_steps": 1,
        "train_text_encoder": True,
        "hybrid_rank": 2,
    }
    plain = adapter(run(output_dir=tmp_path / "plain", **options))
    out = run(output_dir=tmp_path / "plus", loraplus_lr_ratio=4, **options)
    plus = adapter(out)
    moved = 0
    for name, tensor in plain.items():
        factor = 4 if "gralora_B" in name else 1
        torch.testing.assert_close(plus[name], factor * tensor, rtol=1e-5, atol=1e-9)
        moved += factor == 4 and bool(tensor.any())
    assert moved > 32
    assert [row["lr"] for row in metrics(out)] == [1e-2]
    saved = torch.load(out / "checkpoint-1" / "optimizer.bin", weights_only=True)["param_groups"]
    rates = {group["name"]: group["lr"] for group in saved}
    assert rates == {
        "denoiser": 1e-2,
        "denoiser B": 4e-2,
        "text_encoder": 5e-6,
        "text_encoder B": 2e-5,
    }
