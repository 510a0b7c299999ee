"""The files of a run: images, tracker, metrics, curve, card, options."""

from __future__ import annotations

import ast
import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import CommitInfo, ModelCard
from huggingface_hub.utils import filter_repo_objects
from markdown_it import MarkdownIt
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from gralora_diffusion.base_models.options import BaseModelOptions
from gralora_diffusion.training.config.training_config import TrainingConfig, parse_config
from gralora_diffusion.training.config.validation_prompts import ValidationPrompt
from gralora_diffusion.training.outputs import base_license, output_dir, upload
from gralora_diffusion.training.outputs.curve import plot_curve
from gralora_diffusion.training.outputs.metrics import MetricsFile
from gralora_diffusion.training.outputs.model_card import write_card
from gralora_diffusion.training.outputs.validation import image_name
from gralora_diffusion.training.run import train
from gralora_diffusion.training.runtime.acceleration import accelerate_left_as_it_was
from tests.originals import ORIGINALS, write
from tests.training.cards import draw_by_card
from tests.training.optimization.test_step import make_trainer
from tests.training.runs import adapter, assert_same_run, config, make_images, metrics, run

PROMPTS = ['a sks dog: on "snow"', "a dog"]
#: On the CPU, of which the peak memory is not known.
SCALARS = ("loss", "lr", "grad_norm", "samples_per_second")


@pytest.fixture(scope="module")
def finished(base: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(
        output_dir=tmp_path_factory.mktemp("runs") / "my dog",
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        instance_prompt='a "sks" dog: 犬',
        max_train_steps=4,
        checkpointing_steps=2,
        validation_prompt=PROMPTS,
        num_validation_images=2,
        validation_steps=2,
        validation_inference_steps=2,
        report_to="tensorboard",
        optimizer="schedulefree",
        rank_pattern=["attn1.to_q=8", "to_q=2"],
    )


def test_files(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == [
        ".gralora.status",
        "README.md",
        "checkpoint-2",
        "checkpoint-4",
        "logs",
        "metrics.jsonl",
        "pytorch_gralora_weights.safetensors",
        "training_config.yaml",
        "training_curve.png",
        "validation",
        "validation.png",
        "validation_over_time.png",
    ]
    assert [row["step"] for row in metrics(finished)] == [1, 2, 3, 4]
    assert all(row.keys() == {"step", "performance", *SCALARS[:3]} for row in metrics(finished))
    with Image.open(finished / "training_curve.png") as curve:
        assert len(curve.convert("RGB").getcolors(1 << 20) or []) > 100


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    good = [b'{"step": 1, "loss": 0.5, "lr": 1e-4}', b'{"loss": 2, "step": 3}']
    odd = [b"", b"{", b"[]", b"3", b"\xff", b"[" * 3000, b'{"step": 2}']
    odd += [b'{"step": "2", "loss": 1}', b'{"step": 2, "loss": NaN}']
    odd += [b'{"step": 2, "loss": ' + b"1" * 400 + b"}"]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([*odd, good[0], *odd, good[1], *odd]))
    assert [row["step"] for row in MetricsFile(tmp_path, 3).read()] == [1, 3]
    assert path.read_bytes() == b"".join(line + b"\n" for line in good)
    MetricsFile(tmp_path, 1).add({"step": 2, "loss": 1.5})
    assert [row["loss"] for row in metrics(tmp_path)] == [0.5, 1.5]


def test_validation_images_are_files_in_a_grid(finished: Path) -> None:
    steps = sorted((finished / "validation").iterdir())
    assert [step.name for step in steps] == ["step-000000", "step-000002", "step-000004"]
    for step in steps:
        names = ["00-00.png", "00-01.png", "01-00.png", "01-01.png", "grid.png", "prompts.txt"]
        assert sorted(file.name for file in step.iterdir()) == names
        grid = Image.open(step / "grid.png")
        for row in range(2):
            for column in range(2):
                left, top = 112 + 136 * column, 8 + 136 * row
                cell = grid.crop((left, top, left + 128, top + 128))
                single = Image.open(step / f"{row:02d}-{column:02d}.png")
                enlarged = single.resize((128, 128), Image.Resampling.NEAREST)
                assert cell.tobytes() == enlarged.tobytes()
    first, last = (Image.open(step / "00-00.png").tobytes() for step in (steps[0], steps[-1]))
    assert first != last


def test_final_images_are_those_of_the_saved_adapter(finished: Path, base: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_gralora_weights(finished)
    image = pipe(
        PROMPTS[1],
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    saved = Image.open(finished / "validation" / "step-000004" / "01-01.png")
    assert image.tobytes() == saved.tobytes()


def test_tracker_has_scalars_and_images(finished: Path) -> None:
    (events,) = (path for path in (finished / "logs").rglob("*") if path.is_file())  # one run
    content = reload(events).PluginTagToContent("hparams")["_hparams_/session_start_info"]
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["rank"].number_value == 4
    assert shown["instance_prompt"].string_value == 'a "sks" dog: 犬'
    assert set(tags(events)["scalars"]) == set(SCALARS)
    for name in SCALARS:
        tracked = [event.value for event in reload(events).Scalars(name)]
        rows = [{**row, **row["performance"]} for row in metrics(finished)]
        assert tracked == pytest.approx([row[name] for row in rows])
    assert sorted(tags(events)["images"]) == sorted(f"validation/{prompt}" for prompt in PROMPTS)
    drawn = reload(events).Images(f"validation/{PROMPTS[1]}")
    assert [event.step for event in drawn] == [0, 2, 4]
    logged = Image.open(io.BytesIO(drawn[-1].encoded_image_string))
    folder = finished / "validation" / "step-000004"
    row = [np.asarray(Image.open(folder / f"01-{column:02d}.png")) for column in range(2)]
    np.testing.assert_array_equal(np.asarray(logged), np.concatenate(row, axis=1))


def test_gradient_norms_are_those_before_clipping(base: Path, images: Path, tmp_path: Path) -> None:
    """Compared with the gradients that the optimizer takes, which are clipped in the second run."""
    taken: dict[float, list[float]] = {math.inf: [], 1e-3: []}
    logged = {}
    for limit, norms in taken.items():
        with accelerate_left_as_it_was():
            trainer = make_trainer(
                pretrained_model_name_or_path=base,
                instance_data_dir=images,
                output_dir=tmp_path / f"{limit}",
                max_grad_norm=limit,
                gradient_accumulation_steps=2,
                max_train_steps=2,
            )

            def take(*_: Any, taken: list[float] = norms, of: Any = trainer.parameters) -> None:
                taken.append(float(sum(p.grad.double().square().sum() for p in of)) ** 0.5)

            trainer.optimizer.optimizer.register_step_pre_hook(take)
            file = MetricsFile(tmp_path / f"{limit}")
            assert list(trainer.steps(file)) == [1, 2]
            logged[limit] = [row["grad_norm"] for row in file.read()]
    assert logged[math.inf] == pytest.approx(taken[math.inf], rel=1e-5)
    assert min(logged[math.inf]) > 1e-2
    assert taken[1e-3] == pytest.approx([1e-3, 1e-3], rel=1e-2)
    assert logged[1e-3][0] == logged[math.inf][0]


def reload(file: Path) -> Any:
    return EventAccumulator(str(file)).Reload()


def tags(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = reload(file).Tags()
    return found


def test_card(finished: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = ModelCard.load(finished / "README.md")
    data = card.data.to_dict()
    assert data["instance_prompt"] == 'a "sks" dog: 犬'
    assert "gralora" in data["tags"]
    assert data["pipeline_tag"] == "text-to-image"
    assert not data.keys() & {"base_model", "base_model_relation", "license"}  # of a local folder
    assert [example["text"] for example in data["widget"]] == PROMPTS
    for row, example in enumerate(data["widget"]):
        assert example["output"]["url"] == f"validation/step-000004/0{row}-00.png"
        assert (finished / example["output"]["url"]).is_file()
    count = sum(tensor.numel() for tensor in adapter(finished).values())
    assert f"| trained parameters | {count:,} |" in card.text
    (image,) = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert (finished / image).is_file()
    (options,) = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    assert yaml.safe_load(options)["rank"] == 4
    assert yaml.safe_load(options)["rank_pattern"] == ["attn1.to_q=8", "to_q=2"]
    assert "This is a GraLoRA adapter (rank 4, k = 2; other values on some layers)" in card.text
    assert "k lowered" not in card.text
    assert "quantized" not in card.text
    assert "dtype=torch.float32" in card.text
    draw_by_card(card.text, {"path/to/base": base, "path/to/this/folder": finished})


#: What may lie in an output folder without being the run's to show.
PRIVATE = (
    *(".env", "notes/private.txt", "notes/README.md", "validation/README.md", "notes.md"),
    *("validation/step-000000/me.png", "validation/step-x/00-00.png", "class/class-00000.png"),
    *("validation/step-000000/00-00.png.txt", "pytorch_gralora_weights.safetensors.bak"),
)


@pytest.mark.parametrize("single_file", [False, True])
def test_card_and_upload_tell_no_paths_of_this_machine(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_file: bool
) -> None:
    uploaded: list[Path] = []

    def send(*, folder_path: Path, allow_patterns: list[str], **others: Any) -> CommitInfo:
        files = [path for path in folder_path.rglob("*") if path.is_file()]
        names = [path.relative_to(folder_path).as_posix() for path in files]
        left = filter_repo_objects(names, allow_patterns=allow_patterns)
        uploaded.extend(folder_path / name for name in left)
        return CommitInfo("https://huggingface.co/a/b/commit/0", "", "", "0")

    monkeypatch.setattr(upload, "upload_folder", send)  # there is no Hub here
    monkeypatch.setattr(output_dir, "create_repo", lambda *arguments, **others: None)
    weights = {"pretrained_model_name_or_path": base}
    if single_file:
        tensors = ORIGINALS["stable-diffusion"](StableDiffusionPipeline.from_pretrained(base))
        weights["pretrained_model_name_or_path"] = write(tensors, tmp_path / "base.safetensors")
        weights["base_config"] = base
    for name in PRIVATE:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"private")
    (tmp_path / "out" / "validation" / "step-000000" / "00-07.png").symlink_to("../../.env")
    folder = run(
        output_dir=tmp_path / "out",
        latent_cache_dir=tmp_path / "out" / "cache",
        instance_data_dir=make_images(tmp_path / "pictures"),
        held_out_data_dir=make_images(tmp_path / "held out", seed=1),
        held_out_steps=1,
        validation_prompt="a dog",
        validation_inference_steps=1,
        num_validation_images=1,
        max_train_steps=2,
        mixed_precision="bf16",
        report_to="tensorboard",
        push_to_hub=True,
        **weights,
    )
    steps = [f"validation/step-00000{step}" for step in (0, 2)]
    assert sorted(path.relative_to(folder).as_posix() for path in uploaded) == [
        *("README.md", "best/pytorch_gralora_weights.safetensors", "metrics.jsonl"),
        *("pytorch_gralora_weights.safetensors", "training_curve.png", "validation.png"),
        *(f"{step}/{name}" for step in steps for name in ("00-00.png", "grid.png", "prompts.txt")),
        "validation_over_time.png",
    ]
    for path in uploaded:
        data = path.read_bytes()
        assert all(str(place).encode() not in data for place in (tmp_path, base)), path
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "instance_data_dir: pictures\n" in text
    assert "| held-out loss | " in text
    assert f"pretrained_model_name_or_path: {weights['pretrained_model_name_or_path'].name}" in text
    places = {"path/to/this/folder": folder, "path/to/base": base}
    if single_file:
        places["path/to/base.safetensors"] = tmp_path / "base.safetensors"
        places["path/to/base_config"] = places.pop("path/to/base")
    pipe = draw_by_card(text, places)
    assert pipe.unet.dtype == torch.bfloat16


def test_card_reports_a_lowered_k(base: Path, images: Path, tmp_path: Path) -> None:
    """conv_in takes 4 channels and conv_out makes 4, and k is 8 or, for the second one, 2."""
    out = run(
        output_dir=tmp_path / "out",
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        max_train_steps=1,
        rank=8,
        gralora_k=8,
        lora_layers="to_q,conv_in,conv_out",
        k_pattern=["conv_out=2"],
    )
    text = ModelCard.load(out / "README.md").text
    assert "(rank 8, k = 8; other values on some layers)" in text
    layers = len({key.partition(".gralora_")[0] for key in adapter(out)})
    assert f"| adapted layers | {layers} |" in text
    assert (
        "| k lowered | to 4 on 1 of these layers, because their widths allow no larger one |"
        in text
    )


def test_card_states_base_and_license(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a base on the Hub, whose card says ``other``, and of one whose card cannot be had."""
    repository = tmp_path / "of the hub"
    repository.mkdir()
    (repository / "README.md").write_text(
        "---\nlicense: other\nlicense_name: flux-1-dev\nlicense_link: LICENSE.md\n---\n# x\n"
    )

    def fetched(name: str, patterns: list[str], **options: Any) -> Path:
        assert (name, patterns, options["revision"]) == ("owner/base", ["README.md"], "main")
        return repository

    config = TrainingConfig(
        pretrained_model_name_or_path="owner/base", revision="main", output_dir=str(tmp_path)
    )
    data = ModelCard.load(write_card(tmp_path, config, "flux", {}, None, [])).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("owner/base", "adapter")
    assert "license" not in data  # offline
    monkeypatch.setattr(base_license, "fetch", fetched)  # there is no Hub here
    data = ModelCard.load(write_card(tmp_path, config, "flux", {}, None, [])).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "flux-1-dev")
    assert data["license_link"] == "https://huggingface.co/owner/base/blob/main/LICENSE.md"


def test_a_prompt_of_the_card_may_be_a_text(tmp_path: Path) -> None:
    """As in version 0.1, where prompts had no settings of their own."""
    config = TrainingConfig(output_dir=str(tmp_path))
    for name in ("grid.png", image_name(0, 0)):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    cards = [
        write_card(tmp_path, config, "flux", {}, tmp_path / "grid.png", prompts).read_text()
        for prompts in (["a dog"], [ValidationPrompt(prompt="a dog")])
    ]
    assert cards[0] == cards[1]
    assert "a dog" in cards[0]


@pytest.mark.parametrize(
    ("family", "expected"),
    [("stable-diffusion", [None, "own", "usual"]), ("flux", [None, None, None])],
)
def test_card_states_the_negative_prompts_that_were_used(
    family: str, expected: list[str | None], tmp_path: Path
) -> None:
    """An empty one is a prompt's own, and FLUX.1 takes none."""
    prompts = [ValidationPrompt(prompt="a", negative_prompt=text) for text in ("", "own", None)]
    for name in ("grid.png", *(image_name(row, 0) for row in range(len(prompts)))):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    config = TrainingConfig(output_dir=str(tmp_path), validation_negative_prompt="usual")
    path = write_card(tmp_path, config, family, {}, tmp_path / "grid.png", prompts)
    widget = ModelCard.load(path).data.to_dict()["widget"]
    assert [e.get("parameters", {}).get("negative_prompt") for e in widget] == expected


MERGED = "".join(f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 9)}]}}\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("front_matter", "expected"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ("license: creativeml-openrail-m\nlicense_link: https://a.b/c", None),
        ("license: [mit]", {}),
        ('license: "mit\\ntags: [x]"', {}),
        ("license: other\nlicense_name: '{{ x }}'\nlicense_link: ../x", {"license": "other"}),
        ("license: other\nlicense_link: javascript:x", {"license": "other"}),
        ("license_name: x", {}),
        ("license: {", {}),
        ("- a list", {}),
        ("x: " + "[" * 5000, {}),
        ("license: !!binary bWl0", {}),
        # 9 to the power of 9 mappings, if they were merged
        (f"x0: &x0 {{a: b}}\n{MERGED}license: mit", {"license": "mit"}),
    ],
)
def test_license_of_a_local_base(
    tmp_path: Path, front_matter: str, expected: dict[str, str] | None
) -> None:
    options = BaseModelOptions(pretrained_model_name_or_path=str(tmp_path))
    assert base_license.base_license(options) == {}
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n# base\n")
    if expected is None:
        expected = {"license": "creativeml-openrail-m", "license_link": "https://a.b/c"}
    assert base_license.base_license(options) == expected


#: Text that could end a fence, a table, the front matter, a literal or a tag.
HOSTILE = (
    "a `` <script>x</script> ``` {{ 7 * 7 }} {% raw %} | # *b*\n---\ntags: [x]\n\x1b[31m\u202e "
    "\"); import os # '"
)


def test_hostile_text_in_a_card_is_only_text(tmp_path: Path) -> None:
    config = TrainingConfig(
        pretrained_model_name_or_path=HOSTILE,
        revision=HOSTILE,
        instance_prompt=HOSTILE,
        hub_model_id=HOSTILE,
        output_dir=str(tmp_path),
    )
    grid = tmp_path / "grid.png"
    Image.new("RGB", (8, 8)).save(grid)
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    path = write_card(
        folder, config, HOSTILE, {HOSTILE: HOSTILE}, grid, [ValidationPrompt(prompt=HOSTILE)]
    )
    text = path.read_text(encoding="utf-8")
    assert {letter for letter in text if not letter.isprintable()} == {"\n"}
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert (data["base_model"], data["instance_prompt"]) == (HOSTILE, HOSTILE)
    assert data["tags"] == ["text-to-image", "diffusers", "gralora", "dreambooth", HOSTILE]
    shown = MarkdownIt("commonmark").enable("table").parse(card.text)
    inner = [child for token in shown for child in token.children or ()]
    allowed = {"text", "image", "code_inline", "html_inline"}
    assert {token.type for token in inner} <= allowed
    assert {t.content for t in inner if t.type == "html_inline"} == {"<code>", "</code>"}
    headings = [t.tag for t in shown if t.type == "heading_open"]
    assert headings == ["h1", "h2", "h2"]
    assert [t.info for t in shown if t.type == "fence"] == ["python", "yaml"]
    assert "html_block" not in {token.type for token in shown}
    code, options = (t.content for t in shown if t.type == "fence")
    nodes = list(ast.walk(ast.parse(code)))
    assert HOSTILE in {node.value for node in nodes if isinstance(node, ast.Constant)}
    imports = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import)]
    assert imports == ["import torch", "import gralora_diffusion"]
    assert yaml.safe_load(options)["instance_prompt"] == HOSTILE


def test_written_options_make_the_same_run_again(finished: Path, tmp_path: Path) -> None:
    file = finished / "training_config.yaml"
    assert "resume" not in file.read_text(encoding="utf-8")
    out = tmp_path / "again"
    train(parse_config(["--config", str(file), "--output_dir", str(out)]))
    assert_same_run(finished, out)


def test_written_options_keep_their_comments_until_an_option_changes(tmp_path: Path) -> None:
    options = config(output_dir=tmp_path, instance_prompt="a dog", rank=4)
    output_dir.start(tmp_path, options)
    file = tmp_path / "training_config.yaml"
    commented = "# the best of three\n" + file.read_text(encoding="utf-8")
    file.write_text(commented, encoding="utf-8")
    resumed = replace(options, resume_from_checkpoint="latest", overwrite_output_dir=True)
    output_dir.start(tmp_path, resumed)
    assert file.read_text(encoding="utf-8") == commented
    output_dir.start(tmp_path, replace(options, rank=6))
    assert "best" not in file.read_text(encoding="utf-8")
    assert parse_config(["--config", str(file)]).rank == 6
    file.write_text("rank: [", encoding="utf-8")  # damaged
    output_dir.start(tmp_path, options)
    assert parse_config(["--config", str(file)]).rank == 4


def test_metrics_of_a_killed_run_are_cut_at_the_checkpoint(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        first.add({"step": step, "loss": 0.1 * step})
    with first.path.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    resumed = MetricsFile(tmp_path, first_step=2)
    resumed.add({"step": 3, "loss": 7.0})
    assert [row["loss"] for row in resumed.read()] == [0.1, 0.2, 7.0]
    assert MetricsFile(tmp_path).read() == []


@pytest.mark.parametrize("count", [1, 2, 500])
def test_curve_of_any_length(tmp_path: Path, count: int) -> None:
    plot_curve([{"step": i + 1, "loss": 1 / (i + 1)} for i in range(count)], tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (840, 480)
        colors = {color for _, color in image.getcolors(2**20)}
    assert {(0x1F, 0x77, 0xB4), (0xC7, 0xDC, 0xED)} <= colors  # both lines, in the legend at least


def test_curve_of_damaged_numbers(tmp_path: Path) -> None:
    rows = [{"step": 10**400, "loss": 1.7e308}, {"step": -1, "loss": -1.0}, {"step": 2, "loss": 5}]
    plot_curve(rows, tmp_path / "c.png")
    plot_curve([{"step": 0, "loss": 5e-324}], tmp_path / "c.png")


def held_out_row(step: int, mean: float, half: float | None) -> dict[str, Any]:
    ends = {} if half is None else {"low": mean - half, "high": mean + half}
    return {"step": step, "loss": 0.5, "held_out": {"difference": mean, **ends}}


def test_curve_of_held_out_images(tmp_path: Path) -> None:
    """The line and its band are where the differences are, on an axis with zero."""
    first = {**held_out_row(0, 0.0, 0.0), "loss": None}
    rows = [first, *(held_out_row(step, -0.1, 0.02) for step in range(1, 101))]
    plot_curve(rows, tmp_path / "c.png")
    pixels = np.asarray(Image.open(tmp_path / "c.png")).astype(int)
    assert pixels.shape == (780, 840, 3)
    below = pixels[480:, 600]  # left of nothing but the line, its band and the axes
    (line,) = {round(float(np.flatnonzero((below == (0xD6, 0x27, 0x28)).all(-1)).mean()))}
    band = np.flatnonzero((below == (0xF3, 0xD0, 0xD1)).all(-1))
    height = 212 / (1.1 * 0.12)  # pixels per 1, from -0.12 to 0 with margins
    assert line == pytest.approx(28 + 0.05 / 1.1 * 212 + 0.1 * height, abs=2)
    assert (band[-1] - band[0]) == pytest.approx(0.04 * height, abs=3)


@pytest.mark.parametrize(
    "measured", [{"difference": 1e308, "low": -1e308}, {"difference": "1"}, 3, {"difference": True}]
)
def test_curve_of_damaged_measurements(tmp_path: Path, measured: Any) -> None:
    row = {"step": 1, "loss": 0.5, "held_out": measured}
    plot_curve([held_out_row(10**400, 0.1, None), row], tmp_path / "c.png")


def test_curve_is_where_the_losses_are(tmp_path: Path) -> None:
    """A constant loss is a level line below the upper edge; a falling one ends lower than it began.

    Both lines coincide where each mean is of one step.
    """
    line = (0x1F, 0x77, 0xB4)

    def heights(losses: list[float]) -> list[float]:
        rows = [{"step": 7 + i, "loss": loss} for i, loss in enumerate(losses)]
        plot_curve(rows, tmp_path / "c.png")
        pixels = np.asarray(Image.open(tmp_path / "c.png"))
        drawn = (pixels == line).all(-1)
        drawn[:60] = drawn[:60] & (np.arange(840) < 600)  # not the legend
        return [float(np.flatnonzero(drawn[:, x]).mean()) for x in (200, 400, 590)]

    level = heights([0.5] * 10)
    assert level == [pytest.approx(20 + 400 * (1 - 1 / 1.05), abs=1)] * 3
    falling = heights([1 - step / 9 for step in range(10)])
    for x, y in zip((200, 400, 590), falling, strict=True):
        loss = 1 - (x - 80) / 740
        assert y == pytest.approx(420 - 400 * loss / 1.05, abs=2)
