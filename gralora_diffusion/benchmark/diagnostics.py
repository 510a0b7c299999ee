"""The mechanism that GraLoRA's paper claims, logged while any method trains (arXiv 2505.20355).

Input channels with outliers spread into the whole gradient of a LoRA; with GraLoRA they stay in the
blocks of their columns (sections 2 and 3). What is logged of a layer is told apart by no method: it
is of the dense update R, the weight that the layer applies minus the base's.
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

from gralora_diffusion.adapters.layers import GraloraLayer
from gralora_diffusion.adapters.placement.targets import base_of, fitting_k
from gralora_diffusion.benchmark.evaluation.results import Diagnostics
from gralora_diffusion.lora_files.low_rank import (
    effective_rank,
    gralora_singular_values,
    singular_values,
)
from gralora_diffusion.training.optimization.adapters import ADAPTER_NAME
from gralora_diffusion.training.optimization.optimizers import evaluating


class DiagnosticsLog:
    """Watches a training and keeps what :class:`Mechanism` asks for; changes no bit of it.

    What is not finite is left out: a step of a layer, the outliers of a layer with a median of 0
    (half of its input channels are zero) or without input, the effective rank of NaN.

    Args:
        model: with the method put on; several models as one ``nn.ModuleDict``.
        layers: paths of target layers in it, as ``targets.find_targets`` gives them.
        k: blocks per side, the same for all methods that are to be compared. Where it does not
            divide a layer's widths, its largest divisor that does.
        steps: which steps of the optimizer are logged, the first is 1; a ``range`` as long as
            you like, for example. The others cost next to nothing.

    Raises:
        ValueError: k is below 1, or a layer is not there, of another kind, or not trained.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], k: int, steps: Collection[int]
    ) -> None:
        if k < 1:
            raise ValueError(f"the mechanism's log: k must be at least 1, but is {k}")
        modules = dict(model.named_modules())
        for path in layers:
            if problem := _unloggable(modules.get(path)):
                raise ValueError(f"the mechanism's log cannot take the layer '{path}': {problem}")
        self._layers = {path: modules[path] for path in layers}
        self._k = {path: max(fitting_k([base_of(modules[path])], [k])) for path in layers}
        self._steps = steps  # as it is: a range may have no end in sight
        self._forget()

    def _forget(self) -> None:
        self._done = 0
        self._norms: dict[str, dict[str, list[Any]]] = {}
        self._squares: dict[str, Tensor | float] = defaultdict(float)
        self._ranks: dict[str, float] = {}

    @contextmanager
    def watch(
        self,
        optimizer: torch.optim.Optimizer,
        in_use: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> Iterator[None]:
        """Log the steps that this optimizer, or the one that accelerate wraps, makes inside.

        Gradients are taken right before the step: accumulated, clipped and without fp16's scale.
        Inputs are those of the logged steps' forward passes that have gradients. The effective rank
        is measured at the end, of the weights to use, unless an error ends it. Each call starts
        the log anew.

        Args:
            in_use: gives a context inside which the parameters are those to use, as
                ``inference_weights`` does; by default the optimizer's own, of schedule-free.
        """
        self._forget()
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        updates = {path: DenseUpdate(layer) for path, layer in self._layers.items()}
        with ExitStack() as hooks:
            for path, layer in self._layers.items():
                # not on the base layer of an adapter: with hooks there, ours computes another way
                see = partial(self._see_input, path)
                hooks.enter_context(layer.register_forward_pre_hook(see))
            before = partial(self._before_step, updates)
            hooks.enter_context(inner.register_step_pre_hook(before))
            yield
        with evaluating(optimizer) if in_use is None else in_use():
            self._ranks = {path: update.effective_rank() for path, update in updates.items()}

    def result(self) -> Diagnostics:
        """What was logged so far; the effective rank once :meth:`watch` is over."""
        outliers = {path: _outliers(squares) for path, squares in self._squares.items()}
        return Diagnostics(deepcopy(self._norms), _finite(self._ranks), _finite(outliers))

    def _logs_now(self) -> bool:
        return self._done + 1 in self._steps

    def _see_input(self, path: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add the squares of each channel. Passes without gradients are no training.

        Checkpointing runs a layer twice, and that on all inputs: the ratio of channels stays.
        """
        if not self._logs_now() or not torch.is_grad_enabled():
            return
        x = inputs[0].detach()
        if isinstance(base_of(layer), nn.Conv2d):
            x = x.movedim(-3, -1)
        with torch.no_grad():
            dtype = torch.promote_types(x.dtype, torch.float32)
            tokens = x.reshape(-1, x.shape[-1])
            self._squares[path] += torch.linalg.vector_norm(tokens, dim=0, dtype=dtype).square()

    def _before_step(self, updates: dict[str, DenseUpdate], *_: Any) -> None:
        if self._logs_now():
            for path, update in updates.items():
                norms = block_norms(update.gradient(), self._k[path])
                if norms.isfinite().all():
                    log = self._norms.setdefault(path, {"steps": [], "norms": []})
                    log["steps"].append(self._done + 1)
                    log["norms"].append(norms.tolist())
        self._done += 1


class DenseUpdate(nn.Module):
    """The dense update of one layer as a function of its trained parameters.

    Calling it gives (out, in), or (out, in, h, w) of a convolution, in the dtype of the parameters.
    DoRA's is that of the whole weight, magnitude and norm included. Full fine-tuning's is the
    change since this was made; a copy of the weight is kept on the CPU for that.

    Args:
        layer: a ``nn.Linear`` or ``nn.Conv2d``, bare and trained, or an adapter of any kind on it.
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
        delta: Tensor = layer.get_delta_weight(ADAPTER_NAME)
        dora = _dora_of(layer)
        if dora is None:
            return delta
        base = dequantize_module_weight(layer.get_base_layer()).to(delta)
        norm = dora.get_weight_norm(base, delta, scaling=1)
        magnitude = (dora.weight / norm).view(-1, *[1] * (base.ndim - 1))
        return (magnitude - 1) * base + magnitude * delta  # as PEFT adds it: without a step, zero

    def gradient(self) -> Tensor:
        """The gradient in the space of the update, in fp32 or better, from the gradients present.

        A step of gradient descent, parameters minus lr times their gradients, moves the update by
        minus lr times this to first order. So LoRA's is ``s (dL/dB A + B dL/dA)``, and that of full
        fine-tuning ``dL/dW``. A parameter without a gradient does not move.
        """
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        points = {name: _precise(p.detach()) for name, p in trained.items()}
        directions = [
            torch.zeros_like(points[name]) if p.grad is None else _precise(p.grad)
            for name, p in trained.items()
        ]

        def update(*values: Tensor) -> Any:
            return functional_call(self, dict(zip(points, values, strict=True)), ())

        # by two backward passes: LoHa's product has no forward-mode derivative
        return torch.autograd.functional.jvp(update, (*points.values(),), (*directions,))[1]

    @torch.no_grad()
    def effective_rank(self) -> float:
        """Of the singular values of the update as (out, in * h * w); NaN if not finite.

        From the factors where the update is no more than their product.
        """
        layer: Any = self.layer
        name = ADAPTER_NAME
        if not all(p.isfinite().all() for p in self.parameters() if p.requires_grad):
            return math.nan
        if isinstance(layer, GraloraLayer):
            general = None
            if name in layer.gralora_A_general:
                pair: Any = (layer.gralora_A_general[name], layer.gralora_B_general[name])
                general = pair[0].weight, pair[1].weight.flatten(1)
            values = gralora_singular_values(layer.gralora_A[name], layer.gralora_B[name], general)
        elif isinstance(layer, LoraLayer) and _dora_of(layer) is None:
            pair = layer.lora_A[name].weight, layer.lora_B[name].weight
            values = singular_values(pair[0], pair[1].flatten(1))
        else:
            update = self().flatten(1).double()
            if not update.isfinite().all():
                return math.nan
            values = torch.linalg.svdvals(update)
        return effective_rank(values)


def block_norms(update: Tensor, k: int) -> Tensor:
    """Return the Frobenius norms (k, k) of the blocks of an update (out, in) or (out, in, h, w).

    Row: output block, column: input block; a block has all of the kernel.
    """
    out_features, in_features = update.shape[:2]
    blocks = update.reshape(k, out_features // k, k, in_features // k, -1)
    return torch.linalg.vector_norm(blocks, dim=(1, 3, 4))


def _unloggable(layer: nn.Module | None) -> str | None:
    """Say why a layer cannot be logged; None if it can."""
    if layer is None:
        return "the model has none of this path"
    base = base_of(layer)
    if not isinstance(base, (nn.Linear, nn.Conv2d)) or getattr(base, "groups", 1) != 1:
        return f"a {type(base).__name__}; only Linear, and Conv2d with groups=1, have such blocks"
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        return "none of its parameters is trained; put a method on it first"
    return None


def _dora_of(layer: Any) -> Any:
    """PEFT's module that holds DoRA's magnitude and computes its norm; None of other adapters."""
    magnitudes = getattr(layer, "lora_magnitude_vector", None)
    return magnitudes[ADAPTER_NAME] if magnitudes else None


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _outliers(squares: Tensor | float) -> float:
    """The largest channel norm over the median one, NaN or infinite if that is 0."""
    norms = torch.as_tensor(squares).sqrt()
    return float(norms.max() / norms.quantile(0.5))


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {path: value for path, value in values.items() if math.isfinite(value)}
