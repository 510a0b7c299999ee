"""The blind page: pairs, sides, no names, answers; and in a browser, as a person uses it."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gralora_diffusion.benchmark.evaluation.endpoint import Declared
from gralora_diffusion.benchmark.main import benchmark
from gralora_diffusion.benchmark.report import blind_choices, write_blind_page, write_report
from gralora_diffusion.benchmark.report.blind import blind_pairs
from gralora_diffusion.benchmark.run_config import parse_settings, save_run_config
from gralora_diffusion.io.errors import ConfigError, DataError
from tests.benchmark import runs
from tests.benchmark.pages import Page
from tests.benchmark.trials import keys, trial, written

METHODS = ("base", "lora-r4-lr1e-3", "lora-r4-lr2e-3", "gralora-r4-k2-lr1.4e-3")
DECLARED = Declared.parse("dinov2@drift_dinov2", ["gralora-r4-k2:lora-r4"])
#: Of the first LoRA, the second, and GraLoRA.
DRIFTS = {"base": 0.0, METHODS[1]: 0.10, METHODS[2]: 0.31, METHODS[3]: 0.30}
CHROMIUM = Path("/usr/bin/chromium")


def run(folder, size=64):
    results = [trial(key) for key in keys(methods=METHODS)]
    results = [replace(r, scores={**r.scores, "drift_dinov2": DRIFTS[r.method]}) for r in results]
    return written(folder, results, size)


def real_images(results):
    return {r.subject: [r.folder / r.prompts[0].images[0]] for r in results}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    results = run(output)
    path = write_blind_page(
        results, output / "report", declared=DECLARED, real_images=real_images(results)
    )
    return path, results


def key_of(path):
    return json.loads(path.with_name("blind_key.json").read_text(encoding="utf-8"))


def test_pairs_differ_in_the_method_alone_at_the_nearest_drift(page):
    _, results = page
    pairs = blind_pairs(results, DECLARED)
    subjects, seeds = {r.subject for r in results}, {r.seed for r in results}
    assert len(pairs) == len(subjects) * len(seeds) * len(results[0].prompts)
    assert {frozenset(pair.methods) for pair in pairs} == {frozenset(METHODS[2:])}
    for pair in pairs:
        assert pair.drifts == tuple(DRIFTS[method] for method in pair.methods)
        for method, image in zip(pair.methods, pair.images, strict=True):
            assert image.is_file()
            place = (pair.protocol, pair.subject, method, f"seed{pair.seed}")
            assert all(part in image.parts for part in place)
    left = [pair.methods[0] == METHODS[3] for pair in pairs]
    assert 0.2 < np.mean(left) < 0.8
    order = [(pair.subject, pair.seed, pair.prompt) for pair in pairs]
    assert order != sorted(order)
    assert pairs == blind_pairs(list(reversed(results)), DECLARED)


def test_comparisons_and_subjects_share_the_pairs(page, monkeypatch):
    monkeypatch.setattr("gralora_diffusion.benchmark.report.blind.MOST_PAIRS", 7)
    pairs = blind_pairs(page[1], DECLARED)
    places = [(pair.subject, pair.seed) for pair in pairs]
    assert len(pairs) == 7
    assert max(map(places.count, places)) - min(map(places.count, set(places))) <= 1


def test_the_page_names_no_method(page):
    path, results = page
    text = path.read_text(encoding="utf-8")
    uris = re.findall(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=]+)", text)
    assert len(uris) == 2 * len(key_of(path)["pairs"]) + len({r.subject for r in results})
    for uri in set(uris):
        content = base64.b64decode(uri)
        with Image.open(io.BytesIO(content)) as image:
            assert image.info.keys() <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert b"lora" not in content.lower()
    rest = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text).lower()
    for name in ("lora", "r4-", "-k2", "-lr", "dinov2"):
        assert name not in rest, name
    assert Page(re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)).of("meta")
    assert "http" not in rest.replace("http-equiv", "")


def test_the_same_results_give_the_same_page(page, tmp_path):
    path, results = page
    again = write_blind_page(results, tmp_path, declared=DECLARED, real_images=real_images(results))
    assert again.read_bytes() == path.read_bytes()


def test_hostile_prompts_stay_text(tmp_path):
    hostile = "</script><script>alert(1)</script>"
    results = [trial(key) for key in keys(methods=METHODS[1:])]
    results = [
        replace(r, prompts=tuple(replace(p, prompt=hostile + p.prompt) for p in r.prompts))
        for r in results
    ]
    path = write_blind_page(written(tmp_path, results), tmp_path / "report", declared=DECLARED)
    text = path.read_text(encoding="utf-8")
    assert text.count("</script>") == 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert all(pair["prompt"].startswith(hostile) for pair in data["pairs"])
    assert all(pair["reference"] == "" for pair in data["pairs"])


def test_nothing_to_compare(tmp_path):
    results = written(tmp_path, [trial(key) for key in keys(methods=METHODS[:2])])
    with pytest.raises(DataError, match="--blind:\n  there are no two images to compare"):
        write_blind_page(results, tmp_path, declared=DECLARED)


# -- answers ---------------------------------------------------------------------------------------


def answer(path, folder, prefer, name="a.json"):
    """Answers of somebody who prefers a method wherever it is shown, or "none"."""
    key = key_of(path)
    choices = {
        str(n): "none"
        if prefer == "none"
        else next(side for side in ("left", "right") if pair[side].startswith(prefer))
        for n, pair in enumerate(key["pairs"])
    }
    file = folder / name
    file.write_text(json.dumps({"format": 1, "page": key["page"], "choices": choices}))
    return file


def test_answers_are_counted_for_the_method_on_whichever_side(page, tmp_path):
    path, _ = page
    pairs = len(key_of(path)["pairs"])
    ours = answer(path, tmp_path, "gralora", "ours.json")
    theirs = answer(path, tmp_path, "lora", "theirs.json")
    neither = answer(path, tmp_path, "none", "neither.json")
    (found,) = blind_choices([ours], path.parent)
    assert (found.method, found.reference) == ("gralora-r4-k2", "lora-r4")
    assert (found.share, found.choices, found.people) == (1.0, pairs, 1)
    assert found.effective == found.subjects  # unanimous: a subject counts once
    assert found.drift_gap == pytest.approx(0.01)
    (found,) = blind_choices([theirs], path.parent)
    assert found.share == 0.0
    (found,) = blind_choices([ours, theirs, neither], path.parent)
    assert (found.share, found.choices, found.ties, found.people) == (0.5, 3 * pairs, pairs, 3)


def test_the_report_has_the_choices(page, tmp_path):
    path, results = page
    choices = blind_choices([answer(path, tmp_path, "gralora")], path.parent)
    written_page = write_report(results, tmp_path, declared=DECLARED, blind=choices)
    head, row = Page(written_page.read_text(encoding="utf-8")).tables["Blind choices"]
    cells = dict(zip(head, row, strict=True))
    assert cells["share that prefers the method"].startswith("100.0% [")
    assert cells["difference in drift"] == "0.0100"
    assert "| gralora-r4-k2 | lora-r4 | 100.0% " in (tmp_path / "report.md").read_text()
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["blind"][0]["share"] == 1.0


def test_answers_that_cannot_be_used_are_all_reported(page, tmp_path):
    path, _ = page
    name = key_of(path)["page"]
    count = len(key_of(path)["pairs"])
    files = {
        "other.json": ({"page": "x", "choices": {"0": "left"}}, "answers for the page 'x'"),
        "far.json": ({"page": name, "choices": {str(count): "left"}}, f"choice '{count}' must be"),
        "odd.json": ({"page": name, "choices": {"0": "up"}}, "one of left, right, none"),
        "list.json": ({"page": name, "choices": {"0": ["left"]}}, "one of left, right, none"),
        "empty.json": ({"page": name, "choices": {}}, "it has no choices yet"),
        "none.json": ({"page": name}, "it has no choices"),
    }
    for file, (content, _) in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    for file, (_, why) in files.items():
        with pytest.raises(DataError, match=re.escape(why)):
            blind_choices([tmp_path / file], path.parent)
    with pytest.raises(DataError) as caught:
        blind_choices([tmp_path / file for file in files], path.parent)
    assert sum(file in str(caught.value) for file in files) >= 5
    with pytest.raises(DataError, match="is written with the page, by --blind"):
        blind_choices([], tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"drifts": [0.1]},
        {"drifts": [0.1, math.nan]},
        {"drifts": [1e308, -1e308]},
        {"drifts": {}},
        {"comparison": "ab"},
        {"subject": 3},
    ],
)
def test_a_changed_key_is_refused(page, tmp_path, changes):
    path, _ = page
    key = key_of(path)
    key["pairs"][0] |= changes
    (tmp_path / "blind_key.json").write_text(json.dumps(key))
    with pytest.raises(DataError, match="it is not a key that --blind wrote"):
        blind_choices([answer(path, tmp_path, "gralora")], tmp_path)


def test_the_command_writes_the_page_and_reads_answers(world, tmp_path):
    """On a run's folder alone, without training anything."""
    output = tmp_path / "run"
    settings = runs.settings(world, output, comparisons=["gralora-r4-k2:lora-r4"])
    save_run_config(settings)
    methods = tuple(settings.methods)
    written(output, [trial(key) for key in keys(methods=methods, subjects=("cat2", "dog"))])
    there = ["--output_dir", str(output)]
    assert benchmark(parse_settings(["--blind", *there])) == 0
    page = output / "report" / "blind.html"
    assert len(key_of(page)["pairs"]) > 3
    assert not (output / "report" / "index.html").exists()
    answers = str(answer(page, tmp_path, "gralora"))
    assert benchmark(parse_settings(["--blind_answers", answers, *there])) == 0
    report = Page((output / "report" / "index.html").read_text(encoding="utf-8"))
    assert "Blind choices" in report.tables
    with pytest.raises(ConfigError, match="--blind writes a new page, and --blind_answers reads"):
        benchmark(parse_settings(["--blind", "--blind_answers", answers, *there]))
    with pytest.raises(ConfigError, match="--blind: there is no"):
        parse_settings(["--blind", "--output_dir", str(tmp_path / "nowhere")])


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser, path, width=1000, scheme="light"):
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text))
    page.goto(path.as_uri())
    return page


def test_a_person_chooses_with_keyboard_and_mouse(page, browser, tmp_path):
    path, _ = page
    pairs = key_of(path)["pairs"]
    seen = opened(browser, path)
    assert seen.text_content("#progress") == f"Pair 1 of {len(pairs)}, 0 answered"
    assert seen.text_content("#prompt") == pairs[0]["prompt"]
    assert seen.is_disabled("#save")
    for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp"):
        seen.keyboard.press(key)
    assert seen.text_content("#progress") == f"Pair 3 of {len(pairs)}, 3 answered"
    assert seen.get_attribute("#none", "aria-pressed") == "true"
    seen.click("#left")  # changes the third choice
    seen.reload()  # they are kept
    assert seen.text_content("#progress") == f"Pair 4 of {len(pairs)}, 3 answered"
    for _ in pairs[3:]:
        seen.focus("#right")
        seen.keyboard.press("Enter")
    assert seen.is_visible("#done")
    with seen.expect_download() as download:
        seen.click("#save")
    file = tmp_path / "answers.json"
    download.value.save_as(file)
    content = json.loads(file.read_text())
    chosen = [content["choices"][str(n)] for n in range(len(pairs))]
    assert chosen == ["left", "right", "left"] + ["right"] * (len(pairs) - 3)
    (found,) = blind_choices([file], path.parent)
    won = [pair[side].startswith("gralora") for pair, side in zip(pairs, chosen, strict=True)]
    assert found.share == pytest.approx(np.mean(won))
    seen.on("dialog", lambda dialog: dialog.accept())
    seen.click("#clear")
    assert seen.text_content("#progress") == f"Pair 1 of {len(pairs)}, 0 answered"
    assert seen.errors == []
    seen.context.close()


@pytest.mark.parametrize("width", [360, 390, 1200])
def test_nothing_is_cut_off(page, browser, width):
    seen = opened(browser, page[0], width)
    assert seen.evaluate("document.documentElement.scrollWidth") <= width
    images = "[...document.images].filter(i => i.offsetParent)"
    assert seen.evaluate(f"{images}.every(i => i.naturalWidth > 0)")
    assert seen.evaluate(f"{images}.length") == 3
    boxes = [seen.locator(f"#{side}").bounding_box() for side in ("left", "right")]
    assert boxes[0]["y"] == boxes[1]["y"]  # beside each other, also on a phone
    assert boxes[0]["width"] == pytest.approx(boxes[1]["width"], abs=1)
    assert boxes[1]["x"] + boxes[1]["width"] <= width
    seen.context.close()


def test_light_and_dark(page, browser):
    backgrounds = []
    for scheme in ("light", "dark"):
        seen = opened(browser, page[0], scheme=scheme)
        backgrounds.append(
            seen.evaluate(
                "getComputedStyle(document.body).backgroundColor + '/' +"
                "getComputedStyle(document.body).color"
            )
        )
        seen.context.close()
    assert backgrounds == [
        "rgb(255, 255, 255)/rgb(27, 31, 36)",
        "rgb(20, 23, 27)/rgb(230, 233, 237)",
    ]
