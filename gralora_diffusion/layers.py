"""GraLoRA adapter layers: a frozen layer plus a granular low-rank update of its weight.

The layers subclass PEFT's ``GraloraLayer`` and keep its parameter names, so PEFT's and diffusers'
adapter management (switching, deleting, state dicts) works on them unchanged. They add what PEFT's own
layer lacks: the run-time scale that diffusers needs, and convolutions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft import GraloraConfig
from peft.tuners.gralora.layer import GraloraLayer as PeftGraloraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import blockwise

#: Base layers that GraLoRA can adapt; what to name in an error message.
SUPPORTED_LAYERS = "torch.nn.Linear, transformers' Conv1D, torch.nn.Conv2d with groups=1"


class FactorDict(nn.ParameterDict):
    """Factors by adapter name. Call it to read one: ``factors(name)``.

    Indexing would read the parameter as it lies there. A call goes through the module's hooks, so that
    offloading (accelerate's ``AlignDevicesHook``) brings the factor to the computing device first.
    """

    __call__ = nn.Module.__call__  # ParameterDict forbids calling

    def forward(self, name: str) -> Tensor:
        return self[name]


class Projection(nn.Module):
    """One factor of the hybrid (plain LoRA) pair: ``x @ weight.T`` with weight (out, in, *kernel).

    Not an ``nn.Linear``, so that whatever casts or quantizes the linear layers of a model (layerwise
    fp8 casting, torchao, quanto) leaves the adapter alone.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


class GraloraLayer(nn.Module, PeftGraloraLayer):
    """What linear and convolutional GraLoRA layers share: factors, scale, merging.

    ``scaling[adapter]`` is alpha / (r + hybrid_r) times what :meth:`set_scale` was given.

    Args:
        base_layer: the frozen layer, or another tuner's layer around it.
        adapter_name: name of the first adapter.
        module_name: path of the layer in its model, for messages.
        config: rank, k, alpha and the rest; see PEFT's ``GraloraConfig``.

    Raises:
        ValueError: the widths are not divisible by k, or r or hybrid_r is out of range.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        module_name: str,
        config: GraloraConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.hybrid_r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.gralora_k: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.gralora_dropout = nn.ModuleDict()
        self.gralora_A = FactorDict()
        self.gralora_B = FactorDict()
        self.gralora_A_general = nn.ModuleDict()
        self.gralora_B_general = nn.ModuleDict()
        self.kwargs = kwargs
        self.cast_input_dtype_enabled = True  # PEFT's helpers and diffusers' hooks look for it
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        self.in_features, self.out_features, self.kernel_size = layer_shape(self.get_base_layer())
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, module_name, config.r, config)

    # -- adapters -----------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, module_name: str, r: int, config: GraloraConfig
    ) -> None:
        """Add an adapter to this layer, or replace the one of that name."""
        k, hybrid_r = config.gralora_k, config.hybrid_r
        problem = unsuitable(self.get_base_layer(), r, hybrid_r, k)
        if problem:
            raise ValueError(f"{module_name}: {problem}")
        self.module_name = module_name
        self.r[adapter_name] = r
        self.hybrid_r[adapter_name] = hybrid_r
        self.alpha[adapter_name] = config.alpha
        self.gralora_k[adapter_name] = k
        self.set_scale(adapter_name, 1.0)
        p = config.gralora_dropout
        self.gralora_dropout[adapter_name] = nn.Dropout(p) if p > 0.0 else nn.Identity()
        zero_update = bool(config.init_weights)
        self.gralora_A[adapter_name], self.gralora_B[adapter_name] = map(
            nn.Parameter,
            blockwise.init_factors(
                self.in_features, self.out_features, r, k, self.kernel_size, zero_update
            ),
        )
        if hybrid_r > 0:
            down, up = blockwise.init_factors(
                self.in_features, self.out_features, hybrid_r, 1, self.kernel_size, zero_update
            )
            self.gralora_A_general[adapter_name] = Projection(down[0].transpose(0, 1).contiguous())
            up = up[0].T.reshape(self.out_features, hybrid_r, *[1] * len(self.kernel_size))
            self.gralora_B_general[adapter_name] = Projection(up.contiguous())
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; a merged one is unmerged first, so that nothing of it stays behind."""
        if adapter_name in self.merged_adapters:
            self._unmerge([adapter_name])
        super().delete_adapter(adapter_name)

    def forget(self, adapter_name: str) -> None:
        """Remove an adapter, but leave in the base weight what was merged of it."""
        if adapter_name in self.merged_adapters:
            self.merged_adapters.remove(adapter_name)
            self._merged_scaling.pop(adapter_name)
        super().delete_adapter(adapter_name)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Bring the factors of one adapter to ``dtype``."""
        for name in self.adapter_layer_names:
            part = getattr(self, name)
            if adapter_name in part:
                part[adapter_name] = part[adapter_name].to(dtype)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if dtype is not None and dtype.itemsize < 2:
            dtype = None  # a storage dtype such as fp8, not one for factors: move, do not cast
        return device, dtype

    # -- scale: the meaning is that of peft/tuners/lora/layer.py, which diffusers relies on ------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scaling to ``scale`` times alpha / (r + hybrid_r)."""
        if adapter in self.r:
            self.scaling[adapter] = (
                scale * self.alpha[adapter] / (self.r[adapter] + self.hybrid_r[adapter])
            )

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of every active adapter by ``scale``."""
        for adapter in self._active_here():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of every active adapter by ``scale``, or reset it if ``scale`` is None."""
        for adapter in self._active_here():
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.gralora_A]

    # -- forward --------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self._active_here():
            result = result + self._update(x, adapter).to(result.dtype)
        return result

    def _update(self, x: Tensor, adapter: str) -> Tensor:
        """The adapter's scaled contribution to the output, computed in the adapter's dtype.

        Under autocast the products choose the dtype themselves. ``disable_input_dtype_casting`` is not
        asked: the factors are never held in a storage dtype such as fp8, so the cast loses nothing.
        """
        A, B = self.gralora_A(adapter), self.gralora_B(adapter)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)
        x = self.gralora_dropout[adapter](x)  # one mask for both branches
        update = self._granular_update(x, A, B, self.scaling[adapter])
        if adapter in self.gralora_A_general:
            down, up = self.gralora_A_general[adapter](), self.gralora_B_general[adapter]()
            update = update + self._hybrid_update(x, down, up, self.scaling[adapter])
        return update

    def _granular_update(self, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        raise NotImplementedError

    def _hybrid_update(self, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        raise NotImplementedError

    # -- weights --------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the scaled update in the shape of the base weight, in the adapter's dtype."""
        delta = self._delta_weight(adapter, self.scaling[adapter])
        return delta.to(self.gralora_A[adapter].dtype)

    def _delta_weight(self, adapter: str, scaling: float) -> Tensor:
        """As :meth:`get_delta_weight`, in fp32 or better: half precision would round it twice."""
        A, B = self.gralora_A[adapter], self.gralora_B[adapter]
        dtype = torch.promote_types(A.dtype, torch.float32)
        delta = blockwise.delta_weight(A.to(dtype), B.to(dtype))
        if adapter in self.gralora_A_general:
            down = self.gralora_A_general[adapter].weight.to(dtype)
            up = self.gralora_B_general[adapter].weight.to(dtype)
            delta = delta + (up.flatten(1) @ down.flatten(1)).view_as(delta)
        delta = delta * scaling
        return delta.T if self.fan_in_fan_out else delta

    @torch.no_grad()
    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        scale: float = 1.0,
    ) -> None:
        """Add the update of the given (default: the active) adapters to the base weight.

        The sum is formed in fp32 and rounded once to the dtype of the weight.

        Args:
            safe_merge: check that the sum is finite before the weight is touched.
            scale: multiplies the current scaling for this merge alone.

        Raises:
            ValueError: not finite under ``safe_merge``, or a base weight that cannot take a sum.
        """
        names = [
            n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.gralora_A
        ]
        if not names:
            return
        weight = self._mergeable_weight()
        merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        scalings = {name: scale * self.scaling[name] for name in names}
        for name, scaling in scalings.items():
            merged += self._delta_weight(name, scaling).to(merged.device)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"{self.module_name}: merging adapter {', '.join(names)} gives NaN or infinite weights; "
                "the base weight was left as it is. The adapter seems to be broken."
            )
        weight.copy_(merged)
        self.merged_adapters.extend(names)
        self._merged_scaling.update(scalings)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract what was merged, at the scale it was merged with.

        The base weight returns to within one rounding of its dtype.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._unmerge(list(self.merged_adapters))

    def _unmerge(self, names: Iterable[str]) -> None:
        weight = self._mergeable_weight()
        restored = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        for name in names:
            self.merged_adapters.remove(name)
            restored -= self._delta_weight(name, self._merged_scaling.pop(name)).to(restored.device)
        weight.data.copy_(restored)

    def _mergeable_weight(self) -> Tensor:
        weight = self.get_base_layer().weight
        if weight.is_meta:
            raise ValueError(
                f"{self.module_name}: the base weight is not in memory (offloaded). Remove the "
                "offloading hooks before merging, or fuse through `pipe.fuse_gralora()`, which does."
            )
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ValueError(
                f"{self.module_name}: cannot merge into a base weight stored as {weight.dtype}. "
                "Merge into the unquantized base (fp32, bf16 or fp16), then quantize or cast."
            )
        return weight

    def __repr__(self) -> str:
        return "gralora." + super().__repr__()


class GraloraLinear(GraloraLayer):
    """GraLoRA around ``nn.Linear`` or transformers' ``Conv1D``. Input (..., in), output (..., out)."""

    def _granular_update(self, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        return blockwise.linear_update(x, A, B, scaling)

    def _hybrid_update(self, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        return F.linear(F.linear(x, down) * scaling, up)


class GraloraConv2d(GraloraLayer):
    """GraLoRA around ``nn.Conv2d``. Input (batch, in, height, width).

    A has the layer's kernel, (k, in / k, r, h, w); B is 1 x 1 and keeps its shape (k, r, out / k).
    """

    def _granular_update(self, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        x, padding, conv = self._padded(x)
        return blockwise.conv2d_update(x, A, B, scaling, conv.stride, padding, conv.dilation)

    def _hybrid_update(self, x: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
        x, padding, conv = self._padded(x)
        return F.conv2d(F.conv2d(x, down, None, conv.stride, padding, conv.dilation) * scaling, up)

    def _padded(self, x: Tensor) -> tuple[Tensor, Any, nn.Conv2d]:
        conv = self.get_base_layer()
        if conv.padding_mode == "zeros":
            return x, conv.padding, conv
        pad = conv._reversed_padding_repeated_twice
        return F.pad(x, pad, mode=conv.padding_mode), (0, 0), conv


def layer_shape(layer: nn.Module) -> tuple[int, int, tuple[int, ...]]:
    """Return in features, out features and kernel size (empty unless a convolution) of a base layer."""
    if isinstance(layer, Conv1D):
        in_features, out_features = getattr(layer.weight, "ds_shape", layer.weight.shape)
        return in_features, out_features, ()
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels, tuple(layer.kernel_size)
    return layer.in_features, layer.out_features, ()


def unsuitable(layer: nn.Module, r: int, hybrid_r: int, k: int) -> str | None:
    """Say why GraLoRA with these numbers cannot go on this base layer; None if it can."""
    if not isinstance(layer, (nn.Linear, Conv1D, nn.Conv2d)):
        return f"a {type(layer).__name__}, which is not supported ({SUPPORTED_LAYERS})"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return (
            f"a convolution with groups={layer.groups}, which is not supported ({SUPPORTED_LAYERS})"
        )
    if r <= 0:
        return f"`r` should be a positive integer value but the value passed is {r}"
    if hybrid_r < 0:
        return (
            f"`hybrid_r` should be a non-negative integer value but the value passed is {hybrid_r}"
        )
    in_features, out_features, _ = layer_shape(layer)
    wrong = [
        f"{name}={width}"
        for name, width in (("in_features", in_features), ("out_features", out_features))
        if width % k
    ]
    if wrong:
        fitting = [d for d in range(1, k) if in_features % d == out_features % d == r % d == 0]
        return (
            f"{' and '.join(wrong)} not divisible by gralora_k={k} "
            f"(largest k below that fits this layer and r={r}: {max(fitting, default=1)})"
        )
    return None
