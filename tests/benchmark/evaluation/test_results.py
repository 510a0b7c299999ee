"""Results of units: what was written is read; what cannot be used is left out and named."""

import json
import math
import os
import shutil
from dataclasses import replace

import pytest

from gralora_diffusion.benchmark.evaluation.results import (
    RESULT_NAME,
    ResultFileError,
    TrialKey,
    read_result,
    read_results,
    write_result,
)
from tests.benchmark.trials import keys, trial, written

KEY = TrialKey("subject", "a dog", "gralora-r32-k4", 3)


def test_what_was_written_is_read(tmp_path):
    result = trial(KEY, mechanism=True, peak_memory_gib=None, update_rank=None)
    path = write_result(result, tmp_path / KEY.path)
    read = read_result(path)
    assert read == result
    assert read.folder == path.parent
    assert path == tmp_path / "units/subject/a dog/gralora-r32-k4/seed3/result.json"
    assert os.listdir(path.parent) == [RESULT_NAME]
    assert json.loads(path.read_text())["format"] == 1


def test_layers_are_read_and_those_of_the_first_files_are_not_known(tmp_path):
    result = trial(KEY, layers=32, lowered_k={1: 4, 2: 3})
    path = write_result(result, tmp_path)
    assert read_result(path) == result
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: content[k] for k in content.keys() - {"layers", "lowered_k"}}))
    assert read_result(path) == replace(result, layers=None, lowered_k={})


def test_all_trials_of_a_run_are_read_once(tmp_path):
    made = written(tmp_path, [trial(key) for key in keys()])
    results, unreadable = read_results(tmp_path)
    assert unreadable == []
    assert sorted(r.key for r in results) == sorted(r.key for r in made)
    assert read_results(tmp_path / "elsewhere") == ([], [])


def test_a_file_cut_off_anywhere_is_named(tmp_path):
    whole = write_result(trial(KEY), tmp_path / KEY.path).read_bytes()
    other = trial(replace_key(seed=0))
    write_result(other, tmp_path / other.key.path)
    path = tmp_path / KEY.path / RESULT_NAME
    for length in [*range(0, len(whole) - 1, 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        results, unreadable = read_results(tmp_path)
        assert [r.key for r in results] == [other.key]
        assert [u.path for u in unreadable] == [path]
        assert "JSON" in unreadable[0].reason


def replace_key(**changes):
    return KEY._replace(**changes)


def test_a_folder_that_was_copied_does_not_count_twice(tmp_path):
    written(tmp_path, [trial(KEY)])
    shutil.copytree(tmp_path / KEY.path, tmp_path / replace_key(seed=4).path)
    results, unreadable = read_results(tmp_path)
    assert [r.key for r in results] == [KEY]
    assert "another trial" in unreadable[0].reason


def test_bytes_that_are_no_text_and_folders_in_place_of_the_file(tmp_path):
    for seed in (0, 1):
        (tmp_path / replace_key(seed=seed).path).mkdir(parents=True)
    (tmp_path / replace_key(seed=0).path / RESULT_NAME).write_bytes(b"\xff\xfe\x00")
    (tmp_path / replace_key(seed=1).path / RESULT_NAME).mkdir()
    results, unreadable = read_results(tmp_path)
    assert (results, len(unreadable)) == ([], 2)


MISSING = [
    *("format", "protocol", "subject", "method", "seed", "parameters", "update_rank", "steps"),
    *("train_seconds", "draw_seconds", "peak_memory_gib", "scores", "prompts", "mechanism"),
    *("settings", "versions"),
]


@pytest.mark.parametrize("name", MISSING)
def test_an_incomplete_file_says_what_is_missing(tmp_path, name):
    path = write_result(trial(KEY), tmp_path)
    content = json.loads(path.read_text())
    del content[name]
    path.write_text(json.dumps(content))
    with pytest.raises(ResultFileError, match=f"{name} is missing"):
        read_result(path)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("format",), 2, "format must be 1"),
        (("seed",), True, "seed must be a whole number"),
        (("seed",), -1, "seed must be a whole number"),
        (("steps",), 1.5, "steps must be a whole number"),
        (("train_seconds",), "long", "train_seconds must be a finite number"),
        (("scores", "drift"), math.nan, r"scores\.drift must be a finite number"),
        (("scores", "drift"), None, r"scores\.drift must be a finite number"),
        (("scores",), [], "scores must be an object"),
        (("subject",), "../dog", "subject must be the name of a folder"),
        (("prompts", 1), "a dog", r"prompts\[1\] must be an object"),
        (("prompts", 0, "pictures"), ["../../secret.png"], "files within the trial's folder"),
        (("prompts", 0, "pictures"), ["/secret.png"], "files within the trial's folder"),
        (("mechanism", "effective_rank", "blocks.0.attn.to_q"), "8", "must be a finite number"),
        (("mechanism", "gradient_norms", "blocks.0.attn.to_q", "norms"), [[[1, 2]]], "steps must"),
        (
            ("mechanism", "gradient_norms", "blocks.0.attn.to_q", "norms"),
            [[[1, 2]], [[1, 2]]],
            "norms must be k x k",
        ),
        (
            ("mechanism", "gradient_norms", "blocks.0.attn.to_q", "norms"),
            [[[1]], [[1, 2], [3, 4]]],
            "norms must be k x k",
        ),
        (("mechanism", "step_norms", "blocks.0.attn.to_q", "norms"), [[[1, 2]]], "norms must be k"),
        (
            ("mechanism", "alignment", "blocks.0.attn.to_q", "full_share", "values"),
            [1.0],
            "values must be a finite number for each of steps",
        ),
        (
            ("mechanism", "alignment", "blocks.0.attn.to_q"),
            {"share": {}},
            "share must be one of full_share",
        ),
        (("layers",), -1, "layers must be a whole number"),
        (("lowered_k",), [], "lowered_k must be an object"),
        (("lowered_k",), {"two": 3}, "lowered_k must be numbers of layers by k"),
        (("lowered_k",), {"9" * 5000: 3}, "lowered_k must be numbers of layers by k"),
        (("train_seconds",), 10**400, "train_seconds must be a finite number"),
        (("train_seconds",), 1e61, "train_seconds must be a finite number between"),
        (("scores", "drift"), -1e308, r"scores\.drift must be a finite number between"),
        (("parameters",), 10**400, "parameters must be a whole number that"),
        (
            ("mechanism", "gradient_norms", "blocks.0.attn.to_q", "norms"),
            [[[1e308]], [[1]]],
            "norms must be k x k",
        ),
        (("settings",), {"a": [math.nan]}, "settings cannot be written as JSON"),
        (("settings",), {"a": -math.inf}, "settings cannot be written as JSON"),
        (("lowered_k",), {"2": 3.5}, r"lowered_k\.2 must be a whole number"),
        (("versions", "torch"), 2, r"versions\.torch must be text"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(tmp_path, place, value, said):
    path = write_result(trial(KEY, mechanism=True), tmp_path)
    content = json.loads(path.read_text())
    inner = content
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ResultFileError, match=said) as caught:
        read_result(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"scores": {"dino": math.nan}}, {"settings": {"x": object()}}, {"settings": {"x": math.inf}}],
    ids=["NaN", "no JSON", "infinity"],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, change):
    first = trial(KEY)
    path = write_result(first, tmp_path)
    with pytest.raises(ResultFileError):
        write_result(replace(first, **change), tmp_path)
    assert read_result(path) == first
    assert os.listdir(tmp_path) == [RESULT_NAME]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    first = trial(KEY)
    path = write_result(first, tmp_path)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_result(replace(first, steps=5), tmp_path)
    assert read_result(path) == first
    assert os.listdir(tmp_path) == [RESULT_NAME]
