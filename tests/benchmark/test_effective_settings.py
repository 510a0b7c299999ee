"""The settings that a trial reports: the values used, and None where it has none."""

import platform

import pytest
import torch

from gralora_diffusion import get_family
from gralora_diffusion.benchmark.effective_settings import effective_settings, named_layers
from gralora_diffusion.benchmark.methods import Method
from gralora_diffusion.benchmark.run_config import parse_settings
from gralora_diffusion.benchmark.versions import versions
from gralora_diffusion.training.config.training_config import TrainingConfig
from tests.models import stable_diffusion

LAYERS = (torch.nn.Linear, torch.nn.Conv2d)
CPU = torch.device("cpu")


def told(name="lora-r4", line=(), **options):
    settings = parse_settings(["--dreambooth_dir", "db", *line])
    method = Method.parse(name)
    config = method.configured(TrainingConfig(**{"learning_rate": 1e-4, **options}))
    return effective_settings(settings, method, config, stable_diffusion(), CPU)


@pytest.mark.parametrize(
    ("name", "rank", "k", "hybrid_rank", "rate"),
    [
        # 16 and 2 are the trainer's defaults
        ("gralora-r16-k2", 16, 2, 0, 1e-4),
        ("gralora-r16-k4", 16, 4, 0, 1e-4),
        ("gralora-r24-k2-h8-lr1e-3", 24, 2, 8, 1e-3),
        ("lora-r16", 16, None, None, 1e-4),
        ("dora-r8", 8, None, None, 1e-4),
        ("full-lr1e-5", None, None, None, 1e-5),
        ("base", None, None, None, None),
    ],
)
def test_what_methods_have(name, rank, k, hybrid_rank, rate):
    training = told(name)["training"]
    found = [training[n] for n in ("rank", "gralora_k", "hybrid_rank", "learning_rate")]
    assert found == [rank, k, hybrid_rank, rate]


def test_defaults_are_told_where_they_count():
    assert told(train_batch_size=3)["training"]["train_batch_size"] == 3
    training = told()["training"]
    default = TrainingConfig()
    for name in ("train_batch_size", "optimizer", "lr_scheduler", "target_preset"):
        assert training[name] == getattr(default, name)


def test_the_guidance_that_was_used():
    assert told()["drawing"]["drawing_guidance_scale"] == 7.5  # StableDiffusionPipeline's own
    given = told(line=["--drawing_guidance_scale", "2"])
    assert given["drawing"]["drawing_guidance_scale"] == 2.0


def test_of_files_only_the_names(tmp_path):
    (tmp_path / "base").mkdir()
    line = ["--encoders", f"a={tmp_path}", "b=facebook/dinov2-base"]
    found = told(line=line, pretrained_model_name_or_path=str(tmp_path / "base"))
    assert found["training"]["pretrained_model_name_or_path"] == "base"
    assert found["judges"] == {"a": tmp_path.name, "b": "facebook/dinov2-base"}
    assert str(tmp_path) not in str(found)


@pytest.mark.parametrize(
    ("name", "lowered"),
    [("gralora-r16-k16", {4: 2}), ("gralora-r16-k4", {}), ("lora-r16", {}), ("loha-r2", {})],
)
def test_layers_with_a_lower_k(name, lowered):
    """conv_in and conv_out have 4 channels on one side; the rest is 16 or 32 wide."""
    pipe, method = stable_diffusion(), Method.parse(name)
    layers = "to_q,to_k,conv1,conv_in,conv_out"
    config = method.configured(TrainingConfig(lora_layers=layers))
    method.attach(pipe, get_family(pipe), config)
    names = [n for n, m in stable_diffusion().unet.named_modules() if isinstance(m, LAYERS)]
    wanted = [n for n in names if n.rpartition(".")[2] in layers.split(",")]
    assert named_layers(config, [pipe.unet]) == {"layers": len(wanted), "lowered_k": lowered}


@pytest.mark.parametrize("name", ["full", "base"])
def test_of_methods_that_adapt_no_layer(name):
    config = Method.parse(name).configured(TrainingConfig())
    told = named_layers(config, [stable_diffusion().unet])
    assert told == {"layers": None, "lowered_k": {}}


def test_versions():
    assert versions()["python"] == platform.python_version()
    assert versions()["torch"] == torch.__version__
