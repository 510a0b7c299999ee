"""Optimizers that are named by the import path of their class, and tried before they are used.

Only a command line, or a file of options that the user names, can name one. What a checkpoint or an
adapter says of its optimizer is compared as text and never imported.
"""

from __future__ import annotations

import importlib
import inspect
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from gralora_diffusion.io.yaml_files import compose

#: Set by options of their own, for any optimizer.
_OWN_OPTIONS = {
    "lr": "--learning_rate",
    "weight_decay": "--adam_weight_decay",
    "params": "none, since these are the adapter's",
}
#: Shapes of the parameters that an optimizer is tried on: as an adapter's factors, and a vector.
_SHAPES = ((2, 6, 8), (6, 4), (5,))
#: Steps of a trial; the state is saved before the last one. RAdam may do nothing in the first five.
_STEPS = 10


def imported_class(path: str) -> type[Optimizer]:
    """Return the class that ``package.module.Class`` names.

    Raises:
        ValueError: there is no such class, or it is not an optimizer. The error says why.
    """
    module, _, name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError("it must be the import path of a class, such as torch.optim.RAdam")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(
            f"{module} cannot be imported ({error}). Install its package, or correct the path"
        ) from error
    except AttributeError:
        raise ValueError(f"{module} has no {name}. Correct the path") from None
    except Exception as error:  # the module may raise anything
        raise ValueError(f"{module} cannot be imported ({error!r})") from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError("this is not a subclass of torch.optim.Optimizer")
    return found


def keyword_arguments(given: Sequence[str] | None) -> dict[str, Any]:
    """Return the values of ``key=value`` texts, read as YAML: numbers, texts, true, false, or null.

    A list such as ``[0.9, 0.99]`` becomes a tuple.

    Raises:
        ValueError: a text is something else, or a key is given twice.
    """
    found: dict[str, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise ValueError(f"{text!r} is not of the form key=value")
        if key in found:
            raise ValueError(f"{key} is given twice. Remove one")
        if key in _OWN_OPTIONS:
            raise ValueError(f"{key} has an option of its own: {_OWN_OPTIONS[key]}")
        try:
            root = compose(value)  # mappings, which may be merged to any size, are not made
            if any(isinstance(node, yaml.CollectionNode) for node in _inside(root)):
                raise ValueError(value)
            found[key] = _plain(yaml.safe_load(value))
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(
                f"{text!r} is not a number, a text, true, false, null or a list of them"
            ) from error
    return found


def _inside(root: yaml.Node | None) -> list[yaml.Node]:
    """Return the values of a list, or the value itself unless it is a text or a number."""
    if isinstance(root, yaml.SequenceNode):
        return list(root.value)
    return [] if root is None or isinstance(root, yaml.ScalarNode) else [root]


def _plain(value: Any, nested: bool = False) -> Any:
    if isinstance(value, list) and not nested:
        return tuple(_plain(item, nested=True) for item in value)
    if isinstance(value, str):  # YAML reads 1e-4 as a text
        try:
            return float(value)
        except ValueError:
            return value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ValueError(value)


def accepts(optimizer: type[Optimizer], keyword: str) -> bool:
    """Whether the constructor has a parameter of this name."""
    return keyword in inspect.signature(optimizer).parameters


def make_imported(
    optimizer: type[Optimizer], groups: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> Optimizer:
    """Return an optimizer of these parameter groups, in the mode for training if it has modes."""
    made = optimizer([dict(group) for group in groups], lr=groups[0]["lr"], **arguments)  # type: ignore[call-arg]
    if callable(train := getattr(made, "train", None)):
        train()
    return made


def problems_of_imported(
    path: str, given: Sequence[str] | None, weight_decay: float | None = None
) -> Iterator[str]:
    """Yield why an optimizer cannot be used, or cannot be resumed exactly, after a small trial.

    Args:
        given: its keyword arguments.
        weight_decay: that the user has set; None for the default.
    """
    try:
        optimizer = imported_class(path)
    except ValueError as error:
        yield f"--optimizer is {path!r}: {error}"
        return
    try:
        arguments = keyword_arguments(given)
    except ValueError as error:
        yield f"--optimizer_args: {error}"
        return
    if problem := _misfit(optimizer, arguments, weight_decay):
        yield problem.format(path=path)
        return
    # the trial may use random numbers, which the run's do not depend on
    with torch.random.fork_rng():
        problem = _trial(optimizer, arguments)
    if problem:
        yield f"--optimizer is {path!r}: {problem}"


def _misfit(
    optimizer: type[Optimizer], arguments: Mapping[str, Any], weight_decay: float | None
) -> str | None:
    """Return a problem with the signatures, in which {path} stands for the path."""
    parameters = inspect.signature(optimizer).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known = [name for name in parameters if name not in _OWN_OPTIONS]
        if unknown := [key for key in arguments if key not in parameters]:
            return (
                f"--optimizer_args: {{path}} has no {', '.join(unknown)}; it has "
                f"{', '.join(known) or 'no arguments of its own'}"
            )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        return (
            "--optimizer is '{path}': its step needs a closure, which evaluates the loss several "
            "times. A training step evaluates it once. Give another optimizer"
        )
    if not accepts(optimizer, "lr"):
        return (
            "--optimizer is '{path}': it takes no learning rate (lr), which this trainer sets. "
            "Give another optimizer"
        )
    if weight_decay and not accepts(optimizer, "weight_decay"):
        return (
            f"--adam_weight_decay is {weight_decay:g}, but {{path}} has no weight decay. Leave it "
            "out"
        )
    return None


def _trial(optimizer: type[Optimizer], arguments: Mapping[str, Any]) -> str | None:
    """Make a few steps, save and load the state in between, and return what is wrong."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=random).to(device) for shape in _SHAPES]
    gradients = [
        [torch.randn(shape, generator=random).to(device) for shape in _SHAPES]
        for _ in range(_STEPS)
    ]

    def made(start: Sequence[Tensor]) -> tuple[list[Parameter], Optimizer]:
        parameters = [Parameter(value.clone()) for value in start]
        group: dict[str, Any] = {"name": "denoiser", "params": parameters, "lr": 1e-3}
        group["weight_decay"] = 0.0
        return parameters, make_imported(optimizer, [group], arguments)

    def step(parameters: Sequence[Parameter], tried: Optimizer, number: int) -> None:
        for parameter, gradient in zip(parameters, gradients[number], strict=True):
            parameter.grad = gradient.clone()
        torch.manual_seed(number)  # as each step of a training does
        tried.step()
        tried.zero_grad()

    try:
        parameters, tried = made(values)
        if callable(getattr(tried, "train", None)) and "train_mode" not in tried.param_groups[0]:
            return "it has modes other than schedule-free's, which this trainer does not know"
        for number in range(_STEPS - 1):
            step(parameters, tried, number)
    except Exception as error:  # a foreign class may raise anything
        return f"it does not work with parameter groups of an adapter ({error!r})"
    if any(torch.equal(p, value) for p, value in zip(parameters, values, strict=True)):
        return (
            "its step() changes nothing, or not every parameter. It may work by hooks in the "
            "backward pass, which this trainer has none for"
        )
    file = io.BytesIO()
    try:
        torch.save(tried.state_dict(), file)
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return (
            "its state has other objects than tensors, numbers and text. A checkpoint of it could "
            "not be read without running code, so it could not be resumed"
        )
    except Exception as error:
        return f"its state cannot be saved ({error!r})"
    try:
        resumed, other = made(parameters)
        other.load_state_dict(state)
        step(resumed, other, _STEPS - 1)
        step(parameters, tried, _STEPS - 1)
    except Exception as error:
        return f"it cannot be resumed ({error!r})"
    if not all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True)):
        return "a run that is resumed from its saved state would differ from one that was not"
    return None
