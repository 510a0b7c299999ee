"""Mistakes of beginners: each command answers with one message, before anything is loaded."""

from __future__ import annotations

import shlex
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gralora_diffusion.cli import main
from tests.models import adapt, stable_diffusion

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456\n"
FILES = {
    "empty/0.txt": "",
    "page.safetensors": "<html>not found</html>",
    "lfs.safetensors": LFS,
    "options.toml": "rank = 4\n",
    "flags.yaml": "--rank: 4\n",
    "no_space.yaml": "rank:4\n",
    "types.yaml": "use_ema: maybe\nrank: 4.0\n",
    "variable.yaml": "instance_data_dir: $HOME/pictures\n",
    "tabs.yaml": "rank:\t4\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter, a LoRA, images, and files that are none of these."""
    folder = tmp_path_factory.mktemp("beginner")
    pipe = stable_diffusion()
    pipe.save_pretrained(folder / "base")
    adapt(pipe)
    pipe.save_gralora_weights(folder / "adapter")
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {
        f"{layer}.lora_A.weight": torch.ones(2, 32),
        f"{layer}.lora_B.weight": torch.ones(32, 2),
    }
    save_file(pair, folder / "lora.safetensors")
    for name in ("images/0.png", "images/1.png", "empty/0.png", "latin/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(folder / name)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin/0.txt").write_bytes("ein hübsches Spielzeug".encode("latin-1"))
    (folder / "pickle.ckpt").write_bytes(b"\x80\x02}q\x00.")
    (folder / "videos").mkdir()
    (folder / "videos/0.mp4").write_bytes(b"0")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.write(folder / "images/0.png")
    return folder


BASE = "--pretrained_model_name_or_path base"
DATA = "--instance_data_dir images"
TRAIN = f"train --output_dir out --instance_prompt x {DATA} {BASE}"
SAMPLE = "sample --base base --prompt x --output out.png"
IMPORT = "import --lora lora.safetensors --family stable-diffusion --rank 4 --gralora_k 2"

# (command line, what each problem of the message contains)
MISTAKES: list[tuple[str, list[str]]] = [
    # images in the wrong place or form
    (f"{TRAIN} --instance_data_dir images.zip", ["this is a file. Unpack the archive first"]),
    (f"{TRAIN} --instance_data_dir videos", ["none of its 1 files is an image (0.mp4)"]),
    (f"{TRAIN} --instance_data_dir adapter", ["this is the output of a training"]),
    (
        "train --pretrained_model_name_or_path images --instance_data_dir base",
        ["this folder has no model_index.json", "this is a base model, as model_index.json shows"],
    ),
    (
        f"train --output_dir out --instance_data_dir empty {BASE}",
        ["0.png has no caption: 0.txt is empty", "Give --instance_prompt for all images without"],
    ),
    (f"{TRAIN} --instance_data_dir latin", ["0.txt cannot be read as UTF-8 text. Save it with"]),
    # paths as other places write them
    (f"{TRAIN} --instance_data_dir '$HOME/x'", ["The variable $HOME was not replaced"]),
    (f"{TRAIN} --instance_data_dir '${{HOME}}/x'", ["The variable ${HOME} was not replaced"]),
    (f"{TRAIN} --instance_data_dir '%USERPROFILE%/x'", ["%USERPROFILE% was not replaced"]),
    (f"{TRAIN} --instance_data_dir 'C:\\x'", ["A path on Windows does not exist here"]),
    (f"{TRAIN} --instance_data_dir '\"/x/y\"'", ["Its quotes are part of the name"]),
    (f"{TRAIN} --instance_data_dir file:///x/y", ["This is an address. Download it"]),
    (f"{TRAIN} --instance_data_dir ~/no-such", ["there is no such folder in"]),
    ("train --config variable.yaml --instance_prompt x " + BASE, ["variable.yaml:1: --instance"]),
    # a command line that is not one
    (
        f"train {BASE} {DATA} images/1.png --instance_prompt x --output_dir out",
        ["'images/1.png' does not belong to any option: --instance_data_dir takes one value"],
    ),
    (
        f"train {BASE} {DATA} --output_dir out --instance_prompt a photo of sks dog",
        ["'photo of sks dog' does not belong to any option: --instance_prompt takes one value"],
    ),
    (
        f"{TRAIN} rank=4 lora-alpha=8",
        ["Did you mean --rank, --lora_alpha?"],
    ),
    (f"{TRAIN} rank 4", ["Did you mean --rank?"]),
    (f"{TRAIN} -rank 4 -seed 1", ["-rank is not an option. Did", "-seed is not an option. Did"]),
    (f"{TRAIN} --rank: 4", ["--rank: is not an option. Did you mean --rank?"]),
    (
        f"{TRAIN} --rank : 4",
        ["--rank is ':'; it must be a whole number. Leave out the colon", "'4' does not belong"],
    ),
    (
        f"{TRAIN} --seed random --max_train_steps 1k --resolution 512x512",
        ["--seed is 'random'", "--max_train_steps is '1k'", "--resolution is '512x512'"],
    ),
    (
        f"{TRAIN} --resolution 500 --learning_rate -1e-4 --rank 7 --gralora_k 2",
        ["--learning_rate is -0.0001", "The nearest is 496", "Give --rank 6 or 8"],
    ),
    # files of options
    ("train --config SDXL", ["Did you mean sdxl?"]),
    ("train --config sdxl.yml", ["Did you mean sdxl?"]),
    ("train --config images", ["--config cannot be read: it is a folder"]),
    ("train --config images/0.png", ["--config is not a UTF-8 text file"]),
    ("train --config options.toml", ["must contain lines of the form `name: value`"]),
    ("train --config no_space.yaml", ["must contain lines of the form `name: value`"]),
    ("train --config", ["--config needs a value"]),
    (f"{TRAIN} --config flags.yaml", [":1: rank must be written without hyphens before it"]),
    (
        f"{TRAIN} --config types.yaml",
        [
            ":1: use_ema is 'maybe'; it must be true or false",
            ":2: rank is '4.0'; it must be a whole",
        ],
    ),
    (
        "train --config tabs.yaml --rank 3 --gralora_k 2",
        ["Indent with spaces instead of tabs", "k must divide the rank"],
    ),
    # the base, an adapter and a LoRA in each other's place
    (f"{TRAIN} --pretrained_model_name_or_path base/unet", ["has no model_index.json"]),
    (f"{TRAIN} --pretrained_model_name_or_path pickle.ckpt", ["must be a .safetensors or .gguf"]),
    (f"{TRAIN} --pretrained_model_name_or_path lora.safetensors", ["it is an adapter. Pass the"]),
    (f"{TRAIN} --pretrained_model_name_or_path lfs.safetensors", ["a pointer of Git LFS in place"]),
    (f"{TRAIN} --initial_adapter lora.safetensors", ["this is a LoRA file, not a GraLoRA file"]),
    (f"{TRAIN} --initial_adapter base", ["this folder contains no GraLoRA adapter"]),
    (f"{TRAIN} --family flux", ["--family flux, but --pretrained_model_name_or_path is stable"]),
    # images from the command
    ("sample --base base", ["required: --prompt, --output"]),
    ("sample --base adapter --adapter base --prompt x --output out.png", ["no model_index.json"]),
    (
        f"{SAMPLE} --adapter page.safetensors --lora adapter --seed -1",
        ["a web page in place of the file", "Pass it as --adapter", "--seed is -1; it must be at"],
    ),
    (
        f"{SAMPLE} --scale nan --guidance_scale inf",
        ["--scale is 'nan'", "--guidance_scale is 'inf'"],
    ),
    (f"{SAMPLE} --scale 0.5 1.0", ["--scale takes one value"]),
    (f"{SAMPLE} --base https://huggingface.co/a/b", ["this is an address. Give the Hub id"]),
    (f"{SAMPLE} --output images/0.png/x.png", ["cannot be written (Not a directory)"]),
    (f"{SAMPLE} --output out.mp4", ["it must be an image file, such as grid.png"]),
    (f"{SAMPLE} --clip_skip 99", ["--clip_skip is 99, but at most"]),
    # exports
    (
        "export --adapter adapter --base adapter --format diffusers --output out.safetensors",
        ["no model_index.json", "--format diffusers writes a folder"],
    ),
    (
        "export --adapter adapter --format lora --output out.pt --style webui --dtype int4",
        ["Did you mean kohya?", "--dtype is 'int4'", "its name must end in .safetensors"],
    ),
    ("export --adapter lora.safetensors --format lora --output o.safetensors", ["is a LoRA file"]),
    (
        "export adapter lora out.safetensors",
        ["Did you mean --adapter?", "required: --format, --output"],
    ),
    # imports
    (
        "import --lora lora.safetensors --base images --rank 7 --gralora_k 2 --hybrid_rank -1 "
        "--output out.ckpt",
        [
            "--rank is 7 and --gralora_k is 2",
            "--hybrid_rank is -1; it must be at least 0",
            "the name of a file must end in .safetensors",
            "this folder contains no model_index.json",
        ],
    ),
    (f"{IMPORT} --output out --lora images", ["images: this folder contains no .safetensors file"]),
    (f"{IMPORT} --output out --lora adapter", ["this is a GraLoRA adapter already"]),
    (
        "inspect images.zip https://x.y/z.safetensors page.safetensors images",
        [
            "a zip archive or a pickle",
            "This is an address",
            "a web page in place of the file",
            "images: this folder contains no .safetensors file",
        ],
    ),
    # benchmarks
    ("benchmark --suite tyni", ["--suite is 'tyni'; it must be one of tiny"]),
    ("benchmark --config nowhere", ["the name of a bundled one: benchmark_"]),
    ("benchmark --suite tiny --seeds 0,1,2", ["Separate values by spaces: 0 1 2"]),
    ("benchmark --suite tiny --methods base,lora-r4", ["Separate methods by spaces"]),
    # the other commands
    ("caption image --model x", ["FOLDER is 'image': there is no such folder. Did you mean"]),
    ("caption images --model base", ["--model is 'base': this folder has no config.json"]),
    (
        "caption images --model a/b --max_new_tokens 0 --promt x",
        ["Did you mean --prompt?", "--max_new_tokens is 0; it must be at least 1"],
    ),
    ("control stop out", ["the folder comes first: gralora control OUTPUT_DIR stop"]),
    ("control images save --wait -1", ["--wait is -1.0; it must be at least 0"]),
    ("control images status", ["there is no run in images"]),
    ("demo images", ["the demo trains on its own"]),
    ("demo out --output_dir other", ["--output_dir is the first argument here"]),
    ("samples copy --force", ["--force is not an option", "'copy' does not belong to any option"]),
    ("samples --folder copy", ["--folder is called --output here"]),
    ("studio images/0.png --port eighty", ["--port is 'eighty'", "which is a file. Give a folder"]),
]


@pytest.mark.parametrize(("line", "problems"), MISTAKES)
def test_one_message_with_all_problems(
    line: str,
    problems: list[str],
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line))  # of an option that is given twice, the last value counts
    assert caught.value.code == 2
    said, error = capsys.readouterr()
    shown = [text for text in error.splitlines() if not text.endswith(":")]  # without headings
    assert [[text for text in problems if text in one] for one in shown] == [
        [text] for text in problems
    ]
    assert said == ""
    assert sorted(place.rglob("*")) == before
