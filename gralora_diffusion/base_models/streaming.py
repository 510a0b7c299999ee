"""A frozen model whose blocks are in the CPU's memory and come to the device while they compute.

Weights travel one way: they are frozen, so nothing is ever copied back. While one block computes,
the next is copied on a stream of its own, in the order of the calls forward and in reverse
backward. The device therefore holds two of these blocks at most.

The storage of a block on the device is emptied and filled again, as FSDP2 does with its parameters.
Views of weights that autograd has saved are thus valid again when the backward pass needs them,
with or without gradient checkpointing, and do not keep memory in between.

Other mechanisms do not fit (torch 2.13, diffusers 0.42):

- FSDP2 with ``CPUOffloadPolicy`` on one process copies a block on the stream that computes, when
  the block is waited for (``FSDPParamGroup.wait_for_unshard``). Nothing overlaps, and each weight
  is copied once more on the device. It needs a process group, and no weight may be quantized.
- diffusers' group offloading acts around forward passes only. Between two memories, the backward
  pass read weights that had left, at block level unless gradients were checkpointed, and at leaf
  level always.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.training_utils import offload_models
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from .gguf_file import is_packed

logger = logging.getLogger(__name__)

#: Blocks of the streamed ones that are on the device at once: one computes, one arrives.
RING = 2
#: Tensors in a block's memory begin at multiples of it, as CUDA's allocator has it.
_ALIGNMENT = 256


def blocks_of(model: Any) -> list[nn.Module]:
    """Return the blocks that diffusers does not allow to be split, inner ones before outer ones."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in reversed(list(model.modules())) if type(module).__name__ in names]


def inner_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that contain no other block, in the model's order.

    One that has the model's first parameter is left out, since libraries take that parameter's
    device for the model's.
    """
    blocks, first = blocks_of(model), next(model.parameters(), None)
    outer = {block for block in blocks if any(m in blocks for m in list(block.modules())[1:])}
    outer |= {block for block in blocks if any(p is first for p in block.parameters())}
    return [block for block in reversed(blocks) if block not in outer]


@dataclass(frozen=True)
class Streaming:
    """How a model is streamed.

    Attributes:
        kept: fraction of its blocks that stay on the device.
    """

    kept: float = 0.0

    def streamed(self, count: int) -> list[int]:
        """Return which of ``count`` blocks are streamed, evenly spaced.

        A block then has the time of those that are kept beside it to arrive.
        """
        number = count - int(self.kept * count + 1e-9)
        return [step * count // number for step in range(number)]

    def bytes_needed(self, blocks: Sequence[int]) -> StreamedBytes:
        """Return the bytes of blocks of these sizes, see :func:`block_bytes`."""
        streamed = [blocks[i] for i in self.streamed(len(blocks))]
        return StreamedBytes(
            len(streamed), sum(streamed), sum(blocks) - sum(streamed), sum(sorted(streamed)[-RING:])
        )

    def start(self, model: nn.Module, device: torch.device, *, pin: bool = True) -> StreamedBlocks:
        """Stream the blocks of a frozen model on the CPU; all else moves to the device.

        Args:
            pin: lock the blocks in the CPU's memory, which takes a while and makes copies fast.

        Raises:
            ValueError: it has no blocks, or weights that are stored in a way that cannot be
                streamed.
        """
        blocks = inner_blocks(model)
        if not blocks:
            raise ValueError(f"{type(model).__name__} names no blocks that could be streamed")
        return StreamedBlocks(model, [blocks[i] for i in self.streamed(len(blocks))], device, pin)


@contextmanager
def computing_on(
    device: torch.device, models: Sequence[nn.Module], *, streamed: bool = False
) -> Iterator[None]:
    """Have models compute on a device inside, and move them back afterwards.

    Args:
        streamed: stream those whose blocks can be streamed. They must be frozen and on the CPU.
            Their blocks are not locked in memory, because this is for a few passes.
    """
    with ExitStack() as stack:
        for model in models:
            if streamed and can_be_streamed(model):
                stack.callback(Streaming().start(model, device, pin=False).close)
            else:
                stack.enter_context(offload_models(model, device=device))
        yield


class StreamedBytes(NamedTuple):
    """Bytes of a model's blocks.

    Attributes:
        blocks: number of blocks that are streamed.
        streamed: bytes of these blocks, which each pass copies.
        kept: bytes of the others, on the device.
        ring: bytes of streamed blocks that are on the device at once.
    """

    blocks: int
    streamed: int
    kept: int
    ring: int


def block_bytes(model: nn.Module) -> list[int]:
    """Return the bytes of the frozen weights of each block that can be streamed."""
    blocks = inner_blocks(model)
    shared = _shared(model, blocks)
    return [
        _places([t for *_, weight in _weights(block, shared) for t in _stored(weight)])[1]
        for block in blocks
    ]


def can_be_streamed(model: nn.Module) -> bool:
    """Whether a frozen model has blocks, and weights that can be streamed."""
    try:
        return len(block_bytes(model)) > 0
    except ValueError:
        return False


class StreamedBlocks:
    """Blocks of a model while they are streamed.

    Attributes:
        held: bytes of these blocks on the device.
        most_held: the maximum of ``held``.
        copied: bytes copied to the device so far.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device, pin: bool
    ) -> None:
        self.model = model
        self.held = self.most_held = self.copied = 0
        self._order: list[_Block] = []  # of the calls in a forward pass, as far as they are known
        self._there: list[_Block] = []  # on the device, the least recently used first
        shared = _shared(model, blocks)
        self._blocks = [_Block(block, device, shared, pin) for block in blocks]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        streamed = {id(host) for block in self._blocks for _, _, host, _ in block.weights}
        _move_others(model, streamed, device)
        for block in self._blocks:
            block.hooks = [
                block.module.register_forward_pre_hook(self._before(block), prepend=True),
                block.module.register_forward_hook(self._after(block)),
            ]

    def close(self) -> None:
        """End the streaming: the whole model is in the CPU's memory, and has no hooks."""
        for block in self._there:
            block.empty()
        for block in self._blocks:
            for hook in block.hooks:
                hook.remove()
            block.hooks = []
        self._there, self.held = [], 0
        _move_others(self.model, set(), torch.device("cpu"))

    def _before(self, block: _Block) -> Callable[..., None]:
        return lambda *_: self._use(block)

    def _after(self, block: _Block) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if _in_backward() or not torch.is_grad_enabled():
                return  # recomputed for a backward pass that has begun, or there will be none
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            if tensors:
                # nodes run in reverse order, so the first gradient arrives before any other node
                # of this block and after all nodes of later ones
                register_multi_grad_hook(tensors, lambda _: self._use(block), mode="any")

        return hook

    def _use(self, block: _Block) -> None:
        """Have a block on the device, and let the one that is needed next follow."""
        following = self._following(block)
        if block in self._there:
            self._there.remove(block)
        else:
            self._bring(block, (following,))
        self._there.append(block)
        block.wait()
        if following is not None and following not in self._there:
            self._bring(following, (block,))
            self._there.insert(0, following)

    def _bring(self, block: _Block, keep: Sequence[_Block | None]) -> None:
        while len(self._there) >= RING:
            other = next(there for there in self._there if there not in keep)
            self._there.remove(other)
            other.empty()
            self.held -= other.size
        self.held += block.size
        self.most_held = max(self.most_held, self.held)
        self.copied += block.size
        block.fill(self._stream)

    def _following(self, block: _Block) -> _Block | None:
        """Return the block that is used after this one, if that is known."""
        if block not in self._order:
            self._order.append(block)
            return None
        place = self._order.index(block)
        if _in_backward():  # after the first block, the next pass begins with its second
            return self._order[place - 1 if place else min(1, len(self._order) - 1)]
        if place + 1 < len(self._order):
            return self._order[place + 1]
        return None if torch.is_grad_enabled() else self._order[0]


class _Block:
    """The frozen weights of a block, in the CPU's memory and, at times, on the device.

    Attributes:
        weights: module, name, parameter on the CPU and parameter on the device of each weight.
        size: bytes on the device.
    """

    def __init__(
        self, module: nn.Module, device: torch.device, shared: set[Tensor], pin: bool
    ) -> None:
        self.module = module
        self.hooks: list[Any] = []
        found = _weights(module, shared)
        tensors = [t for *_, parameter in found for t in _stored(parameter)]
        places, self.size = _places(tensors)
        self._host = torch.empty(self.size, dtype=torch.uint8)
        self._device = torch.empty(self.size, dtype=torch.uint8, device=device)
        self._ready: Any = None
        on_host, on_device = (
            _parts(self._host, tensors, places),
            _parts(self._device, tensors, places),
        )
        for tensor, part in zip(tensors, on_host, strict=True):
            part.copy_(tensor)
        hosts, devices = iter(on_host), iter(on_device)
        self.weights = [
            (part, name, _alike(parameter, hosts), _alike(parameter, devices))
            for part, name, parameter in found
        ]
        if pin and device.type == "cuda":
            _pin(self._host)
        self.empty()

    def empty(self) -> None:
        """Free the memory on the device, and show the weights on the CPU."""
        for module, name, host, _ in self.weights:
            module._parameters[name] = host
        _resize(self._device, 0)
        self._ready = None

    def fill(self, stream: Any) -> None:
        """Copy the weights to the device, on ``stream`` if there is one."""
        if stream is None:
            self._copy()
        else:
            # what this memory held before may still be in use by what was started until now
            stream.wait_stream(torch.cuda.current_stream(self._device.device))
            with torch.cuda.stream(stream):
                self._copy()
                self._ready = stream.record_event()
        for module, name, _, there in self.weights:
            module._parameters[name] = there

    def wait(self) -> None:
        """Let the device's computations wait until the weights are there."""
        if self._ready is not None:
            torch.cuda.current_stream(self._device.device).wait_event(self._ready)
            self._ready = None

    def _copy(self) -> None:
        _resize(self._device, self.size)
        # the values that autograd has saved are the same as before
        with torch.autograd._unsafe_preserve_version_counter(self._device):
            self._device.copy_(self._host, non_blocking=True)


def _weights(block: nn.Module, shared: set[Tensor]) -> list[tuple[nn.Module, str, Tensor]]:
    """Return module, name and parameter of the frozen weights of a block alone."""
    return [
        (part, name, parameter)
        for part in block.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None and not parameter.requires_grad and parameter not in shared
    ]


def _in_backward() -> bool:
    """Whether a backward pass runs in this thread."""
    return torch._C._current_graph_task_id() != -1


def _resize(tensor: Tensor, size: int) -> None:
    """Set the size of the storage of ``tensor``, which its views share, in bytes."""
    torch.ops.inductor.resize_storage_bytes_(tensor, size)


def _shared(model: nn.Module, blocks: Sequence[nn.Module]) -> set[Tensor]:
    """Return parameters that more than one of the blocks use, or a block and the rest."""
    users: dict[Tensor, set[nn.Module | None]] = {}
    inside = {part: block for block in blocks for part in block.modules()}
    for part in model.modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                users.setdefault(parameter, set()).add(inside.get(part))
    return {parameter for parameter, found in users.items() if len(found) > 1}


def _move_others(model: nn.Module, streamed: set[int], device: torch.device) -> None:
    """Move everything but the parameters with these ids."""
    moved: dict[Tensor, nn.Parameter] = {}  # a tied weight stays tied
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or id(parameter) in streamed:
                continue
            if parameter.requires_grad:  # an optimizer may know it
                parameter.data = parameter.data.to(device)
            elif parameter.device != device:
                if parameter not in moved:
                    moved[parameter] = nn.Parameter(parameter.to(device), requires_grad=False)
                part._parameters[name] = moved[parameter]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)


def _stored(tensor: Any) -> Iterator[Tensor]:
    """Yield the tensors that store a weight: itself, or the parts of a quantized one."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _stored(getattr(tensor, name))
    elif is_packed(tensor):
        yield tensor.as_tensor().detach()
    elif type(tensor) in (Tensor, nn.Parameter):
        yield tensor.detach()
    else:
        raise ValueError(f"weights of the kind {type(tensor).__name__} cannot be streamed")


def _alike(parameter: Tensor, parts: Iterator[Tensor]) -> nn.Parameter:
    """Return a parameter like ``parameter`` that is stored in the next of ``parts``."""

    def made(tensor: Any) -> Tensor:
        if not hasattr(tensor, "__tensor_flatten__"):
            return next(parts)
        names, others = tensor.__tensor_flatten__()
        inner = {name: made(getattr(tensor, name)) for name in names}
        built: Tensor = type(tensor).__tensor_unflatten__(
            inner, others, tensor.shape, tensor.stride()
        )
        return built

    if is_packed(parameter):
        old: Any = parameter
        packed: nn.Parameter = type(old)(next(parts), quant_type=old.quant_type)
        return packed
    return nn.Parameter(made(parameter), requires_grad=False)


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Return where each tensor begins in a block's memory, and the size of that, in bytes."""
    places, end = [], 0
    for tensor in tensors:
        places.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return places, end


def _parts(memory: Tensor, tensors: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """Return views of a block's memory that have dtype, shape and strides of ``tensors``."""
    parts = []
    for tensor, start in zip(tensors, places, strict=True):
        flat = memory[start : start + tensor.nbytes].view(tensor.dtype)
        strides = torch.empty_like(tensor, device="meta").stride()  # dense, if others are not
        parts.append(flat.as_strided(tensor.shape, strides, flat.storage_offset()))
    return parts


def _pin(memory: Tensor) -> None:
    """Lock memory where it is, so that the GPU reads it while both compute.

    ``pin_memory`` would copy it, into up to twice as much memory: its sizes are powers of two.
    """
    runtime: Any = torch.cuda.cudart()
    address = memory.data_ptr()
    if int(runtime.cudaHostRegister(address, memory.nbytes, 0)) != 0:
        _forget_error()
        logger.warning(
            "memory of the CPU cannot be pinned, so copying blocks to the GPU takes longer. Some "
            "systems limit how much can be locked: see `ulimit -l`"
        )
        return
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, address)


def _forget_error() -> None:
    """Have CUDA report an error that has been handled, so that no later call fails with it."""
    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        pass
