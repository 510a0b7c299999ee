"""What is said about options once the family is known."""

from __future__ import annotations

from typing import Any

import pytest

from gralora_diffusion.families import get_family, list_families
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.training.checks.family import check_family_options
from gralora_diffusion.training.optimization.adapters import trained_components
from tests.training.runs import config


def problem(family: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_family_options(config(**options), get_family(family))
    return str(caught.value)


@pytest.mark.parametrize("name", list_families())
def test_defaults_fit_every_family(name: str) -> None:
    assert check_family_options(config(), get_family(name)) == []


def test_text_encoders() -> None:
    chosen = {
        ("stable-diffusion", None): ["unet", "text_encoder"],
        ("stable-diffusion-xl", None): ["unet", "text_encoder", "text_encoder_2"],
        ("stable-diffusion-3", None): ["transformer", "text_encoder", "text_encoder_2"],
        ("flux", None): ["transformer", "text_encoder"],
        ("flux", ("text_encoder_2",)): ["transformer", "text_encoder_2"],
        ("stable-diffusion-3", ("text_encoder_3", "text_encoder")): [
            *("transformer", "text_encoder", "text_encoder_3")
        ],
    }
    for (family, encoders), expected in chosen.items():
        options = config(train_text_encoder=True, text_encoders=encoders)
        assert check_family_options(options, get_family(family)) == []
        assert trained_components(options, get_family(family)) == tuple(expected)
        denoiser = trained_components(config(), get_family(family))
        assert denoiser == tuple(expected[:1])
    text = problem("flux", train_text_encoder=True, text_encoders=["text_encoder_3"])
    assert "--text_encoders names text_encoder_3; flux has text_encoder, text_encoder_2" in text
    clash = problem(
        "stable-diffusion-3",
        train_text_encoder=True,
        text_encoders=["text_encoder", "text_encoder_3"],
        leave_out_text_encoders=["text_encoder_3"],
    )
    assert "--leave_out_text_encoders leaves out text_encoder_3, but --train_text_" in clash
    assert "flux2-klein: its text encoder is a large language model" in problem(
        "flux2-klein", train_text_encoder=True
    )


def test_presets() -> None:
    text = problem(
        "stable-diffusion-3",
        target_preset="all",
        train_text_encoder=True,
        text_encoder_target_preset="some",
    )
    assert "--target_preset is 'all'; for the transformer of stable-diffusion-3 it must be" in text
    assert "attention, attention+ff, attention+ff+modulation" in text
    assert "--text_encoder_target_preset is 'some'; for the text_encoder_2 of" in text
    unused = config(text_encoder_target_preset="none")
    assert check_family_options(unused, get_family("stable-diffusion")) == []
    # layers named one by one take the preset's place
    options = config(target_preset="all", lora_layers="to_q")
    assert check_family_options(options, get_family("flux")) == []


def test_options_of_another_objective_are_remarked() -> None:
    (warning,) = check_family_options(
        config(snr_gamma=5.0, prediction_type="epsilon"), get_family("flux2")
    )
    assert warning == (
        "these options have no effect on a base of flux2: --snr_gamma, --prediction_type"
    )
    (warning,) = check_family_options(
        config(flow_shift=2, weighting_scheme="mode", max_sequence_length=64),
        get_family("stable-diffusion-xl"),
    )
    assert ": --weighting_scheme, --flow_shift, --max_sequence_length" in warning


def test_negative_prompt_where_no_pipeline_takes_it() -> None:
    drawing = config(validation_prompt="a dog", validation_negative_prompt="snow")
    assert check_family_options(drawing, get_family("stable-diffusion-3")) == []
    for family in ("flux", "flux2", "flux2-klein"):
        (warning,) = check_family_options(drawing, get_family(family))
        assert warning.endswith(": --validation_negative_prompt")


def test_layers_of_clip_where_no_pipeline_skips_them() -> None:
    for family in ("stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3"):
        assert check_family_options(config(clip_skip=1), get_family(family)) == []
    for family in ("flux", "flux2", "flux2-klein"):
        (warning,) = check_family_options(config(clip_skip=1), get_family(family))
        assert warning.endswith(": --clip_skip")


def test_prompts_longer_than_the_pipelines_take() -> None:
    for family in ("flux", "stable-diffusion-3"):
        assert check_family_options(config(max_sequence_length=512), get_family(family)) == []
        assert f"pipelines of {family} accept at most 512" in problem(
            family, max_sequence_length=513
        )
    assert check_family_options(config(max_sequence_length=600), get_family("flux2")) == []
