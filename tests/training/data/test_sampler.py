"""The order of samples: every item once per epoch, shared out among processes, and resumable."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
import torch

from gralora_diffusion.training.data.sampler import Prefetcher, SampleStream, StreamBatchSampler
from gralora_diffusion.training.data.seeds import generator, seed_from


def indices(stream, start, count):
    """The items at ``count`` positions from ``start`` on, across epochs."""
    return [stream.index(position) for position in range(start, start + count)]


def test_seed_is_the_documented_hash():
    digest = hashlib.sha256(b'[7, "noise", 3]').hexdigest()
    assert seed_from(7, "noise", 3) == int(digest[:16], 16) // 2


def test_seed_tells_parts_apart():
    seeds = [seed_from("ab", "c"), seed_from("a", "bc"), seed_from(1, 2), seed_from("1", "2")]
    seeds += [seed_from(12), seed_from("abc"), seed_from("a", "b", "c")]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generator_depends_on_seed_purpose_and_position_only():
    def draw(*parts):
        return torch.randn(8, generator=generator(*parts))

    torch.manual_seed(0)
    first = draw(0, "noise", 5)
    torch.manual_seed(1)
    assert torch.equal(first, draw(0, "noise", 5))
    for other in ((1, "noise", 5), (0, "timestep", 5), (0, "noise", 6)):
        assert not torch.equal(first, draw(*other))


def test_each_epoch_is_another_permutation_of_all_items():
    stream = SampleStream(7, seed=0, name="instance")
    order = indices(stream, 0, 70)
    epochs = [order[start : start + 7] for start in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    assert order != indices(SampleStream(7, seed=1, name="instance"), 0, 70)
    assert order != indices(SampleStream(7, seed=0, name="class"), 0, 70)


def test_positions_may_be_asked_in_any_order():
    order = indices(SampleStream(5, seed=3, name="instance"), 0, 40)
    stream = SampleStream(5, seed=3, name="instance")
    assert [stream.index(position) for position in reversed(range(40))] == order[::-1]
    assert indices(stream, 13, 9) == order[13:22]


def test_stream_of_nothing_and_negative_positions_are_refused():
    with pytest.raises(ValueError, match="'instance' needs at least one item"):
        SampleStream(0, seed=0, name="instance")
    with pytest.raises(IndexError):
        SampleStream(1, seed=0, name="instance").index(-1)


GROUPS = ["wide"] * 5 + ["square"] + ["tall"] * 4


@pytest.mark.parametrize(
    ("groups", "batch_size"), [(None, 4), (["one"] * 10, 4), (GROUPS, 1)], ids=str
)
def test_order_is_the_usual_one_where_no_batch_could_mix_groups(groups, batch_size):
    usual = SampleStream(10, seed=0, name="instance")
    stream = SampleStream(10, 0, "instance", groups, batch_size)
    assert stream.length == usual.length == 10
    assert indices(stream, 0, 100) == indices(usual, 0, 100)
    assert not any(stream.padding.values())


@pytest.mark.parametrize(
    ("batch_size", "padding"),
    [
        (2, {"wide": 1, "square": 1, "tall": 0}),
        (3, {"wide": 1, "square": 2, "tall": 2}),
        (7, {"wide": 2, "square": 6, "tall": 3}),
    ],
)
def test_batches_are_of_one_group_and_no_item_is_left_out(batch_size, padding):
    stream = SampleStream(10, 0, "instance", GROUPS, batch_size)
    assert stream.padding == padding
    assert stream.length == 10 + sum(padding.values())
    orders, shapes, extra = set(), set(), Counter()
    for epoch in range(60):
        order = indices(stream, epoch * stream.length, stream.length)
        for start in range(0, stream.length, batch_size):
            batch = order[start : start + batch_size]
            assert len({GROUPS[item] for item in batch}) == 1
            shapes.add((start, GROUPS[batch[0]]))
        seen = Counter(order)
        assert set(seen) == set(range(10))
        for group, more in padding.items():
            counts = [seen[item] for item in range(10) if GROUPS[item] == group]
            assert sum(counts) == len(counts) + more
            assert max(counts) - min(counts) <= 1
        extra.update(seen)
        orders.add(tuple(order))
    assert len(orders) == 60
    assert len(shapes) == 3 * stream.length // batch_size  # the order of the batches changes too
    for group in padding:  # and which items come once more: in the end all alike
        counts = [extra[item] for item in range(10) if GROUPS[item] == group]
        assert max(counts) - min(counts) < 30


def test_grouped_positions_may_be_asked_in_any_order():
    order = indices(SampleStream(10, 3, "instance", GROUPS, 2), 0, 60)
    stream = SampleStream(10, 3, "instance", GROUPS, 2)
    assert [stream.index(position) for position in reversed(range(60))] == order[::-1]
    assert order != indices(SampleStream(10, 3, "class", GROUPS, 2), 0, 60)
    assert order != indices(SampleStream(10, 4, "instance", GROUPS, 2), 0, 60)


def test_a_group_for_each_item_is_wanted():
    with pytest.raises(ValueError, match="10 groups for 9 items of the stream 'class'"):
        SampleStream(9, 0, "class", GROUPS, 2)


def steps_of(samplers, accumulation):
    """Positions of each optimizer step, all processes and micro-batches together, sorted."""
    per_process = [list(sampler) for sampler in samplers]
    steps = len(per_process[0]) // accumulation
    return [
        sorted(
            position
            for batches in per_process
            for batch in batches[step * accumulation : (step + 1) * accumulation]
            for position in batch
        )
        for step in range(steps)
    ]


def samplers(batch_size, accumulation, processes, start_step=0, max_steps=6):
    return [
        StreamBatchSampler(
            start_step=start_step,
            max_steps=max_steps,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            process_index=index,
            num_processes=processes,
        )
        for index in range(processes)
    ]


def test_positions_follow_the_documented_formula():
    two, accumulation, size = samplers(3, 2, 2), 2, 3
    for process, sampler in enumerate(two):
        batches = list(sampler)
        assert len(sampler) == len(batches) == 12
        for step in range(6):
            for micro in range(accumulation):
                start = step * 12 + micro * 6 + process * size
                assert batches[step * 2 + micro] == [start, start + 1, start + 2]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes"), [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
)
def test_any_way_of_sharing_out_takes_the_same_samples_per_step(
    batch_size, accumulation, processes
):
    steps = steps_of(samplers(batch_size, accumulation, processes), accumulation)
    assert steps == [list(range(step * 4, step * 4 + 4)) for step in range(6)]


def test_starting_later_goes_on_where_the_whole_run_would():
    for whole, resumed in zip(samplers(2, 3, 2), samplers(2, 3, 2, start_step=4), strict=True):
        assert list(resumed) == list(whole)[4 * 3 :]
        assert len(resumed) == 2 * 3
    assert list(samplers(2, 1, 1, start_step=6)[0]) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"gradient_accumulation_steps": 0},
        {"process_index": 1},
        {"start_step": 7},
        {"start_step": -1},
    ],
)
def test_impossible_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match=r"process|must be"):
        StreamBatchSampler(**{"start_step": 0, "max_steps": 6, "batch_size": 2, **wrong})


def test_ahead_makes_an_item_early_and_gives_each_once():
    made = []

    def items():
        for item in range(4):
            made.append(item)
            yield item

    ahead = Prefetcher(items())
    assert next(ahead) == 0
    assert made == [0]
    ahead.prepare()
    ahead.prepare()
    assert made == [0, 1]
    assert list(ahead) == [1, 2, 3]
    ahead.prepare()  # there is no more
    assert list(ahead) == []


def test_ahead_passes_errors_on():
    ahead = Prefetcher(1 // number for number in (1, 0))
    assert next(ahead) == 1
    with pytest.raises(ZeroDivisionError):
        ahead.prepare()
