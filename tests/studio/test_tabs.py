"""What the tabs show and refuse, without a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
from urllib.parse import parse_qsl, urlsplit

import pytest

pytest.importorskip("gradio")
import gradio as gr

from gralora_diffusion.studio import tab_compare, tab_images, tab_runs, tab_share
from gralora_diffusion.studio.context import Studio, chosen_of, log_of, waits_for
from gralora_diffusion.studio.engine.comparing import SPEC_NAME, Comparison
from gralora_diffusion.studio.engine.form import all_fields
from gralora_diffusion.studio.engine.jobs import Job, Jobs
from gralora_diffusion.studio.engine.runs import JOB_CONFIG, Run
from gralora_diffusion.studio.engine.workspace import Workspace
from gralora_diffusion.studio.page import build
from gralora_diffusion.studio.tab_train import filled_from
from tests import ROOT
from tests.training.runs import copy_robot

RIGHT = {"scales": "1", "seeds": "0", "steps": "30", "guidance": "", "size": "", "tokens": ""}


def read_fields(**given):
    """What the fields of Compare are read as."""
    left = {
        "adapters": [],
        "loras": [],
        "base": "b",
        "with_base": True,
        "blended": False,
        "share": 0.5,
    }
    return tab_compare._read(**left, prompts="a", negative="", **(RIGHT | given))


@pytest.mark.parametrize(
    ("field", "text", "problem"),
    [
        ("guidance", "7,5", "the guidance scale is '7,5'; it must be a number. Write a decimal"),
        ("guidance", "7 5", "the guidance scale is '7 5'; it must be a number, not several"),
        ("scales", "0,5", "a strength is '0,5'; it must be a number. Write a decimal point"),
        ("scales", "1_0", "a strength is '1_0'; it must be a number"),
        ("steps", "10 20", "the number of steps is '10 20'; it must be a whole number, not"),
        ("size", "1.5", "the size is '1.5'; it must be a whole number"),
        ("tokens", "64.5", "the number of tokens of a prompt is '64.5'; it must be a whole number"),
    ],
)
def test_numbers_in_compare_are_refused_rather_than_guessed(field, text, problem):
    comparison, (found,) = read_fields(**{field: text})
    assert comparison is None
    assert found.startswith(problem)


def test_numbers_in_compare():
    comparison, problems = read_fields(scales="0.5, 1;2", seeds=" 3 4 ", steps="", guidance="7.5")
    assert problems == []
    assert (comparison.scales, comparison.seeds) == ([0.5, 1.0, 2.0], [3, 4])
    assert (comparison.steps, comparison.guidance_scale) == (30, 7.5)
    assert read_fields(steps="0")[0].problems() == ["the steps are 0; they must be at least 1"]


def test_the_settings_of_a_comparison_fill_the_fields():
    blend = Comparison(
        base="b",
        prompts=["a toy", "a <b> toy"],
        adapters=["/second", "/first"],
        loras=["x/y"],
        scales=[0.5, 1.0],
        blends=[0.3],
        seeds=[0, 7],
        guidance_scale=4.5,
        negative_prompt="grey",
        size=64,
        max_sequence_length=128,
    )
    for comparison in (blend, Comparison(base="b", prompts=["a"])):
        fields = tab_compare._texts(comparison, ["/first", "/second"])
        assert tab_compare._read(*fields) == (comparison, [])
    assert tab_compare._texts(blend, ["/first"])[0] == ["/first"]


def test_another_is_never_chosen_in_place_of_one_that_is_gone(tmp_path):
    runs = [Run(tmp_path / name, name) for name in ("a", "b")]
    assert chosen_of(runs, None, False) is runs[0]
    assert chosen_of(runs, "b", False) is runs[1]
    assert chosen_of(runs, "c", False) is None
    assert chosen_of(runs, None, True) is None
    assert chosen_of([], None, False) is None


def test_a_folder_that_leads_elsewhere_does_not_hide_the_others(tmp_path):
    studio = Studio.at(tmp_path / "studio")
    run = tmp_path / "studio/runs/a"
    images = tmp_path / "elsewhere/step-000001"
    images.mkdir(parents=True)
    (images / "00-00.png").touch()
    run.mkdir(parents=True)
    (run / "training_config.yaml").write_text("rank: 4\n")
    (run / "validation").symlink_to(images.parent)
    (found,) = studio.runs()
    assert "00-00.png is in another folder" in tab_runs._strips(studio, [found])
    assert studio.address(images / "00-00.png") is None


def test_a_job_of_somebody_else_opens_no_folder(tmp_path):
    studio = Studio.at(tmp_path / "studio")
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "training_config.yaml").write_text("rank: 4\n")
    job = tmp_path / "studio/.studio/jobs/1-train"
    job.mkdir(parents=True)
    line = ["-m", "gralora_diffusion", "train"]
    facts = {"kind": "train", "title": "a", "command": line, "output": str(outside), "queued": True}
    (job / "job.json").write_text(json.dumps(facts))
    (run,) = studio.runs()
    assert run.folder == outside
    assert studio.address(outside / "a.png") is None


def test_a_run_that_cannot_be_read_says_so(tmp_path):
    class Unreadable(Run):
        @property
        def state(self):
            raise PermissionError(13, "Permission denied")

    run = Unreadable(tmp_path, "a")
    assert tab_runs._label(run) == "a · cannot be read: Permission denied"
    text = tab_runs._or_problem(lambda: tab_runs._state(run, []))
    assert "the run cannot be read: [Errno 13] Permission denied" in text


def test_a_run_without_a_folder_is_duplicated_from_its_job(tmp_path):
    (tmp_path / JOB_CONFIG).write_text("rank: 4\nvalidation_prompt: [a dog, a cat]\n")
    job = Job(tmp_path, "train", "a", (), tmp_path / "runs/a", queued=True)
    run = Run(tmp_path / "runs/a", "runs/a", job)
    names = [field.name for field in all_fields()]
    values = dict(zip(names, filled_from(Studio.at(tmp_path), run), strict=True))
    assert values["rank"] == "4"
    assert values["output_dir"] == str(tmp_path / "runs/a")
    assert tab_runs._written(run.options["validation_prompt"]) == "a dog · a cat"


def test_damaged_comparisons(tmp_path):
    studio = Studio.at(tmp_path)
    line = ("-m", "gralora_diffusion", "--version")
    job = studio.jobs.add("compare", "without", line)
    assert "without has no folder" in tab_compare._result(studio, job)
    folder = tmp_path / "comparisons/a"
    folder.mkdir(parents=True)
    job = studio.jobs.add("compare", "a", line, folder)
    for wrong, problem in (
        ({"prompts": "x"}, "prompts is"),
        ({"seeds": [0] * 2000}, "these are 2,000 images; at most 1,000 are compared"),
    ):
        spec = json.loads(Comparison(base="b", prompts=["p"]).to_json()) | wrong
        (folder / SPEC_NAME).write_text(json.dumps(spec))
        assert problem in tab_compare._result(studio, job)
    for job in studio.jobs.list():
        job.wait(60)
    shutil.rmtree(folder)


def test_a_waiting_job_says_what_it_waits_for(tmp_path):
    jobs = Jobs(tmp_path, programs=[("-c",)])
    line = ["-c", "import time; time.sleep(60)"]
    assert waits_for(jobs.list()) == "starts in a moment"
    running = jobs.add("compare", "a <b>", line, tmp_path / "a", queued=True)
    jobs.add("train", "c", line, tmp_path / "c", queued=True).stop()
    assert waits_for(jobs.list()) == "starts when the comparison a <b> has ended"
    running.stop()
    assert running.wait(20) == "stopped"


def functions_of(studio, tab, name):
    """The functions of this name that a tab calls, and the ids of their inputs."""
    calls = [call for call in build(studio).fns.values() if call.fn is not None]
    return [
        (call.fn, [component.elem_id for component in call.inputs])
        for call in calls
        if (call.fn.__module__, getattr(call.fn, "__name__", "")) == (tab.__name__, name)
    ]


def test_the_chosen_run_is_deleted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "training_config.yaml").write_text("rank: 4\n")
    (refresh, _), *_ = functions_of(Studio.at(tmp_path), tab_runs, "refresh")
    studio = Studio.at(tmp_path)

    def shows(place):
        """The state that the page gets when it asks for what the place says."""
        address = html.unescape(re.search('data-live="([^"]*)"', place)[1])
        return tab_runs.look(studio, dict(parse_qsl(urlsplit(address).query)))[0]["runs-state"]

    *_, place, seen = refresh("runs/a", "", {})
    assert "runs/a" in shows(place)
    shutil.rmtree(tmp_path / "runs/a")
    assert "This run is no longer there" in shows(place)
    chosen, *_, place, seen = refresh("runs/a", "", seen)
    assert chosen.value is None
    assert "This run is no longer there" in shows(place)
    *_, place, seen = refresh(None, "", seen)
    assert "This run is no longer there" in shows(place)
    *_, place, seen = refresh("runs/b", "", seen)
    assert "runs/b" in shows(place)


def test_a_comparison_is_stopped(tmp_path):
    workspace = Workspace(tmp_path)
    studio = Studio(workspace, Jobs(workspace.jobs, programs=[("-c",)]))
    line = ["-c", "import time; time.sleep(60)"]
    jobs = [
        studio.jobs.add("compare", name, line, tmp_path / name, queued=True) for name in ("a", "b")
    ]
    ((end, inputs),) = functions_of(studio, tab_compare, "end")
    assert inputs == ["compare-earlier"]
    end(jobs[1].name)
    assert [job.state for job in jobs] == ["running", "cancelled"]
    end(jobs[0].name)
    assert jobs[0].wait(20) == "stopped"


def test_the_second_of_a_blend_has_its_name(tmp_path):
    ((name, inputs),) = functions_of(Studio.at(tmp_path), tab_compare, "name_share")
    assert inputs == ["compare-adapters"]
    assert name(["/runs/a", "/runs/b"]).label == "Share of b"
    assert name(["/runs/a"]).label == "Share of the second"


def test_precisions_follow_the_format(tmp_path):
    ((choose, inputs),) = functions_of(Studio.at(tmp_path), tab_share, "choose_format")
    assert inputs == ["share-format", "share-dtype"]
    style, precision = choose("checkpoint", "fp8_e4m3")
    assert (style.interactive, precision.value) == (False, "fp8_e4m3")
    style, precision = choose("lora", "fp8_e4m3")
    assert (style.interactive, precision.value) == (True, "keep")
    assert "fp8_e4m3" not in dict(precision.choices)


@pytest.mark.parametrize(("kind", "checked"), [("checkpoint", False), ("lora", True)])
def test_an_export_without_its_base_starts_nothing(tmp_path, kind, checked):
    studio = Studio.at(tmp_path)
    ((export, _),) = functions_of(studio, tab_share, "run_export")
    (said,) = export("/runs/a", kind, "comfyui", " ", "keep", checked)
    assert "the base is missing" in said
    assert studio.jobs.list() == []


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000])
def test_texts_that_no_file_can_have_as_its_name(tmp_path, text):
    studio = Studio.at(tmp_path)
    ((export, _),) = functions_of(studio, tab_share, "run_export")
    (said,) = export("/runs/a", "checkpoint", "comfyui", text, "keep", False)
    assert "the base is" in said
    inspect, _ = functions_of(studio, tab_share, "run_inspect")[0]
    (said,) = inspect(text, [])
    assert "the path is" in said
    assert studio.jobs.list() == []
    for given in ({"base": text}, {"base": "b", "loras": [text]}):
        assert len(Comparison(prompts=["a"], **given).problems()) == 1


def test_a_folder_is_read_again_only_if_something_has_changed(tmp_path):
    folder = str(copy_robot(tmp_path))
    shows = functions_of(Studio.at(tmp_path), tab_images, "show_if_changed")
    show, given = shows[0][0], (folder, "sks", "", "", False, False, "", "")
    summary, _, seen = show((), *given)
    assert "&#39;sks&#39; is in 5 captions" in summary
    assert show(seen, *given) == [gr.skip()] * 3
    assert show(seen, "", *given[1:]) == [gr.skip()] * 3
    summary, *_ = show(seen, given[0], "robot", *given[2:])
    assert "&#39;robot&#39; is in 0 captions" in summary


def test_a_dropped_file_is_inspected_whatever_the_field_says(tmp_path):
    found = functions_of(Studio.at(tmp_path), tab_share, "run_inspect")
    assert [inputs for _, inputs in found] == [
        ["share-dropped", "share-looks"],
        ["share-path", "share-looks"],
    ]
    (inspect, _) = found[0]
    assert "drop a file" in next(inspect(" ", []))


def test_inspect_in_the_words_of_the_page(tmp_path):
    studio = Studio.at(tmp_path)
    inspect, _ = functions_of(studio, tab_share, "run_inspect")[0]
    file = str(ROOT / "samples/tiny-base/unet/diffusion_pytorch_model.safetensors")
    *_, said = inspect(file, ["sha256", "--harm"])
    (job,) = studio.jobs.list()
    assert job.command[2:] == ("inspect", "--sha256", "--", file)
    assert file in said
    (job.folder / "log.txt").write_text("... and 2 more (--all_layers)")
    text = log_of(job, instead={"(--all_layers)": "(choose <it>)"})
    assert "... and 2 more (choose &lt;it&gt;)" in text
