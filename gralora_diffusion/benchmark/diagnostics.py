"""The mechanism that GraLoRA's paper claims, logged while any method trains (arXiv 2505.20355).

Input channels with outliers affect the whole gradient of a LoRA; with GraLoRA their effect stays in
the blocks of their columns (sections 2 and 3). The log is the same for all methods: it describes
the dense update R, the weight that the layer applies minus the base's.

Three changes of R are compared at each step: minus the full gradient dL/dR, which needs no factors;
the direction in which gradient descent on the method's parameters moves it; and what the optimizer
makes of that, since AdamW divides each number by its own size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.grad import conv2d_weight

from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.adapters.placement.targets import base_of, fitting_k
from gralora_diffusion.benchmark.evaluation.results import Diagnostics
from gralora_diffusion.lora_files import spectrum
from gralora_diffusion.training.optimization.adapters import ADAPTER_NAME
from gralora_diffusion.training.optimization.optimizers import evaluating

from .rivals import dense_update


class DiagnosticsLog:
    """Records :class:`Diagnostics` during a training without changing a bit of it.

    Values that are not finite are left out: a step of a layer, the outliers of a layer without
    input or with a median of 0 (half of its input channels are zero), the effective rank of NaN.

    Args:
        model: with the method attached; several models as one ``nn.ModuleDict``.
        layers: paths of target layers in it, as ``targets.find_targets`` gives them.
        k: blocks per side, the same for all methods that are compared. If it does not divide a
            layer's widths, its largest divisor that does is used.
        steps: the optimizer steps to log, where the first is 1; a ``range`` of any length, for
            example. Other steps cost almost nothing.

    Raises:
        ValueError: k is below 1, or a layer does not exist, has another kind, or is not trained.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], k: int, steps: Collection[int]
    ) -> None:
        if k < 1:
            raise ValueError(f"the mechanism's log needs k of at least 1, but k is {k}")
        modules = dict(model.named_modules())
        for path in layers:
            if problem := _unloggable(modules.get(path)):
                raise ValueError(f"the mechanism's log does not support layer '{path}': {problem}")
        self._layers = {path: modules[path] for path in layers}
        self._k = {path: max(fitting_k([base_of(modules[path])], [k])) for path in layers}
        self._steps = steps  # not copied, because a range may be very long
        self._forget()

    def _forget(self) -> None:
        self._done = 0
        self._norms: dict[str, dict[str, list[Any]]] = {}
        self._squares: dict[str, Tensor | float] = defaultdict(float)
        self._ranks: dict[str, float] = {}
        self._stable_ranks: dict[str, float] = {}
        self._step_norms: dict[str, dict[str, list[Any]]] = {}
        self._alignment: dict[str, dict[str, dict[str, list[Any]]]] = {}
        self._forget_step()

    def _forget_step(self) -> None:
        """Forget what belongs to one step only."""
        self._squares_now: dict[str, Tensor | float] = defaultdict(float)
        self._full: dict[str, Tensor] = {}
        self._before: dict[str, dict[str, Tensor]] = {}

    @contextmanager
    def watch(
        self,
        optimizer: torch.optim.Optimizer,
        in_use: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> Iterator[None]:
        """Log the steps that this optimizer, or the one that accelerate wraps, makes inside.

        Gradients are recorded right before the step: accumulated, clipped and without fp16's scale.
        Inputs are those of the logged steps' forward passes that have gradients. Until the backward
        pass, they are kept, as they are without gradient checkpointing. The effective rank of the
        inference weights is measured at the end, unless there was an error. Each call starts a new
        log.

        Args:
            in_use: gives a context inside which the parameters are those for inference, as
                ``inference_weights`` does; by default schedule-free's, if it is the optimizer.
        """
        self._forget()
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        updates = {path: DenseUpdate(layer) for path, layer in self._layers.items()}
        with ExitStack() as hooks:
            for path, layer in self._layers.items():
                # not on an adapter's base layer, where hooks would change how GraLoRA computes
                see = partial(self._see_input, path)
                hooks.enter_context(layer.register_forward_pre_hook(see))
                hooks.enter_context(layer.register_forward_hook(partial(self._see_output, path)))
            hooks.callback(self._forget_step)
            before = partial(self._before_step, updates)
            hooks.enter_context(inner.register_step_pre_hook(before))
            after = partial(self._after_step, updates)
            hooks.enter_context(inner.register_step_post_hook(after))
            yield
        with evaluating(optimizer) if in_use is None else in_use():
            values = {path: update.singular_values() for path, update in updates.items()}
        found = {path: v for path, v in values.items() if v is not None}
        self._ranks = {path: spectrum.effective_rank(v) for path, v in found.items()}
        self._stable_ranks = {path: spectrum.stable_rank(v) for path, v in found.items()}

    def result(self) -> Diagnostics:
        """Return the log so far, with the effective rank once :meth:`watch` is over."""
        outliers = {path: _outliers(squares) for path, squares in self._squares.items()}
        return Diagnostics(
            deepcopy(self._norms),
            _finite(self._ranks),
            _finite(outliers),
            _finite(self._stable_ranks),
            deepcopy(self._step_norms),
            deepcopy(self._alignment),
        )

    def _logs_now(self) -> bool:
        return self._done + 1 in self._steps

    def _see_input(self, path: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add the squares of each channel. Passes without gradients are not training.

        Checkpointing runs a layer twice on all inputs, so the ratio of channels stays the same.
        """
        if not self._logs_now() or not torch.is_grad_enabled():
            return
        x = inputs[0].detach()
        if isinstance(base_of(layer), nn.Conv2d):
            x = x.movedim(-3, -1)
        with torch.no_grad():
            dtype = torch.promote_types(x.dtype, torch.float32)
            tokens = x.reshape(-1, x.shape[-1])
            squares = torch.linalg.vector_norm(tokens, dim=0, dtype=dtype).square()
            self._squares[path] += squares
            self._squares_now[path] += squares

    def _see_output(
        self, path: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        """Add to the full gradient as soon as the output has one.

        Of the two times that checkpointing runs a layer, only one output gets a gradient.
        """
        if self._logs_now() and torch.is_grad_enabled() and output.requires_grad:
            output.register_hook(partial(self._add_full_gradient, path, layer, inputs[0].detach()))

    @torch.no_grad()
    def _add_full_gradient(self, path: str, layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
        if not self._logs_now():
            return
        base = base_of(layer)
        with torch.autocast(x.device.type, enabled=False):
            x, gradient = _precise(x), _precise(gradient.detach())
            if isinstance(base, nn.Conv2d):
                shape, places = base.weight.shape, (base.stride, base.padding, base.dilation)
                found = conv2d_weight(x, shape, gradient, *places)
            else:
                found = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        # on the CPU, because those of all layers together are as large as the base
        found = found.cpu()
        self._full[path] = self._full[path] + found if path in self._full else found

    def _before_step(self, updates: dict[str, DenseUpdate], *_: Any) -> None:
        if self._logs_now():
            for path, update in updates.items():
                gradient = update.gradient()
                _append(self._norms, path, self._done + 1, block_norms(gradient, self._k[path]))
                self._log_alignment(path, self._done + 1, "gradient", gradient)
                self._before[path] = update.parameters_now()
        self._done += 1

    def _after_step(self, updates: dict[str, DenseUpdate], *_: Any) -> None:
        if self._done in self._steps:
            for path, update in updates.items():
                step = update.change_since(self._before.pop(path)).neg()
                _append(self._step_norms, path, self._done, block_norms(step, self._k[path]))
                self._log_alignment(path, self._done, "step", step)
                if (full := self._full.get(path)) is not None:
                    self._log_alignment(path, self._done, "full", full)
        self._forget_step()

    def _log_alignment(self, path: str, step: int, name: str, change: Tensor) -> None:
        """Log the outlier's share in a change of the update, and its cosine with the full one."""
        change = change.detach().double().cpu().flatten(2 if change.ndim > 2 else 1)
        found = {}
        if path in self._squares_now:
            outlier = int(torch.as_tensor(self._squares_now[path]).argmax())
            share = change[:, outlier].square().sum() / change.square().sum()
            found[f"{name}_share"] = float(share) * change.shape[1]
        if name != "full" and path in self._full:
            pair = change.flatten(), self._full[path].double().flatten()
            found[f"{name}_cosine"] = float(torch.dot(*pair) / (pair[0].norm() * pair[1].norm()))
        for measure, value in found.items():
            if math.isfinite(value):
                log = self._alignment.setdefault(path, {}).setdefault(
                    measure, {"steps": [], "values": []}
                )
                log["steps"].append(step)
                log["values"].append(value)


class DenseUpdate(nn.Module):
    """The dense update of one layer as a function of its trained parameters.

    Calling it gives (out, in), or (out, in, h, w) for a convolution, in the parameters' dtype.
    DoRA's update is that of the whole weight, including magnitude and norm. Full fine-tuning's is
    the change since this object was created, which keeps a copy of the weight on the CPU.

    Args:
        layer: a trained bare ``nn.Linear`` or ``nn.Conv2d``, or an adapter of any kind on one.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._start: Any = None
        if not isinstance(layer, BaseTunerLayer):
            weight: Any = layer.weight
            self._start = weight.detach().to("cpu", copy=True)

    def forward(self) -> Tensor:
        layer: Any = self.layer
        if self._start is not None:
            weight: Tensor = layer.weight
            return weight - self._start.to(weight)
        if (update := dense_update(layer)) is not None:
            return update
        delta: Tensor = layer.get_delta_weight(ADAPTER_NAME)
        dora = _dora_of(layer)
        if dora is None:
            return delta
        base = dequantize_module_weight(layer.get_base_layer()).to(delta)
        norm = dora.get_weight_norm(base, delta, scaling=1)
        magnitude = (dora.weight / norm).view(-1, *[1] * (base.ndim - 1))
        return (magnitude - 1) * base + magnitude * delta  # as in PEFT; zero before the first step

    def gradient(self) -> Tensor:
        """Return the gradient in the space of the update, in fp32 or better.

        It follows from the parameters' current gradients. A step of gradient descent, parameters
        minus lr times their gradients, moves the update by minus lr times this, to first order.
        LoRA's is therefore ``s (dL/dB A + B dL/dA)``, and full fine-tuning's ``dL/dW``. A parameter
        without a gradient does not move.
        """
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        points = {name: _precise(p.detach()) for name, p in trained.items()}
        directions = [
            torch.zeros_like(points[name]) if p.grad is None else _precise(p.grad)
            for name, p in trained.items()
        ]

        def update(*values: Tensor) -> Any:
            return functional_call(self, dict(zip(points, values, strict=True)), ())

        # by two backward passes, because LoHa's product has no forward-mode derivative
        return torch.autograd.functional.jvp(update, (*points.values(),), (*directions,))[1]

    def parameters_now(self) -> dict[str, Tensor]:
        """Return a copy of the trained parameters, in float64."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return {name: p.detach().to(torch.float64, copy=True) for name, p in trained.items()}

    @torch.no_grad()
    def change_since(self, before: dict[str, Tensor]) -> Tensor:
        """Return by how much the update has changed since :meth:`parameters_now`, in float64."""
        now, then = (functional_call(self, p, ()) for p in (self.parameters_now(), before))
        change: Tensor = now - then
        return change

    @torch.no_grad()
    def singular_values(self) -> spectrum.Values | None:
        """Return those of the update as (out, in * h * w); None if the update is not finite.

        It is computed from the factors if the update is simply their product.
        """
        layer: Any = self.layer
        name = ADAPTER_NAME
        if not all(p.isfinite().all() for p in self.parameters() if p.requires_grad):
            return None
        if isinstance(layer, GraloraLayer):
            general = None
            if name in layer.gralora_A_general:
                pair: Any = (layer.gralora_A_general[name], layer.gralora_B_general[name])
                general = _array(pair[0].weight), _array(pair[1].weight.flatten(1))
            factors = _array(layer.gralora_A[name]), _array(layer.gralora_B[name])
            return spectrum.gralora_singular_values(*factors, general)
        plain = _dora_of(layer) is None and dense_update(layer) is None
        if isinstance(layer, LoraLayer) and plain:
            pair = layer.lora_A[name].weight, layer.lora_B[name].weight
            return spectrum.singular_values(_array(pair[0]), _array(pair[1].flatten(1)))
        update = self().flatten(1).double()
        # a dense update is large, so this is computed where it is
        return _array(torch.linalg.svdvals(update)) if update.isfinite().all() else None


def _append(logs: dict[str, dict[str, list[Any]]], path: str, step: int, norms: Tensor) -> None:
    """Add the norms of a step to a layer's log if they are finite."""
    if norms.isfinite().all():
        log = logs.setdefault(path, {"steps": [], "norms": []})
        log["steps"].append(step)
        log["norms"].append(norms.tolist())


def _array(tensor: Tensor) -> spectrum.Values:
    values: spectrum.Values = tensor.detach().double().cpu().numpy()
    return values


@torch.no_grad()
def update_norm(models: Sequence[nn.Module]) -> float | None:
    """Return the Frobenius norm of the dense updates of all adapted layers together.

    Returns None without adapted layers, as in full fine-tuning, or if it is not finite.
    """
    layers = [m for model in models for m in model.modules() if isinstance(m, BaseTunerLayer)]
    norms = [torch.linalg.vector_norm(DenseUpdate(m)(), dtype=torch.float64) for m in layers]
    if not norms:
        return None
    norm = float(torch.stack(norms).norm())
    return norm if math.isfinite(norm) else None


def block_norms(update: Tensor, k: int) -> Tensor:
    """Return the Frobenius norms (k, k) of the blocks of an update (out, in) or (out, in, h, w).

    Rows are output blocks and columns are input blocks. A block includes the whole kernel.
    """
    out_features, in_features = update.shape[:2]
    blocks = update.reshape(k, out_features // k, k, in_features // k, -1)
    return torch.linalg.vector_norm(blocks, dim=(1, 3, 4))


def _unloggable(layer: nn.Module | None) -> str | None:
    """Return why a layer cannot be logged, or None if it can."""
    if layer is None:
        return "the model has no layer at this path"
    base = base_of(layer)
    if not isinstance(base, (nn.Linear, nn.Conv2d)) or getattr(base, "groups", 1) != 1:
        return (
            f"it is a {type(base).__name__}; only Linear, and Conv2d with groups=1, have such "
            "blocks"
        )
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        return "none of its parameters is trained; attach a method first"
    return None


def _dora_of(layer: Any) -> Any:
    """Return PEFT's module with DoRA's magnitude and norm, or None for other adapters."""
    magnitudes = getattr(layer, "lora_magnitude_vector", None)
    return magnitudes[ADAPTER_NAME] if magnitudes else None


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _outliers(squares: Tensor | float) -> float:
    """Return the largest channel norm over the median one; NaN or infinite if that is 0."""
    norms = torch.as_tensor(squares).sqrt()
    return float(norms.max() / norms.quantile(0.5))


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {path: value for path, value in values.items() if math.isfinite(value)}
