"""The base class of GraLoRA layers: a frozen layer plus a granular low-rank update of its weight.

The layers subclass PEFT's ``GraloraLayer`` and keep its parameter names, so PEFT's and diffusers'
adapter management (switching, deleting, state dicts) works on them unchanged. Unlike PEFT's own
layer, they have the run-time scale that diffusers needs, and merging is exact and checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import GraloraConfig
from peft.tuners.gralora.layer import GraloraLayer as PeftGraloraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from gralora_diffusion.adapters.placement.layer_config import invalid_values, layer_settings
from gralora_diffusion.adapters.placement.targets import layer_shape, quantization_of, unsuitable

from . import functional
from .parameters import FactorDict, Projection

#: How many values of a weight are merged at once: 2 MiB in fp32.
_VALUES_AT_ONCE = 2**19


class GraloraLayer(nn.Module, PeftGraloraLayer):
    """Factors, scale and merging of linear and convolutional GraLoRA layers.

    ``scaling[adapter]`` is alpha / (r + hybrid_r) times the scale passed to :meth:`set_scale`.

    Args:
        base_layer: the frozen layer, or another tuner's layer around it.
        adapter_name: name of the first adapter.
        module_name: path of the layer in its model, for the config's patterns and for messages.
        config: rank, k, alpha and the rest: the ``GraloraConfig`` of PEFT or of this package.

    Raises:
        ValueError: the widths are not divisible by k, or a number of the config is out of range.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Hide nn.Module's, which types the attributes inherited from PEFT Tensor | Module."""

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
        self._active_adapter: str | list[str] = adapter_name
        self.update_layer(adapter_name, module_name, config)

    # -- adapters ----------------------------------------------------------------------------------

    def update_layer(  # type: ignore[override]  # PEFT's also takes the rank
        self, adapter_name: str, module_name: str, config: GraloraConfig
    ) -> None:
        """Add an adapter to this layer, or replace the adapter of that name."""
        if problems := invalid_values(config):
            raise ValueError(f"{module_name}: {' '.join(problems)}")
        (r, k, alpha), hybrid_r = layer_settings(config, module_name), config.hybrid_r
        if problem := unsuitable(self.get_base_layer(), r, k):
            raise ValueError(f"{module_name}: {problem}")
        if adapter_name in self.merged_adapters:
            self.unmerge([adapter_name])
        self.module_name = module_name
        self.r[adapter_name] = r
        self.hybrid_r[adapter_name] = hybrid_r
        self.alpha[adapter_name] = alpha
        self.gralora_k[adapter_name] = k
        self.set_scale(adapter_name, 1.0)
        p = config.gralora_dropout
        self.gralora_dropout[adapter_name] = nn.Dropout(p) if p > 0.0 else nn.Identity()
        widths, zero_update = (self.in_features, self.out_features), bool(config.init_weights)
        A, B = functional.init_factors(*widths, r, k, self.kernel_size, zero_update)
        self.gralora_A[adapter_name] = nn.Parameter(A)
        self.gralora_B[adapter_name] = nn.Parameter(B)
        if hybrid_r > 0:
            plain = functional.init_plain_factors(*widths, hybrid_r, self.kernel_size, zero_update)
            self.gralora_A_general[adapter_name] = Projection(plain[0])
            self.gralora_B_general[adapter_name] = Projection(plain[1])
        elif adapter_name in self.gralora_A_general:
            del self.gralora_A_general[adapter_name], self.gralora_B_general[adapter_name]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. A merged one is unmerged first, so that its update does not remain."""
        if adapter_name in self.merged_adapters:
            self.unmerge([adapter_name])
        super().delete_adapter(adapter_name)

    def forget(self, adapter_name: str) -> None:
        """Remove an adapter; a merged update stays in the base weight.

        No other adapter becomes active or trainable instead.
        """
        if adapter_name in self.merged_adapters:
            self.merged_adapters.remove(adapter_name)
            self._merged_scaling.pop(adapter_name)
        self._active_adapter = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Convert the factors of one adapter to ``dtype``."""
        for name in self.adapter_layer_names:
            part = getattr(self, name)
            if adapter_name not in part:
                continue
            factor = part[adapter_name]
            if isinstance(factor, nn.Module):
                factor.to(dtype)
            elif factor.dtype != dtype:
                cast = factor.detach().to(dtype)
                part[adapter_name] = nn.Parameter(cast, requires_grad=factor.requires_grad)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if dtype is not None and dtype.itemsize < 2:
            dtype = None  # fp8 is for storage: the factors are moved, but not cast to it
        return device, dtype

    # -- scale: as in peft/tuners/lora/layer.py, on which diffusers relies -------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's scaling to ``scale`` times alpha / (r + hybrid_r)."""
        if adapter in self.r:
            rank = self.r[adapter] + self.hybrid_r[adapter]
            self.scaling[adapter] = scale * self.alpha[adapter] / rank

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of every active adapter by ``scale``."""
        for adapter in self._active_here():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of every active adapter by ``scale``; None resets it."""
        for adapter in self._active_here():
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale

    def _active_here(self) -> list[str]:
        active = self._active_adapter
        # ``scaling`` has the adapters of this layer, and is faster to read than a module's members
        return [n for n in ((active,) if isinstance(active, str) else active) if n in self.scaling]

    # -- forward -----------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        disabled, merged = self._disable_adapters, self.merged_adapters
        if disabled and merged:
            self.unmerge()
        names = [] if disabled else self._active_here()
        if merged:
            names = [name for name in names if name not in merged]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(x, names, *args, **kwargs)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of these adapters."""
        result = self.base_layer(x, *args, **kwargs)
        _check_tangent(self.base_layer, x, result)
        for name in names:
            dropped = self.gralora_dropout[name](x)  # one mask for both branches
            result = result + self._update(dropped, name).to(result.dtype)
        return result

    def _update(self, x: Tensor, adapter: str) -> Tensor:
        """Return the adapter's scaled contribution to the output."""
        raise NotImplementedError

    def _product_dtype(self, x: Tensor, adapter: str) -> torch.dtype:
        """Return the dtype that an update is computed in: autocast's, or that of its factors.

        ``cast_input_dtype_enabled`` has no influence: factors never have a storage dtype such as
        fp8, so casting the input loses nothing.
        """
        if autocasts(x):
            return torch.get_autocast_dtype(x.device.type)
        return self._factor_dtype(adapter)

    def _factor_dtype(self, adapter: str) -> torch.dtype:
        return self.gralora_A[adapter].dtype

    def _factors(self, adapter: str) -> list[tuple[Tensor, Tensor]]:
        """Return A and B of the granular part and, if hybrid, of the plain part (k=1)."""
        A: Any = self.gralora_A  # a FactorDict, which nn.Module does not tell
        B: Any = self.gralora_B
        factors = [(A.read(adapter), B.read(adapter))]
        if self.hybrid_r[adapter]:
            down, up = self.gralora_A_general[adapter](), self.gralora_B_general[adapter]()
            factors.append((down.transpose(0, 1)[None], up.flatten(1).T[None]))
        return factors

    # -- weights -----------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the scaled update in the shape of the base weight, in the adapter's dtype."""
        A = self.gralora_A[adapter]
        # in fp32 or better, because half precision would round it twice
        dtype = torch.promote_types(A.dtype, torch.float32)
        delta = torch.zeros(
            self.out_features, self.in_features, *self.kernel_size, dtype=dtype, device=A.device
        )
        for A, B in self._factors(adapter):
            functional.add_delta(delta.flatten(1), A, B, self.scaling[adapter])
        return (delta.T if self.fan_in_fan_out else delta).to(self._factor_dtype(adapter))

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
            safe_merge: check that the sum is finite before the weight is changed.
            scale: multiplies the current scaling for this merge only.

        Raises:
            ValueError: the sum is not finite (under ``safe_merge``), or the base weight is
                quantized, fp8 or offloaded.
        """
        names = check_adapters_to_merge(self, adapter_names) or []
        scalings = {n: scale * self.scaling[n] for n in names if n in self.gralora_A}
        if scalings:
            if safe_merge:
                self.check_merge(scalings, scale)
            for rows, total in self._sums(scalings, in_place=True):
                rows.copy_(total)
            self.merged_adapters.extend(scalings)
            self._merged_scaling.update(scalings)

    @torch.no_grad()
    def check_merge(self, adapter_names: Iterable[str], scale: float = 1.0) -> None:
        """Raise the errors of :meth:`merge` with ``safe_merge``, without changing anything."""
        scalings = {n: scale * self.scaling[n] for n in adapter_names}
        for rows, total in self._sums(scalings, in_place=False):
            # the least and the largest value show NaN and values too large for the dtype
            if not torch.stack(total.aminmax()).to(rows.dtype).isfinite().all():
                raise ValueError(
                    f"{self.module_name}: merging adapter {', '.join(scalings)} gives NaN or "
                    f"infinite weights in {rows.dtype}; the base weight is unchanged. Either the "
                    "adapter is broken or its scale is too large for the dtype. Use a smaller "
                    "scale, or a base in bf16 or fp32."
                )

    @torch.no_grad()
    def unmerge(self, adapter_names: Iterable[str] | None = None) -> None:
        """Subtract merged adapters (default: all), at the scale that they were merged with.

        The base weight returns to within one rounding of its dtype.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        names = list(self.merged_adapters if adapter_names is None else adapter_names)
        scalings = {n: -self._merged_scaling[n] for n in names}
        for rows, total in self._sums(scalings, in_place=True):
            rows.copy_(total)
        for name in names:
            self.merged_adapters.remove(name)
            self._merged_scaling.pop(name)

    def _sums(self, scalings: dict[str, float], in_place: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows of the base weight, as a view, and their sum with updates at these scalings.

        The sum is in fp32 or better, so that the caller rounds it once. With ``in_place`` it may be
        the rows themselves. A few rows at a time fit into the processor's cache, and no temporary
        has the size of the weight.
        """
        weight = self._mergeable_weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        factors = [
            (
                *functional.row_factors(A.to(weight.device, dtype), B.to(weight.device, dtype)),
                scaling,
            )
            for name, scaling in scalings.items()
            for A, B in self._factors(name)
        ]
        by_outputs = weight.T if self.fan_in_fan_out else weight
        step = max(1, _VALUES_AT_ONCE // max(1, by_outputs[0].numel()))
        for start in range(0, len(by_outputs), step):
            rows = by_outputs[start : start + step]
            total = rows
            if not (in_place and rows.dtype == dtype and rows.is_contiguous()):
                total = rows.to(dtype, copy=True, memory_format=torch.contiguous_format)
            for rows_A, rows_B, scaling in factors:
                functional.add_delta_rows(total.flatten(1), rows_A, rows_B, start, scaling)
            yield rows, total

    def _mergeable_weight(self) -> Tensor:
        layer: Any = self.get_base_layer()
        if kind := quantization_of(layer):
            raise ValueError(
                f"{self.module_name}: cannot merge into a base weight stored as {kind}. Load the "
                "unquantized base (fp32, bf16 or fp16), load the adapter, fuse it, and only then "
                "quantize or cast."
            )
        weight: Tensor = layer.weight
        if weight.is_meta:
            raise ValueError(
                f"{self.module_name}: the base weight is not in memory (offloaded). Remove the "
                "offloading hooks before merging, or use `pipe.fuse_gralora()`, which removes them."
            )
        return weight.detach()

    def __repr__(self) -> str:
        return "gralora." + super().__repr__()


def _check_tangent(base: nn.Module, x: Tensor, result: Tensor) -> None:
    """Raise RuntimeError if forward-mode AD has lost the tangent of ``x`` in the base layer.

    bitsandbytes' product in 4 bits on the CPU has no rule for it under ``torch.func.jvp``, which
    then takes it for 0.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    given, made = (forward_ad.unpack_dual(tensor).tangent for tensor in (x, result))
    if given is not None and made is None:
        raise RuntimeError(
            f"{type(base).__module__}.{type(base).__name__} has dropped the tangent of its input, "
            "so the result of forward-mode AD would be wrong. Use reverse mode, as "
            "`torch.autograd.functional.jvp` does, or a base layer that is not quantized."
        )


def autocasts(x: Tensor) -> bool:
    """Whether products with ``x`` are computed in autocast's dtype; those of float64 are not."""
    device = x.device.type
    return (
        torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and x.dtype != torch.float64
    )
