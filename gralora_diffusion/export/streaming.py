"""Write a large safetensors file tensor by tensor, from stored tensors with updates added.

Only a few blocks of rows are in memory at a time. Unchanged tensors are copied byte for byte.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from gralora_diffusion.io.dtypes import short_name
from gralora_diffusion.io.tensor_files import StoredTensor, replacing
from gralora_diffusion.key_maps import Shape

from .rounding import DTYPES, Rounding, RoundingError, RoundingLoss, measure, round_to
from .tensor_bytes import Files, as_bytes, check_space, count, make_header

#: Values in a block of rows: few enough that the work on a block fits into a core's cache.
_BLOCK = 1 << 19
_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class RowUpdate(Protocol):
    """An update that is added to the rows of a piece."""

    def add_to(self, target: Tensor, start: int) -> None:
        """Add rows ``start``... of the update to ``target`` (rows, columns), fp32, in place."""


@dataclass(frozen=True)
class Piece:
    """Consecutive rows (first axis) of an output tensor.

    Args:
        source: a stored tensor, or one in memory.
        start, stop: rows of the source after transposing.
        transposed: whether the source is transposed.
        update: creates the update when it is needed, so that not all factors are in memory. Its
            rows count from the piece's first row.
    """

    source: StoredTensor | Tensor
    start: int
    stop: int
    transposed: bool = False
    update: Callable[[], RowUpdate] | None = None


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output.

    Args:
        scale_key: if given, the values are divided by a scale per tensor, which is written under
            this key.
    """

    key: str
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    scale_key: str | None = None


def write_streamed(
    path: Path,
    outputs: Sequence[OutputTensor],
    metadata: Mapping[str, str],
    rounding: Rounding,
    *,
    progress: bool = True,
    workers: int | None = None,
) -> dict[str, RoundingLoss]:
    """Write a safetensors file. It appears under its name once it is complete.

    Args:
        progress: show a progress bar.
        workers: number of threads; the number of cores if None.

    Returns:
        Key -> loss by rounding, for each tensor with an update.

    Raises:
        RoundingError: a value is NaN, infinite or too large for the dtype.
        OSError: there is not enough space.
    """
    tensors = [(o.key, o.dtype, o.shape) for o in outputs]
    tensors += [(o.scale_key, torch.float32, ()) for o in outputs if o.scale_key]
    header, offsets, total = make_header(tensors, metadata)
    check_space(path, total)
    threads = torch.get_num_threads()
    workers = workers or os.cpu_count()
    losses: dict[str, RoundingLoss] = {}
    try:
        torch.set_num_threads(1)  # each thread handles a tensor; torch adds no threads of its own
        with (
            replacing(path, sync=False) as temporary,
            Files(temporary, total) as files,
            tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar,
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            files.write(header, 0)
            buffers = _Buffers()
            bar.update(len(header))
            jobs = {
                pool.submit(_Job(output, offsets, files, rounding, buffers, bar).run): output.key
                for output in outputs
            }
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                losses |= {jobs[job]: loss for job in done if (loss := job.result())}
            finally:  # after an error or an interrupt, no further job starts
                pool.shutdown(cancel_futures=True)
    finally:
        torch.set_num_threads(threads)
    return losses


def sample_remedies(output: OutputTensor, rounding: Rounding) -> dict[str, RoundingLoss]:
    """Measure the losses of other ways of rounding on the first block of rows of each piece.

    Returns:
        Name of the alternative -> its loss; the current way comes first.
    """
    name = short_name(output.dtype)
    alternatives = {name: (output, rounding)}
    if not rounding.stochastic:
        stochastic = replace(rounding, stochastic=True)
        alternatives[f"{name} and stochastic rounding"] = (output, stochastic)
    for other, dtype in DTYPES.items():
        if torch.finfo(dtype).eps < torch.finfo(output.dtype).eps:
            alternatives[other] = (replace(output, dtype=dtype, scale_key=None), rounding)
    losses = {}
    with Files() as files, tqdm(disable=True) as bar:
        for alternative, (tensor, how) in alternatives.items():
            with suppress(RoundingError):  # a dtype that cannot represent the values is left out
                losses[alternative] = _Job(tensor, {}, files, how, _Buffers(), bar).sample()
    return losses


@dataclass(frozen=True)
class _Job:
    """One tensor of the output."""

    output: OutputTensor
    offsets: Mapping[str, int]
    files: Files
    rounding: Rounding
    buffers: _Buffers
    bar: tqdm

    def run(self) -> RoundingLoss | None:
        """Write it; return the loss by rounding if it has an update."""
        columns = count(self.output.shape[1:])
        offset = self.offsets[self.output.key]
        scale = self._scale() if self.output.scale_key else 1.0
        loss, block = None, 0
        for piece in self.output.pieces:
            nbytes = (piece.stop - piece.start) * columns * self.output.dtype.itemsize
            if self._is_copied(piece):
                assert isinstance(piece.source, StoredTensor)
                start = piece.source.offset + piece.start * columns * self.output.dtype.itemsize
                self.files.copy(piece.source.path, start, offset, nbytes)
            else:
                update = piece.update() if piece.update else None
                at = offset
                for first, base in self._blocks(piece, columns):
                    here, data = self._rounded(base, update, first, scale, block)
                    loss = (loss or RoundingLoss()) + here if here else loss
                    self.files.write(data, at)
                    at += len(data)
                    block += 1
            offset += nbytes
            self.bar.update(nbytes)
        if self.output.scale_key:
            one = as_bytes(torch.tensor(scale))
            self.files.write(one, self.offsets[self.output.scale_key])
        return loss

    def sample(self) -> RoundingLoss:
        """Return the loss by rounding in the first block of each piece; nothing is written."""
        columns = count(self.output.shape[1:])
        scale = self._scale() if self.output.scale_key else 1.0
        total = RoundingLoss()
        for piece in self.output.pieces:
            if piece.update:
                first, base = next(self._blocks(piece, columns))
                total += self._rounded(base, piece.update(), first, scale, 0)[0] or RoundingLoss()
        return total

    def _is_copied(self, piece: Piece) -> bool:
        source = piece.source
        as_it_is = not (piece.update or piece.transposed or self.output.scale_key)
        return as_it_is and isinstance(source, StoredTensor) and source.dtype == self.output.dtype

    def _blocks(self, piece: Piece, columns: int) -> Iterator[tuple[int, Tensor]]:
        """Yield blocks of rows in their own dtype, each with its first row within the piece.

        A block is only valid until the next one is requested.
        """
        rows = max(1, _BLOCK // max(1, columns))
        source = piece.source
        if isinstance(source, Tensor) or piece.transposed:
            if isinstance(source, StoredTensor):
                stored, source = source, torch.empty(source.shape, dtype=source.dtype)
                self.files.read(stored.path, stored.offset, as_bytes(source))
            whole = source.mT if piece.transposed else source
            whole = whole.reshape(-1, columns)[piece.start : piece.stop]
            for first in range(0, len(whole), rows):
                yield first, whole[first : first + rows]
            return
        for first in range(piece.start, piece.stop, rows):
            shape = (min(rows, piece.stop - first), columns)
            base, _, data = self.buffers.take("base", shape, source.dtype)
            at = source.offset + first * columns * source.dtype.itemsize
            self.files.read(source.path, at, data)
            yield first - piece.start, base

    def _rounded(
        self, base: Tensor, update: RowUpdate | None, first: int, scale: float, block: int
    ) -> tuple[RoundingLoss | None, memoryview]:
        """Return the loss by rounding if there is an update, and the rounded block."""
        dtype = self.output.dtype
        if not dtype.is_floating_point:
            return None, as_bytes(base.to(dtype))
        total = self.buffers.take("total", base.shape)
        total.rows.copy_(base)
        if update:
            update.add_to(total.rows, first)
        # stochastic only with an update; the base's own values are rounded to nearest
        generator = self.rounding.generator(self.output.key, block) if update else None
        scaled = total.rows
        if scale != 1.0:
            scaled = torch.div(scaled, scale, out=self.buffers.take("scaled", base.shape).rows)
        if update is None or dtype.itemsize == 1:
            self._check(scaled)
        rounded = self.buffers.take("rounded", base.shape, dtype)
        round_to(scaled, rounded.rows, generator)
        if update is None:
            return None, rounded.data
        values, back = (self.buffers.take(name, base.shape) for name in ("values", "back"))
        values.rows.copy_(base)
        back.rows.copy_(rounded.rows)
        before = values.flat
        if base.dtype != dtype or scale != 1.0:
            before = self._base_rounded(values.rows, scale).flat
            back.flat.mul_(scale)
        loss = measure(values.flat, before, total.flat, back.flat)
        if not math.isfinite(loss.difference):  # a value is or became infinite
            self._check(values.flat.add_(total.flat))
        return loss, rounded.data

    def _base_rounded(self, values: Tensor, scale: float) -> _Buffer:
        """Return the base's values in the dtype of the output, clamped to its range."""
        dtype, largest = self.output.dtype, torch.finfo(self.output.dtype).max
        before = self.buffers.take("before", values.shape)
        torch.div(values, scale, out=before.rows).clamp_(-largest, largest)
        before.rows.copy_(self.buffers.take("cast", values.shape, dtype).rows.copy_(before.rows))
        before.flat.mul_(scale)
        return before

    def _check(self, values: Tensor) -> None:
        """Raise RoundingError if the dtype cannot represent the values.

        They are checked before rounding: some versions of torch turn infinity into the largest
        value of fp8, others into NaN.
        """
        info = torch.finfo(self.output.dtype)
        low, high = (float(end) for end in values.aminmax())
        worst = max(-low, high)
        if worst <= info.max * (1 + info.eps / 4):  # up to this it is rounded to the largest value
            return
        if not math.isfinite(worst):
            raise RoundingError(
                f"{self.output.key} has NaN or infinite values, in the base or with the adapter "
                "added"
            )
        raise RoundingError(
            f"{self.output.key} has a value of {worst:.4g}, but the largest value of "
            f"{short_name(self.output.dtype)} is {info.max:.4g}. Use bf16 or fp32"
            + (", or fp8 with scales" if self.output.dtype.itemsize == 1 else "")
        )

    def _scale(self) -> float:
        """Return the smallest power of two for which the largest value fits into the dtype.

        Dividing by it is exact, and so is multiplying by it in half precision, as ComfyUI does.
        Another scale would be rounded there, and would change all weights by up to 0.2% in the same
        direction. For this reason it is not below fp16's smallest normal number.
        """
        columns, largest = count(self.output.shape[1:]), 0.0
        for piece in self.output.pieces:
            update = piece.update() if piece.update else None
            for first, base in self._blocks(piece, columns):
                total = self.buffers.take("total", base.shape).rows.copy_(base)
                if update:
                    update.add_to(total, first)
                largest = max(largest, float(total.abs().max()))
        if not (math.isfinite(largest) and largest):
            return 1.0
        return 2.0 ** max(math.ceil(math.log2(largest / _FP8_MAX)), -14)


class _Buffer(NamedTuple):
    """The same memory as rows and columns, as values and as bytes."""

    rows: Tensor
    flat: Tensor
    data: memoryview


class _Buffers(threading.local):
    """Memory that each thread reuses, because allocating takes longer than the computation.

    The views are reused as well: while a thread creates one, it may have to wait for the GIL.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[tuple[str, torch.dtype, Shape], _Buffer] = {}

    def take(self, name: str, shape: Shape, dtype: torch.dtype = torch.float32) -> _Buffer:
        """Return memory for (rows, columns) with arbitrary values."""
        buffer = self.views.get((name, dtype, shape))
        if buffer is None:
            held = self.held.get((name, dtype))
            if held is None or held.numel() < count(shape):
                held = torch.empty(max(count(shape), _BLOCK), dtype=dtype)
                self.held[name, dtype] = held
                self.views = {k: v for k, v in self.views.items() if k[:2] != (name, dtype)}
            flat = held[: count(shape)]
            buffer = _Buffer(flat.view(shape), flat, as_bytes(flat))
            self.views[name, dtype, shape] = buffer
        return buffer
