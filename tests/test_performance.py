"""The benchmarks run, on little; what they measure is nobody's business here."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from tests import ROOT
from tests.performance import (
    attach,
    calls,
    cost,
    gpu,
    layer,
    measuring,
    peers,
    plans,
    real_step,
    recipes,
    shapes,
    streaming,
    train_step,
)

SHORT = ["--rounds", "1", "--seconds", "0", "--device", "cpu", "--rank", "4"]


@pytest.mark.parametrize("name", ["sd15-320@16", "64x32@16"])
def test_layer_benchmark(name, tmp_path, capsys):
    options = ["--shapes", name, "--json", str(tmp_path / "all.json"), *SHORT]
    options += ["--methods", "peft-lora", "peft-gralora", "ours"]
    layer.main([*options, "--dtypes", "fp32", "bf16-autocast"])
    found = json.loads((tmp_path / "all.json").read_text())["results"]
    assert [(row["dtype"], row["measure"]) for row in found["time"]] == [
        (dtype, measure)
        for dtype in ("fp32", "bf16-autocast")
        for measure in ("forward", "training")
    ]
    assert all(row["least_passes"] >= row["least_operations"] > 0 for row in found["time"])
    assert len(found["memory"]) == 2
    weights = [row["measure"] for row in found["weight"]]
    assert weights == (["delta_weight", "merge + unmerge"] if name == "64x32@16" else [])
    assert name in capsys.readouterr().out


def test_calls_of_a_small_layer(tmp_path):
    """In fp32 its backward pass has no Python, and no more kernels than PEFT's LoRA."""
    options = ["--shapes", "32x32@8", "--device", "cpu", "--json", str(tmp_path / "all.json")]
    calls.main([*options, "--methods", "peft-lora", "ours"])
    found = json.loads((tmp_path / "all.json").read_text())["results"]
    rows = {(row["dtype"], row["method"]): row for row in found}
    ours, lora = rows["fp32", "ours"], rows["fp32", "peft-lora"]
    assert lora["names"]["aten.mm.default"] == 7  # six of LoRA and the frozen layer's
    assert ours["backward"]["calls"] == lora["backward"]["calls"] == 0
    for one in ("forward", "backward"):
        for dtype in ("fp32", "bf16-autocast"):
            theirs = rows[dtype, "peft-lora"][one]["kernels"]
            assert 0 < rows[dtype, "ours"][one]["kernels"] <= theirs


def test_methods_share_the_frozen_weights_and_count_the_same_parameters():
    shape = shapes.make_shape("sd15-320@16", torch.device("cpu"), torch.float32)
    targets = peers.adapted_paths(shape.module, shapes.TARGETS)
    assert len(targets) == 8
    counts, outputs = set(), []
    for method in ("peft-lora", "peft-gralora", "ours"):
        changed = peers.adapted(shape.module, method, targets, peers.Sizes(8, 2))
        shared = {id(parameter) for parameter in shape.module.parameters()}
        counts.add(sum(p.numel() for p in changed.parameters() if id(p) not in shared))
        assert shared <= {id(parameter) for parameter in changed.parameters()}
        outputs.append(changed(*shape.inputs))
    assert counts == {8 * (8 * 320 + 6 * 320 + 2 * 768)}
    assert not any(torch.equal(output, shape.module(*shape.inputs)) for output in outputs)


def test_shapes_of_the_default():
    for name in (*shapes.BLOCKS, *shapes.LAYERS):
        kind, _, tokens = name.partition("@")
        assert tokens.isdigit()
        assert kind in shapes._BLOCKS or len(kind.split("x")) == 2
    with pytest.raises(ValueError, match="sd15-320"):
        shapes.make_shape("sd15@8", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="lacks its number of tokens"):
        shapes.make_shape("8x8", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        ("sd15", 859_520_964),
        ("sdxl", 2_567_463_684),
        ("sd35-medium", 2_469_663_936),
        ("flux", 11_901_408_320),
        ("flux2-klein", 3_875_544_576),
    ],
)
def test_real_sizes_are_those_of_the_published_weights(name, elements):
    model = real_step.make_denoiser(real_step.BASES[name], torch.device("meta"), quick=False)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == elements


def test_memory_is_what_was_allocated():
    def run():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second + torch.ones(500).sum()

    # the second and third at once, or first and second; the third is as large
    assert 8000 <= measuring.peak_bytes(run, torch.device("cpu")) <= 8000 + 1024

    x, w = torch.ones(10, 20, requires_grad=True), torch.ones(20, 20)
    assert measuring.saved_bytes(lambda: (x @ w).exp(), [w]) == 4 * 10 * 20  # exp's result


def test_bounds():
    use, peak = cost.Use(tokens=100, inputs=30, outputs=20), cost.Peak(operations=1e3, bytes=1e9)
    operations, passes = cost.least_seconds([use, use], 4, peak, 2, backward=True)
    assert operations == passes == pytest.approx(2 * 3 * 2 * 100 * 4 * (30 + 20) / 1e3)
    _, passes = cost.least_seconds([use], 4, cost.Peak(1e12, 1.0), 2, backward=False)
    assert passes == 2 * (3000 + 120 + 400 + 400 + 80 + 4000)


def test_attach_benchmark(tmp_path, capsys):
    options = ["--double_blocks", "1", "--single_blocks", "2", "--json", str(tmp_path / "all.json")]
    attach.main([*options, *SHORT])
    found = json.loads((tmp_path / "all.json").read_text())["results"]
    assert {row["preset"]: row["layers"] for row in found} == {
        "attention": 8 + 2 * 3,
        "attention+ff": 12 + 2 * 5,
    }
    assert "load_lora_weights" in capsys.readouterr().out


def test_train_step_benchmark(tmp_path, capsys):
    options = ["--bases", "tiny", "--batch_size", "1", "--json", str(tmp_path / "all.json")]
    train_step.main([*options, *SHORT])
    (row,) = json.loads((tmp_path / "all.json").read_text())["results"]
    assert row["layers"] == 32
    assert set(row["ms"]) == {*train_step.METHODS, train_step.TRAINER}
    assert "trainer / bare, ours" in capsys.readouterr().out


def test_undo_is_called_after_each_call_and_does_not_count():
    calls = []
    measuring.timed(
        lambda: calls.append("run"), torch.device("cpu"), 2, lambda: calls.append("undo")
    )
    assert calls == ["run", "undo", "run", "undo"]


# -- the GPU day -----------------------------------------------------------------------------------


def test_the_tables_of_the_gpu_day_are_those_of_its_results(tmp_path):
    """In the document, whether a GPU has measured or not."""
    kept, copy = ROOT / "docs" / gpu.RESULTS_NAME, tmp_path / "performance.md"
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    shutil.copy(ROOT / "docs" / "performance.md", copy)
    gpu.write_tables(copy, results)
    assert copy.read_text(encoding="utf-8") == (ROOT / "docs" / "performance.md").read_text(
        encoding="utf-8"
    )


def test_a_table_is_written_between_its_markers(tmp_path):
    document = tmp_path / "performance.md"
    empty = [f"<!-- gpu:{name} --><!-- /gpu:{name} -->" for name in [*gpu.PARTS, "unseen"]]
    document.write_text("\n".join(["begin", *empty, "end"]), encoding="utf-8")
    row = {"base": "sdxl", "way": "bf16", "ms": 100.2, "spread_ms": 1.0}
    row |= {"peak_gib": 9.0, "plan_gib": 10.0}
    failed = {"base": "flux", "way": "bf16", "error": "OutOfMemoryError: no room"}
    steps = {"machine": "A GPU, torch 9", "quick": False, "results": [row, failed]}
    gpu.write_tables(document, {"steps": steps})
    text = document.read_text(encoding="utf-8")
    assert text.startswith("begin")
    assert text.endswith("end")
    assert "A GPU, torch 9:\n\n| base | way |" in text
    assert "| sdxl | bf16 | 100 ± 1 | 9.00 | 10.00 | 0.90 |" in text
    assert "| flux | bf16 | `failed: OutOfMemoryError: no room` |" in text
    assert "| peak memory against the plan | A GPU |" in text
    assert "Not measured yet: `python -m tests.performance.gpu --parts blocks`" in text
    gpu.write_tables(document, {"steps": {**steps, "quick": True}})
    text = document.read_text(encoding="utf-8")
    assert "Not a measurement, only a trial of the command on small shapes; A GPU, torch 9:" in text
    assert "| peak memory against the plan | no machine yet |" in text
    document.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="gpu:steps"):
        gpu.write_tables(document, {})


@pytest.fixture
def two_parts(monkeypatch):
    """Return the parts that ran; the first time, the first one fails."""
    ran = []

    def run(file, args):
        ran.append(file.name)
        if len(ran) == 1:
            raise RuntimeError("interrupted")
        file.write_text(json.dumps({"machine": "A GPU", "results": {}}), encoding="utf-8")

    parts = {name: gpu.Part(run, lambda results: (["a"], [])) for name in ("one", "two")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return ran


def test_parts_that_are_done_are_not_run_again(two_parts, tmp_path, capsys):
    line = ["--quick", "--folder", str(tmp_path)]
    assert gpu.main(line) == 1
    assert two_parts == ["one.part", "two.part"]
    assert set(json.loads((tmp_path / "gpu.json").read_text())) == {"two"}
    assert gpu.main(line) == 0
    assert two_parts == ["one.part", "two.part", "one.part"]
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: result["quick"] for name, result in results.items()} == {"one": True, "two": True}
    assert "one failed: RuntimeError: interrupted" in capsys.readouterr().err


def test_no_part_is_begun_when_the_time_is_up(two_parts, tmp_path, capsys):
    line = ["--quick", "--folder", str(tmp_path)]
    assert gpu.main([*line, "--minutes", "0"]) == 1
    assert not two_parts
    assert "--minutes 0 have passed; run again for one, two" in capsys.readouterr().out


def test_small_shapes_never_reach_the_documents(two_parts, tmp_path, capsys):
    for docs in (ROOT / "docs", ROOT / "tests" / ".." / "docs"):
        with pytest.raises(SystemExit):
            gpu.main(["--quick", "--folder", str(tmp_path), "--docs", str(docs)])
        assert "give a copy of them with --docs" in capsys.readouterr().err
    gpu.main(["--quick", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main(["--folder", str(tmp_path)])
    assert "has two, which ran with --quick" in capsys.readouterr().err
    assert two_parts == ["one.part", "two.part"]


def test_the_help_of_the_gpu_day_needs_no_torch():
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['gpu', '--help']\n"
    code += "runpy.run_module('tests.performance.gpu', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: python -m tests.performance.gpu")
    assert not done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_day_needs_a_gpu():
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu.main([])


def test_recipes(capsys):
    """Plans for cards: with tiny models, everything fits and nothing is streamed."""
    recipes.main(["--quick", "--bases", "SDXL", "FLUX.2 dev, 2 GPUs", "--resolutions", "64"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[3] for line in lines] == ["fits", *["yes"] * 5]
    assert [line.split(" | ")[4] for line in lines] == ["streamed", *[""] * 5]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts the peak of the memory")
def test_plans_against_resident_memory(capsys):
    options = ["--megabytes", "5", "--bases", "flux", "--ways", "whole", "--resolution", "16"]
    plans.main(options)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| flux")]
    assert [row[:3] for row in rows] == [["flux", "whole", "before"], ["flux", "whole", "steps"]]


def test_streaming_benchmark(tmp_path, capsys):
    """A block is copied forward and backward, but for those that are there; no more is held."""
    options = ["--json", str(tmp_path / "all.json"), *SHORT]
    streaming.main(["--quick", "--bases", "sd15", "--kept", "0", "0.5", *options])
    whole, *streamed = json.loads((tmp_path / "all.json").read_text())["results"]
    assert whole["copied"] == whole["held"] == 0
    for row in streamed:
        assert 0 < row["held"] <= row["planned_held"]
        most = row["planned_copied"]
        assert most - 2 * row["planned_held"] <= row["copied"] <= most
    assert "copied MiB" in capsys.readouterr().out
