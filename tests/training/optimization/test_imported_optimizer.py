"""Optimizers by import path: used as they are, or refused with the reason."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.studio.engine.form import check
from gralora_diffusion.training.checkpoints.resume import PROGRESS_NAME
from gralora_diffusion.training.checks.options import find_problems, find_warnings
from gralora_diffusion.training.config.training_config import TrainingConfig, parse_config
from gralora_diffusion.training.optimization.imported_optimizer import (
    keyword_arguments,
    problems_of_imported,
)
from gralora_diffusion.training.optimization.optimizers import build_optimizer
from tests.training.runs import assert_same_run, config, run

HERE = __name__
#: In YAML, 9 to the power of 9 mappings, if they were merged.
MERGED = [f"&x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 9)}]}}" for n in range(1, 10)]
BOMB = f"[&x0 {{a: 1}}, {', '.join(MERGED)}]"


class Hooked(Optimizer):
    """Would do its work in hooks."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


class Plain(Hooked):
    """Gradient descent with a factor."""

    def __init__(self, params: Any, lr: float = 1e-3, factor: float = 1.0) -> None:
        super().__init__(params, lr)
        self.factor, self.steps = factor, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * self.factor * self.rate() * parameter.grad

    def rate(self) -> float | Tensor:
        return 1.0


class Forgetful(Plain):
    """Has a state of its own that is not saved."""

    def rate(self) -> float:
        return 1 / self.steps


class Coded(Plain):
    """Keeps an object in its state."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "extra": Path("x")}


class Random(Plain):
    """Uses the random state, which is set before each step."""

    def rate(self) -> Tensor:
        return torch.rand(())


class OtherModes(Plain):
    def train(self) -> None:
        pass


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("torch.optim.RAdam", ["betas=[0.8,0.95]", "foreach=false", "eps=1e-6"]),
        ("torch.optim.SGD", ["momentum=0.9", "nesterov=true"]),
        ("torch.optim.Adafactor", None),
        ("schedulefree.SGDScheduleFree", ["momentum=0.8"]),
        (f"{HERE}.Plain", ["factor=2"]),
        (f"{HERE}.Random", None),
    ],
)
def test_usable_ones_have_no_problem(path: str, given: list[str] | None) -> None:
    state = torch.get_rng_state()
    assert list(problems_of_imported(path, given)) == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("path", "given", "problem"),
    [
        ("torch.optim.LBFGS", None, "its step needs a closure, which evaluates the loss several"),
        ("torch.optim.RAdam", ["beta=0.9"], "torch.optim.RAdam has no beta; it has betas, eps, "),
        ("torch.optim.RAdam", ["betas=3"], "it does not work with parameter groups of an adapter"),
        ("torch.optim.RAdam", ["lr=1"], "lr has an option of its own: --learning_rate"),
        ("torch.optim.RAdam", ["eps"], "'eps' is not of the form key=value"),
        ("torch.optim.RAdam", ["eps=1", "eps=2"], "eps is given twice"),
        ("torch.optim.RAdam", [f"eps={BOMB}"], "is not a number, a text, true, false, null or a"),
        ("torch.optim.RAdam", ["eps={a: 1}"], "is not a number, a text, true, false, null or a"),
        ("torch.optim.RAdam", ["eps=!!python/name:os.system"], "is not a number, a text, true,"),
        ("torch.optim.SparseAdam", None, "it does not work with parameter groups of an adapter"),
        ("torch.optim.Optimizer", None, "it takes no learning rate"),
        ("torch.optim.NoSuch", None, "torch.optim has no NoSuch"),
        ("no_such_package.Class", None, "no_such_package cannot be imported"),
        ("torch.nn.Linear", None, "this is not a subclass of torch.optim.Optimizer"),
        ("torch.optim/x.Adam", None, "it must be the import path of a class"),
        (f"{HERE}.Hooked", None, "its step() changes nothing, or not every parameter"),
        (f"{HERE}.Forgetful", None, "a run that is resumed from its saved state would differ"),
        (f"{HERE}.Coded", None, "its state has other objects than tensors, numbers and text"),
        (f"{HERE}.OtherModes", None, "modes other than schedule-free's"),
    ],
)
def test_others_are_refused_with_the_reason(
    path: str, given: list[str] | None, problem: str
) -> None:
    (found,) = problems_of_imported(path, given)
    assert problem in found
    assert problem in " ".join(find_problems(config(optimizer=path, optimizer_args=given)))


def test_values_are_yamls_scalars_and_lists() -> None:
    given = ["a=1", "b=1e-4", "c=[0.9, 1e-3]", "d=true", "e=null", "f=text", "g='1'", "h=a=b"]
    assert keyword_arguments(given) == {
        "a": 1,
        "b": 1e-4,
        "c": (0.9, 1e-3),
        "d": True,
        "e": None,
        "f": "text",
        "g": 1.0,
        "h": "a=b",
    }


def test_options_arrive() -> None:
    chosen = TrainingConfig(
        optimizer="torch.optim.RAdam",
        optimizer_args=["betas=[0.8,0.95]", "foreach=false"],
        learning_rate=0.03,
        adam_weight_decay=0.1,
        text_encoder_lr=0.01,
    ).with_defaults({})
    parameters = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    optimizer = build_optimizer(chosen, parameters[:1], parameters[1:])
    assert type(optimizer) is torch.optim.RAdam
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 1e-3]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}

    plain = TrainingConfig(
        optimizer=f"{HERE}.Plain", optimizer_args=["factor=2"], learning_rate=0.5
    )
    optimizer = build_optimizer(plain.with_defaults({}), parameters[:1])
    parameters[0].grad = torch.ones(3)
    optimizer.step()
    assert parameters[0].tolist() == [0.0] * 3
    assert optimizer.param_groups[0]["weight_decay"] == 0  # it has none, and none is pretended
    refused = config(optimizer=f"{HERE}.Plain", adam_weight_decay=0.1)
    assert any("--adam_weight_decay is 0.1, but" in text for text in find_problems(refused))


def test_arguments_of_a_named_optimizer_have_no_effect_and_say_so() -> None:
    found = find_warnings(config(optimizer="adamw", optimizer_args=["eps=1"]))
    assert any("--optimizer_args has no effect on --optimizer adamw" in text for text in found)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "torch.optim.RAdam", "optimizer_args": ["betas=[0.8,0.95]"]},
        {"optimizer": "schedulefree.SGDScheduleFree", "loraplus_lr_ratio": 4, "learning_rate": 1.0},
    ],
    ids=["torch", "schedulefree"],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(
    base: Path, images: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    options |= {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    options |= {"checkpointing_steps": 2, "max_train_steps": 4, "lr_scheduler": "constant"}
    whole = run(output_dir=tmp_path / "whole", **options)
    parts = tmp_path / "parts"
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    shutil.copyfile(whole / "metrics.jsonl", parts / "metrics.jsonl")
    run(output_dir=parts, resume_from_checkpoint="latest", **options)
    assert_same_run(whole, parts)

    # other arguments are another run
    shutil.rmtree(parts / "checkpoint-4")
    options["optimizer_args"] = ["foreach=false"]
    with pytest.raises(ConfigError, match="--optimizer_args"):
        run(output_dir=parts, resume_from_checkpoint="latest", **options)


def test_files_never_import_what_they_name(
    base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint, and a file of options that is only looked at."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    shared = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    shared |= {"output_dir": out, "checkpointing_steps": 1}
    run(**shared, max_train_steps=1)
    path = out / "checkpoint-1" / PROGRESS_NAME
    progress = json.loads(path.read_text(encoding="utf-8"))
    progress["options"]["optimizer"] = "evil_module.Class"
    path.write_text(json.dumps(progress), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"--optimizer evil_module.Class there, adamw here"):
        run(**shared, max_train_steps=2, resume_from_checkpoint="latest")

    options = tmp_path / "options.yaml"
    options.write_text("optimizer: evil_module.Class\n")
    assert parse_config(["--config", str(options)]).optimizer == "evil_module.Class"
    assert not any("evil" in text for _, text in check({"optimizer": "evil_module.Class"}).problems)
    assert "evil_module" not in sys.modules


def test_schedulefree_is_saved_as_its_average() -> None:
    """The class is the library's own, so its modes are found without its name."""
    chosen = TrainingConfig(optimizer="schedulefree.AdamWScheduleFree", learning_rate=0.1)
    parameter = Parameter(torch.ones(3))
    optimizer = build_optimizer(chosen.with_defaults({}), [parameter])
    assert isinstance(optimizer, schedulefree.AdamWScheduleFree)
    assert optimizer.param_groups[0]["train_mode"]
