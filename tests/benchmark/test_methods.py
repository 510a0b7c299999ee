"""Each method on a small pipeline: what is trained, no change at first, and off again."""

from dataclasses import fields

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from gralora_diffusion import get_family
from gralora_diffusion.benchmark.methods import FORMS, KINDS, Method, bare_afterwards
from gralora_diffusion.benchmark.options import ComparedOptions
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.optimization.adapters import adapter_parameters
from tests.models import draw, stable_diffusion, structure
from tests.training.runs import config as training_config

NAMES = [
    "lora-r4",
    "dora-r4",
    "loha-r2",
    "gralora-r4-k2",
    "gralora-r4-k4",
    "gralora-r4-k2-h2",
    "full",
    "rslora-r4",
    "pissa-r4",
    "scaledlora-r4",
    "loraplus-r4-x16",
    "lokr-r4-f2",
    "oft-b8",
    "boft-b8-m1",
]


@pytest.mark.parametrize(
    "name", [*NAMES, "base", "full-lr1e-5", "lora-r4-lr0.003", "gralora-r4-k2-h2-lr3e-4"]
)
def test_names_are_read_and_written(name):
    assert Method.parse(name).name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lora",
        "lora-r0",
        "gralora-r4",
        "gralora-r4-k3",
        "gralora-r4-k0",
        "lora-r4-k2",
        "Full",
        "base-lr1",
        "lora-r4-lr",
        "lora-r4-lr0",
        "-lr1",
        "oft",
        "oft-b1",
        "oft-r8",
        "boft-b8",
        "boft-b7-m1",
        "boft-b8-m0",
        "boft-m1-b8",
        "lokr-r4",
        "lokr-r4-f0",
        "loraplus-r4",
        "loraplus-r4-x0",
        "pissa-r4-k2",
        "rslora-r4-h2",
        "lora-r4-r4",
        "lora-r\u0664",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match=f"--methods contains '{name}'"):
        Method.parse(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lroa-r16", "lora-r16"),
        ("LoRA-r16", "lora-r16"),
        ("lora16", "lora-r16"),
        ("dora", "dora-r32"),
        ("gralora-r16", "gralora-r16-k2"),
        ("gralora-k4-r16", "gralora-r16-k4"),
        ("gralora_r16_k4", "gralora-r16-k4"),
        ("grlaora-r24-k2-h8", "gralora-r24-k2-h8"),
        ("lora-r4-k2", "gralora-r4-k2"),
        ("loar-r04", "lora-r4"),
        ("lroa-r8-lr1e-4", "lora-r8-lr1e-4"),
        ("lora-r8-lr1e", "lora-r8"),
        ("ful", "full"),
        ("bas", "base"),
        ("oft64", "oft-b64"),
        ("lokr-r8f4", "lokr-r8-f4"),
        ("pisa-r16", "pissa-r16"),
        ("lora+-r8-x4", "loraplus-r8-x4"),
    ],
)
def test_a_misspelt_name_is_told_the_right_one(name, meant):
    with pytest.raises(ConfigError) as caught:
        Method.parse(name)
    assert caught.value.problems == [
        f"--methods contains '{name}', which is not a method. Did you mean {meant}? A method is "
        f"{FORMS}"
    ]
    assert Method.parse(meant).name == meant


def test_what_is_like_no_method_is_told_what_there_is():
    with pytest.raises(
        ConfigError, match=rf"contains 'xyz', which is not a method\. A method is {FORMS}"
    ):
        Method.parse("xyz")
    for form in ("lora-r<rank>", "dora-r<", "loha-r<", "gralora-r<rank>-k<k>-h<", "full", "base"):
        assert form in FORMS


def test_help_names_every_method():
    texts = {f.name: f.metadata["help"] for f in fields(ComparedOptions)}
    for kind, described in KINDS.items():
        if kind != "base":
            assert f"({described.title})" in texts["methods"]
    counted = "rsLoRA, PiSSA, LoRA+, LoKr, OFT, BOFT follow from the size of their first step; LoHa"
    assert counted in texts["rates"]


@pytest.mark.parametrize("name", ["lora-r" + "9" * 5000, "full-lr1e-" + "9" * 5000])
def test_numbers_of_thousands_of_digits(name):
    with pytest.raises(ConfigError, match="which is not a method"):
        Method.parse(name)


@pytest.mark.parametrize(
    ("name", "said"), [("lora-r04", "lora-r4"), ("gralora-r4-k2-h0", "gralora-r4-k2")]
)
def test_one_method_has_one_name(name, said):
    with pytest.raises(ConfigError, match=f"--methods contains '{name}'; write {said}"):
        Method.parse(name)


def test_ranks_of_the_updates():
    ranks = [Method.parse(name).update_rank for name in NAMES]
    assert ranks == [4, None, 4, 8, 16, 10, None, 4, 8, 4, 4, 8, None, None]


def test_a_learning_rate_of_its_own():
    config = training_config(instance_data_dir="x", learning_rate=1e-4)
    assert Method.parse("full-lr1e-5").configured(config).learning_rate == 1e-5
    assert Method.parse("full").configured(config).learning_rate == 1e-4


def attach(name, **options):
    pipe = stable_diffusion()
    family, method = get_family(pipe), Method.parse(name)
    config = method.configured(training_config(instance_data_dir="x", **options))
    return pipe, method, method.attach(pipe, family, config), family


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", [False, True])
def test_put_on_and_taken_off(name, text, tmp_path):
    pipe = stable_diffusion()
    family, method = get_family(pipe), Method.parse(name)
    options = {"train_text_encoder": True} if text else {}
    config = method.configured(training_config(instance_data_dir="x", **options))
    components = ("unet", "text_encoder") if text else ("unet",)
    models = [getattr(pipe, component) for component in components]
    for model in models:
        model.requires_grad_(False)  # as the base is loaded
    before, image = [structure(model) for model in models], draw(pipe)
    weights = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    with bare_afterwards(pipe, components, method):
        assert method.attach(pipe, family, config) == components
        # at first nothing is changed; PiSSA rounds the weight when it takes a part out of it
        rounding = {"rtol": 1e-4, "atol": 1e-4} if method.kind == "pissa" else {}
        torch.testing.assert_close(draw(pipe), image, **rounding)
        for component in components:
            parameters = adapter_parameters(pipe, component)
            assert parameters
            assert {p.dtype for p in parameters} == {torch.float32}
            with torch.no_grad():
                for parameter in parameters:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        assert not torch.allclose(draw(pipe), image, rtol=1e-2)
        method.save(pipe, family, components, tmp_path)
        assert len(list(tmp_path.iterdir())) == (0 if name == "full" else 1)
    for model, kept in zip(models, weights, strict=True):
        assert model.state_dict().keys() == kept.keys()
        assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    if name != "full":  # which writes to the weights themselves
        assert [structure(model) for model in models] == before
    assert torch.equal(draw(pipe), image)
    assert not any(p.requires_grad for p in pipe.unet.parameters())


def test_the_same_layers_and_equal_parameters():
    """LoRA and GraLoRA of a rank, on exactly the same layers; the whole denoiser is more."""
    counts, layers = {}, {}
    for name in ("lora-r4", "gralora-r4-k2", "gralora-r4-k4", "full"):
        pipe = attach(name)[0]
        counts[name] = sum(p.numel() for p in adapter_parameters(pipe, "unet"))
        layers[name] = {n for n, m in pipe.unet.named_modules() if isinstance(m, BaseTunerLayer)}
    assert counts["lora-r4"] == counts["gralora-r4-k2"] == counts["gralora-r4-k4"] < counts["full"]
    assert layers["lora-r4"] == layers["gralora-r4-k2"] != set()


@pytest.mark.parametrize("name", ["lora-r4", "loha-r2", "gralora-r4-k2"])
def test_a_seed_gives_the_same_start(name):
    first, again, other = (
        torch.cat([p.flatten() for p in adapter_parameters(attach(name, seed=s)[0], "unet")])
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
