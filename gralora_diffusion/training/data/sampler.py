"""The order of the samples as a function of the position in the stream of samples.

Training reads an endless stream of sample positions 0, 1, 2, ...; an optimizer step takes the next
``train_batch_size * num_processes * gradient_accumulation_steps`` of them. Everything random about
a sample comes from a generator that is made from the seed, the purpose and the position. The step
number is the only state, so a resumed run equals a run that was never stopped, and processes and
accumulation divide exactly the samples that one process would take.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Hashable, Iterator, Sequence
from itertools import cycle, islice
from typing import TypeVar

import torch
from torch.utils.data import Sampler

from .seeds import generator

Item = TypeVar("Item")
#: Permutations that a rotation remembers.
_KEPT_TURNS = 64


class SampleStream:
    """An endless stream over items 0, 1, 2, ...; each epoch is a new permutation of all of them.

    Items may be in groups that no batch may mix. An epoch is then a new permutation within each
    group, split into batches, and a new order of all batches. If the last batch of a group is not
    full, the group's first items of that epoch are repeated. Each item comes at least once in an
    epoch, and ``length`` is the same for all epochs. None of this is needed for batches of one.

    Args:
        items: number of items.
        seed: of the run.
        name: distinguishes streams of the same run; each has its own permutations.
        groups: the group of each item; None if all are in one.
        batch_size: positions in a batch; batch b has those from b * ``batch_size`` on.

    Attributes:
        length: positions in an epoch; a multiple of ``batch_size`` if there are several groups.
        batch_size: 1 if no batch could mix groups, since the order does not depend on it then.
        padding: group -> how many of its items are repeated in an epoch.

    Raises:
        ValueError: there is no item, or the number of groups differs from that of items.
    """

    def __init__(
        self,
        items: int,
        seed: int,
        name: str,
        groups: Sequence[Hashable] | None = None,
        batch_size: int = 1,
    ) -> None:
        if items < 1:
            raise ValueError(f"the stream {name!r} needs at least one item, got {items}")
        self.groups = [None] * items if groups is None else list(groups)
        if len(self.groups) != items:
            raise ValueError(f"{len(self.groups)} groups for {items} items of the stream {name!r}")
        counts = Counter(self.groups)
        self.items = items
        self.seed = seed
        self.name = name
        self.batch_size = batch_size if len(counts) > 1 else 1
        self.padding = {group: -count % self.batch_size for group, count in counts.items()}
        self.length = items + sum(self.padding.values())
        self._epoch = -1
        self._order = array("q")

    def index(self, position: int) -> int:
        """Return which item is at ``position`` (0, 1, 2, ...)."""
        if position < 0:
            raise IndexError(f"position {position} in the stream {self.name!r}")
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._order = array("q", self._draw(epoch))
            self._epoch = epoch
        return self._order[place]

    def _draw(self, epoch: int) -> list[int]:
        random = generator(self.seed, f"order of {self.name}", epoch)
        order = torch.randperm(self.items, generator=random).tolist()
        if self.batch_size == 1:
            return order
        batches: list[list[int]] = []
        for group, padding in self.padding.items():
            members = [item for item in order if self.groups[item] == group]
            padded = list(islice(cycle(members), len(members) + padding))
            starts = range(0, len(padded), self.batch_size)
            batches += [padded[start : start + self.batch_size] for start in starts]
        chosen = torch.randperm(len(batches), generator=random).tolist()
        return [item for batch in chosen for item in batches[batch]]


class Rotation:
    """Members in turn, a fixed number in each epoch; each time through all is a new permutation.

    Args:
        members: at least one.
        count: how many an epoch has.
        seed: of the run.
        name: distinguishes rotations of the same run.
    """

    def __init__(self, members: Sequence[int], count: int, seed: int, name: str) -> None:
        self.members, self.count, self.seed, self.name = list(members), count, seed, name
        self._orders: dict[int, list[int]] = {}

    def member(self, epoch: int, number: int) -> int:
        """Return which member is the one of a number, from 0 to below ``count``, in an epoch."""
        turn, place = divmod(epoch * self.count + number, len(self.members))
        if turn not in self._orders:
            if len(self._orders) >= _KEPT_TURNS:
                self._orders.clear()
            random = generator(self.seed, f"turn of {self.name}", turn)
            self._orders[turn] = torch.randperm(len(self.members), generator=random).tolist()
        return self.members[self._orders[turn][place]]


class StreamBatchSampler(Sampler[list[int]]):
    """The positions of each micro-batch of one process, from ``start_step`` to ``max_steps``.

    With W processes, batch size B and accumulation over M micro-batches, micro-batch m of optimizer
    step s on process p contains the B positions from ``s*M*B*W + m*B*W + p*B`` on. Positions are
    endless, so every batch is full and no sample is left out.

    The sampler already divides the positions among the processes. Do not pass a loader that uses it
    to ``Accelerator.prepare``, which would divide them a second time.

    Args:
        start_step: optimizer steps that are already done.
        max_steps: optimizer steps at the end of the run.

    Raises:
        ValueError: a count is below one, or the step or the process is out of range.
    """

    def __init__(
        self,
        *,
        start_step: int,
        max_steps: int,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if min(batch_size, gradient_accumulation_steps, num_processes) < 1:
            raise ValueError(
                f"batch_size {batch_size}, gradient_accumulation_steps "
                f"{gradient_accumulation_steps} and num_processes {num_processes}: each must be at "
                "least 1"
            )
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index {process_index} of {num_processes} processes")
        if not 0 <= start_step <= max_steps:
            raise ValueError(f"start_step {start_step} must be from 0 to max_steps, {max_steps}")
        self.start_step = start_step
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.process_index = process_index
        self.num_processes = num_processes

    def __len__(self) -> int:
        return (self.max_steps - self.start_step) * self.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        micro_batch = self.batch_size * self.num_processes
        first = self.start_step * self.gradient_accumulation_steps
        for number in range(first, first + len(self)):
            start = number * micro_batch + self.process_index * self.batch_size
            yield list(range(start, start + self.batch_size))


class Prefetcher(Iterator[Item]):
    """An iterator whose next item can be made ahead of time."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items, self._made = items, deque[Item]()

    def prepare(self) -> None:
        """Make the next item if there is one and it has not been made yet."""
        if not self._made:
            self._made.extend(islice(self._items, 1))

    def __next__(self) -> Item:
        self.prepare()
        if not self._made:
            raise StopIteration
        return self._made.popleft()
