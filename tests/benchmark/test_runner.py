"""Trials on a tiny base: their results equal those computed again from their files."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from gralora_diffusion.adapters.adapter_file import read_adapter
from gralora_diffusion.adapters.layers.functional import lora_factors
from gralora_diffusion.benchmark.evaluation.encoders import load_encoder
from gralora_diffusion.benchmark.evaluation.metrics import score_drift, score_prior, score_subject
from gralora_diffusion.benchmark.methods import Method
from gralora_diffusion.benchmark.runner import Runner, trial_seed
from gralora_diffusion.benchmark.tasks import read_tasks
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.pipelines.generation import generate
from gralora_diffusion.training.run import train
from tests.benchmark import judges, runs
from tests.pipeline_classes import build, build_filling
from tests.training.runs import adapter

METHODS = [
    *("lora-r4", "dora-r4", "loha-r2", "gralora-r4-k2", "gralora-r4-k2-h2"),
    *("rslora-r4", "pissa-r4", "scaledlora-r4", "loraplus-r4-x16", "lokr-r4-f2", "oft-b8"),
    *("boft-b8-m1", "full", "base"),
]


def made(world, output, **options):
    settings = runs.settings(world, output, **{"subjects": ["dog"], **options})
    (task,) = read_tasks(settings)
    return Runner(settings, task.config), task


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """Each method's unit, done one after the other on one base; the weights before and after."""
    output = tmp_path_factory.mktemp("run")
    runner, task = made(world, output, mechanism_steps=2, mechanism_k=2)
    weights = {k: v.clone() for k, v in runner.pipe.unet.state_dict().items()}
    results = {}
    for name in METHODS:
        results[name] = runner.run(task, Method.parse(name), 0, output / name)
        after = runner.pipe.unet.state_dict()
        assert after.keys() == weights.keys()
        assert all(torch.equal(after[k], weights[k]) for k in weights), name
    return runner, task, results


def files(result, beginning=""):
    return [
        [result.folder / name for name in prompt.images]
        for prompt in result.prompts
        if prompt.images[0].startswith(f"pictures/{beginning}")
    ]


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (
            lambda: build_filling("stable-diffusion"),
            "fills images, and the benchmark has no images",
        ),
        (
            lambda: build("StableDiffusionInstructPix2PixPipeline"),
            "edits images, and the benchmark",
        ),
    ],
)
def test_bases_that_need_images(world, tmp_path, build, problem, declared):
    """Refused by their index before anything is loaded, and if it is wrong, by their weights."""
    pipe, base = build(), tmp_path / "base"
    pipe.save_pretrained(base)
    if declared:
        shutil.rmtree(base / "unet")
    else:
        index = json.loads((base / "model_index.json").read_text())
        (base / "model_index.json").write_text(
            json.dumps({**index, "_class_name": "StableDiffusionPipeline"})
        )
    with pytest.raises(ConfigError, match=problem):
        made(world, tmp_path / "out", pretrained_model_name_or_path=base)


def test_what_is_told(run):
    runner, task, results = run
    result = results["gralora-r4-k2"]
    assert (result.protocol, result.subject, result.method) == ("subject", "dog", "gralora-r4-k2")
    assert (result.seed, result.steps, result.update_rank) == (0, 3, 8)
    assert [prompt.prompt for prompt in result.prompts] == [
        *task.prompts,
        "a car",
        "a tree",
        "a dog",
    ]
    assert [len(prompt.images) for prompt in result.prompts] == [2, 2, 1, 1, 2]
    assert result.settings["training"]["max_train_steps"] == 3
    assert result.settings["drawing"]["inference_steps"] == 2
    assert result.versions["torch"] == torch.__version__
    assert result.train_seconds > 0 < result.generation_seconds
    assert results["lora-r4"].parameters == result.parameters > 0
    assert results["lora-r4"].layers == result.layers == len(result.mechanism.effective_rank)
    assert results["full"].layers is results["base"].layers is None
    assert results["base"].parameters == results["base"].steps == 0
    everything = sum(p.numel() for p in runner.pipe.unet.parameters())
    assert results["full"].parameters == everything


def test_scores_are_those_of_the_images(run, world):
    runner, task, results = run
    encoders = {name: load_encoder(world / name) for name in ("dinov2", "clip")}
    base = runner.settings.folder / "base" / "seed0" / "dog"
    for result in results.values():
        expected = score_subject(encoders, files(result, "0"), task.texts, task.real).overall
        unmoved = [[base / f"drift-{row:03d}_0.png"] for row in range(2)]
        expected |= score_drift(encoders, files(result, "drift-"), unmoved).overall
        class_base = [base / "a_dog" / f"class-000_{n}.png" for n in range(2)]
        (class_drawn,) = files(result, "class-")
        expected |= score_prior(encoders, class_drawn, class_base, task.real)
        assert result.scores == pytest.approx(expected, abs=1e-6)
    nothing = results["base"].scores
    assert [nothing[f"{n}_dinov2"] for n in ("drift", "prior")] == pytest.approx([0, 0], abs=1e-6)
    assert all(r.scores["drift_dinov2"] > 1e-6 for name, r in results.items() if name != "base")


def test_images_are_those_of_the_adapter(run, world):
    """The file that is left, loaded as a user does, draws what the unit drew."""
    _, task, results = run
    result = results["gralora-r4-k2"]
    pipe = DiffusionPipeline.from_pretrained(world / "base")
    pipe.load_gralora_weights(result.folder / "adapter")
    pipe.vae.enable_slicing()  # for the rounding: the benchmark decodes images one by one
    seed = 10_000 * trial_seed(0, "dog")
    images = generate(pipe, task.prompts, 2, seed=seed, size=16, inference_steps=2, batch_size=4)
    for row, paths in zip(images, files(result, "0"), strict=True):
        for image, path in zip(row, paths, strict=True):
            with Image.open(path) as kept:
                assert image.tobytes() == kept.tobytes()


def test_a_trial_is_the_trainers_run(run, world, tmp_path):
    """Bit for bit, though the base was loaded once and has been trained with other methods."""
    _, task, results = run
    for name in ("gralora-r4-k2", "gralora-r4-k2-h2"):
        config = Method.parse(name).configured(replace(task.config, seed=trial_seed(0, "dog")))
        folder = train(replace(config, output_dir=str(tmp_path / name)))
        kept = load_file(results[name].folder / "adapter" / "pytorch_gralora_weights.safetensors")
        trained = adapter(folder)
        assert trained.keys() == kept.keys()
        assert all(torch.equal(trained[key], kept[key]) for key in kept)


def test_the_norm_of_the_update_is_that_of_the_file(run):
    """As PEFT's and GraLoRA's files define the update, by layers."""
    results = run[2]
    tensors = load_file(results["lora-r4"].folder / "adapter" / "adapter.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight")
    paths = {key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])}
    squares = [
        (tensors[path + ends[1]].double() @ tensors[path + ends[0]].double()).square().sum()
        for path in paths
    ]
    assert len(squares) > 1
    expected = float(sum(squares)) ** 0.5
    assert results["lora-r4"].update_norm == pytest.approx(expected, rel=1e-6)
    layers = read_adapter(results["gralora-r4-k2-h2"].folder / "adapter").components["unet"]
    a_b = layers.tensors
    squares = []
    for key in a_b:
        if key.endswith("gralora_A"):
            path = key.removesuffix("gralora_A")
            down, up = lora_factors(a_b[key].double(), a_b[path + "gralora_B"].double())
            dense = up @ down
            dense += (a_b[path + "gralora_B_general.weight"].double()) @ (
                a_b[path + "gralora_A_general.weight"].double()
            )
            squares.append(dense.square().sum())
    expected = float(sum(squares)) ** 0.5
    assert results["gralora-r4-k2-h2"].update_norm == pytest.approx(expected, rel=1e-6)
    assert results["base"].update_norm == 0
    assert results["full"].update_norm is None
    assert all(results[name].update_norm > 0 for name in METHODS[:-2])


def test_seeds_are_of_subject_and_seed():
    """Neither is left out, and no two trials share more than chance has them share."""
    seeds = {(s, n): trial_seed(n, s) for s in ("cat2", "dog", "owl") for n in range(200)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds.values())
    assert abs(np.mean(list(seeds.values())) / 2**31 - 0.5) < 0.05


def test_an_endpoint_that_is_not_measured_is_refused_before_any_trial(world, tmp_path):
    settings = runs.settings(world, tmp_path, endpoint="dino", subjects=["dog"])
    (task,) = read_tasks(settings)
    said = "--endpoint is dino, but dino is not measured. These are: dinov2, clip_i, clip_t, drift_"
    with pytest.raises(ConfigError, match=re.escape(said)):
        Runner(settings, task.config)


def test_subjects_of_version_0_1_share_a_seed(world, tmp_path):
    """So that a run of its time is gone on with as it was begun."""
    runner, task = made(world, tmp_path, seeding="shared", max_train_steps=1)
    result = runner.run(task, Method.parse("lora-r4"), 5, tmp_path / "unit")
    assert result.settings["training"]["seed"] == 5
    assert (tmp_path / "base" / "seed5" / "drift-000_0.png").is_file()


def test_the_mechanism_is_logged(run):
    results = run[2]
    assert results["base"].mechanism is None
    layers = set(results["lora-r4"].mechanism.gradient_norms)
    for name in METHODS[:-1]:
        mechanism = results[name].mechanism
        assert set(mechanism.gradient_norms) == layers != set()
        assert {tuple(log["steps"]) for log in mechanism.gradient_norms.values()} == {(1, 3)}
        assert set(mechanism.effective_rank) <= layers
        assert max(mechanism.effective_rank.values()) <= (results[name].update_rank or 1e9) + 1e-3


def test_text_encoders_prior_and_averages(world, tmp_path):
    """The trainer's options that touch more of the base than the denoiser."""
    runner, task = made(
        world,
        tmp_path,
        train_text_encoder=True,
        use_ema=True,
        with_prior_preservation=True,
        num_class_images=2,
        prior_images=None,
        protocols=["subject", "drift"],
    )
    texts = {k: v.clone() for k, v in runner.pipe.text_encoder.state_dict().items()}
    for name in ("lora-r4", "gralora-r4-k2"):
        result = runner.run(task, Method.parse(name), 0, tmp_path / name)
        assert "drift_dinov2" in result.scores
        after = runner.pipe.text_encoder.state_dict()
        assert all(torch.equal(after[k], texts[k]) for k in texts)
    assert len(list((tmp_path / "class_pictures" / "a_dog").iterdir())) == 2
    kept = load_file(tmp_path / "gralora-r4-k2" / "adapter" / "pytorch_gralora_weights.safetensors")
    assert any(key.startswith("text_encoder.") for key in kept)


def test_the_rank_is_of_the_average_that_is_drawn_with(world, tmp_path):
    """By the file that is left of it."""
    runner, task = made(world, tmp_path, use_ema=True, mechanism_steps=1)
    result = runner.run(task, Method.parse("lora-r4"), 0, tmp_path / "unit")
    tensors = load_file(result.folder / "adapter" / "adapter.safetensors")
    assert len(result.mechanism.effective_rank) == len(tensors) / 2 > 1
    for layer, rank in result.mechanism.effective_rank.items():
        down, up = (tensors[f"unet.{layer}.lora_{part}.weight"].double() for part in "AB")
        p = torch.linalg.svdvals(up @ down)
        p = p[p > 1e-9 * p[0]] / p.sum()
        assert rank == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-4), layer


def test_a_lower_k_is_told(world, tmp_path):
    """Where a width asks for it, as that of conv_in with its 4 channels."""
    runner, task = made(world, tmp_path, lora_layers="to_q,conv_in", mechanism_steps=3)
    result = runner.run(task, Method.parse("gralora-r8-k8"), 0, tmp_path / "unit")
    assert result.lowered_k == {4: 1}
    assert result.layers == len(result.mechanism.gradient_norms) > 1


def test_captioned(world, tmp_path):
    for number, path in enumerate(judges.draw(tmp_path / "set", 6)):
        path.with_suffix(".txt").write_text(f"picture {number}", encoding="utf-8")
    options = {"dreambooth_dir": None, "captioned_dir": tmp_path / "set", "held_out": 2}
    runner, task = made(world, tmp_path / "out", subjects=None, **options)
    folder = tmp_path / "out" / "a" / ".work" / "b"
    home = tmp_path / "out" / "a"
    result = runner.run(task, Method.parse("gralora-r4-k2"), 0, folder, home)
    assert result.folder == home
    assert set(result.scores) == {"dinov2", "clip_i", "clip_t", "drift_dinov2", "drift_clip_i"}
    for prompt, real in zip(result.prompts, task.real, strict=False):
        assert (result.folder / prompt.real).resolve() == real.resolve()
    assert [prompt.real for prompt in result.prompts[2:]] == [None, None]
