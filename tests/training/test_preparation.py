"""Without a shared folder, each machine reports differences before loading; none waits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.forked import fork_ranks
from tests.training.runs import arguments, make_images, run

PROGRAM = """
import json, os, sys
from pathlib import Path
import gralora_diffusion.training.loop as loop
from gralora_diffusion.training.runtime.acceleration import make_accelerator
from gralora_diffusion.training.preparation import complete_class_images, find_beginning
from gralora_diffusion.training.checkpoints.store import CheckpointStore
from gralora_diffusion.training.config.training_config import parse_config
from gralora_diffusion.training.data import class_images

class_images._SEEN_WITHIN = 0.5
lines, rank = json.loads(sys.argv[1]), os.environ["RANK"]
for line in lines:
    config = parse_config([part.replace("NODE", f"node{rank}") for part in line])
    accelerator = make_accelerator(config)
    store = CheckpointStore(config.output_dir)
    try:
        found = find_beginning(config, store, accelerator)
        images = complete_class_images(config, found, accelerator)
        print("BEGAN", len(found.images), len(images), found.resume and found.resume[0])
    except Exception as error:
        print("ERROR", type(error).__name__, str(error).replace(chr(10), " "))
"""


def test_what_differs_is_told_by_all(base: Path, images: Path, tmp_path: Path) -> None:
    nodes = [tmp_path / f"node{rank}" for rank in range(2)]
    for node in nodes:
        shutil.copytree(images, node / "pictures")
        make_images(node / "alike", 2)
    usual: dict[str, Any] = {"pretrained_model_name_or_path": base, "max_train_steps": 2}
    usual["checkpointing_steps"] = 2
    done = run(output_dir=tmp_path / "done", instance_data_dir=images, **usual)
    shutil.copytree(done / "checkpoint-2", nodes[0] / "one" / "checkpoint-2")
    for node in nodes:
        shutil.copytree(done / "checkpoint-2", node / "both" / "checkpoint-2")
        make_images(node / "other", 2, seed=int(node.name[-1]))
        make_images(node / "classes" / "both", 2, seed=2)
    make_images(nodes[0] / "classes" / "one", 2, seed=2)
    make_images(nodes[1] / "only-there", 2)
    here = tmp_path / "NODE"
    usual |= {"instance_data_dir": here / "pictures", "output_dir": here / "new"}
    classes = {"with_prior_preservation": True, "class_prompt": "a dog", "num_class_images": 2}

    def of_class(name: str) -> dict[str, Any]:
        return {**classes, "class_data_dir": here / "classes" / name, "sample_batch_size": 1}

    resume = {"resume_from_checkpoint": "latest", "max_train_steps": 4}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "BEGAN 3 0 None"),
        ({"output_dir": here / "both", **resume}, "BEGAN 3 0 2"),
        (
            {"output_dir": here / "one", **resume},
            "the checkpoint to resume is step 2 of hash ",
        ),
        ({"instance_data_dir": here / "other"}, "the images and captions are 2 of hash "),
        ({"instance_data_dir": here / "only-there"}, "there is no such folder"),
        ({"instance_prompt": "a dog of NODE"}, "--instance_prompt is a dog of node0 in process 0"),
        (of_class("both"), "BEGAN 3 2 None"),
        (of_class("one"), "the class images are 2 of hash "),
        (of_class("none"), "is not the same folder for all processes"),
    ]
    lines = json.dumps([arguments(**{**usual, **options}) for options, _ in cases])
    told = fork_ranks(PROGRAM, lines, machines=True)
    answers = []
    for code, text in told:
        assert code == 0, text
        answers.append([t for t in text.splitlines() if t.startswith(("BEGAN", "ERROR"))])
    assert len(answers[0]) == len(answers[1]) == len(cases), told
    for (_, wanted), *both in zip(cases, *answers, strict=True):
        for answer in both:
            assert wanted in answer, answers
    assert not list(tmp_path.glob("node*/classes/none"))  # nothing was generated, nothing is left


def test_processes_that_share_a_folder_share_the_class_images(
    base: Path, images: Path, tmp_path: Path
) -> None:
    line = arguments(
        pretrained_model_name_or_path=base,
        instance_data_dir=images,
        output_dir=tmp_path / "out",
        with_prior_preservation=True,
        class_prompt="a dog",
        class_data_dir=tmp_path / "class",
        num_class_images=3,
        sample_batch_size=1,
    )
    for code, text in fork_ranks(PROGRAM, json.dumps([line]), machines=True):
        assert code == 0, text
        assert "BEGAN 3 3 None" in text
    names = sorted(path.name for path in (tmp_path / "class").iterdir())
    assert names == [f"class-{number:05d}.png" for number in range(3)]


COUNTS = (
    """
from gralora_diffusion.training.data import checked_files

checked_files._SETTLED = 0
decode, count = checked_files._WORK["image"], []
checked_files._WORK["image"] = lambda data: count.append(1) or decode(data)
"""
    + PROGRAM
    + """
print("DECODED", len(count))
"""
)


def test_one_process_of_a_machine_decodes_the_images(
    base: Path, images: Path, tmp_path: Path
) -> None:
    usual: dict[str, Any] = {"pretrained_model_name_or_path": base, "instance_data_dir": images}
    usual |= {"output_dir": tmp_path / "out", "latent_cache_dir": tmp_path / "cache"}
    for expected in ([3, 0], [0, 0]):
        told = fork_ranks(COUNTS, json.dumps([arguments(**usual)]))
        assert [code for code, _ in told] == [0, 0], told
        for (_, text), count in zip(told, expected, strict=True):
            assert "BEGAN 3 0 None" in text
            assert f"DECODED {count}" in text
