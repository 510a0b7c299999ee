"""The options: command line, YAML file, checks and their texts, and the table in the docs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from diffusers.optimization import SchedulerType
from PIL import Image

from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.options.command_parser import named_in
from gralora_diffusion.options.fields import Fixed, Needs, choices_of, options_with
from gralora_diffusion.training.checks.base import check_sizes
from gralora_diffusion.training.checks.options import find_problems, read_and_check, validate
from gralora_diffusion.training.config.other_programs import OTHER_NAMES
from gralora_diffusion.training.config.training_config import TrainingConfig, parse_config
from tests import ROOT
from tests.forked import Forked

# diffusers' train_dreambooth_lora.py: every option of it that is carried, spelled as there, and the
# value that each must give
DIFFUSERS_SD = [
    ("--pretrained_model_name_or_path runwayml/sd", "runwayml/sd"),
    ("--revision main", "main"),
    ("--variant fp16", "fp16"),
    ("--instance_data_dir dog", "dog"),
    ("--class_data_dir dogs", "dogs"),
    ("--instance_prompt dog", "dog"),
    ("--class_prompt dog", "dog"),
    ("--validation_prompt dog", ["dog"]),
    ("--num_validation_images 2", 2),
    ("--validation_epochs 25", 25),
    ("--rank 8", 8),
    ("--lora_dropout 0.1", 0.1),
    ("--with_prior_preservation", True),
    ("--prior_loss_weight 0.5", 0.5),
    ("--num_class_images 200", 200),
    ("--output_dir out", "out"),
    ("--seed 42", 42),
    ("--resolution 512", 512),
    ("--use_aspect_ratio_buckets", True),  # of train_dreambooth_lora_flux2_klein.py, like the next
    ("--aspect_ratio_buckets 512,512;640,384", "512,512;640,384"),
    ("--center_crop", True),
    ("--train_batch_size 1", 1),
    ("--sample_batch_size 2", 2),
    ("--num_train_epochs 3", 3),
    ("--max_train_steps 500", 500),
    ("--checkpointing_steps 100", 100),
    ("--checkpoints_total_limit 2", 2),
    ("--resume_from_checkpoint latest", "latest"),
    ("--gradient_accumulation_steps 2", 2),
    ("--gradient_checkpointing", True),
    ("--learning_rate 1e-4", 1e-4),
    ("--scale_lr", True),
    ("--lr_scheduler polynomial", "polynomial"),
    ("--lr_warmup_steps 10", 10),
    ("--lr_num_cycles 2", 2),
    ("--lr_power 2.0", 2.0),
    ("--dataloader_num_workers 1", 1),
    ("--use_8bit_adam", True),
    ("--adam_beta1 0.8", 0.8),
    ("--adam_beta2 0.99", 0.99),
    ("--adam_weight_decay 1e-2", 1e-2),
    ("--adam_epsilon 1e-08", 1e-8),
    ("--max_grad_norm 0.5", 0.5),
    ("--push_to_hub", True),
    ("--hub_token secret", "secret"),
    ("--hub_model_id me/dog", "me/dog"),
    ("--logging_dir log", "log"),
    ("--allow_tf32", True),
    ("--report_to wandb", "wandb"),
    ("--mixed_precision fp16", "fp16"),
    ("--prior_generation_precision fp32", "fp32"),
    ("--local_rank 0", 0),
    ("--train_text_encoder", True),
    ("--enable_xformers_memory_efficient_attention", True),
    ("--image_interpolation_mode bicubic", "bicubic"),
]
SWITCHES = [f.name for f in fields(TrainingConfig) if isinstance(f.default, bool)]


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line without a fault; its paths are relative to the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("base/model_index.json").write_text("{}")
    Path("pictures").mkdir()
    Image.new("RGB", (8, 8)).save("pictures/1.png")
    return [
        "--pretrained_model_name_or_path=base",
        "--instance_data_dir=pictures",
        "--instance_prompt=a photo of sks dog",
    ]


def problems_of(arguments: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(parse_config(arguments))
    return caught.value.problems


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize(("text", "value"), DIFFUSERS_SD)
def test_diffusers_spelling(text: str, value: object) -> None:
    flag, *given = text.split()
    assert getattr(parse_config([flag, *given]), flag[2:]) == value
    assert getattr(parse_config([flag.replace("_", "-"), *given]), flag[2:]) == value


def test_the_command_of_diffusers_readme(good: list[str]) -> None:
    command = (
        "--output_dir=lora-trained --train_text_encoder --resolution=512 --train_batch_size=1 "
        "--gradient_accumulation_steps=1 --checkpointing_steps=100 --learning_rate=1e-4 "
        "--report_to=tensorboard --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=500 "
        "--validation_epochs=50 --seed=0"
    )
    config = parse_config([*good, *command.split(), "--validation_prompt", "a sks dog in a bucket"])
    assert validate(config) == []
    assert config.validation_prompt == ["a sks dog in a bucket"]
    assert (config.learning_rate, config.max_train_steps) == (1e-4, 500)


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_goes_both_ways(name: str) -> None:
    assert getattr(parse_config([f"--{name}"]), name) is True
    assert getattr(parse_config([f"--{name}", "False"]), name) is False
    assert getattr(parse_config([f"--{name}=true"]), name) is True
    if getattr(TrainingConfig(), name):
        assert getattr(parse_config([f"--no_{name}"]), name) is False


def test_several_validation_prompts() -> None:
    config = parse_config(["--validation_prompt", "a dog", "a cat", "--rank", "8"])
    assert (config.validation_prompt, config.rank) == (["a dog", "a cat"], 8)


def test_every_schedule_of_diffusers_is_a_choice() -> None:
    assert set(choices_of(TrainingConfig)["lr_scheduler"]) == {s.value for s in SchedulerType}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--rnk 8", "--rnk is not an option. Did you mean --rank?"),
        ("--gralora-kk=8", "--gralora-kk is not an option. Did you mean --gralora_k"),
        ("--zzzzzz", "--zzzzzz is not an option. See --help for all options"),
        (
            "--pre_compute_text_embeddings",
            "an option of diffusers' scripts that does not exist here: prompts",
        ),
        ("--rank eight", "--rank is 'eight'; it must be a whole number"),
        ("--rank 1e1", "--rank is '1e1'; it must be a whole number. Did you mean 10?"),
        ("--rank=", "--rank needs a value"),
        ("--learning_rate fast", "--learning_rate is 'fast'; it must be a number"),
        ("--learning_rate 0,001", "it must be a number. Did you mean 0.001?"),
        ("--mixed_precision fp8", "is 'fp8'; it must be one of no, fp16, bf16"),
        ("--mixed_precision bfloat16", "Did you mean bf16?"),
        ("--lr_scheduler cosin", "Did you mean cosine?"),
        ("--prior_source photos", "is 'photos'; it must be one of images, teacher"),
        ("--random_flip perhaps", "--random_flip is 'perhaps'; it must be true or false"),
        ("--rank", "--rank needs a value"),
        ("--rank 8 dog", "'dog' does not belong to any option"),
        ("--config nowhere.yaml", "nowhere.yaml: --config cannot be read: No such file"),
    ],
)
def test_what_cannot_be_parsed(arguments: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(arguments.split())
    assert text in str(caught.value)


def test_all_unknown_options_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(["--rnk", "8", "--sed", "1"])
    assert [p.split()[0] for p in caught.value.problems] == ["--rnk", "--sed"]


def test_optimizer_names() -> None:
    assert parse_config(["--optimizer", "AdamW"]).optimizer == "adamw"
    assert parse_config(["--optimizer", "AdamW8bit"]).optimizer == "adamw8bit"
    assert parse_config(["--use_8bit_adam"]).optimizer == "adamw8bit"
    assert parse_config(["--use_8bit_adam", "--optimizer=Prodigy"]).optimizer == "prodigy"


# ---------------------------------------------------------------- YAML


def test_yaml_values_are_typed_by_the_parser(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "# a comment\n"
        "learning_rate: 1e-4\n"  # a string to YAML
        "mixed_precision: no\n"  # false to YAML
        "center-crop: yes\n"
        "prodigy_decouple: false\n"
        "validation_prompt: [a dog, 'a cat: asleep']\n"
        "instance_prompt: '--odd prompt'\n"
        "class_prompt: null\n"
        "max_train_steps:\n"
        "rank: 8\n"
    )
    expected = TrainingConfig(
        config=str(file),
        learning_rate=1e-4,
        mixed_precision="no",
        center_crop=True,
        prodigy_decouple=False,
        validation_prompt=["a dog", "a cat: asleep"],
        instance_prompt="--odd prompt",
        rank=8,
    )
    assert parse_config(["--config", str(file)]) == expected


def test_command_line_wins_over_yaml_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank: 8\nuse_ema: true\nvalidation_prompt: [a, b, c]\nseed: 3\n")
    override = ["--rank", "4", "--use_ema", "false", "--validation_prompt", "d"]
    for arguments in (["--config", str(file), *override], [*override, f"--config={file}"]):
        config = parse_config(arguments)
        assert (config.rank, config.use_ema, config.seed) == (4, False, 3)
        assert config.validation_prompt == ["d"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            "rank: 8\nlearningrate: 1",
            ":2: learningrate is not an option. Did you mean learning_rate",
        ),
        ("rank: 8\nrank: 16", ":2: rank is given twice"),
        ("rank: [8, 16]", ":1: rank takes one value, not a list"),
        (
            "validation_prompt: []",
            ":1: validation_prompt takes a list of at least one plain value",
        ),
        (
            "validation_prompt: [[a]]",
            ":1: validation_prompt takes a list of at least one plain value",
        ),
        ("rank:\n  unet: 8", ":1: rank takes a plain value, because options are not nested"),
        ("lr: 1e-4", ":1: lr is called learning_rate here"),
        ("model:\n  name: x", ":2: model.name is nested, but options are not nested here: it is"),
        ("train:\n  - opts:\n      lr: 1", ":3: train.opts.lr is nested, but options are not nest"),
        (
            "network:\n  rank: 8",
            ":2: network.rank is nested, but options are not nested here. Write",
        ),
        ("text: a: b", "Put a text that contains `: ` in quotes"),
        ("rank:\n\t- 8", "Indent with spaces instead of tabs"),
        ("config: other.yaml", ":1: config is only allowed on the command line"),
        (
            "no_cache_latents: true",
            ":1: no_cache_latents is not an option. Did you mean cache_latents",
        ),
        ("rank: eight", ":1: rank is 'eight'; it must be a whole number"),
        ("lr_scheduler: cosin", "Did you mean cosine?"),
        ("[rank]: 8", ":1: the name of an option must be plain text"),
        ("&a [*a]: 8", ":1: the name of an option must be plain text"),
        ("[" * 3000, "is nested too deeply"),
        ('instance_prompt: "\\UFFFFFFFF"', "an escape that is no character"),
        ("- rank", "must contain lines of the form `name: value`"),
        ("rank: [8", "is not YAML"),
        ("tokenizer_name: x", "the tokenizer is always the base's"),
    ],
)
def test_faults_of_the_yaml_file_name_it(tmp_path: Path, content: str, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", str(file), "--rank", "4"])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{file}:")
    assert text in problem


def test_a_file_is_not_read_far_beyond_its_problems(tmp_path: Path) -> None:
    """Each unknown name is compared with all names there are, nested ones as well."""
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"rnk{i}: 8\n" for i in range(3000)))
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", str(file)])
    *problems, last = caught.value.problems
    assert problems[0].startswith(f"{file}:1: rnk0 is not an option. Did you mean")
    assert [p.split(" ")[1] for p in problems] == [f"rnk{i}" for i in range(100)]
    end = f"{file}:101: the file is not read further after 100 problems. Mend these first"
    assert last == end
    file.write_text("rank:\n" + "".join(f"  zzq{i}zq: 8\n" for i in range(20_000)))
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", str(file)])
    assert caught.value.problems[0].endswith(
        "rank takes a plain value, because options are not nested"
    )


def test_unreadable_yaml_files(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00rank")
    for path, text in ((binary, "not a UTF-8 text file"), (tmp_path, "it is a folder, not a file")):
        with pytest.raises(ConfigError, match=text):
            parse_config(["--config", str(path)])


def test_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("# nothing yet\n")
    assert parse_config(["--config", str(file)]).to_yaml() == TrainingConfig().to_yaml()


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = TrainingConfig(
        pretrained_model_name_or_path="owner/name",
        instance_prompt="ein Foto von „sks“: Hund # 1",
        class_prompt="null",
        validation_prompt=["yes", "a: b", ""],
        mixed_precision="no",
        learning_rate=1e-5,
        prodigy_decouple=False,
        hub_token="hf_secret",
        lora_layers="re:.*to_[qk]$",
        rank_pattern=[r"attn1\.to_[qk]=32", "a: 'b' # c=8"],
        k_pattern=["{x}=1"],
        local_rank=-2,
    )
    text = config.to_yaml()
    assert "hf_secret" not in text + repr(config) + str(config.as_record())
    assert set(yaml.safe_load(text)) == {
        "pretrained_model_name_or_path",
        "instance_prompt",
        "class_prompt",
        "validation_prompt",
        "mixed_precision",
        "learning_rate",
        "prodigy_decouple",
        "lora_layers",
        "rank_pattern",
        "k_pattern",
        "local_rank",
    }
    file = tmp_path / "record.yaml"
    file.write_text(text)
    again = parse_config(["--config", str(file)])
    again.config, config.hub_token = None, None
    assert again == config


def test_home_is_expanded_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("instance_data_dir: ~/dog\n")
    assert parse_config(["--config", str(file)]).instance_data_dir == str(Path.home() / "dog")


def test_problems_of_both_and_of_the_checks_are_reported_together(
    good: list[str], tmp_path: Path
) -> None:
    """Each with its flag, or its file and line; and none is about a default in its place."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "# of another program\nunet_lr: 1e-4\nrank: eight\nresolution: 500\nseed: -1\n"
        "lr_scheduler: cosin\n"
    )
    line = ["--config", str(file), "--gralora_k", "3", "--steps", "100", "--seed", "-2"]
    with pytest.raises(ConfigError) as caught:
        read_and_check([*good, *line, "--lr_warmup_steps", "x", "--family", "sdxl"])
    assert caught.value.problems == [
        f"{file}:2: unet_lr is called learning_rate here",
        f"{file}:3: rank is 'eight'; it must be a whole number",
        f"{file}:6: lr_scheduler is 'cosin'; it must be one of linear, cosine, "
        "cosine_with_restarts, polynomial, constant, constant_with_warmup, piecewise_constant. "
        "Did you mean cosine?",
        "--lr_warmup_steps is 'x'; it must be a whole number",
        "--steps is called --max_train_steps here",
        "--seed is -2; it must be at least 0 and below 4294967296",
        f"{file}:4: --resolution is 500; it must be a multiple of 8, since the VAE shrinks by 8. "
        "The nearest is 496",
        "--family is 'sdxl'; it must be one of flux, flux2, flux2-klein, stable-diffusion, "
        "stable-diffusion-3, stable-diffusion-xl. Did you mean stable-diffusion-xl?",
    ]


def test_what_is_said_of_other_programs_names_options_that_exist() -> None:
    names = {f.name for f in fields(TrainingConfig)}
    for theirs, said in OTHER_NAMES.items():
        assert theirs not in names
        assert {name for name in named_in(said) if name != "dtype"} <= names, said


# ---------------------------------------------------------------- checks


def test_a_good_command_line_has_no_problem_and_no_warning(good: list[str]) -> None:
    assert validate(parse_config(good)) == []


def test_all_problems_are_reported_at_once(good: list[str]) -> None:
    bad = "--rank 10 --gralora_k 4 --adam_beta1 1.0 --resolution 500 --with_prior_preservation"
    assert problems_of([*good, *bad.split()]) == [
        "--adam_beta1 is 1.0; it must be at least 0 and below 1",
        "--resolution is 500; it must be a multiple of 8, since the VAE shrinks by 8. "
        "The nearest is 496",
        "--with_prior_preservation needs --class_prompt. Give a prompt for the class without the "
        "subject's name, such as --class_prompt 'a photo of a dog'",
        "--with_prior_preservation needs --class_data_dir to keep the class images. Give a folder "
        "(it is created and filled), or --prior_source teacher, which needs no class images",
        "--rank is 10 and --gralora_k is 4; k must divide the rank. Give --rank 8 or 12, or one of "
        "these values for --gralora_k: 1, 2, 5, 10",
    ]


BASE = "--pretrained_model_name_or_path"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        # single values
        ("--rank 0", "--rank is 0; it must be at least 1"),
        ("--gralora_k -2", "--gralora_k is -2; it must be at least 1"),
        ("--hybrid_rank -1", "--hybrid_rank is -1; it must be at least 0"),
        ("--lora_dropout 1", "--lora_dropout is 1.0; it must be at least 0 and below 1"),
        ("--train_batch_size 0", "--train_batch_size is 0; it must be at least 1"),
        ("--max_train_steps 0", "--max_train_steps is 0; it must be at least 1"),
        (
            f"--max_train_steps 1{'0' * 400}",
            f"--max_train_steps is 1{'0' * 79}; it must be a smaller number",
        ),
        ("--checkpoints_total_limit 0", "--checkpoints_total_limit is 0; it must be at least 1"),
        ("--learning_rate 0", "--learning_rate is 0.0; it must be above 0"),
        ("--learning_rate nan", "--learning_rate is nan; it must be above 0"),
        ("--learning_rate inf", "--learning_rate is inf; it must be above 0"),
        ("--snr_gamma 0", "--snr_gamma is 0.0; it must be above 0"),
        (
            "--snr_gamma 5 --debiased_estimation_loss",
            "--debiased_estimation_loss and --snr_gamma 5 both weight the loss by the SNR. "
            "Leave one out",
        ),
        (
            "--optimizer prodigy --loraplus_lr_ratio 4",
            "--loraplus_lr_ratio and --optimizer prodigy exclude each other: Prodigy takes one "
            "learning rate for all. Leave out --loraplus_lr_ratio",
        ),
        ("--max_grad_norm 0", "--max_grad_norm is 0.0; it must be above 0"),
        ("--noise_offset -0.1", "--noise_offset is -0.1; it must be at least 0"),
        ("--adam_beta2 1.5", "--adam_beta2 is 1.5; it must be at least 0 and below 1"),
        ("--prodigy_beta3 -1", "--prodigy_beta3 is -1.0; it must be at least 0 and below 1"),
        ("--ema_decay 1", "--ema_decay is 1.0; it must be at least 0 and below 1"),
        (
            "--validation_prompt a --validation_width 100",
            "--validation_width is 100; it must be a multiple of 8, since the VAE shrinks by 8. "
            "The nearest is 96",
        ),
        ("--caption_dropout 1", "--caption_dropout is 1.0; it must be at least 0 and below 1"),
        ("--resolution 4", "--resolution is 4; it must be a multiple of 8"),
        (
            "--aspect_ratio_buckets 512,512;512x640",
            "--aspect_ratio_buckets is '512,512;512x640': Invalid bucket format: '512x640'. "
            "Expected 'height,width'. Give 'height,width' pairs separated by ';', such as",
        ),
        ("--aspect_ratio_buckets=", "--aspect_ratio_buckets is '': Bucket string cannot be empty."),
        ("--aspect_ratio_buckets 0,512", "Bucket dimensions must be positive integers. Give"),
        (
            "--aspect_ratio_buckets 512,512;500,644",
            "--aspect_ratio_buckets contains 500,644; height and width must be multiples of 8, "
            "since the VAE shrinks by 8. The nearest is 496,640",
        ),
        (
            "--aspect_ratio_buckets 512,640;768,960",
            "--aspect_ratio_buckets contains 512,640 and 768,960, which have the same shape",
        ),
        (
            "--aspect_ratio_buckets 64,64;64,64",
            "contains 64,64 and 64,64, which have the same shape",
        ),
        ("--seed -1", "--seed is -1; it must be at least 0 and below 4294967296"),
        # the base
        (f"{BASE}=", f"{BASE} is missing. Give a diffusers folder, a Hub id"),
        (f"{BASE} ./bse", "'./bse': there is no such file or folder. Did you mean 'base'?"),
        (f"{BASE} /nowhere/x", "no such file or folder, not even the folder '/nowhere'"),
        (f"{BASE} sd15.safetensors", "'sd15.safetensors': there is no such file or folder in '.'"),
        (f"{BASE} base/unet/x", "no such file or folder, not even the folder 'base/unet'"),
        (f"{BASE} pictures", "this folder has no model_index.json. Give a diffusers folder, which"),
        (f"{BASE} pictures/1.png", "a single file must be a .safetensors or .gguf file. Convert"),
        (f"{BASE} https://huggingface.co/a/b", "this is an address. Give the Hub id"),
        (f"{BASE} stable*diffusion", "there is no such file or folder"),
        ("--pretrained_vae_model_name_or_path base", "this folder has no config.json"),
        ("--pretrained_vae_model_name_or_path pictures/1.png", "this is a file. Give a diffusers"),
        (
            "--base_config pictures",
            "--base_config is 'pictures': this folder has no model_index.json",
        ),
        # the data
        ("--instance_data_dir=", "--instance_data_dir is missing. Give the folder"),
        ("--dataset_name me/dogs", "a run trains on only one of them. Leave one out"),
        ("--instance_data_dir picture", "no such folder. Did you mean 'pictures'?"),
        ("--instance_data_dir pictures/1.png", "this is a file. Give the folder with the images"),
        ("--instance_data_dir empty", "this folder is empty. Put the training images"),
        ("--instance_data_dir texts", "none of its 1 files is an image (notes.doc)"),
        (
            "--instance_prompt=",
            "--instance_prompt is missing, and 'pictures' contains no captions: no .txt, .caption",
        ),
        (
            "--instance_data_dir= --dataset_name d --instance_prompt=",
            "--dataset_name needs --caption_column or --instance_prompt",
        ),
        # masks
        ("--masked_loss --mask_data_dir masks", "--mask_data_dir is 'masks': there is no such"),
        ("--masked_loss --mask_data_dir empty", "this folder is empty. Put the masks into it"),
        ("--masked_loss --mask_data_dir pictures/1.png", "Give the folder with the masks"),
        (
            "--masked_loss --mask_data_dir ./pictures",
            "--mask_data_dir is './pictures', which is --instance_data_dir. Masks beside the",
        ),
        (
            "--instance_data_dir= --dataset_name d --masked_loss --mask_data_dir pictures",
            "--mask_data_dir is for --instance_data_dir; the rows of --dataset_name have no file",
        ),
        ("--mask_outside_weight -1", "--mask_outside_weight is -1.0; it must be at least 0"),
        # prior preservation
        (
            "--with_prior_preservation --class_data_dir c",
            "--with_prior_preservation needs --class_prompt",
        ),
        (
            "--with_prior_preservation --class_prompt c",
            "--with_prior_preservation needs --class_data_dir",
        ),
        (
            "--with_prior_preservation --prior_source teacher",
            "--with_prior_preservation needs --class_prompt",
        ),
        (
            "--with_prior_preservation --class_prompt c --class_data_dir pictures/1.png",
            "--class_data_dir is 'pictures/1.png': this is a file. Give a folder",
        ),
        (
            "--with_prior_preservation --class_prompt c --class_data_dir ./pictures",
            "--class_data_dir is './pictures', which must not be the same folder as --instance_",
        ),
        # the adapter
        ("--rank 3 --gralora_k 4", "Give --rank 4, or one of these values for --gralora_k: 1, 3"),
        ("--lora_layers re:to_(q", "--lora_layers is 're:to_(q': not a regular expression"),
        ("--lora_layers ,", "--lora_layers is empty. Name layers such as to_q,to_v"),
        ("--exclude_modules re:to_(q", "--exclude_modules is 're:to_(q': not a regular expression"),
        (
            "--exclude_modules=",
            "--exclude_modules is empty. Name layers such as to_q,to_v, or omit",
        ),
        # single layers
        ("--rank_pattern to_q", "--rank_pattern contains 'to_q': it must be REGEX=VALUE, where"),
        ("--k_pattern =4", "--k_pattern contains '=4': it must be REGEX=VALUE"),
        (
            "--rank_pattern to_(q=8",
            "--rank_pattern contains 'to_(q=8': 'to_(q' is not a regular expr",
        ),
        (
            "--k_pattern (?i)to_q=2",
            "--k_pattern contains '(?i)to_q=2': '(?i)to_q' is not a regular",
        ),
        (
            "--rank_pattern a=b=8.0",
            "contains 'a=b=8.0': '8.0' must be a whole number of at least 1",
        ),
        ("--k_pattern a=0", "--k_pattern contains 'a=0': '0' must be a whole number of at least 1"),
        ("--alpha_pattern a=", "--alpha_pattern contains 'a=': '' must be a number above 0"),
        ("--alpha_pattern a=nan", "contains 'a=nan': 'nan' must be a number above 0"),
        ("--alpha_pattern a=inf", "contains 'a=inf': 'inf' must be a number above 0"),
        ("--alpha_pattern a=1 b=2 a=3", "--alpha_pattern contains 'a' twice. Keep one"),
        (
            "--rank_pattern a=9",
            "--rank_pattern contains 'a=9', and k is 2 for these layers; k must divide the rank. "
            "Give another rank, or use --k_pattern 'a=...' to give these layers a k that divides 9",
        ),
        ("--rank_pattern a=9 --k_pattern a=2", "contains 'a=9', and k is 2 for these layers"),
        (
            "--rank_pattern a=9 --k_pattern b=4 a=6",
            "contains 'a=9', and k is 2 or 4 or 6 for these",
        ),
        (
            "--k_pattern a=3",
            "--k_pattern contains 'a=3', and the rank is 16 for these layers; k must divide the "
            "rank. Give another k, or use --rank_pattern 'a=...' to give these layers a rank "
            "that 3 divides",
        ),
        # the optimizer and its schedule
        (
            "--optimizer Prodgy",
            "--optimizer is 'prodgy'; it must be one of adamw, adamw8bit, prodigy",
        ),
        ("--optimizer Prodgy", "Did you mean prodigy?"),
        (
            "--optimizer adafactor --use_8bit_adam",
            "--use_8bit_adam and --optimizer adafactor exclude",
        ),
        ("--optimizer prodigy --scale_lr", "--scale_lr and --optimizer prodigy exclude each other"),
        (
            "--optimizer prodigy --train_text_encoder --text_encoder_lr 0.5",
            "--text_encoder_lr is 0.5 and --learning_rate is 1.0, but Prodigy takes one learning",
        ),
        (
            "--optimizer schedulefree --adam_beta1 0",
            "it must be above 0 with --optimizer schedulefree",
        ),
        ("--optimizer schedulefree --lr_scheduler cosine", "Give --lr_scheduler constant"),
        ("--optimizer schedulefree --use_ema", "--use_ema and --optimizer schedulefree exclude"),
        (
            "--lr_warmup_steps 500 --max_train_steps 400",
            "--lr_warmup_steps is 500 and --max_train_steps is 400, so the learning rate would "
            "never be reached. A tenth of the steps is usual: 40",
        ),
        ("--lr_scheduler piecewise_constant", "piecewise_constant needs --lr_step_rules"),
        ("--lr_step_rules 1-100", "--lr_step_rules is '1-100'; it must be factor:step pairs"),
        # the output
        ("--output_dir pictures/1.png", "--output_dir is 'pictures/1.png': this is a file"),
        ("--output_dir pictures/1.png/out", "1.png' is a file, so no folder can be created in it"),
        ("--output_dir=", "--output_dir is empty"),
        (
            "--latent_cache_dir pictures/1.png",
            "--latent_cache_dir is 'pictures/1.png': this is a file",
        ),
        (
            "--resume_from_checkpoint checkpoint-7 --output_dir done",
            "no such checkpoint. Checkpoints in done: checkpoint-90, checkpoint-100. Give one of",
        ),
        (
            "--resume_from_checkpoint elsewhere/checkpoint-7",
            "no such checkpoint. Checkpoints in gralora-",
        ),
        (
            "--output_dir done",
            "--output_dir is 'done', which contains checkpoint-100 of an earlier run",
        ),
        (
            "--output_dir finished",
            "--output_dir is 'finished', which contains pytorch_gralora_weights.safetensors of",
        ),
        ("--output_dir finished --resume_from_checkpoint latest", "but no checkpoint to resume"),
        (
            "--output_dir done --resume_from_checkpoint latest --overwrite_output_dir",
            "--overwrite_output_dir and --resume_from_checkpoint exclude each other",
        ),
        ("--hub_model_id me/my/dog", "--hub_model_id is 'me/my/dog'; it must be owner/name"),
    ],
)
def test_problem(good: list[str], arguments: str, text: str) -> None:
    Path("empty").mkdir()
    Path("texts").mkdir()
    Path("texts/notes.doc").touch()
    for step in (100, 90):
        Path(f"done/checkpoint-{step}").mkdir(parents=True)
    Path("finished").mkdir()
    Path("finished/pytorch_gralora_weights.safetensors").touch()
    found = [p for p in problems_of([*good, *arguments.split()]) if text in p]
    assert len(found) == 1


READ_AND_WRITTEN = [
    ("--output_dir pictures/run", "output_dir", "instance_data_dir"),
    ("--output_dir base", "output_dir", "pretrained_model_name_or_path"),
    ("--output_dir base/unet/new", "output_dir", "pretrained_model_name_or_path"),
    ("--output_dir linked/run", "output_dir", "instance_data_dir"),
    ("--output_dir x --latent_cache_dir pictures", "latent_cache_dir", "instance_data_dir"),
    ("--class_data_dir pictures/class", "class_data_dir", "instance_data_dir"),
    ("--class_data_dir base", "class_data_dir", "pretrained_model_name_or_path"),
    ("--class_data_dir x --output_dir x", "output_dir", "class_data_dir"),
    ("--initial_adapter ia --output_dir ia/run", "output_dir", "initial_adapter"),
]


def test_a_folder_that_may_not_be_read_whole(good: list[str], tmp_path: Path) -> None:
    """Links there may lead to what belongs to somebody else."""
    Path("some").mkdir()
    Path("some/link").symlink_to("link")
    Path("some/notes.doc").touch()
    (problem,) = problems_of([*good, "--instance_data_dir=some"])
    assert "none of its 2 files is an image (link, notes.doc)" in problem


@pytest.mark.parametrize(("arguments", "written", "read"), READ_AND_WRITTEN)
def test_what_is_read_is_not_written_to(
    good: list[str], arguments: str, written: str, read: str
) -> None:
    for folder in ("ia", "x"):
        Path(folder).mkdir()
    Path("linked").symlink_to("pictures")
    prior = ["--with_prior_preservation", "--class_prompt=c", "--prior_source=images"]
    options = [*good, *(prior if "class_data" in arguments else []), *arguments.split()]
    (problem,) = problems_of(options)
    assert f"--{written} is" in problem
    assert f"which is or lies in --{read} " in problem


@pytest.mark.parametrize("written", ["output_dir", "latent_cache_dir"])
def test_a_base_in_the_hubs_cache_is_not_written_to(
    good: list[str], monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    Path("hub/models--me--cat/snapshots").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "hub")
    options = [*good, f"--{written}=hub/models--me--cat/snapshots/x"]
    validate(parse_config(options))
    (problem,) = problems_of([*options, "--pretrained_model_name_or_path=me/cat"])
    assert f"--{written} is" in problem
    assert "which is or lies in --pretrained_model_name_or_path 'me/cat'" in problem


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ("out/pytorch_gralora_weights.safetensors", True),
        ("out/checkpoint-5/pytorch_gralora_weights.safetensors", True),
        ("out/logs/a.safetensors", True),
        ("out/kept/a.safetensors", False),
    ],
)
def test_what_a_run_replaces_is_not_read(good: list[str], path: str, refused: bool) -> None:
    Path(path).parent.mkdir(parents=True)
    Path(path).touch()
    options = [*good, "--initial_adapter", path, "--output_dir=out", "--overwrite_output_dir"]
    if not refused:
        validate(parse_config(options))
        return
    (problem,) = problems_of(options)
    assert "this run would replace or delete" in problem


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 is fine on a GPU")
def test_fp16_without_a_gpu(good: list[str]) -> None:
    (problem,) = problems_of([*good, "--mixed_precision", "fp16"])
    assert problem == "--mixed_precision is 'fp16', which needs a GPU. Give bf16 or no on the CPU"


@pytest.mark.parametrize(
    ("arguments", "module", "package"),
    [
        ("--optimizer adamw8bit", "bitsandbytes", "bitsandbytes"),
        ("--optimizer prodigy", "prodigyopt", "prodigyopt"),
        ("--optimizer schedulefree", "schedulefree", "schedulefree"),
        ("--report_to wandb", "wandb", "wandb"),
        ("--report_to tensorboard", "tensorboard", "tensorboard"),
        ("--instance_data_dir= --dataset_name me/dogs", "datasets", "datasets"),
        ("--enable_xformers_memory_efficient_attention", "xformers", "xformers"),
    ],
)
def test_missing_library(
    good: list[str], monkeypatch: pytest.MonkeyPatch, arguments: str, module: str, package: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == module else real(name, *a)
    )
    (problem,) = problems_of([*good, *arguments.split()])
    assert f"needs: pip install {package}" in problem


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_that_is_not_writable(good: list[str]) -> None:
    Path("locked").mkdir(mode=0o500)
    (problem,) = problems_of([*good, "--output_dir", "locked/run"])
    assert "'locked' is not writable. Give another folder" in problem


def test_choices_are_checked_without_the_parser(good: list[str]) -> None:
    config = parse_config(good)
    config.lr_scheduler = "cosin"  # type: ignore[assignment]
    with pytest.raises(
        ConfigError, match="--lr_scheduler is 'cosin'; it must be one of linear, cos"
    ):
        validate(config)


@pytest.mark.parametrize(
    "arguments",
    [
        "--pretrained_model_name_or_path owner/name.v1-5",
        "--pretrained_model_name_or_path one.safetensors",
        "--max_grad_norm inf",
        "--with_prior_preservation --class_prompt c --class_data_dir new",
        "--with_prior_preservation --class_prompt c --prior_source teacher",
        "--instance_prompt= --instance_data_dir captioned",
        "--rank 12 --gralora_k 3 --hybrid_rank 5",
        r"--rank_pattern attn1\.to_[qk]=32 to_q=8 --alpha_pattern a=0.5 b=2 --k_pattern to_k=1",
        "--rank_pattern a=9 --k_pattern a=3",
        "--rank_pattern a=9 --k_pattern b=3",  # b may be a's layers
        "--rank_pattern a=8 b=9 --k_pattern c=9",
        "--rank_pattern (?!x=1)a=8",
        "--lora_layers to_q,to_v",
        "--lora_layers re:.*to_[qv]",
        "--exclude_modules to_q --target_preset all",
        "--exclude_modules re:.*to_[qv] --lora_layers to_q,to_k",
        "--optimizer schedulefree --lr_warmup_steps 10",
        "--lr_scheduler piecewise_constant --lr_step_rules 1:100,.1:200,1e-3",
        "--output_dir a/b/c --latent_cache_dir a/d",
        "--resume_from_checkpoint checkpoint-5 --output_dir done",
        "--resume_from_checkpoint done/checkpoint-5",
        "--resume_from_checkpoint latest --output_dir done",
        "--overwrite_output_dir --output_dir done",
        "--overwrite_output_dir --output_dir finished",
        "--resume_from_checkpoint done/checkpoint-5 --output_dir finished",
    ],
)
def test_no_problem(good: list[str], arguments: str) -> None:
    Path("one.safetensors").touch()
    Path("captioned").mkdir()
    Image.new("RGB", (8, 8)).save("captioned/1.jpg")
    Path("captioned/1.txt").write_text("a dog")
    for file in ("done/checkpoint-5/x", "done/pytorch_gralora_weights.safetensors", "finished/x"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    Path("finished/pytorch_gralora_weights.safetensors").touch()
    assert validate(parse_config([*good, *arguments.split()])) == []


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (
            "--text_encoder_lr 1e-5",
            "these options have no effect without --train_text_encoder: --text_encoder_lr",
        ),
        (
            "--class_prompt c",
            "these options have no effect without --with_prior_preservation: --class_prompt",
        ),
        (
            "--validation_steps 5",
            "these options have no effect without --validation_prompt or "
            "--validation_prompts_file: --validation_steps",
        ),
        (
            "--no_cache_latents --cached_crops 2",
            "these options have no effect without --cache_latents: --cached",
        ),
        (
            "--hub_model_id me/dog",
            "these options have no effect without --push_to_hub: --hub_model_id",
        ),
        (
            "--mask_outside base --mask_outside_weight 2",
            "without --masked_loss: --mask_outside, --mask_outside_weight",
        ),
        (
            "--mask_from_alpha",
            "without --masked_loss or --inpaint_given_masks: --mask_from_alpha",
        ),
        (
            "--masked_loss --mask_outside_weight 0.5",
            "--mask_outside_weight has no effect with --mask_outside ignore. Did you mean",
        ),
        ("--ema_decay 0.9", "these options have no effect without --use_ema: --ema_decay"),
        (
            "--max_train_steps 5 --num_train_epochs 2",
            "--num_train_epochs has no effect, since --max_train_steps overrides it",
        ),
        ("--lr_warmup_steps 5", "Did you mean --lr_scheduler constant_with_warmup?"),
        (
            "--lora_layers to_q --target_preset all",
            "--target_preset has no effect, since --lora_layers names the layers",
        ),
        (
            "--aspect_ratio_buckets 512,640;640,512 --resolution 512",
            "--resolution only sets the size of validation images with --aspect_ratio_buckets",
        ),
        ("--optimizer prodigy --learning_rate 1e-4", "1.0 is usual with Prodigy"),
        ("--resume_from_checkpoint latest", "contains no checkpoint, so this run starts from"),
        (
            "--with_prior_preservation --prior_source teacher --class_prompt c --class_data_dir d",
            "these options have no effect with --prior_source teacher: --class_data_dir",
        ),
        (
            "--pretrained_model_name_or_path pictures/bse",
            "'pictures/bse' is taken as a Hub id because there is no such folder here",
        ),
    ],
)
def test_warning(good: list[str], arguments: str, warning: str) -> None:
    (found,) = validate(parse_config([*good, *arguments.split()]))
    assert warning in found


def test_sizes_are_checked_again_once_the_base_is_known() -> None:
    config = TrainingConfig(resolution=520, aspect_ratio_buckets="512,640;648,512;8,24")
    assert not any("multiple" in problem for problem in find_problems(config))
    check_sizes(config, 8)
    with pytest.raises(ConfigError) as caught:
        check_sizes(config, 16)
    several = "height and width must be multiples of 16 for this base"
    assert caught.value.problems == [
        "--resolution is 520; it must be a multiple of 16 for this base. The nearest is 512",
        f"--aspect_ratio_buckets contains 648,512; {several}. The nearest is 640,512",
        f"--aspect_ratio_buckets contains 8,24; {several}. The nearest is 16,32",
    ]


def test_switches_are_options() -> None:
    needs = options_with(TrainingConfig, Needs).values()
    switches = {needed.switch for needed in needs}
    switches |= {needed.alternative for needed in needs if needed.alternative}
    switches |= {f.switch for f in options_with(TrainingConfig, Fixed).values() if f.switch}
    assert switches <= {f.name for f in fields(TrainingConfig)}


def test_an_option_is_declared_in_one_place(tmp_path) -> None:
    """In a copy of the package, with one field more: everything else follows from it."""
    copy = shutil.copytree(ROOT / "gralora_diffusion", tmp_path / "gralora_diffusion")
    options = copy / "training" / "config" / "options.py"
    before = "class LossOptions:\n"
    text = options.read_text(encoding="utf-8")
    assert text.count(before) == 1
    field = (
        "    shine: Annotated[float, Limits(at_least=0, below=2), Fixed()] = option(\n"
        '        0.5, "How much it shines"\n    )\n'
        "    polish: Annotated[str | None, Place(read=True), SetByBenchmark('use wax')] = option(\n"
        '        None, "File of polish"\n    )\n'
    )
    head, _, rest = text.partition(before)
    body, group, rest = rest.partition('_argument_group_name: ClassVar[str] = "Noise and loss"\n')
    options.write_text(head + before + body + group + field + rest, encoding="utf-8")
    program = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "gralora_diffusion"]:
    del sys.modules[name]  # forked with the package itself
sys.path.insert(0, sys.argv[1])
import pytest
from pathlib import Path
import gralora_diffusion
assert Path(gralora_diffusion.__file__).parent.parent == Path(sys.argv[1])
from gralora_diffusion import CheckpointError, ConfigError, TrainingConfig, parse_config, validate
from gralora_diffusion.benchmark.options import training_groups
from gralora_diffusion.benchmark.run_config import parse_settings
from gralora_diffusion.training.checkpoints.resume import check_options, deciding_options
from gralora_diffusion.training.config.training_config import options_table

config = parse_config(["--shine", "1.5", "--polish", "~/secret/wax.txt"])
assert config.shine == 1.5 and config.polish == str(Path.home() / "secret/wax.txt")  # parsed
with pytest.raises(ConfigError, match="--shine is 3.0; it must be at least 0 and below 2"):
    validate(parse_config(["--shine", "3"]))  # checked
assert "| `--shine` | `0.5` | How much it shines |" in options_table()  # documented
assert config.as_record()["shine"] == 1.5 and "shine: 1.5" in config.to_yaml()  # recorded
assert "polish: wax.txt" in config.to_yaml(public=True)
there = {"options": deciding_options(TrainingConfig())}
with pytest.raises(CheckpointError, match="--shine 0.5 there, 1.5 here"):
    check_options(Path("checkpoint-1"), there, config)  # compared on resume
assert parse_settings(["--shine", "1.5"]).training.shine == 1.5  # passed by the benchmark
with pytest.raises(ConfigError, match="--polish cannot be set here: use wax"):
    parse_settings(["--polish", "x"])
"""
    code, said = Forked(program, tmp_path).wait()
    assert code == 0, said


# ---------------------------------------------------------------- what others take from it


def test_family_defaults_fill_only_what_is_open() -> None:
    family = {"resolution": 768, "learning_rate": 5e-4, "adam_weight_decay": 1e-2}
    config = TrainingConfig(learning_rate=3e-4).with_defaults(family)
    assert (config.resolution, config.learning_rate, config.text_encoder_lr) == (768, 3e-4, 5e-6)
    assert config.adam_weight_decay == 1e-2
    config = TrainingConfig().with_defaults({"resolution": 512})
    assert (config.learning_rate, config.adam_weight_decay) == (1e-4, 1e-4)
    config = TrainingConfig(optimizer="Prodigy", train_text_encoder=True).with_defaults(family)
    assert (config.learning_rate, config.text_encoder_lr) == (1.0, 1.0)
    with pytest.raises(KeyError, match="resolutoin"):
        TrainingConfig().with_defaults({"resolutoin": 512})


def test_listed_buckets_imply_their_use(tmp_path: Path) -> None:
    config = parse_config(["--aspect_ratio_buckets", "512,512;640,384"])
    assert config.use_aspect_ratio_buckets
    assert not TrainingConfig().use_aspect_ratio_buckets
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    again = parse_config(["--config", str(tmp_path / "run.yaml")])
    assert again.aspect_ratio_buckets == "512,512;640,384"


def test_alpha_and_targets() -> None:
    assert TrainingConfig(rank=16, hybrid_rank=4).alpha == 20
    assert TrainingConfig(rank=16, lora_alpha=32).alpha == 32
    assert TrainingConfig().target_modules is None
    assert TrainingConfig().excluded_modules is None
    assert TrainingConfig(exclude_modules="a, b.0,").excluded_modules == ["a", "b.0"]
    assert TrainingConfig(exclude_modules="re:.*a").excluded_modules == ".*a"
    assert TrainingConfig(lora_layers="to_q, to_out.0,").target_modules == ["to_q", "to_out.0"]
    assert TrainingConfig(lora_layers="re:.*to_[qv]").target_modules == ".*to_[qv]"


def test_patterns() -> None:
    options = TrainingConfig(
        rank=16,
        hybrid_rank=4,
        rank_pattern=[r"attn1\.to_[qk]=32", "a=b=8"],
        k_pattern=["to_q=1"],
        alpha_pattern=["z=0.5", "a=b=3"],
    )
    patterns = {"rank_pattern": {r"attn1\.to_[qk]": 32, "a=b": 8}, "k_pattern": {"to_q": 1}}
    given = {"z": 0.5, "a=b": 3.0}
    assert options.patterns == patterns | {"alpha_pattern": given | {r"attn1\.to_[qk]": 36}}
    assert list(options.patterns["alpha_pattern"]) == ["z", "a=b", r"attn1\.to_[qk]"]
    options.lora_alpha = 5
    assert options.patterns == patterns | {"alpha_pattern": given}
    nothing = {"rank_pattern": {}, "k_pattern": {}, "alpha_pattern": {}}
    assert TrainingConfig().patterns == nothing


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("docs/options.md", "gralora_diffusion.training.config.training_config"),
        ("docs/benchmark_options.md", "gralora_diffusion.benchmark.settings"),
    ],
)
def test_the_table_in_the_docs_is_up_to_date(page: str, module: str) -> None:
    table = importlib.import_module(module).options_table()
    remake = f'from {module} import options_table; print(options_table(), end="")'
    assert (ROOT / page).read_text() == table, f"remake it with: python -c '{remake}' > {page}"


def test_files_that_are_no_images_or_captions(good: list[str]) -> None:
    """An .h5 file is not an image; captions may have any supported form."""
    Path("science").mkdir()
    Path("science/1.h5").touch()
    told = problems_of([*good, "--instance_data_dir", "science"])
    assert any("none of its 1 files is an image (1.h5)" in problem for problem in told)
    for name in ("1.TXT", "1.json", "1.png.caption", "Metadata.csv", "metadata.parquet"):
        folder = Path(f"with {name}")
        folder.mkdir()
        (folder / "1.PNG").touch()
        without = [*good, "--instance_data_dir", str(folder), "--instance_prompt=", "--rank=-1"]
        assert any("--instance_prompt is missing" in problem for problem in problems_of(without))
        (folder / name).touch()
        assert not any("--instance_prompt" in problem for problem in problems_of(without))


def test_options_without_effect_are_not_written() -> None:
    changed = {"text_encoder_lr": 1e-5, "ema_decay": 0.9, "learning_rate": 1e-3}
    used = {"train_text_encoder": True, "use_ema": True}

    def written(**options: object) -> object:
        return yaml.safe_load(TrainingConfig(**options).to_yaml(effective=True))

    assert written(**changed) == {"learning_rate": 1e-3}
    assert written(**changed, **used) == changed | used


@pytest.mark.parametrize("name", ["9" * 300, "a/" * 2500, "nul\0"])
def test_names_that_no_file_can_have(name: str) -> None:
    problems = find_problems(TrainingConfig(instance_data_dir=name, output_dir="out"))
    assert len(problems) == 1
    assert problems[0].startswith("--instance_data_dir is '")
    assert "which cannot be the name of a file" in problems[0]
    assert len(problems[0]) < 250
