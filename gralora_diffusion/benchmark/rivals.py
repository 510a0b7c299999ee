"""Rivals of GraLoRA by PEFT's own implementations, and what these leave to be done.

===============  ==============================================================================
kind             method
===============  ==============================================================================
``lora``         E. Hu et al., arXiv 2106.09685
``dora``         S.-Y. Liu et al., arXiv 2402.09353
``loha``         N. Hyeon-Woo et al., arXiv 2108.06098
``lokr``         S.-Y. Yeh et al., arXiv 2309.14859
``rslora``       D. Kalajdzievski, arXiv 2312.03732: a LoRA with a scaling of alpha / sqrt(rank)
``loraplus``     S. Hayou et al., arXiv 2402.12354: a LoRA whose second factor has a higher rate
``pissa``        F. Meng et al., arXiv 2404.02948: a LoRA that starts as the weight's largest part
``oft``          Z. Qiu et al., arXiv 2306.07280, with the Cayley-Neumann series of 2506.19847
``boft``         W. Liu et al., arXiv 2311.06243
``scaledlora``   a LoRA of input channels that are scaled alike, see :class:`ChannelScale`
===============  ==============================================================================
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gralora_diffusion.adapters.placement.targets import layer_shape, quantization_of
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.training.optimization.adapters import ADAPTER_NAME

#: A channel's scale is at least this share of that of the mean energy, so that channels that are
#: almost never active are not blown up.
LEAST_SCALE = 0.01


class Numbers(Protocol):
    """What :class:`~gralora_diffusion.benchmark.methods.Method` says of a rival."""

    @property
    def kind(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def factor(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def butterflies(self) -> int: ...


def attach_rival(
    model: nn.Module, layers: Mapping[str, nn.Module], method: Numbers, dropout: float
) -> None:
    """Inject PEFT's adapter into these layers (path -> bare layer) of a bare model.

    Initial values are drawn from torch's global generator. The model applies the same weights
    afterwards, to within rounding.

    Raises:
        ConfigError: PEFT's implementation cannot adapt some of the layers, each of which is named,
            or ignores the dropout. The model is as it was.
    """
    problems = [
        f"{path}: {why}" for path, layer in layers.items() if (why := unadaptable(layer, method))
    ]
    if problems:
        raise ConfigError(
            [
                f"{method.name} cannot adapt {len(problems)} of {len(layers)} layers: "
                f"{first_few(problems)}. Leave the method out, or name other layers with "
                "--lora_layers, --exclude_modules or --target_preset"
            ]
        )
    if dropout and method.kind == "oft":  # its forward pass has none
        raise ConfigError([f"{method.name} has no dropout. Leave out --lora_dropout or the method"])
    kept: dict[str, Any] = {}
    if method.kind == "pissa":
        kept = {path: layer.weight.data for path, layer in layers.items()}
    try:
        with warnings.catch_warnings():
            # BOFT of one factor needs no CUDA, which it warns about nevertheless
            warnings.filterwarnings("ignore", message=".*(CUDA extension|boft_n_butterfly)")
            paths = "|".join(map(re.escape, layers))
            config = _config(method, paths, dropout)
            peft.inject_adapter_in_model(config, model, ADAPTER_NAME)
    except BaseException:
        for path, weight in kept.items():
            layers[path].weight.data = weight
        raise
    for path in layers:
        adapter: Any = model.get_submodule(path)
        if method.kind == "pissa":
            adapter.start = PissaStart(adapter, kept[path])
        elif method.kind == "scaledlora":
            scale_input_channels(adapter)


def unadaptable(layer: nn.Module, method: Numbers) -> str | None:
    """Return why PEFT's implementation cannot adapt a bare layer; None if it can."""
    inputs, outputs, kernel = layer_shape(layer)
    rotated = inputs
    for side in kernel:
        rotated *= side
    if method.kind in ("pissa", "lokr", "boft") and (how := quantization_of(layer)):
        return f"its weight is quantized ({how})"
    if method.kind == "pissa":
        if kernel:
            return "PEFT has no PiSSA for convolutions"
        if method.rank > min(inputs, outputs):
            return f"its weight has fewer singular values ({min(inputs, outputs)}) than the rank"
    if method.kind in ("oft", "boft"):
        if method.kind == "oft" and kernel not in ((), (1, 1)):
            # it folds overlapping patches by adding them up: not even its start leaves x unchanged
            return f"PEFT's OFT is wrong for kernels of {kernel[0]}x{kernel[1]}"
        if rotated % method.block_size:
            return f"its {rotated:,} inputs cannot be split into blocks of {method.block_size}"
    if method.kind == "boft":
        return _unadaptable_by_boft(layer, rotated, kernel, method)
    return None


def _unadaptable_by_boft(
    layer: Any, rotated: int, kernel: tuple[int, ...], method: Numbers
) -> str | None:
    if method.butterflies > 1 and not _has_boft_extension():
        return (
            "PEFT's BOFT of several butterfly factors needs its CUDA extension, which cannot be "
            "built here; it would use one factor"
        )
    if rotated % (method.block_size * 2 ** (method.butterflies - 1)):
        return f"its {rotated:,} inputs are too few for {method.butterflies} butterfly factors"
    if kernel:
        if kernel[0] != kernel[1] or len({*layer.stride}) > 1 or len({*layer.padding}) > 1:
            return "PEFT's BOFT needs square convolutions"
        if tuple(layer.dilation) != (1, 1):
            return "PEFT's BOFT needs a dilation of 1"
        if layer.bias is None:
            return "PEFT's BOFT needs a convolution with a bias"
    return None


def _has_boft_extension() -> bool:
    from peft.tuners.boft.layer import get_fbd_cuda

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_fbd_cuda() is not None


def _config(method: Numbers, targets: str, dropout: float) -> peft.PeftConfig:
    """Return PEFT's config; alpha is the rank for all of them."""
    rank, kind = method.rank, method.kind
    if kind in ("loha", "lokr"):
        given: dict[str, Any] = {"r": rank, "alpha": rank, "module_dropout": dropout}
        if kind == "loha":
            return peft.LoHaConfig(target_modules=targets, **given)
        return peft.LoKrConfig(target_modules=targets, decompose_factor=method.factor, **given)
    if kind == "oft":
        return peft.OFTConfig(r=0, oft_block_size=method.block_size, target_modules=targets)
    if kind == "boft":
        return peft.BOFTConfig(
            boft_block_size=method.block_size,
            boft_n_butterfly_factor=method.butterflies,
            boft_dropout=dropout,
            target_modules=targets,
        )
    return peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        lora_dropout=dropout,
        use_dora=kind == "dora",
        use_rslora=kind == "rslora",
        init_lora_weights="pissa" if kind == "pissa" else True,
    )


# -- PiSSA -----------------------------------------------------------------------------------------


class PissaStart(nn.Module):
    """What PiSSA began with: the base's weight, which PEFT replaces by a residual, and the factors.

    The update of the original weight is therefore ``residual + scaling * B A - weight``, and as
    factors ``scaling * [B, -B0] [A; A0]``, to within the rounding of the residual.
    """

    weight: Tensor
    A: Tensor
    B: Tensor

    def __init__(self, adapter: Any, weight: Tensor) -> None:
        super().__init__()
        first, second = adapter.lora_A[ADAPTER_NAME], adapter.lora_B[ADAPTER_NAME]
        for name, value in {
            "weight": weight,
            "A": first.weight.detach().clone(),
            "B": second.weight.detach().clone(),
        }.items():
            self.register_buffer(name, value, persistent=False)


def bare_layer(adapter: BaseTunerLayer) -> nn.Module:
    """Return the layer beneath an adapter, with the base's own weight, bit for bit."""
    base: Any = adapter.get_base_layer()
    start = getattr(adapter, "start", None)
    if isinstance(start, PissaStart):
        base.weight.data = start.weight
    return base


# -- scaled input channels -------------------------------------------------------------------------


class ChannelScale(nn.Module):
    """Divides the columns of a LoRA's A by the scales of its input channels.

    The layer computes ``W x + B A D^-1 x`` with ``D = diag(s)``. The scale ``s_c`` of channel c is
    the root mean square of that channel over the tokens of the first training batch, relative to
    the root mean square of all channels, and at least ``LEAST_SCALE``. All channels that A reads
    therefore have the same energy, and together that of x. D stays as it is from then on, and a
    merged update is ``B (A D^-1)``.

    A scale per channel from calibration activations is SmoothQuant's answer to outliers (G. Xiao et
    al., arXiv 2211.10438), and values from the first batch are those of ActNorm (D. P. Kingma and
    P. Dhariwal, arXiv 1807.03039).

    Args:
        weight: of A: (rank, in) or (rank, in, h, w).
    """

    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.is_calibrated = False
        self.register_buffer("scale", torch.ones(weight.shape[1], device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight / self.scale.view(1, -1, *[1] * (weight.ndim - 2)).to(weight)

    @torch.no_grad()
    def calibrate(self, first_factor: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Set the scales by the first inputs of a training; a forward pre-hook of A."""
        if self.is_calibrated or not first_factor.training:
            return
        x = inputs[0]
        if isinstance(first_factor, nn.Conv2d):
            x = x.movedim(1, -1)
        self.scale.copy_(channel_scales(x.reshape(-1, x.shape[-1])))
        self.is_calibrated = True


def channel_scales(x: Tensor) -> Tensor:
    """Return the scales (in,) of the channels of tokens (tokens, in), see :class:`ChannelScale`."""
    energy = x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(0)
    mean = energy.mean()
    if not (0 < float(mean) < float("inf")):
        return torch.ones_like(energy)
    return (energy / mean).sqrt().clamp(min=LEAST_SCALE)


def scale_input_channels(adapter: Any) -> None:
    """Make a new LoRA one of scaled input channels, which are calibrated in its first training."""
    first = adapter.lora_A[ADAPTER_NAME]
    scale = ChannelScale(first.weight)
    parametrize.register_parametrization(first, "weight", scale)
    first.register_forward_pre_hook(scale.calibrate)


# -- the dense update and the file -----------------------------------------------------------------


def dense_update(adapter: Any) -> Tensor | None:
    """Return the update of the base's weight if PEFT's ``get_delta_weight`` is something else.

    OFT's and BOFT's is a rotation R (and a scale s of the rows), which makes the weight
    ``s W R^T``; PiSSA's includes what was taken out of the weight. None for other adapters.
    """
    start = getattr(adapter, "start", None)
    is_rotation = hasattr(adapter, "oft_R") or hasattr(adapter, "boft_R")
    if not is_rotation and not isinstance(start, PissaStart):
        return None
    found = adapter.get_delta_weight(ADAPTER_NAME)
    if isinstance(start, PissaStart):
        # first what is close to each other, so that nothing is rounded away
        residual = dequantize_module_weight(adapter.get_base_layer())
        begun = residual.to(found) - start.weight.to(found)
        return begun + found
    rotation, scale = found if isinstance(found, tuple) else (found, None)
    weight = dequantize_module_weight(adapter.get_base_layer()).to(rotation)
    rotated = weight.flatten(1) @ rotation.T
    if scale is not None:
        rotated = scale * rotated
    return rotated.view_as(weight) - weight


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter in PEFT's names, as it is loaded onto the original base.

    PiSSA's is a LoRA of twice the rank, and the scales of channels are merged into A.
    """
    state = model.state_dict()
    for path, layer in model.named_modules():
        first: Any = getattr(layer, "lora_A", {})
        if not isinstance(layer, BaseTunerLayer) or ADAPTER_NAME not in first:
            continue
        names = {part: f"{path}.lora_{part}.{ADAPTER_NAME}.weight" for part in "AB"}
        start = getattr(layer, "start", None)
        if isinstance(start, PissaStart):
            state[names["A"]] = torch.cat([state[names["A"]], start.A])
            state[names["B"]] = torch.cat([state[names["B"]], -start.B], 1)
        if parametrize.is_parametrized(first[ADAPTER_NAME]):
            inner = f"{path}.lora_A.{ADAPTER_NAME}.parametrizations."
            for key in [key for key in state if key.startswith(inner)]:
                del state[key]
            state[names["A"]] = first[ADAPTER_NAME].weight
    tensors = peft.utils.get_peft_model_state_dict(model, state, adapter_name=ADAPTER_NAME)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
