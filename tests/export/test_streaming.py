"""Whole files against the same sums in float64, rounded once."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gralora_diffusion.export import streaming
from gralora_diffusion.export.rounding import Rounding, RoundingError
from gralora_diffusion.export.streaming import (
    OutputTensor,
    Piece,
    sample_remedies,
    write_streamed,
)
from gralora_diffusion.io.tensor_files import read_header
from tests.export.test_tensor_bytes import same

if sys.platform == "linux":
    import resource

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16, FP8]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks in small tensors."""
    monkeypatch.setattr(streaming, "_BLOCK", 512)


@dataclass(frozen=True)
class Dense:
    """An update held whole."""

    rows: Tensor

    def add_to(self, target: Tensor, start: int) -> None:
        target += self.rows[start : start + len(target)]


def whole(stored, **changes) -> OutputTensor:
    """A tensor of the output that is one of the source."""
    piece = Piece(stored, 0, stored.shape[0] if stored.shape else 1, **changes)
    return OutputTensor(stored.key, tuple(stored.shape), stored.dtype, (piece,))


def written(path, outputs, rounding=None, **options) -> tuple[dict[str, Tensor], dict]:
    losses = write_streamed(
        path, outputs, {"format": "pt"}, rounding or Rounding(), progress=False, **options
    )
    return load_file(path), losses


def source(path, tensors: dict[str, Tensor]):
    save_file(tensors, path)
    return read_header(path)[0]


def steps(*shape: int, size: float = 1 / 64) -> Tensor:
    """Random multiples of ``size`` up to 2: sums of them are exact in fp32."""
    return torch.randint(-int(2 / size), int(2 / size) + 1, shape) * size


def test_untouched_tensors_are_copied_byte_for_byte(tmp_path):
    """Of every dtype, from several shards; values that are not finite too."""
    odd = torch.tensor([float("nan"), float("inf"), -0.0])
    shards = [
        {"a": torch.randn(60, 30).bfloat16(), "b": torch.arange(7), "c": odd},
        {"d": torch.randn(5, 3, 2, 2).half(), "e": torch.randn(9).to(FP8), "f": torch.tensor(2.5)},
        {"g": torch.tensor(True), "h": torch.randn(3, 3).double(), "i": torch.empty(0)},
    ]
    outputs, expected = [], {}
    for number, tensors in enumerate(shards):
        stored = source(tmp_path / f"{number}.safetensors", tensors)
        outputs += [whole(tensor) for tensor in stored.values()]
        expected |= tensors
    found, losses = written(tmp_path / "out.safetensors", outputs)
    assert same(found, expected)
    assert losses == {}
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", DTYPES)
def test_an_update_is_added_with_one_rounding(held, dtype, tmp_path):
    base, update = steps(64, 48).to(held), steps(64, 48, size=1 / 1024)
    stored = source(tmp_path / "base.safetensors", {"a": base})["a"]
    output = replace(whole(stored, update=lambda: Dense(update)), dtype=dtype)
    found, losses = written(tmp_path / "out.safetensors", [output])
    exact = base.double() + update.double()
    assert torch.equal(exact.float().double(), exact)
    assert same(found, {"a": exact.float().to(dtype)})
    before, kept = base.to(dtype).double(), found["a"].double()
    loss, size = losses["a"], update.double().square().sum()
    assert loss.weight == pytest.approx(float(before.square().sum()), rel=1e-5)
    assert loss.update == pytest.approx(float(size), rel=1e-5)
    missing = float((kept - before - update.double()).square().sum())
    assert loss.difference == pytest.approx(missing, rel=1e-4, abs=1e-12)
    gain = float(((kept - before) * update.double()).sum() / size)
    assert loss.gain == pytest.approx(gain, abs=1e-5)


def test_pieces_joined_sliced_turned_and_in_memory(tmp_path):
    """As in a fused qkv: rows of several tensors and files, some of them with an update."""
    shards = [
        {"q": steps(40, 24), "v": steps(90, 24)},
        {"turned": steps(24, 70), "conv": steps(16, 4, 3, 2), "bias": steps(33)},
    ]
    stored = source(tmp_path / "0.safetensors", shards[0])
    stored |= source(tmp_path / "1.safetensors", shards[1])
    memory, update = steps(24, 20), [steps(40, 24), steps(35, 24), steps(50, 24)]
    pieces = (
        Piece(stored["q"], 0, 40, update=lambda: Dense(update[0])),
        Piece(stored["v"], 17, 60),
        Piece(stored["turned"], 20, 55, transposed=True, update=lambda: Dense(update[1])),
        Piece(memory, 3, 19, transposed=True),
        Piece(stored["turned"], 0, 70, transposed=True),
        Piece(stored["v"], 40, 90, update=lambda: Dense(update[2])),
    )
    kernel, bias = steps(12, 24), torch.randn(5)
    joined = [
        OutputTensor("joined", (40 + 43 + 35 + 16 + 70 + 50, 24), torch.float32, pieces),
        OutputTensor(
            "conv",
            (12, 4, 3, 2),
            torch.float32,
            (Piece(stored["conv"], 2, 14, update=lambda: Dense(kernel)),),
        ),
        OutputTensor(
            "bias", (38,), torch.float32, (Piece(stored["bias"], 0, 33), Piece(bias, 0, 5))
        ),
        OutputTensor("number", (), torch.bfloat16, (Piece(torch.tensor(1.0), 0, 1),)),
        OutputTensor("steps", (2,), torch.int64, (Piece(torch.arange(5), 2, 4),)),
        OutputTensor("mark", (0,), torch.float32, (Piece(torch.empty(0), 0, 0),)),
    ]
    found, losses = written(tmp_path / "out.safetensors", joined)
    a, b = shards
    parts = [
        a["q"] + update[0],
        a["v"][17:60],
        b["turned"].mT[20:55] + update[1],
        memory.mT[3:19],
        b["turned"].mT,
        a["v"][40:] + update[2],
    ]
    expected = {
        "joined": torch.cat(parts),
        "conv": b["conv"][2:14] + kernel.view(12, 4, 3, 2),
        "bias": torch.cat([b["bias"], bias]),
        "number": torch.tensor(1.0).bfloat16(),
        "steps": torch.tensor([2, 3]),
        "mark": torch.empty(0),
    }
    assert same(found, expected)
    assert set(losses) == {"joined", "conv"}
    total = sum(float(u.double().square().sum()) for u in update)
    assert losses["joined"].update == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, FP8])
def test_fp8_with_a_scale(held, tmp_path):
    """value / scale, rounded once; the scale is the smallest power of two with which it fits."""
    base, update = (3 * torch.randn(50, 40)).to(held), 0.3 * torch.randn(50, 40)
    stored = source(tmp_path / "base.safetensors", {"a.weight": base})["a.weight"]
    output = whole(stored, update=lambda: Dense(update))
    output = replace(output, dtype=FP8, scale_key="a.scale_weight")
    found, losses = written(tmp_path / "out.safetensors", [output])
    total = base.float() + update
    scale = found["a.scale_weight"]
    assert torch.frexp(scale).mantissa == 0.5
    assert 224 < total.abs().max() / scale <= 448
    nearest = (total.double() / scale.double()).float().to(FP8)
    assert same({"a": found["a.weight"]}, {"a": nearest})
    before = (base.double() / scale).float().to(FP8).double() * scale
    kept = found["a.weight"].double() * scale
    exact = total.double() - base.double()
    missing = float((kept - before - exact).square().sum())
    loss = losses["a.weight"]
    assert loss.weight == pytest.approx(float(before.square().sum()), rel=1e-5)
    assert loss.difference == pytest.approx(missing, rel=1e-4)
    gain = float(((kept - before) * exact).sum() / exact.square().sum())
    assert loss.gain == pytest.approx(gain, abs=1e-4)


def test_fp8_with_a_scale_of_zeros_and_untouched(tmp_path):
    tensors = {"zero.weight": torch.zeros(4, 4), "one.weight": torch.randn(4, 4).bfloat16()}
    stored = source(tmp_path / "base.safetensors", tensors)
    outputs = [replace(whole(t), dtype=FP8, scale_key=f"{k}.scale") for k, t in stored.items()]
    found, losses = written(tmp_path / "out.safetensors", outputs)
    assert found["zero.weight.scale"] == 1
    assert not found["zero.weight"].float().any()
    scale, one = found["one.weight.scale"], tensors["one.weight"].float()
    assert 224 < one.abs().max() / scale <= 448
    assert same({"a": found["one.weight"]}, {"a": (one / scale).to(FP8)})
    assert losses == {}


@pytest.mark.parametrize("size", [1e-7, 1e-4, 0.01, 1.0, 300.0])
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16])
def test_scaled_fp8_is_read_exactly_in_half_precision(size, computed, tmp_path):
    """ComfyUI 0.3.64 multiplies there, ``weight * scale_weight.to(weight.dtype)`` in ``ops.py``."""
    stored = source(tmp_path / "base.safetensors", {"a.weight": size * torch.randn(30, 40)})
    output = replace(whole(stored["a.weight"]), dtype=FP8, scale_key="a.scale_weight")
    found, _ = written(tmp_path / "out.safetensors", [output])
    weight, scale = found["a.weight"], found["a.scale_weight"]
    exact = weight.double() * scale.double()
    assert torch.equal(scale.to(computed).double(), scale.double())
    if computed == torch.bfloat16 or size >= 0.01:  # what is below fp16's range cannot be there
        assert torch.equal((weight.to(computed) * scale.to(computed)).double(), exact)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (
            70000.0,
            torch.float16,
            r"bad has a value of 7.014e\+04, but the largest .* fp16 is 6\.55e\+04",
        ),
        (
            500.0,
            FP8,
            r"bad has a value of 500, but the largest .* fp8_e4m3 is 448.*fp8 with scales",
        ),
        (float("nan"), torch.float16, "bad has NaN or infinite values"),
        (float("-inf"), torch.float32, "bad has NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("updated", [True, False])
def test_what_a_dtype_cannot_hold_is_named_and_leaves_no_file(
    updated, value, dtype, message, tmp_path
):
    bad = torch.ones(60, 40, dtype=torch.bfloat16)
    bad[33, 7] = value
    tensors = {"bad": bad, **{f"good.{i}": torch.ones(60, 40) for i in range(5)}}
    stored = source(tmp_path / "base.safetensors", tensors)
    change = {"update": lambda: Dense(torch.zeros(60, 40))} if updated else {}
    outputs = [replace(whole(t, **change), dtype=dtype) for t in stored.values()]
    with pytest.raises(RoundingError, match=message):
        written(tmp_path / "out.safetensors", outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize("stochastic", [True, False])
def test_large_values_that_fit_are_kept(stochastic, tmp_path):
    values = torch.tensor([[65504.0, -65504.0, 1.0, 0.0]])
    stored = source(tmp_path / "base.safetensors", {"a": values})["a"]
    output = replace(whole(stored, update=lambda: Dense(torch.zeros(1, 4))), dtype=torch.float16)
    found, _ = written(tmp_path / "out.safetensors", [output], Rounding(stochastic))
    assert same(found, {"a": values.half()})
    huge = torch.tensor([[3e38, -3e38, 2e30, 0.0]])
    stored = source(tmp_path / "huge.safetensors", {"a": huge})["a"]
    output = replace(whole(stored, update=lambda: Dense(torch.zeros(1, 4))), dtype=torch.bfloat16)
    found, _ = written(tmp_path / "out.safetensors", [output])
    assert same(found, {"a": huge.bfloat16()})


def test_a_scale_cannot_hide_what_is_not_finite(tmp_path):
    bad = torch.ones(60, 40)
    bad[1, 1] = float("inf")
    stored = source(tmp_path / "base.safetensors", {"bad": bad})["bad"]
    with pytest.raises(RoundingError, match="bad has NaN or infinite values"):
        written(
            tmp_path / "out.safetensors", [replace(whole(stored), dtype=FP8, scale_key="scale")]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]


def test_rounding_by_chance_needs_its_seed_alone(tmp_path):
    """The same bytes however many threads; only what has an update is rounded so."""
    tensors = {f"{i}": torch.randn(80, 40) for i in range(6)}
    stored = source(tmp_path / "base.safetensors", tensors)
    update = torch.full((80, 40), 1e-3)
    outputs = [
        replace(whole(t, update=lambda: Dense(update)), dtype=torch.bfloat16)
        for t in stored.values()
    ]
    outputs.append(replace(outputs[0], key="untouched", pieces=(Piece(stored["0"], 0, 80),)))
    path, made = tmp_path / "out.safetensors", []
    for workers, seed in ((1, 5), (2, 5), (7, 5), (2, 6)):
        written(path, outputs, Rounding(True, seed), workers=workers)
        made.append(path.read_bytes())
    assert made[0] == made[1] == made[2] != made[3]
    found = load_file(path)
    assert torch.equal(found["untouched"], tensors["0"].bfloat16())
    kept = torch.cat([found[key].double() - t.double() for key, t in tensors.items()])
    spread = float(kept.std()) / kept.numel() ** 0.5
    assert abs(float(kept.mean()) - 1e-3) < 5 * spread
    assert all(not torch.equal(found[k], (t + update).bfloat16()) for k, t in tensors.items())


@pytest.mark.parametrize("stochastic", [True, False])
def test_fp64_holds_every_sum(stochastic, tmp_path):
    """Sums are formed in fp32; there is nothing to round, by chance or to nearest."""
    base, update = steps(10, 24).double(), torch.randn(10, 24)
    stored = source(tmp_path / "base.safetensors", {"a": base})["a"]
    output = whole(stored, update=lambda: Dense(update))
    found, losses = written(tmp_path / "out.safetensors", [output], Rounding(stochastic))
    assert same(found, {"a": (base.float() + update).double()})
    assert losses["a"].error < 1e-6
    assert set(sample_remedies(output, Rounding(True))) == {"fp64"}


def test_remedies_are_what_the_other_ways_cost(tmp_path):
    """Small enough for one block, so that the sample is the whole."""
    base, update = steps(10, 24).bfloat16(), 0.002 * torch.randn(10, 24)
    stored = source(tmp_path / "base.safetensors", {"a": base})["a"]
    kept = whole(stored, update=lambda: Dense(update))
    for output in (kept, replace(kept, dtype=FP8, scale_key="scale")):
        remedies = sample_remedies(output, Rounding())
        name = {torch.bfloat16: "bf16", FP8: "fp8_e4m3"}[output.dtype]
        finer = ["fp32", "fp16"] if name == "bf16" else ["fp32", "bf16", "fp16"]
        assert list(remedies) == [name, f"{name} and stochastic rounding", *finer]
        for way, loss in remedies.items():
            dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
            changed = output
            if way in finer:
                changed = replace(output, dtype=dtypes[way], scale_key=None)
            rounding = Rounding("stochastic" in way)
            assert loss == written(tmp_path / "out.safetensors", [changed], rounding)[1]["a"], way
    assert "fp8_e4m3 and stochastic rounding" not in sample_remedies(output, Rounding(True))


def test_remedies_leave_out_what_cannot_hold_the_values(tmp_path):
    base = torch.full((8, 8), 1e6, dtype=torch.bfloat16)
    stored = source(tmp_path / "base.safetensors", {"a": base})["a"]
    output = whole(stored, update=lambda: Dense(torch.ones(8, 8)))
    assert "fp16" not in sample_remedies(output, Rounding())


def test_what_is_there_stays_when_the_writing_fails(tmp_path):
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"precious")
    stored = source(tmp_path / "base.safetensors", {"a": torch.full((9, 9), 1e6)})["a"]
    with pytest.raises(RoundingError):
        written(path, [replace(whole(stored), dtype=torch.float16)])

    def broken() -> Dense:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(path, [whole(stored, update=broken)])
    assert path.read_bytes() == b"precious"
    assert {p.name for p in tmp_path.iterdir()} == {"out.safetensors", "base.safetensors"}


def test_threads_of_torch_are_as_before(tmp_path):
    stored = source(tmp_path / "base.safetensors", {"a": torch.randn(4, 4)})["a"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        written(tmp_path / "out.safetensors", [whole(stored)])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def write_limited(limit: int, path: Path, outputs: list[OutputTensor]) -> None:
    """Write with a limit on the size of files, as a disk with little space has it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit,) * 2)
    with pytest.raises(OSError, match="File too large"):
        write_streamed(path, outputs, {}, Rounding(), progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, limits files as Linux does")
@pytest.mark.parametrize("limit", [100_000, 2_000_000])
@pytest.mark.parametrize("touched", [True, False])
def test_a_full_disk_is_told_and_leaves_nothing(touched, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_BLOCK", 1 << 16)
    base, output = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    stored = source(base, {f"{i}": torch.randn(1000, 100) for i in range(10)})
    before = base.read_bytes()
    output.write_bytes(b"precious")
    change = {"update": lambda: Dense(torch.ones(1000, 100))} if touched else {}
    outputs = [whole(tensor, **change) for tensor in stored.values()]
    # in another process, for the limit stays
    process = multiprocessing.get_context("fork").Process(
        target=write_limited, args=(limit, output, outputs)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert output.read_bytes() == b"precious"
    assert base.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"out.safetensors", "base.safetensors"}
