"""Every reader of files that others gave: small samples, how they are read, how they are refused.

A sample is a folder. What is read is called ``file`` with an ending, or is the folder itself.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import socket
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from filelock import FileLock
from PIL import Image, ImageCms, PngImagePlugin, features

from gralora_diffusion.base_models.quantization import check_quantization
from gralora_diffusion.benchmark import ledger, run_config
from gralora_diffusion.benchmark.dreambooth import PROMPTS_NAME, read_subjects
from gralora_diffusion.benchmark.evaluation.results import TRIALS_FOLDER, read_results, write_result
from gralora_diffusion.benchmark.report import blind_choices, write_report
from gralora_diffusion.inspection import inspect_file
from gralora_diffusion.inspection.text import as_text
from gralora_diffusion.io.colour_profiles import rgb_profile
from gralora_diffusion.io.errors import AdapterFileError, CheckpointError, ConfigError, DataError
from gralora_diffusion.io.image_files import (
    ImageError,
    image_suffix,
    read_image,
    read_mask,
    read_opacity,
)
from gralora_diffusion.io.image_parameters import OWN
from gralora_diffusion.io.safe_text import json_for_terminal
from gralora_diffusion.studio.engine import comparing
from gralora_diffusion.studio.engine.jobs import Jobs
from gralora_diffusion.studio.engine.runs import differing_options, find_runs
from gralora_diffusion.training import control_command
from gralora_diffusion.training.checkpoints.resume import (
    PROGRESS_NAME,
    describe_base,
    find_checkpoint,
)
from gralora_diffusion.training.checkpoints.state import RunState
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.checks.base import resolve_defaults
from gralora_diffusion.training.checks.options import validate
from gralora_diffusion.training.config.data_file import sound_sections, with_data_file
from gralora_diffusion.training.config.training_config import parse_config
from gralora_diffusion.training.config.validation_prompts import validation_prompts
from gralora_diffusion.training.data import checked_files
from gralora_diffusion.training.data.checked_files import CheckedFiles
from gralora_diffusion.training.data.controls import ControlPlaces
from gralora_diffusion.training.data.hf_dataset import find_dataset_examples
from gralora_diffusion.training.data.image_folder import find_examples
from gralora_diffusion.training.data.masks import MaskPlaces
from gralora_diffusion.training.data.tensor_store import TensorStore
from gralora_diffusion.training.optimization.adapters import adapter_parameters, add_adapters
from gralora_diffusion.training.optimization.optimizers import build_lr_scheduler, build_optimizer
from gralora_diffusion.training.outputs.base_license import base_license
from gralora_diffusion.training.outputs.curve import plot_curve
from gralora_diffusion.training.outputs.metrics import MetricsFile
from gralora_diffusion.training.outputs.published import PROMPTS_NAME as VALIDATION_PROMPTS
from gralora_diffusion.training.outputs.published import VALIDATION_NAME
from gralora_diffusion.training.outputs.validation import image_name
from gralora_diffusion.training.outputs.validation_history import write_history
from gralora_diffusion.training.runtime.control import REQUESTS, RunControl, read_status
from gralora_diffusion.training.runtime.folder_lock import LOCK_NAME, OWNER_NAME, owner_name
from tests import models
from tests.benchmark import trials
from tests.io.image_bytes import D65, PRIMARIES
from tests.training.runs import make_images

from .adapters import ADAPTERS, make_adapters, make_attached, make_loras, pairs
from .bases import BASES, make_model, make_single
from .reader import FAMILY, Reader, file_or, sample_folder, save_tensors, training_config

# -- all kinds ------------------------------------------------------------------------------------


def _make_inspected(folder: Path) -> None:
    make_adapters(folder)
    make_attached(sample_folder(folder, "..attached"))
    for made in ("native", "peft"):
        (folder / "..attached" / made).rename(folder / f"attached-{made}")
    (folder / "..attached").rmdir()
    make_loras(sample_folder(folder, "..loras"))
    for made in ("kohya", "diffusers", "peft"):
        (folder / "..loras" / made).rename(folder / f"lora-{made}")
    (folder / "..loras").rmdir()
    flat = "lora_unet_down_blocks_0_attentions_0_proj_in"
    loha = {f"hada_w{i}_{s}": (8, 4) if s == "a" else (4, 8) for i in (1, 2) for s in "ab"}
    save_tensors(pairs(flat, **loha, alpha=()), sample_folder(folder, "loha"))
    save_tensors(
        pairs(flat, lokr_w1=(4, 4), lokr_w2_a=(8, 2), lokr_w2_b=(2, 8)),
        sample_folder(folder, "lokr"),
    )
    save_tensors(pairs(f"{flat}.x", diff=(8, 8), diff_b=(8,)), sample_folder(folder, "differences"))
    make_single(folder)
    make_model(folder)


def _inspect(folder: Path) -> None:
    facts = inspect_file(file_or(folder), check=True)
    as_text(facts)
    json_for_terminal(facts.to_dict(), indent=2)


# -- training --------------------------------------------------------------------------------------

YAML = """\
pretrained_model_name_or_path: stable-diffusion-v1-5/stable-diffusion-v1-5
instance_data_dir: pictures
instance_prompt: a sks dog
output_dir: x
rank: 16
lora_alpha: 16
learning_rate: 1e-4
resolution: 64
train_text_encoder: yes
validation_prompt: [a sks dog, "a: sks dog"]
rank_pattern: ["to_q=8", "re:.*to_k=4"]
lora_layers: to_q,to_k
max_train_steps: 100
snr_gamma: 5
adam_beta1: 0.9
lr_step_rules: "1:3,0.1"
"""


def _make_config(folder: Path) -> None:
    make_images(folder / "config" / "pictures", 1, side=4)
    (folder / "config" / "file.yaml").write_text(YAML)


def _parse(folder: Path) -> None:
    config = parse_config(["--config", str(folder / "file.yaml")])
    validate(config)
    yaml.safe_load(config.to_yaml())


@cache
def _run(ema: bool) -> RunState:
    options = {"use_ema": ema, "lr_scheduler": "cosine", "optimizer": "adamw"}
    layers = {"lora_layers": "attn1.to_q", "rank": 4, "gralora_k": 2}
    config = training_config(
        pretrained_model_name_or_path="a/b", max_train_steps=4, **options, **layers
    )
    pipe, accelerator = models.stable_diffusion(), Accelerator(cpu=True)
    config = resolve_defaults(config, FAMILY, pipe, "no")
    components = add_adapters(pipe, FAMILY, config)
    parameters = list(adapter_parameters(pipe, "unet"))
    optimizer = build_optimizer(config, parameters)
    schedule = build_lr_scheduler(config, optimizer, 4)
    average = EMAModel(parameters, foreach=True) if ema else None
    sum(p.square().sum() for p in parameters).backward()
    optimizer.step()
    return RunState(
        config, pipe, describe_base(pipe, config), FAMILY, components, parameters,
        accelerator.prepare(optimizer), schedule, average, accelerator, "digest", lambda step: {},
    )  # fmt: skip


def _make_checkpoints(folder: Path) -> None:
    """Those of this version, and of earlier ones, which have no hashes of the files."""
    for ema in (False, True):
        name = "average" if ema else "plain"
        store = CheckpointStore(sample_folder(folder, name))
        state = _run(ema)
        state.step = 2
        shutil.copytree(store.write(2, state.save).parent, folder / f"{name}-earlier")
        path = folder / f"{name}-earlier/checkpoint-2" / PROGRESS_NAME
        progress = json.loads(path.read_text())
        del progress["files"]
        path.write_text(json.dumps(progress))


def _resume(folder: Path) -> None:
    state = _run((folder / "checkpoint-2" / "ema.safetensors").exists())
    config = training_config(resume_from_checkpoint="latest", output_dir=str(folder))
    found = find_checkpoint(config, CheckpointStore(folder))
    if found is None:
        return
    before = copy.deepcopy(state.optimizer.state_dict())
    try:
        state.load(found[1])
        assert 0 <= state.step <= 2**53
        assert all(torch.is_tensor(tensor) for tensor in state.adapter().tensors.values())
    finally:  # the run is used for other cases
        state.optimizer.load_state_dict(before)


def _make_records(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 0.5 / step, "lr": 1e-4} for step in range(1, 6)
    ]
    rows[2]["held_out"] = {"loss": 0.3, "difference": -0.1, "low": -0.2, "high": 0.0}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (sample_folder(folder, "metrics") / "metrics.jsonl").write_text(text)


def _go_on(folder: Path) -> None:
    metrics = MetricsFile(folder, 3)
    metrics.add({"step": 4, "loss": 0.1})
    plot_curve(metrics.read(), folder / "curve.png")


def _make_captions(folder: Path) -> None:
    names = ("0.png", "1.png", "2.png")
    rows = [{"file_name": name, "text": f"a dog, {name}", "tags": ["x"]} for name in names]
    (make_images(folder / "jsonl", side=4) / "metadata.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    with open(make_images(folder / "csv", side=4) / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "text"], *([n, f"a, {n}"] for n in names)])
    path = make_images(folder / "parquet", side=4) / "metadata.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    beside = make_images(folder / "beside", side=4)
    (beside / "0.txt").write_text("a dog\n")
    (beside / "1.caption").write_text("a dog, sitting\n")
    (beside / "2.json").write_text(json.dumps({"caption": "a dog", "tags": ["x", 1]}))


def _find(folder: Path) -> None:
    for example in find_examples(folder, "a dog"):
        example.caption.encode()
        example.load()


def _make_dataset(folder: Path) -> None:
    import datasets

    rows = [{"file_name": f"{i}.png", "text": f"a dog {i}"} for i in range(3)]
    pictures = make_images(sample_folder(folder, "pictures") / "data", side=4)
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = datasets.Dataset.from_dict(
        {
            "image": [
                {"bytes": (pictures / f"{i}.png").read_bytes(), "path": None} for i in range(3)
            ],
            "text": [row["text"] for row in rows],
        }
    )
    made.to_parquet(sample_folder(folder, "parquet") / "train.parquet")
    made.save_to_disk(sample_folder(folder, "disk") / "data")


def _find_rows(folder: Path) -> None:
    place = folder / "data" if (folder / "data").exists() else folder
    found = find_dataset_examples(
        str(place), "a dog", caption_column="text", cache_dir=str(folder / "cache")
    )
    for example in found:
        example.caption.encode()


def _make_columns(folder: Path) -> None:
    """A dataset with masks, and with one control image and several in each row."""
    import datasets

    images = make_images(sample_folder(folder, "..images"), 2, side=4)
    stored = [{"bytes": (images / name).read_bytes(), "path": None} for name in _TWO]
    masks = []
    for name in _TWO:
        Image.open(images / name).convert("L").save(images / "mask.png")
        masks.append({"bytes": (images / "mask.png").read_bytes(), "path": None})
    shutil.rmtree(images)
    columns = {"image": stored, "mask": masks, "first": stored, "more": [stored, []]}
    kinds = {name: datasets.Image() for name in columns}
    kinds["more"] = datasets.Sequence(datasets.Image())
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    made.to_parquet(sample_folder(folder, "parquet") / "train.parquet")


def _find_columns(folder: Path) -> None:
    found = find_dataset_examples(
        str(folder),
        "a dog",
        cache_dir=str(folder / "cache"),
        masks=MaskPlaces(),
        control_columns=("first", "more"),
    )
    for example in found:
        assert example.mask is None or example.mask.load().size == example.size
        for control in example.controls:
            assert control.load().size == control.size


def _make_cache(folder: Path) -> None:
    store = TensorStore(sample_folder(folder, "latents"))
    store["key"] = {"mean": torch.ones(4, 2, 2), "std": torch.ones(4, 2, 2)}


def _read_cache(folder: Path) -> None:
    store = TensorStore(folder)
    if "key" in store:
        store["key"]
    store.finish_looking()


def _make_checked(folder: Path) -> None:
    """What was found of an image and of a mask."""
    with CheckedFiles(CHECKED, sample_folder(folder, "found")) as checked:
        path = checked._file
    facts = ["0" * 64, [4, 3], None, 0, ["its profile is damaged"], False]
    rows = [
        checked_files._VERSION,
        ["image", "/images/0.png", [100, 1, 2], *facts],
        ["mask", "/images/0.mask.png", [100, 1, 2], "1" * 64, [4, 3], [0, 0, 2, 2], 255, [], False],
    ]
    assert path is not None
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _read_checked(folder: Path) -> None:
    with CheckedFiles(CHECKED, folder, write=False) as checked:
        assert not checked.knows("image", Path("/images/none.png"))


CHECKED = Path("/images")


def _make_edits(folder: Path) -> None:
    """Control images in a folder, and in columns of metadata files."""
    for name in ("folder", "jsonl", "csv"):
        images = make_images(sample_folder(folder, name) / "images", 2, side=4)
        for control in ("first", "second"):
            make_images(images / f".{control}" if name != "folder" else folder / name / control, 2)
    rows = [
        {"file_name": "0.png", "text": "a", "control": ".first/0.png"},
        {"file_name": "1.png", "text": "b", "control": [".first/1.png", ".second/1.png"]},
    ]
    (folder / "jsonl/images/metadata.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    with open(folder / "csv/images/metadata.csv", "w", newline="") as file:
        table = [
            ["file_name", "text", "control_file_name"],
            *([n, "a", f".first/{n}"] for n in _TWO),
        ]
        csv.writer(file).writerows(table)


_TWO = ("0.png", "1.png")


def _find_edits(folder: Path) -> None:
    given = tuple(folder / name for name in ("first", "second") if (folder / name).is_dir())
    for example in find_examples(folder / "images", "a dog", controls=ControlPlaces(given)):
        for control in example.controls:
            assert control.load().size == control.size


def _make_masked(folder: Path) -> None:
    """Masks in a folder, beside the images, in a column, and as opacity."""
    for name in ("folder", "beside", "column", "opacity"):
        images = make_images(sample_folder(folder, name) / "images", 2, side=12)
        masks = [Image.open(images / n).convert("L") for n in _TWO]
        for n, mask in zip(_TWO, masks, strict=True):
            if name == "opacity":
                image = Image.open(images / n).convert("RGBA")
                image.putalpha(mask)
                image.save(images / n)
                continue
            place = {"folder": folder / name / "masks" / n, "column": images / f".{n}"}
            path = place.get(name, images / f"{Path(n).stem}.mask.png")
            path.parent.mkdir(exist_ok=True)
            mask.save(path)
    rows = [{"file_name": n, "text": "a", "mask": f".{n}"} for n in _TWO]
    (folder / "column/images/metadata.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )


def _find_masked(folder: Path) -> None:
    masks = folder / "masks"
    places = MaskPlaces(masks if masks.is_dir() else None, from_alpha=True)
    for example in find_examples(folder / "images", "a dog", masks=places):
        if example.mask is not None:
            mask = example.mask.load()
            assert (mask.mode, mask.size) == ("L", example.size)
            assert mask.getbbox() == example.mask.box


DATA = """\
- folder: images
  prompt: a photo of sks dog
  repeats: 2
  resolution: 64
  random_flip: yes
- folder: images
  trigger_word: zwx
  prompt: a cat
  loss_weight: 0.5
  share: 0.25
  caption_dropout: 0.1
- {role: prior, folder: others, prompt: a dog, loss_weight: 0.5}
"""


def _make_data_file(folder: Path) -> None:
    for name in ("images", "others"):
        make_images(folder / "sets" / name, 1, side=4)
    (folder / "sets" / "file.yaml").write_text(DATA)


def _read_data_file(folder: Path) -> None:
    config = training_config(
        pretrained_model_name_or_path="a/b",
        instance_data_dir=None,
        instance_prompt=None,
        data_config=str(folder / "file.yaml"),
    )
    for section in sound_sections(config, "train"):
        part = section.image_set
        part.options(config)
        part.name(config).encode()
    validate(with_data_file(config))


def _make_quantization(folder: Path) -> None:
    values = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "float32",
    }
    (sample_folder(folder, "config") / "file.json").write_text(json.dumps(values))


def _check_quantization(folder: Path) -> None:
    list(
        check_quantization(training_config(bnb_quantization_config_path=str(folder / "file.json")))
    )


# -- images ----------------------------------------------------------------------------------------


def _picture(mode: str) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def _make_images(folder: Path) -> None:
    saved = {
        "png": ("RGB", "RGBA", "P", "L", "1", "I;16"),
        "jpeg": ("RGB", "CMYK", "L"),
        "tiff": ("RGB", "CMYK", "I;16", "P", "LAB"),
        "gif": ("P",),
        **dict.fromkeys(("bmp", "ppm", "tga", "ico", "jp2", "webp", "avif"), ("RGB",)),
        **dict.fromkeys(("pcx", "sgi", "dds", "im", "qoi", "icns"), ("RGB",)),
    }
    for ending, modes in saved.items():
        if ending in ("jp2", "webp", "avif") and not features.check(
            {"jp2": "jpg_2000"}.get(ending, ending)
        ):
            continue
        for mode in modes:
            image = _picture("L") if mode == "I;16" else _picture(mode)
            image = image.convert("I;16") if mode == "I;16" else image
            sizes = {"sizes": [image.size]} if ending == "ico" else {}
            path = sample_folder(folder, f"{ending}-{mode.replace(';', '')}") / f"file.{ending}"
            try:
                image.save(path, **sizes)
            except (KeyError, OSError):  # Pillow reads it and does not write it
                path.parent.rmdir()


def _make_profiles(folder: Path) -> None:
    profiles = {
        "p3": rgb_profile((*PRIMARIES["display-p3"], *D65), None),
        "gamma": rgb_profile((*PRIMARIES["adobe"], *D65), 2.2),
        "srgb": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "lab": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    }
    for ending in ("png", "jpeg", "tiff"):
        for name, profile in profiles.items():
            path = sample_folder(folder, f"{ending}-{name}") / f"file.{ending}"
            _picture("RGB").save(path, icc_profile=profile)


def _show(folder: Path) -> None:
    (path,) = folder.iterdir() if any(folder.iterdir()) else (folder / "file.png",)
    image = read_image(path, [])
    assert image.mode == "RGB"
    read_image(path.read_bytes(), at_least=4)
    assert image_suffix(path.read_bytes())[0] == "."


def _make_masks(folder: Path) -> None:
    gray = _picture("L")
    masks = {"L": gray, "1": gray.convert("1"), "LA": gray.convert("LA"), "P": gray.convert("P")}
    rgba = gray.convert("RGBA")
    rgba.putalpha(gray)
    for mode, mask in (masks | {"RGBA": rgba}).items():
        for ending in ("png", "tiff") if mode != "P" else ("png", "gif"):
            mask.save(sample_folder(folder, f"{ending}-{mode}") / f"file.{ending}")


def _show_masks(folder: Path) -> None:
    (path,) = folder.iterdir() if any(folder.iterdir()) else (folder / "file.png",)
    opacity = read_opacity(path)
    assert opacity is None or opacity.mode == "L"
    assert read_mask(path).mode == "L"


# -- a run, and the studio -------------------------------------------------------------------------


def _make_statuses(folder: Path) -> None:
    for name, state in (("running", "training"), ("done", "finished")):
        part = sample_folder(folder, name)
        control = RunControl(part)
        control.begin(2, 10)
        control.progress(3, 0.5)
        control.answer("save", "checkpoint-3 was written")
        control.say(state)
        owner = {"pid": 1, "host": "here", "since": 1.8e9}
        (part / OWNER_NAME).write_text(json.dumps(owner))
        (part / "training_config.yaml").write_text("rank: 4\n")


def _read_run(folder: Path) -> None:
    json.dumps(read_status(folder).to_dict())
    assert owner_name(folder).isprintable()


def _make_controlled(folder: Path) -> None:
    """Folders of runs that are alive, and asked for something."""
    _make_statuses(folder)
    for name in ("running", "done"):
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": 1.8e9}
        (folder / name / OWNER_NAME).write_text(json.dumps(owner))
        (folder / name / LOCK_NAME).touch()
        for what in REQUESTS:
            (folder / name / f".gralora.request-{what}").touch()


def _control(folder: Path) -> None:
    """Both sides: a command asks, and the run hears and answers."""
    with suppress(OSError), FileLock(folder / LOCK_NAME, timeout=0):
        control_command.main([str(folder), "stop", "--wait", "0"])
        run = RunControl(folder)
        run.begin(3, 10)
        run.is_asked_to_stop()
        heard = run.take() if run.is_asked() else frozenset()
        assert heard <= REQUESTS.keys()
        run.progress(4, 0.5)
        for what in heard:
            run.answer(what, "done")
        assert not RunControl(folder).is_asked()
        # without the owner's file, the status may be of an earlier run
        assert read_status(folder).answers.keys() in (heard, frozenset())
        run.discard_requests()
    control_command.main([str(folder), "status"])
    control_command.main([str(folder), "status", "--json"])


CARD = """\
---
license: other
license_name: some-license
license_link: LICENSE.md
tags: [a, &b c]
widget:
- text: a dog
  output: {url: a.png}
---
# A base
"""


def _make_cards(folder: Path) -> None:
    # texts are damaged as texts, by their ending
    (sample_folder(folder, "card") / "file.txt").write_text(CARD)


def _read_card(folder: Path) -> None:
    if (folder / "file.txt").is_file():
        (folder / "file.txt").rename(folder / "README.md")
    found = base_license(training_config(pretrained_model_name_or_path=str(folder)))
    assert not set(found) - {"license", "license_name", "license_link"}
    assert all(text.isprintable() for text in found.values())


def _make_histories(folder: Path) -> None:
    for name, steps in (("two", (5, 10)), ("many", range(1, 12))):
        for step in steps:
            part = sample_folder(folder, f"{name}/{VALIDATION_NAME}/step-{step:06d}")
            (part / VALIDATION_PROMPTS).write_text("a dog\na cat\n")
            for row in range(2):
                _picture("RGB").save(part / image_name(row, 0))


def _read_history(folder: Path) -> None:
    write_history(folder)


def _make_jobs(folder: Path) -> None:
    for name, files in (
        ("waiting", {}),
        ("running", {"started.json": {"pid": 1, "since": 5.5}, "stopped.json": {}}),
        ("done", {"started.json": {"pid": 1, "since": 5.5}, "ended.json": {"code": 0}}),
    ):
        part = sample_folder(folder, f"{name}/20260101-000000-train")
        facts = {"kind": "train", "title": "a dog", "output": "runs/a", "queued": True}
        facts |= {"command": ["-m", "gralora_diffusion", "train", "--config", "a.yaml"]}
        for file, content in {"job.json": facts, **files}.items():
            (part / file).write_text(json.dumps(content))
        (part / "log.txt").write_text("step 1\rstep 2\nend\n")


def _read_jobs(folder: Path) -> None:
    for job in Jobs(folder).list():
        assert job.state in ("running", "done", "failed", "stopped", "cancelled")
        job.log().encode()
        assert job.command[:2] == ("-m", "gralora_diffusion")


def _make_comparisons(folder: Path) -> None:
    part = sample_folder(folder, "made")
    made = comparing.Comparison(
        base="base", prompts=["a dog"], adapters=["one", "two"], blends=[0.5], size=64
    )
    (part / "file.json").write_text(made.to_json())
    texts = PngImagePlugin.PngInfo()
    texts.add_text(OWN, json.dumps({"prompt": "a dog", "seed": 3}))
    _picture("RGB").save(part / "cell.png", pnginfo=texts)


def _read_comparison(folder: Path) -> None:
    json.dumps(comparing.settings_of(folder / "cell.png"))
    found = comparing.read(folder / "file.json")
    if not found.problems():
        assert len(found.rows) * len(found.columns) > 0
    found.to_json().encode()


def _make_studio_runs(folder: Path) -> None:
    config = training_config(
        pretrained_model_name_or_path="a/b", instance_prompt="a dog", max_train_steps=4
    )
    for name in ("one", "two"):
        run = sample_folder(folder, f"{name}/run")
        (run / "training_config.yaml").write_text(config.to_yaml() + "report_to: [a, b]\n")
        rows = [{"step": step, "loss": 0.5 / step, "lr": 1e-4} for step in range(1, 4)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / f"checkpoint-{len(name)}").mkdir()


def _read_studio_runs(folder: Path) -> None:
    found = find_runs(folder, [])
    for run in found:
        json.dumps([run.state, run.steps, run.checkpoints, list(run.rows), run.validations])
        assert run.adapter is None
    json.dumps(differing_options(found))


def _make_validation_prompts(folder: Path) -> None:
    (sample_folder(folder, "text") / "file.txt").write_text(
        "# sampled while training\na dog --w 64 --h 32 --d 3 --l 2.5 --s 4\na cat --n blurry\n"
    )
    entries = [
        {"prompt": "a dog", "seed": 3, "scale": 0.5},
        {"prompt": "a cat", "width": 64, "height": 32},
    ]
    (sample_folder(folder, "yaml") / "file.yaml").write_text(yaml.safe_dump(entries))


def _read_validation_prompts(folder: Path) -> None:
    files = [*folder.iterdir(), folder / "file.txt"]
    validation_prompts(training_config(validation_prompts_file=str(files[0])))


# -- the benchmark ---------------------------------------------------------------------------------


def _make_results(folder: Path) -> None:
    output = sample_folder(folder, "run")
    for key in trials.keys(trials.SUBJECTS[:2], trials.METHODS[:2], (0,)):
        write_result(trials.trial(key, mechanism=True), output / key.path)


def _results(folder: Path) -> None:
    found, unreadable = read_results(folder)
    assert len(found) + len(unreadable) <= 4
    assert all(str(entry.reason) for entry in unreadable)
    ledger.Ledger(folder).failures()
    for path in (folder / TRIALS_FOLDER).glob("*/*/*/*/result.json"):
        ledger._why(path)


def _report(folder: Path) -> None:
    found, unreadable = read_results(folder)
    write_report(found, folder / "report", unreadable=unreadable)


def _make_answers(folder: Path) -> None:
    part = sample_folder(folder, "page")
    pair = {"comparison": ["gralora-r4-k2", "lora-r4"], "left": "lora-r4", "right": "gralora-r4-k2"}
    pairs = [{"subject": name, "drifts": [0.1, 0.2], **pair} for name in ("dog", "cat")]
    key = {"format": 1, "page": "0123", "pairs": pairs}
    (part / "blind_key.json").write_text(json.dumps(key))
    (part / "file.json").write_text(
        json.dumps({"page": "0123", "choices": {"0": "left", "1": "none"}})
    )


def _count_answers(folder: Path) -> None:
    for found in blind_choices([folder / "file.json"], folder):
        assert 0 <= found.share <= 1
        json.dumps(found.drift_gap, allow_nan=False)


def _make_kept(folder: Path) -> None:
    part = sample_folder(folder, "run")
    text = (
        "dreambooth_dir: db\npretrained_model_name_or_path: base\nmethods: [lora-r4, gralora-r4-k2]"
    )
    text += "\nseeds: [0, 1]\nencoders: [dinov2=samples/tiny-encoders/dinov2]\nsnr_gamma: 5.0\n"
    (part / run_config.SETTINGS_NAME).write_text(text)


def _keep(folder: Path) -> None:
    settings = run_config.parse_settings(["--report_only", "--output_dir", str(folder)])
    run_config.check_same_run(settings)


def _make_prompts(folder: Path) -> None:
    part = sample_folder(folder, "set")
    source = Path(__file__).parents[2] / "samples/subjects" / PROMPTS_NAME
    lines = source.read_text().split("\n")
    (part / PROMPTS_NAME).write_text("\n".join(lines[:4] + lines[15:]))
    for line in lines[3:4]:
        make_images(part / line.partition(",")[0], 1, side=4)


def _subjects(folder: Path) -> None:
    for subject in read_subjects(folder):
        subject.prompts("sks")
        subject.instance_prompt("sks")


READERS: dict[str, Reader] = {
    **ADAPTERS,
    "inspect": Reader(_make_inspected, _inspect, (AdapterFileError,)),
    **BASES,
    "config": Reader(_make_config, _parse, (ConfigError,)),
    "quantization": Reader(_make_quantization, _check_quantization),
    "checkpoint": Reader(_make_checkpoints, _resume, (CheckpointError,)),
    "records": Reader(_make_records, _go_on, (OSError,), writes=True, slow=True),
    "captions": Reader(_make_captions, _find, (DataError,)),
    "dataset": Reader(_make_dataset, _find_rows, (DataError,), writes=True, slow=True),
    "columns": Reader(_make_columns, _find_columns, (DataError,), writes=True, slow=True),
    "data_file": Reader(_make_data_file, _read_data_file, (ConfigError,)),
    "checked": Reader(_make_checked, _read_checked),
    "cache": Reader(_make_cache, _read_cache, (DataError,), writes=True),
    "pictures": Reader(_make_images, _show, (ImageError,)),
    "profiles": Reader(_make_profiles, _show, (ImageError,)),
    "masks": Reader(_make_masks, _show_masks, (ImageError,)),
    "card": Reader(_make_cards, _read_card, writes=True),
    "history": Reader(_make_histories, _read_history, (OSError,), writes=True, slow=True),
    "status": Reader(_make_statuses, _read_run, (ConfigError,)),
    "control": Reader(_make_controlled, _control, (SystemExit,), writes=True),
    "jobs": Reader(_make_jobs, _read_jobs),
    "comparison": Reader(_make_comparisons, _read_comparison, (OSError, ValueError)),
    "studio_runs": Reader(_make_studio_runs, _read_studio_runs),
    "edits": Reader(_make_edits, _find_edits, (DataError,)),
    "masked": Reader(_make_masked, _find_masked, (DataError,)),
    "validation_prompts": Reader(
        _make_validation_prompts, _read_validation_prompts, (ConfigError,)
    ),
    "results": Reader(_make_results, _results),
    "report": Reader(_make_results, _report, writes=True, slow=True),
    "answers": Reader(_make_answers, _count_answers, (DataError,)),
    "kept": Reader(_make_kept, _keep, (ConfigError,)),
    "prompts": Reader(_make_prompts, _subjects, (DataError,)),
}
