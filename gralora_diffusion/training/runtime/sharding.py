"""A frozen base in parts, one on each process's device, by PyTorch's FSDP2.

Each block of the denoiser is gathered while it computes, and freed again. The adapter stays whole,
in fp32 and synchronized by DistributedDataParallel. The optimizer, the EMA, checkpoints and adapter
files are therefore those of a run without sharding.

``accelerate launch --use_fsdp`` asks for it. accelerate's own preparation would shard the adapter
as well, and transformers would load text encoders without weights in all processes but one.
Both read an environment variable, which is therefore hidden from them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import parse_flag_from_env, str_to_bool
from torch import Tensor, nn

from gralora_diffusion.base_models.streaming import blocks_of
from gralora_diffusion.base_models.unread_weights import StoredWeights, UnreadModels
from gralora_diffusion.families import ModelFamily
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.io.safe_text import first_few
from gralora_diffusion.pipelines.placement import bytes_of, tensors_of
from gralora_diffusion.training.config.training_config import TrainingConfig

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)

#: accelerate's variables: whether to shard, and how.
_USE, _OFFLOAD, _RESHARD = (
    "ACCELERATE_USE_FSDP",
    "FSDP_OFFLOAD_PARAMS",
    "FSDP_RESHARD_AFTER_FORWARD",
)
#: Values of ``_RESHARD`` that leave blocks whole after the forward pass; those in capitals are
#: FSDP1's.
_WHOLE_AFTER_FORWARD = ("false", "0", "no", "shard_grad_op", "hybrid_shard_zero2")


@dataclass(frozen=True)
class Sharding:
    """How the base is sharded.

    Attributes:
        offload: the parts are in the CPU's memory, and are copied to the device when they are used.
        reshard_after_forward: blocks are freed after the forward pass and gathered again for the
            backward pass. Otherwise they stay until then, which takes memory and saves time.
    """

    offload: bool = False
    reshard_after_forward: bool = True

    def shard(
        self,
        model: nn.Module,
        device: torch.device,
        unread: StoredWeights | None = None,
        *,
        visits: bool = False,
    ) -> None:
        """Shard the frozen weights of a model on the CPU, block by block, in place.

        Everything else, such as the adapter, moves to the device whole. All processes must call it.

        Args:
            unread: where the weights are stored if the model has placeholders for them. Each
                process then only reads its part.
            visits: the model stays on the CPU, and will be on the device for some passes. What is
                outside of its blocks then stays gathered after a pass, since pipelines use it.

        Raises:
            ConfigError: the model's weights are quantized, so they cannot be divided.
            RuntimeError: torch.distributed is not initialized.
            AdapterFileError: a weight cannot be read.
        """
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
        from torch.distributed.tensor import DTensor

        kinds = sorted(
            {type(p).__name__ for p in model.parameters() if type(p) is not nn.Parameter}
        )
        if kinds:
            raise ConfigError(
                [
                    f"the base's {type(model).__name__} is quantized on disk (its weights are "
                    f"{first_few(kinds)}), and FSDP cannot divide such weights. Give FSDP the base "
                    "in 16 bits or as a file in scaled fp8, or leave out --use_fsdp"
                ]
            )
        whole = {p for p in model.parameters() if p.requires_grad}
        on_cpu = self.offload and device.type != "cpu" and not visits
        options: dict[str, Any] = {
            "ignored_params": whole,
            "reshard_after_forward": self.reshard_after_forward or visits,
            "offload_policy": CPUOffloadPolicy() if on_cpu else OffloadPolicy(),
        }
        if unread is not None:  # FSDP takes weights without values, but no placeholders
            _empty_on_meta(model)
        kind = type(model)
        for block in blocks_of(model):
            fully_shard(block, **options)
        fully_shard(model, **options | {"reshard_after_forward": False} if visits else options)
        # FSDP gives it a class of its own, but transformers looks up by the name of the class which
        # hidden states it can return (``_CAN_RECORD_REGISTRY``)
        type(model).__module__, type(model).__qualname__ = kind.__module__, kind.__qualname__
        if unread is not None:
            place = torch.device("cpu") if on_cpu or visits else device
            made: dict[Tensor, Tensor] = {}  # a tied weight stays tied

            def empty(tensor: Tensor) -> Tensor:
                if tensor.is_meta and tensor not in made:
                    made[tensor] = torch.empty_like(tensor, device=place)
                return made.get(tensor, tensor)

            model._apply(empty)
            for name, parameter in model.named_parameters():
                if (
                    isinstance(parameter, DTensor)
                    and name.replace(".base_layer.", ".") in unread.places
                ):
                    unread.read(name, parameter.to_local(), _first_row(parameter))
        if visits:
            return
        for parameter in whole:
            parameter.data = parameter.data.to(device)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)

    def shard_encoders(
        self, pipe: Any, family: ModelFamily, device: torch.device, unread: UnreadModels
    ) -> bool:
        """Shard the text encoders that have placeholders for their weights; return whether any do.

        They are on the CPU, and may be moved to the device while they encode.
        """
        names = [name for name in unread.weights if name != family.denoiser]
        for name in names:
            self.shard(getattr(pipe, name), device, unread.weights[name], visits=True)
        return bool(names)

    def bytes_needed(
        self, model: nn.Module, processes: int, *, visits: bool = False
    ) -> tuple[int, int]:
        """Return the most bytes of a frozen model on each device: of its parts, and gathered.

        Two blocks are there at once, because the next one is gathered while one computes.

        Args:
            visits: as in :meth:`shard`.
        """
        blocks = blocks_of(model)
        own = {model: 0} | dict.fromkeys(blocks, 0)
        owner = {p: module for module in (model, *reversed(blocks)) for p in module.parameters()}
        for parameter, module in owner.items():
            own[module] += parameter.nbytes
        rest = own.pop(model)
        gathered = rest + sum(sorted(own.values())[-2:])
        total = rest + sum(own.values())
        parts = 0 if self.offload and not visits else -(-total // processes)
        return parts, gathered if self.reshard_after_forward or visits else total


def _empty_on_meta(model: nn.Module) -> None:
    """Move frozen weights to the meta device; a tied weight stays tied."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                if parameter not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    made[parameter] = nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = made[parameter]


def parts_to_shard(config: TrainingConfig, family: ModelFamily) -> tuple[str, ...]:
    """Return the components of which each process holds a part: text encoders unless trained."""
    encoders = () if config.train_text_encoder else family.all_text_encoders
    return (family.denoiser, *encoders)


def warn_of_whole(pipe: Any, unread: UnreadModels) -> None:
    """Warn of models that could not be read in parts, with the memory that this takes."""
    for name, why in unread.whole.items():
        size = bytes_of(tensors_of(getattr(pipe, name))) / 2**30
        logger.warning(
            "each process loads the whole %s, %.2f GiB, not only its part, because %s",
            name,
            size,
            why,
        )


def _first_row(weight: DTensor) -> int:
    """Return the first row of this process's part of a weight."""
    rows, mesh = weight.shape[0], weight.device_mesh
    return min(mesh.get_local_rank() * -(-rows // mesh.size()), int(rows))


@contextmanager
def requested_sharding() -> Iterator[Sharding | None]:
    """Return the sharding that accelerate is set to, and hide the setting from libraries inside."""
    if not parse_flag_from_env(_USE):
        yield None
        return
    before = os.environ[_USE]
    os.environ[_USE] = "false"
    try:
        yield Sharding(
            offload=bool(str_to_bool(os.environ.get(_OFFLOAD, "false"))),
            reshard_after_forward=os.environ.get(_RESHARD, "true").lower()
            not in _WHOLE_AFTER_FORWARD,
        )
    finally:
        os.environ[_USE] = before
