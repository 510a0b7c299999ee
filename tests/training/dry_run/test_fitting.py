"""Options that make a run fit into a given memory, and plans of streamed runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator

from gralora_diffusion.base_models.loading import find_base_family, load_base
from gralora_diffusion.base_models.streaming import Streaming, block_bytes
from gralora_diffusion.io.dtypes import torch_dtype
from gralora_diffusion.studio.engine.form import arguments, values_of
from gralora_diffusion.studio.engine.form import fitted as fitted_form
from gralora_diffusion.training.checks.options import find_problems
from gralora_diffusion.training.config.training_config import TrainingConfig, parse_config
from gralora_diffusion.training.data.data_module import find_images
from gralora_diffusion.training.dry_run.fitting import Fit, find_fit, format_fit, smallest_card
from gralora_diffusion.training.dry_run.formatting import format_plan
from gralora_diffusion.training.dry_run.memory_check import WARN, fitted, with_offloading
from gralora_diffusion.training.dry_run.plan import Plan, plan_run
from gralora_diffusion.training.runtime.offloading import NOTHING, Offloading
from tests import ROOT
from tests.training.runs import make_shapes

CONFIG = TrainingConfig(
    pretrained_model_name_or_path=str(ROOT / "samples/tiny-base"),
    instance_data_dir=str(ROOT / "samples/subjects/owl/train"),
    instance_prompt="an owl",
    resolution=16,
    train_batch_size=2,
    mixed_precision="no",
)


def plan_of(config: TrainingConfig) -> Plan:
    family, images = find_base_family(config), find_images(config)
    return plan_run(config, family, images, [], Accelerator(cpu=True), apart=True)


class Planned:
    """Plans by their options, each made once: a plan takes about a second."""

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}

    def __call__(self, config: TrainingConfig) -> Plan:
        key = config.to_yaml()
        if key not in self.plans:
            self.plans[key] = plan_of(config)
        return self.plans[key]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(CONFIG)


def size_of(plan: Plan, name: str, phase: str = "steps") -> int:
    return sum(row.bytes.get(phase, 0) for row in plan.memory if row.name == name)


def test_bytes_of_a_streamed_base(plan: Plan) -> None:
    """They are those of the blocks of the real models, and move from the device to the CPU."""
    pipe = load_base(CONFIG, find_base_family(CONFIG), torch_dtype("fp32"))
    blocks, encoder = block_bytes(pipe.unet), block_bytes(pipe.text_encoder)
    assert plan.blocks == {"unet": blocks, "text_encoder": encoder}
    assert plan.copied == 0
    streamed = plan.offloaded(Offloading(Streaming(), encoders=True))
    assert size_of(streamed, "unet") == size_of(plan, "unet") - sum(blocks)
    assert size_of(streamed, "ring") == sum(sorted(blocks)[-2:])
    assert size_of(streamed, "ring", "prompts") == sum(encoder)
    assert size_of(streamed, "activations") == size_of(plan, "activations")
    assert streamed.peak("pictures") == plan.peak("pictures")
    assert streamed.copied == 2 * sum(blocks)
    taught = {"with_prior_preservation": True, "prior_source": "teacher"}
    changed = replace(CONFIG, gradient_accumulation_steps=4, **taught)
    assert replace(streamed, config=changed).copied == 3 * 4 * sum(blocks)
    kept = replace(CONFIG, masked_loss=True, mask_outside="base")
    assert replace(streamed, config=kept).copied == 2 * sum(blocks)  # there are no masks
    assert replace(streamed, config=kept, masks=1).copied == 3 * sum(blocks)
    both = replace(kept, **taught)
    assert replace(streamed, config=both, masks=1).copied == 4 * sum(blocks)
    text = format_plan(streamed)
    assert f"{len(blocks)} of {len(blocks)} blocks streamed" in text
    assert re.search(r"blocks copied to the device: [\d.]+ per step, at least 0\.0 s at 20", text)
    on_cpu = replace(plan, apart=False).offloaded(Offloading(Streaming()))
    assert on_cpu.peak("steps") == plan.peak("steps") + size_of(streamed, "ring")


def test_no_more_is_streamed_than_must_be(plan: Plan) -> None:
    peak, count = plan.peak("steps"), len(plan.blocks["unet"])
    assert fitted(plan, peak).offloading == NOTHING
    least = fitted(plan, 0)
    assert least.offloading == Offloading(Streaming(), encoders=True)
    for most in range(least.peak("steps"), peak, (peak - least.peak("steps")) // 5):
        found = fitted(plan, most)
        streaming = found.offloading.denoiser
        assert found.peak("steps") <= most
        assert streaming is not None
        fewer = len(streaming.streamed(count)) - 1
        if fewer > 2:
            less = plan.offloaded(Offloading(Streaming((count - fewer) / count)))
            assert less.peak("steps") > most


def test_options_decide_what_is_streamed(plan: Plan) -> None:
    def found(**options: str | bool) -> Offloading:
        return with_offloading(plan, replace(CONFIG, **options), None, free=1).offloading

    assert found(offload_base="none") == NOTHING
    assert found(offload_base="0.5") == Offloading(Streaming(0.5), encoders=True)
    assert found() == Offloading(Streaming(), encoders=True)
    assert found(torch_compile=True) == Offloading(None, encoders=True)
    assert with_offloading(replace(plan, apart=False), CONFIG, None, 1).offloading == NOTHING
    assert with_offloading(plan, CONFIG, None, 1 << 40).offloading == NOTHING


def test_options_that_make_a_run_fit(plan: Plan) -> None:
    """Each one only where those before do not do; the plan of what is found fits."""
    planned = Planned()

    def found(size: float, streams: bool = True) -> tuple[Fit | None, Fit]:
        return find_fit(CONFIG, planned, int(size), streams=streams)

    whole = plan.peak("steps")
    fit, _ = found(whole / WARN + 1)
    assert fit is not None
    assert fit.options == ()
    assert "The run fits into" in format_fit(1 << 30, fit, fit)
    fit, smallest = found(0.9 * whole / WARN)
    assert fit is not None
    assert fit.options != ()
    assert fit.peak <= 0.9 * whole
    least = min(fitted(p, 0).peak("steps") for p in planned.plans.values())
    fit, smallest = found(least / WARN + 1)
    assert fit is not None
    assert fit.peak <= least + 1
    assert fit.options[-1] == "--offload_base blocks"
    # the studio fills its form from the text
    values = values_of(CONFIG)
    read = fitted_form(values, "plan\n\n" + format_fit(int(least), fit, smallest))
    assert read is not None
    assert read.said.startswith("To fit into ")
    given = [*arguments(values), *" ".join(fit.options).split()]
    assert parse_config(arguments({**values, **read.values})) == parse_config(given)
    none, smallest = found(0.9 * least)
    assert none is None
    assert smallest.options == ()  # there is no smaller card
    text = format_fit(1 << 20, none, smallest)
    assert "No options make this run fit into 0.000977 GiB, since a step takes too much." in text
    assert "The smallest card for this run has 4 GiB, with the options as they are" in text
    fit, _ = found(least / WARN + 1, streams=False)
    assert fit is None


#: What is given before an option that rounds or makes images smaller.
NEUTRAL = "--gradient_checkpointing --train_batch_size 1 --gradient_accumulation_steps 2"
ROUNDING = "--optimizer adamw8bit --quantization torchao-int8"


class TestWholeAnswers:
    """Each option only after those that change less, and a plan with the options that are given."""

    planned = Planned()

    def answer(
        self, config: TrainingConfig, options: str, eight_bits: set[str], streams: bool = True
    ) -> str:
        """The answer for the largest card for which these options are given, without its start."""
        size = 1 << 40
        while True:
            fit, smallest = find_fit(
                config, self.planned, size, streams=streams, eight_bits=eight_bits
            )
            assert fit is not None
            assert fit.peak <= int(WARN * size)
            if " ".join(fit.options) == options:
                break
            size = int((fit.peak - 1) / WARN)
        given = parse_config([*arguments(values_of(config)), *options.split()])
        plan = self.planned(replace(given, offload_base="none"))
        if "offload" in options:
            plan = with_offloading(plan, given, None, 1)
        assert max(map(plan.peak, plan.phases)) == fit.peak
        text = format_fit(size, fit, smallest)
        needs = f"It needs about {fit.peak / 2**30:,.2f} GiB at the peak"
        if plan.copied:
            needs += f" and copies {plan.copied / 2**30:,.1f} GiB to the GPU in a step"
        start = f"To fit into {size / 2**30:.3g} GiB, give {options}. {needs}."
        assert text.startswith(start)
        return text.removeprefix(start).partition("\nThe smallest card for this run has 4 GiB")[0]

    @pytest.fixture
    def small(self, saved_base: Callable[[str], Path]) -> TrainingConfig:
        base = str(saved_base("stable-diffusion"))
        return replace(CONFIG, pretrained_model_name_or_path=base)

    def test_rounding_only_where_streaming_does_not_do(self, small: TrainingConfig) -> None:
        both = {"bitsandbytes", "torchao"}
        streamed = "--gradient_checkpointing --offload_base blocks"
        assert self.answer(small, streamed, both) == ""
        config = replace(small, rank=64, resolution=32)  # much optimizer state
        for options in (f"{NEUTRAL} --optimizer adamw8bit", f"{NEUTRAL} {ROUNDING}"):
            assert self.answer(config, options, both, streams=False) == ""
        options = f"{NEUTRAL} --quantization torchao-int8"
        assert self.answer(config, options, {"torchao"}, streams=False) == ""

    def test_smaller_images_last(self, small: TrainingConfig) -> None:
        config = replace(small, resolution=512)
        for side in (384, 256):
            options = f"{NEUTRAL} --resolution {side}"
            assert self.answer(config, options, set()) == (
                f" This changes the result: with --resolution {side}, the adapter learns from "
                "smaller images. No other options suffice."
            )

    def test_control_images_before_images(
        self, tmp_path: Path, saved_base: Callable[[str], Path]
    ) -> None:
        config = replace(
            CONFIG,
            pretrained_model_name_or_path=str(saved_base("flux2-klein")),
            instance_data_dir=str(make_shapes(tmp_path / "images", [(384, 384)] * 2)),
            control_data_dir=[str(make_shapes(tmp_path / "controls", [(600, 600)] * 2))],
            resolution=384,
            max_sequence_length=8,
        )
        controls = "--control_resolution 256"
        assert self.answer(config, f"{NEUTRAL} {controls}", set()) == (
            f" This changes the result: with {controls}, the adapter learns from smaller images. "
            "No other options suffice."
        )
        both = f"{controls} --resolution 256"
        assert self.answer(config, f"{NEUTRAL} {both}", set()) == (
            f" This changes the result: with {both}, the adapter learns from smaller images. No "
            "other options suffice."
        )


def test_smallest_card(plan: Plan) -> None:
    def card(gib: float) -> int:
        row = replace(plan.memory[0], bytes={"steps": int(gib * 2**30)})
        return smallest_card(Fit((), replace(plan, memory=(row,))))

    assert [card(g) for g in (0.1, 7.1, 7.3, 43, 250)] == [4, 8, 10, 48, 278]


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("8", 8 << 30), ("1.5 gb", 3 << 29), ("512MiB", 512 << 20), ("a", None)],
)
def test_sizes(text: str, size: int | None) -> None:
    config = replace(CONFIG, device_memory=text)
    problems = [p for p in find_problems(config) if "device_memory" in p]
    if size is None:
        assert problems == ["--device_memory is 'a'; it must be a size such as 8GiB or 8192MiB"]
    else:
        assert config.device_bytes == size
        assert not problems


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tests.training.runs import run

    run(
        pretrained_model_name_or_path=CONFIG.pretrained_model_name_or_path,
        instance_data_dir=CONFIG.instance_data_dir,
        output_dir=tmp_path / "out",
        dry_run=True,
        device_memory="8GiB",
    )
    out = capsys.readouterr().out
    assert "Memory in MiB (a GPU of 8 GiB)" in out
    assert "The run fits into 8 GiB as it is." in out
    assert not (tmp_path / "out").exists()
