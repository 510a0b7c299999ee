"""What each protocol trains on, draws and compares with."""

import pytest

from gralora_diffusion.benchmark.run_config import parse_settings
from gralora_diffusion.benchmark.tasks import folder_name, read_tasks
from gralora_diffusion.io.errors import ConfigError, DataError
from tests.benchmark import judges, runs


def test_subjects(world, tmp_path):
    bear, cat, dog = read_tasks(runs.settings(world, tmp_path, subjects=None, max_prompts=2))
    assert [task.subject for task in (bear, cat, dog)] == ["bear_plushie", "cat2", "dog"]
    assert dog.protocol == "subject"
    assert dog.prompts == ("a sks dog wearing a santa hat", "a red sks dog")
    assert dog.texts == ("a dog wearing a santa hat", "a red dog")
    assert len(bear.prompts) == 2
    assert [example.source for example in dog.examples] == list(dog.real)
    assert {example.caption for example in bear.examples} == {"a sks stuffed animal"}
    assert bear.class_prompt == "a stuffed animal"
    assert cat.config.class_prompt is None


def test_images_held_out_are_compared_with(world, tmp_path):
    folder = runs.clone(tmp_path)
    for part, count in (("train", 2), ("held_out", 3)):
        judges.draw(folder / "dataset/dog" / part, count)
    (folder / "dataset/dog/held_out/3.png").write_bytes(b"no picture")
    options = {"dreambooth_dir": folder, "subjects": ["dog"]}
    (folder / "dataset/dog/train/1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=str(folder)) as caught:
        read_tasks(runs.settings(world, tmp_path / "out", **options))
    images = [p.split(" cannot")[0] for p in caught.value.problems if "is not an image" in p]
    assert images == ["dataset/dog/train: 1.png", "dataset/dog/held_out: 3.png"]
    judges.draw(folder / "dataset/dog/train", 2)
    (task,) = read_tasks(runs.settings(world, tmp_path / "out", skip_bad_images=True, **options))
    assert [e.source.parent.name for e in task.examples] == ["train"] * 2
    assert [path.name for path in task.real] == ["0.png", "1.png", "2.png"]
    assert {path.parent.name for path in task.real} == {"held_out"}


def test_the_subjects_of_a_suite_in_another_folder(world):
    line = ["--suite", "tiny", "--dreambooth_dir", str(world / "dreambooth")]
    with pytest.raises(DataError) as caught:
        read_tasks(parse_settings(line))
    (problem,) = caught.value.problems
    assert problem.startswith("there is no subject robot, owl, teapot")
    assert problem.endswith(
        "which --suite tiny, or --subjects, names. The subjects are: bear_plushie, cat2, dog. Give "
        "some of these as --subjects"
    )
    (task,) = read_tasks(parse_settings([*line, "--subjects", "dog"]))
    assert task.subject == "dog"


def test_class_images_are_shared_by_subjects_of_a_class(world, tmp_path):
    prior = {"with_prior_preservation": True, "num_class_images": 2}
    bear, *_ = read_tasks(runs.settings(world, tmp_path, subjects=["bear_plushie"], **prior))
    assert bear.config.class_prompt == "a stuffed animal"
    assert bear.config.class_data_dir == str(tmp_path / "class_pictures" / "a_stuffed_animal")
    others = ["a teddy bear", "a teddy-bear", "a teddy_bear", "a/teddy bear", "a teddy bear "]
    assert len({folder_name(text) for text in others}) == len(others)
    assert folder_name("a/teddy bear").startswith("a_teddy_bear_")


def test_captioned(world, tmp_path, monkeypatch):
    for number, path in enumerate(judges.draw(tmp_path / "set", 7)):
        path.with_suffix(".txt").write_text(f"picture {number}", encoding="utf-8")
    options = {"dreambooth_dir": None, "subjects": None, "captioned_dir": tmp_path / "set"}
    (task,) = read_tasks(runs.settings(world, tmp_path / "out", held_out=3, **options))
    assert (task.protocol, task.subject, len(task.examples)) == ("captioned", "set", 4)
    assert task.prompts == task.texts
    trained = {example.caption for example in task.examples}
    assert trained | set(task.prompts) == {f"picture {n}" for n in range(7)}
    for caption, path in zip(task.prompts, task.real, strict=True):
        shown = caption.removeprefix("picture ")
        assert path.read_bytes() == (tmp_path / "set" / f"{shown}.png").read_bytes()
    monkeypatch.chdir(tmp_path / "set")
    here = {**options, "captioned_dir": ".", "held_out": 3}
    (again,) = read_tasks(runs.settings(world, tmp_path / "out", **here))
    assert again.subject == "set"
    with pytest.raises(ConfigError, match="--held_out is 7, but there are 7 different images"):
        read_tasks(runs.settings(world, tmp_path / "out", held_out=7, **options))


def test_all_that_is_wrong_is_said_at_once(world, tmp_path):
    runs.clone(tmp_path)
    for name in ("dog", "cat2"):
        (tmp_path / "dataset" / name / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png") as caught:
        read_tasks(runs.settings(world, tmp_path / "out", dreambooth_dir=tmp_path))
    assert {p.split(":")[0] for p in caught.value.problems} == {
        "dataset/cat2",
        "dataset/dog",
    }
    assert not (tmp_path / "out").exists()


def test_the_trainer_looks_at_its_options(world, tmp_path):
    with pytest.raises(ConfigError, match="--learning_rate is 0"):
        read_tasks(runs.settings(world, tmp_path, learning_rate=0.0))
