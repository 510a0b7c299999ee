"""The form of all options, and what its texts mean."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields, replace

import pytest

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.studio.engine import form
from gralora_diffusion.training.checks.options import read_and_check
from gralora_diffusion.training.config.training_config import TrainingConfig, parse_config
from tests import ROOT

BLANK = {f.name: f.default for f in form.all_fields()}
GOOD = {
    "pretrained_model_name_or_path": str(ROOT / "samples/tiny-base"),
    "instance_data_dir": str(ROOT / "samples/subjects/robot/train"),
    "report_to": "none",
}


def test_every_option_is_in_the_form_or_left_out_on_purpose():
    left_out = {"config", "dry_run", "local_rank", "hub_token"}
    assert {f.name for f in fields(TrainingConfig)} - BLANK.keys() == left_out
    assert set(form.BASIC) <= BLANK.keys()


def test_an_untouched_form_has_the_defaults():
    assert form.arguments(BLANK) == []
    assert form.values_of(TrainingConfig()) == BLANK


def test_a_form_is_read_as_the_command_that_it_shows(tmp_path):
    given = {
        **GOOD,
        "output_dir": str(tmp_path / "a b"),
        "rank": "8",
        "learning_rate": "3e-4",
        "validation_prompt": "a cat, 'quoted'\na dog\n",
        "mixed_precision": "no",
        "cache_latents": False,
        "use_ema": True,
        "max_grad_norm": "inf",
    }
    found = form.check(BLANK | given)
    assert found.problems == ()
    assert found.config.validation_prompt == ["a cat, 'quoted'", "a dog"]
    assert not found.config.cache_latents
    command = shlex.split(found.command)
    assert command[:2] == ["gralora", "train"]
    assert parse_config(command[2:]) == found.config
    file = tmp_path / "options.yaml"
    file.write_text(found.yaml)
    assert replace(parse_config(["--config", str(file)]), config=None) == found.config
    assert form.from_file(file) == form.values_of(found.config)


def test_bad_text_in_every_field_has_the_words_of_the_command_line():
    texts = {f.name for f in form.all_fields() if f.kind == "text"}
    texts -= {"bnb_quantization_config_path"}  # whose check imports bitsandbytes
    values = BLANK | dict.fromkeys(texts, "\x00 <b>no/such</b> --x")
    found = form.check(values)
    with pytest.raises(ConfigError) as caught:
        read_and_check(form.arguments(values))
    assert [text for _, text in found.problems] == caught.value.problems
    kinds = {f.name: f.type for f in fields(TrainingConfig)}
    numbers = {n for n in texts if re.search(r"\[(int|float)\b|^(int|float)\b", kinds[n])}
    assert numbers <= {option for option, _ in found.problems}
    assert len(numbers) > 40


def test_problems_are_beside_their_fields():
    found = form.check(BLANK | GOOD | {"rank": "7", "seed": "many"})
    assert [option for option, _ in found.problems] == ["seed", "rank"]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "tiny_robot"])
def test_bundled_files_fill_the_form(name):
    values = form.from_file(name)
    assert values["pretrained_model_name_or_path"]
    assert form.described(name)


def test_a_file_with_a_problem(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("rank: many\n")
    with pytest.raises(ConfigError, match="rank is 'many'; it must be a whole number"):
        form.from_file(file)


def test_what_a_plan_for_a_given_memory_changes():
    given = BLANK | GOOD | {"train_batch_size": "2", "learning_rate": "1e-4"}
    said = "give --gradient_checkpointing --offload_base 0.25. It needs about 7.10 GiB at the peak."
    found = form.fitted(given, f"plan\n\nTo fit into 8 GiB, {said}\nThe smallest card")
    assert found.said == f"To fit into 8 GiB, {said}"
    assert found.values == {"gradient_checkpointing": True, "offload_base": "0.25"}
    now = given | found.values
    assert form.check(now).problems == ()
    assert form.without_fit(now, found.undo) == given
    edited = now | {"offload_base": "0.5"}
    assert form.without_fit(edited, found.undo) == given | {"offload_base": "0.5"}
    assert form.fitted(given, "No options make this run fit into 8 GiB, since") is None
    as_it_is = form.fitted(given, "The run fits into 8 GiB as it is. It needs about 1.00 GiB at")
    assert as_it_is.values == as_it_is.undo == {}
