"""The pretended GPU: inside :func:`pretended_gpu`, torch has a device ``cuda:0``.

Import :mod:`.guard` and load it before this module, which imports torch.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # it lists functions that are replaced here
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten: Any = torch.ops.aten


class DeviceMismatch(RuntimeError):
    """CUDA would refuse an operation, because of the devices of its tensors or its generator."""


# -- what waits for the device ---------------------------------------------------------------------


class Waits:
    """Counts what makes the host wait for the device, inside :meth:`counted`."""

    def __init__(self) -> None:
        self._found: Counter[tuple[str, str]] | None = None

    @contextmanager
    def counted(self, found: Counter[tuple[str, str]] | None) -> Iterator[None]:
        """Inside, add (kind, line of the package or of a library) to ``found``; None: nowhere."""
        before, self._found = self._found, found
        try:
            yield
        finally:
            self._found = before

    def note(self, kind: str) -> None:
        if self._found is not None:
            self._found[kind, _line()] += 1


WAITS = Waits()


def _line() -> str:
    """The innermost line of the package on the stack; of another library if there is none."""
    files = [(frame.filename, frame.lineno) for frame in reversed(traceback.extract_stack())]
    for part in ("gralora_diffusion/", "site-packages/"):
        for name, line in files:
            if part in name and "/torch/" not in name and "/tests/" not in name:
                return f"{name.rpartition(part)[2]}:{line}"
    return "torch"


# -- tensors ---------------------------------------------------------------------------------------


class Pretended(Tensor):
    """A tensor that says ``cuda:0``; ``_held`` is the one on the CPU with its values."""

    _held: Tensor
    _is_param: bool

    @staticmethod
    def __new__(cls: Any, real: Any, requires_grad: bool = False, **_: Any) -> Any:
        # as libraries call a parameter's class to make another
        if isinstance(real, Pretended):
            made: Any = real.detach().requires_grad_(requires_grad)
            made._is_param = True
            return made
        return nn.Parameter(real, requires_grad)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self._held!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        held: Any = self._held.detach().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            held = nn.Parameter(held, self.requires_grad)
        return held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        made: Any = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            made._is_param = True
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


Pretended.__module__ = "torch"  # a plain tensor to those who ask by the class


def _pretend(real: Tensor) -> Pretended:
    make: Any = torch.Tensor._make_wrapper_subclass
    made: Pretended = make(
        Pretended,
        real.size(),
        strides=real.stride(),
        storage_offset=real.storage_offset(),
        dtype=real.dtype,
        layout=real.layout,
        device=DEVICE,
    )
    made._held = real
    return made


def is_pretended(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value, "_held", None) is not None


# -- operations ------------------------------------------------------------------------------------

_INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
#: Operations that take tensors of both devices.
_MIXED = _INDEXING | {
    aten._foreach_copy_.default,
    aten.copy_.default,
    aten._to_copy.default,
    aten.set_.source_Tensor,
    aten.item.default,
    aten.is_pinned.default,
}
#: Operations whose results the host reads.
_READ = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.is_nonzero.default,
}
#: Operations that do not even take a number on the CPU beside tensors of the GPU.
_STRICT = {aten.cat.default, aten.stack.default, aten.mm.default, aten.bmm.default}
_CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    leaves = _leaves(args, kwargs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if is_pretended(tensor)]
    here = [t for t in tensors if not is_pretended(t) and t.device.type != "meta"]
    for tensor in here:
        plain = type(tensor) in (Tensor, nn.Parameter)
        if not plain and hasattr(tensor, "__tensor_flatten__"):
            return NotImplemented  # another subclass, whose turn it is
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    to_there = bool(there) if wanted is None else wanted.type == "cuda"
    _check_devices(func, args, leaves, there, here, to_there)
    _note_waits(func, args, kwargs, there, wanted)
    if func is aten.is_pinned.default:
        return True
    result = _computed(func, args, kwargs, wanted, to_there)
    if there and to_there:
        try:
            return return_and_correct_aliasing(func, args, kwargs, result)
        except Exception:  # of operations whose schema says nothing of aliases
            return result
    return result


def _leaves(*values: Any) -> list[Any]:
    """What is in nested lists and dicts, as operations have them; torch's own is for more."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            if value:
                found += _leaves(*value)
        elif isinstance(value, dict):
            if value:
                found += _leaves(*value.values())
        else:
            found.append(value)
    return found


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(function, part) for part in value])
    if isinstance(value, dict):
        return {name: _mapped(function, part) for name, part in value.items()}
    return function(value)


def _check_devices(
    func: Any, args: Any, leaves: Any, there: Any, here: Any, to_there: bool
) -> None:
    if there and func not in _MIXED:
        if large := [tuple(t.shape) for t in here if t.dim() > 0]:
            shapes = [tuple(t.shape) for t in there]
            raise DeviceMismatch(
                f"{func}: tensors on two devices, cuda:0 {shapes} and cpu {large}, at {_line()}"
            )
        if here and func in _STRICT:
            raise DeviceMismatch(f"{func}: a number on the cpu beside cuda:0, at {_line()}")
    indices = args[1] if func in _INDEXING and not is_pretended(args[0]) else ()
    if any(is_pretended(index) for index in indices):
        raise DeviceMismatch(f"{func}: a tensor on the cpu indexed on cuda:0, at {_line()}")
    generators = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
    if generators and to_there and generators[0].device.type == "cpu":
        raise DeviceMismatch(f"{func}: a generator of the cpu for cuda:0, at {_line()}")


def _note_waits(func: Any, args: Any, kwargs: Any, there: Any, wanted: Any) -> None:
    if func in _READ and there:
        WAITS.note("read by the host")
    if func in _INDEXING and is_pretended(args[0]):
        for index in args[1]:
            if index is not None and not is_pretended(index):
                WAITS.note("unpinned copy")
            elif index is not None and index.dtype == torch.bool:
                WAITS.note("read by the host")  # the number of elements
    if func is aten._to_copy.default and wanted is not None:
        _note_copy(is_pretended(args[0]), wanted.type == "cuda", args[0], kwargs)
    if func is aten.copy_.default:
        blocks = {"non_blocking": args[2]} if len(args) > 2 else kwargs
        _note_copy(is_pretended(args[1]), is_pretended(args[0]), args[1], blocks)


def _note_copy(from_there: bool, to_there: bool, source: Any, kwargs: Any) -> None:
    if from_there == to_there:
        return
    if from_there:
        WAITS.note("read by the host")
    elif not (getattr(source, "_pinned", False) or _is_locked(source)):
        WAITS.note("unpinned copy")
    elif not kwargs.get("non_blocking"):
        WAITS.note("blocking copy")


def _computed(func: Any, args: Any, kwargs: Any, wanted: Any, to_there: bool) -> Any:
    """Compute on the CPU what the GPU would compute."""
    back: dict[int, Any] = {}
    rounds = _rounds_to_tf32(func)

    def unwrapped(value: Any) -> Any:
        if is_pretended(value):
            back[id(value._held)] = value
            held = value._held
            return _tf32(held) if rounds and held.dtype == torch.float32 else held
        return CPU if type(value) is torch.device and value.type == "cuda" else value

    inner_args, inner_kwargs = _mapped(unwrapped, args), _mapped(unwrapped, kwargs)
    if wanted is not None and wanted.type != "meta":
        inner_kwargs["device"] = CPU
    if "pin_memory" in inner_kwargs:
        inner_kwargs["pin_memory"] = False
    if func is aten._to_copy.default:
        inner_kwargs.pop("non_blocking", None)
    out = func(*inner_args, **inner_kwargs)
    if func is aten._to_copy.default and wanted is not None and out is inner_args[0]:
        out = out.clone()

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or is_pretended(value) or value.device.type == "meta":
            return value
        if id(value) in back:
            return back[id(value)]
        return _pretend(value) if to_there else value

    return _mapped(wrapped, out)


def _rounds_to_tf32(func: Any) -> bool:
    if func not in _CONVOLUTIONS and func not in _PRODUCTS:
        return False
    backends: Any = torch.backends
    if not hasattr(backends.cudnn, "conv"):  # torch < 2.9
        convolutions, products = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    else:
        convolutions = backends.cudnn.conv.fp32_precision == "tf32"
        products = backends.cuda.matmul.fp32_precision == "tf32"
    return bool(convolutions if func in _CONVOLUTIONS else products)


def _tf32(tensor: Tensor) -> Tensor:
    """Round to 10 bits of the mantissa."""
    bits = tensor.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class _Operations(TorchDispatchMode):
    """Operations without a pretended tensor whose result must be one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        to_there = device is not None and torch.device(device).type == "cuda"
        if (
            to_there
            or Pretended in types
            or any(is_pretended(leaf) for leaf in _leaves(args, kwargs))
        ):
            return _dispatch(func, args, kwargs)
        return func(*args, **kwargs)


# functions of tensors that end before an operation is dispatched

_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
_GET_ITEM, _NEW_TENSOR, _TO_LIST = Tensor.__getitem__, Tensor.new_tensor, Tensor.tolist


def _set_data(tensor: Any, value: Any) -> None:
    _SET_DATA(tensor, value)
    tensor._held = value._held if is_pretended(value) else None


def _get_item(tensor: Tensor, index: Any) -> Any:
    if isinstance(index, list) and is_pretended(tensor):
        index = torch.tensor(index).to(DEVICE)
    return _GET_ITEM(tensor, index)


def _new_tensor(tensor: Tensor, data: Any, **options: Any) -> Tensor:
    if not is_pretended(tensor):
        return _NEW_TENSOR(tensor, data, **options)
    return torch.tensor(data, dtype=options.get("dtype", tensor.dtype)).to(DEVICE)


def _to_list(tensor: Tensor) -> Any:
    if not is_pretended(tensor):
        return _TO_LIST(tensor)
    WAITS.note("read by the host")
    held: Any = tensor.detach()
    return held._held.tolist()


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``scaled_dot_product_attention``, which refuses what CUDA's kernels refuse."""
    if enable_gqa:
        repeats = query.size(-3) // key.size(-3)
        key, value = (tensor.repeat_interleave(repeats, -3) for tensor in (key, value))
    if query.is_cuda and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if len(dtypes := {tensor.dtype for tensor in (query, key, value)}) > 1:
        raise RuntimeError(f"query, key and value must have one dtype, not {dtypes}")
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = (query.float() @ key.float().transpose(-2, -1)) * factor
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, float("-inf"))
        if attn_mask is not None:
            if attn_mask.device != query.device:
                raise DeviceMismatch(f"attention: a mask on {attn_mask.device}, at {_line()}")
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, float("-inf"))
            elif attn_mask.dtype in (query.dtype, torch.float32):
                scores = scores + attn_mask
            else:
                raise RuntimeError(f"a mask in {attn_mask.dtype} for queries in {query.dtype}")
        return (scores.softmax(-1) @ value.float()).to(query.dtype)


# -- the device ------------------------------------------------------------------------------------


class _Stream:
    device = DEVICE

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def synchronize(self) -> None:
        WAITS.note("synchronized")

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        WAITS.note("synchronized")


#: Addresses of memory that is locked where it lies.
_LOCKED: set[int] = set()


def _is_locked(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and _DATA_PTR(tensor.untyped_storage()) in _LOCKED


def _lock(address: int, size: int, flags: int) -> int:
    _LOCKED.add(address)
    return 0


def _unlock(address: int) -> int:
    _LOCKED.remove(address)
    return 0


def _pinned(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    copy: Any = tensor.clone()
    copy._pinned = True
    return copy


_DATA_PTR = torch.UntypedStorage.data_ptr


def _data_ptr(storage: Any) -> int:
    """An address: of pretended memory, one that is as unique."""
    try:
        return _DATA_PTR(storage)
    except RuntimeError:
        return int(storage._cdata)


def _without_gradients(mode: Any = True) -> Any:
    """``inference_mode``, whose tensors cannot be wrapped."""
    if callable(mode):
        return torch.no_grad()(mode)
    return torch.no_grad() if mode else nullcontext()


class Gpu:
    """The device inside :func:`pretended_gpu`.

    Attributes:
        free: bytes that are free, as the device says.
    """

    total = 80 * 2**30

    def __init__(self) -> None:
        self.free = self.total
        self._random = torch.zeros(16, dtype=torch.uint8)

    def functions(self, capability: tuple[int, int]) -> dict[str, Any]:
        """What replaces the functions of ``torch.cuda``."""

        def nothing(*_: Any, **__: Any) -> None:
            pass

        def synchronize(*_: Any) -> None:
            WAITS.note("synchronized")

        properties = SimpleNamespace(
            name="Pretended GPU",
            total_memory=self.total,
            major=capability[0],
            minor=capability[1],
            multi_processor_count=100,
        )
        values: dict[str, Any] = {
            "is_available": True,
            "is_initialized": True,
            "is_bf16_supported": True,
            "device_count": 1,
            "current_device": 0,
            "get_device_name": properties.name,
            "get_device_capability": capability,
            "get_device_properties": properties,
            "max_memory_allocated": 1,
            "memory_allocated": 1,
        }
        constants: dict[str, Callable[..., Any]] = {
            name: lambda *_, value=value, **__: value for name, value in values.items()
        }
        ignored = (
            *("set_device", "reset_peak_memory_stats", "reset_max_memory_allocated", "ipc_collect"),
            *("empty_cache", "manual_seed", "manual_seed_all", "set_rng_state", "_lazy_init"),
            "set_rng_state_all",
        )
        return {
            **constants,
            **dict.fromkeys(ignored, nothing),
            "mem_get_info": lambda *_: (self.free, self.total),
            "synchronize": synchronize,
            "get_rng_state": lambda *_: self._random.clone(),
            "get_rng_state_all": lambda: [self._random.clone()],
            "current_stream": _Stream,
            "default_stream": _Stream,
            "Stream": _Stream,
            "Event": _Event,
            "stream": lambda _: nullcontext(),
            "cudart": lambda: SimpleNamespace(cudaHostRegister=_lock, cudaHostUnregister=_unlock),
        }


def _forget_devices() -> None:
    """diffusers asks for the device only once."""
    backend = getattr(sys.modules.get("diffusers.utils.torch_utils"), "TorchDeviceBackend", None)
    if backend is not None:
        backend._detect_device_type.cache_clear()


@contextmanager
def pretended_gpu(capability: tuple[int, int] = (8, 0)) -> Iterator[Gpu]:
    """Inside, torch has a CUDA device, which is pretended."""
    gpu = Gpu()
    tensors = {
        "cuda": lambda tensor, *_, **__: tensor.to(DEVICE),
        "data": property(_GET_DATA, _set_data),
        "__getitem__": _get_item,
        "new_tensor": _new_tensor,
        "tolist": _to_list,
        "pin_memory": _pinned,
        "is_pinned": lambda tensor, *_: getattr(tensor, "_pinned", False),
        "record_stream": lambda *_: None,
    }
    with ExitStack() as stack:
        accelerator = {"is_available": lambda: True, "current_accelerator": lambda *_, **__: DEVICE}
        for place, functions in (
            (torch.cuda, gpu.functions(capability)),
            (torch.accelerator, accelerator),
            (Tensor, tensors),
        ):
            for name, value in functions.items():
                stack.enter_context(mock.patch.object(place, name, value))
        _forget_devices()
        stack.callback(_forget_devices)
        storage = mock.patch.object(torch.UntypedStorage, "data_ptr", _data_ptr)
        stack.enter_context(storage)
        functional = torch.nn.functional
        attention = mock.patch.object(functional, "scaled_dot_product_attention", _attention)
        stack.enter_context(attention)
        stack.enter_context(mock.patch.object(torch, "inference_mode", _without_gradients))
        # the modes belong to this thread
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Operations())
        yield gpu
