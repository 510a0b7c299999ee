"""The report: its numbers and sentences, whatever the trials contain."""

import csv
import html
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest

from gralora_diffusion.benchmark.evaluation.endpoint import Declared
from gralora_diffusion.benchmark.evaluation.results import TrialKey, Unreadable
from gralora_diffusion.benchmark.report import write_report
from gralora_diffusion.io.staging import OutputError
from tests.benchmark.pages import Page
from tests.benchmark.trials import METHODS, SUBJECTS, keys, trial, written

FILES = {"index.html", "report.md", "scores.csv", "report.json"}
#: What could break out of HTML, an attribute, Markdown or a table.
HOSTILE = (
    "</style></pre><script>alert('x')</script><img src=x onerror=\"y\"> | a_b *c* `d` & \n"
    "\\| [e](f) {{ 7 * 7 }} {% raw %} {# g #} ````"
)
#: What a terminal, a browser or a reader would obey, and how it is shown.
CONTROLS, SHOWN = "a\x1b[31m\x9bb\x00\u202ec", "a\\x1b[31m\\x9bb\\x00\\u202ec"


DECLARED = Declared.parse(
    "dinov2", [f"{name}:lora-r32" for name in ("gralora-r32-k2", "dora-r32", "gralora-r32-k4")]
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report of seven subjects, four methods and two seeds; two trials are missing."""
    output = tmp_path_factory.mktemp("run")
    expected = keys()
    results = written(output, [trial(key, mechanism=True) for key in expected[:-2]])
    broken = Unreadable(output / "units/x/result.json", "not readable as JSON")
    write_report(
        results,
        output / "report",
        title="Made-up numbers",
        expected=expected,
        unreadable=[broken],
        settings={"methods": list(METHODS), "steps": 800, "seeding": "subject"},
        declared=DECLARED,
    )
    return results, output / "report"


@pytest.fixture(scope="module")
def page(made):
    return Page((made[1] / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def content(made):
    return json.loads((made[1] / "report.json").read_text(encoding="utf-8"))


def numbers(value):
    """Every number of a JSON value."""
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_four_files_and_nothing_else(made):
    assert set(os.listdir(made[1])) == FILES


def test_the_page_needs_nothing_beside_itself(page):
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {t for t, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "xlink:href", "action", "poster"):
                assert value.startswith(("data:image/", "#"))
    style = re.findall(r"<style>(.*?)</style>", "".join(page.rawdata), re.DOTALL)
    assert not re.search(r"url\(|@import|https?:", "".join(style))
    policy = next(m for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy["content"]


def test_links_lead_to_sections(page):
    names = {attributes.get("id") for attributes in page.of("section")}
    links = {attributes["href"].removeprefix("#") for attributes in page.of("a")}
    top = {"verdict", "look", "plots0"}  # in sight without a link
    assert links == names - top
    assert names >= top
    assert len(links) == 5


def test_every_number_of_the_json_is_in_the_tables(page, content):
    shown = set(page.numbers)
    wanted = numbers(content["protocols"]) + numbers(content["units"]) + numbers(content["missing"])
    assert len(wanted) > 900
    assert [n for n in wanted if float(n) not in shown] == []


def test_means_and_differences_are_those_of_the_trials(made, content):
    results, _ = made
    found = content["protocols"]["subject"]["scores"]
    values = {
        score: {(r.method, r.subject, r.seed): r.scores[score] for r in results}
        for score in ("dinov2", "clip_t", "drift")
    }
    for score, by_trial in values.items():
        for method in METHODS:
            places = {s: [k[2] for k in by_trial if k[:2] == (method, s)] for s in SUBJECTS}
            means = [
                np.mean([by_trial[method, s, n] for n in ns]) for s, ns in places.items() if ns
            ]
            assert found[score]["means"][method]["mean"] == pytest.approx(np.mean(means), rel=1e-12)
            if method != "lora-r32":
                gains = [
                    np.mean([by_trial[method, s, n] - by_trial["lora-r32", s, n] for n in ns])
                    for s, ns in places.items()
                    if ns
                ]
                difference = found[score]["comparisons"]["lora-r32"][method]["difference"]
                assert difference["mean"] == pytest.approx(np.mean(gains), rel=1e-9)


def test_who_wins_loses_or_neither_is_said(content, page, made):
    """As the trials were made: k2 gains and drifts more, dora loses, k4 goes either way."""
    k2, dora, k4 = content["protocols"]["subject"]["verdicts"]
    assert re.fullmatch(
        r"gralora-r32-k2 beats lora-r32\. DINOv2 similarity differs by \+0\.025 \(95% interval "
        r"\+0\.017 to \+0\.032, 7 subjects, p < 0\.001; "
        r"p < 0\.001 after correction for 3 comparisons\)\.",
        k2,
    )
    assert dora.startswith("dora-r32 loses to lora-r32. DINOv2 similarity differs by -0.0")
    assert k4.startswith("gralora-r32-k4 against lora-r32: undecided. DINOv2 similarity differs by")
    text = (made[1] / "report.md").read_text(encoding="utf-8")
    plain = html.unescape(re.sub(r"\\(.)", r"\1", text))
    for sentence in (k2, dora, k4):
        for part in re.split(r"(?<=\.) (?=[A-Z])", sentence):
            assert part in page.text
        assert f"- {sentence}" in plain
    found = content["protocols"]["subject"]["decisions"]
    assert [d["verdict"] for d in found] == ["better", "worse", "inconclusive"]
    rows = page.tables["Declared comparisons"][1:]
    assert [row[2] for row in rows] == ["better", "worse", "inconclusive"]


def test_what_was_not_declared_has_no_verdict(page, content, made):
    """It is called exploratory wherever it stands."""
    text = (made[1] / "report.md").read_text(encoding="utf-8")
    for table in re.findall(r"\n\n(.*)\n\n\*\*Differences from", text):
        assert "These differences are exploratory" in table
    head = page.tables["Differences from lora-r32, trial by trial"][0]
    assert "verdict" not in head
    comparison = content["protocols"]["subject"]["scores"]["drift"]["comparisons"]["lora-r32"]
    assert "verdict" not in comparison["dora-r32"]


def test_without_a_declaration_there_is_no_verdict(tmp_path):
    write_report([trial(key) for key in keys()], tmp_path)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "No verdict." in page.text
    assert "No comparison was declared before this run." in page.text
    assert "Declared comparisons" not in page.tables
    assert "share the random numbers" not in page.text  # there are two seeds
    write_report([trial(key) for key in keys(seeds=(0,))], tmp_path)
    assert (
        "All subjects share the random numbers of one seed." in (tmp_path / "report.md").read_text()
    )


RATES = ("1e-3", "2e-3", "4e-3", "8e-3")


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Curves whose gap is known: GraLoRA's similarity is higher by 0.05 at every drift."""
    output = tmp_path_factory.mktemp("curves")
    results = []
    for number, subject in enumerate(SUBJECTS):
        for method, lift in (("lora-r32", 0.0), ("gralora-r32-k2", 0.05)):
            for rate in RATES:
                drift = 50 * float(rate) * (1 + 0.1 * (lift > 0)) + 0.01 * number
                if rate == "8e-3":  # where training has broken down, drift no longer grows
                    drift = 0.1
                key = TrialKey("subject", subject, f"{method}-lr{rate}", 0)
                scores = {"dinov2": 0.5 + drift + lift, "drift_dinov2": drift, "clip_t": 0.3}
                results.append(trial(key, scores=scores, update_norm=1000 * float(rate)))
        key = TrialKey("subject", subject, "base", 0)
        results.append(trial(key, scores={"dinov2": 0.1, "drift_dinov2": 0.0}, update_norm=0.0))
    results = written(output, results)
    declared = Declared.parse("dinov2@drift_dinov2", ["gralora-r32-k2:lora-r32"])
    real = {SUBJECTS[0]: [results[0].folder / "pictures/000_0.png"]}
    write_report(results, output / "report", declared=declared, real_images=real)
    return results, output / "report"


def test_methods_are_compared_along_their_curves(curves):
    content = json.loads((curves[1] / "report.json").read_text(encoding="utf-8"))
    found = content["protocols"]["subject"]
    (decision,) = found["decisions"]
    assert decision["difference"]["mean"] == pytest.approx(0.05, abs=1e-9)
    assert set(decision["by_subject"]) == set(SUBJECTS)
    assert (decision["verdict"], decision["sign_flip_p"]) == ("better", 2 / 2**7)
    assert found["verdicts"][0].startswith(
        "gralora-r32-k2 beats lora-r32. DINOv2 similarity at equal drift (DINOv2) differs by +0.050"
    )
    by_drift, by_norm = found["curves"]
    assert (by_drift["cost"], by_norm["cost"]) == ("drift_dinov2", "update_norm")
    points = by_drift["points"]["lora-r32"]
    assert list(points) == [f"lora-r32-lr{rate}" for rate in RATES]
    mean = np.mean([0.05 + 0.01 * n for n in range(7)])
    assert points["lora-r32-lr1e-3"] == pytest.approx([mean, 0.5 + mean])
    gap = by_norm["gaps"]["lora-r32"]["gralora-r32-k2"]["mean"]
    fine = np.linspace(1e-3, 8e-3, 70_001)
    norms, lora = np.array([1e-3, 2e-3, 4e-3, 8e-3]), np.array([50e-3, 0.1, 0.2, 0.1])
    ours = np.where(norms < 8e-3, 1.1 * lora, lora)
    # the norm grows to the last rate, though the drift does not; subjects shift both alike
    shift = np.mean([0.01 * n for n in range(7)])
    both = [line + np.array([shift] * 3 + [0]) for line in (ours, lora)]
    expected = np.mean(np.interp(fine, norms, both[0]) - np.interp(fine, norms, both[1])) + 0.05
    assert gap == pytest.approx(expected, abs=1e-5)
    assert content["references"] == []  # trials at different rates are not paired


def test_a_page_of_curves(curves):
    page = Page((curves[1] / "index.html").read_text(encoding="utf-8"))
    legend = [tag for tag, a in page.tags if tag == "polyline" and "curve" in (a["class"] or "")]
    assert len(legend) == 2 * 2 * 2  # two curves in two plots, and their legends
    content = json.loads((curves[1] / "report.json").read_text(encoding="utf-8"))
    shown = set(page.numbers)
    assert [n for n in numbers(content["protocols"]) if float(n) not in shown] == []


def test_the_strip_is_of_the_declared_methods_and_the_bare_base(curves):
    """From the same prompt and seed, of three subjects chosen by their difference."""
    page = (curves[1] / "index.html").read_text(encoding="utf-8")
    section = re.search(r'<section id="look">.*?</section>', page, re.DOTALL)
    strip = Page(section[0])
    alts = [image["alt"] for image in strip.of("img")]
    lora, ours = alts[1:3] if alts[0] == "bare base" else alts[2:4]
    assert (lora[:12], ours[:18]) == ("lora-r32-lr1", "gralora-r32-k2-lr1")  # at equal drift
    assert len(alts) in (9, 10)  # the first subject alone has a real image here
    assert alts.count("bare base") == 3


def test_a_declared_comparison_that_cannot_be_made_is_said(tmp_path):
    results = [trial(key) for key in keys(methods=("lora-r32", "dora-r32"))]
    declared = Declared.parse("dinov2", ["gralora-r32-k2:lora-r32"])
    write_report(results, tmp_path, declared=declared)
    text = (tmp_path / "report.md").read_text()
    assert (
        "gralora-r32-k2 against lora-r32: no verdict. DINOv2 similarity cannot be compared, "
        "because no subject has trials of both." in text
    )


def test_the_tables_of_page_and_markdown_are_the_same(made, page):
    text = (made[1] / "report.md").read_text(encoding="utf-8")
    found = {}
    for title, body in re.findall(r"^\*\*(.*)\*\*\n\n((?:\|.*\n?)+)", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in body.strip().splitlines()]
        cells = [[re.sub(r"\\(.)", r"\1", cell).strip() for cell in row] for row in rows]
        found[title] = [cells[0], *cells[2:]]
    assert len(found) >= 12
    for title, rows in found.items():
        assert rows == page.tables[title]
    assert {len(row) for rows in found.values() for row in rows if not rows[0]} == set()
    assert all(len({len(row) for row in rows}) == 1 for rows in found.values())


def test_markdown_shows_the_mechanism(made, content):
    text = (made[1] / "report.md").read_text(encoding="utf-8")
    section = text[text.index("## Diagnostics: subject") : text.index("## How the numbers")]
    assert "Concentration is the largest block's share" in section
    row = re.search(r"^\| gralora-r32-k4 \|.*$", section, re.MULTILINE)[0]
    found = content["protocols"]["subject"]["mechanism"]["gralora-r32-k4"]
    kinds = ("concentration", "effective_rank", "input_outliers")
    for cell, kind in zip(row.split("|")[3:6], kinds, strict=True):
        values = list(found[kind].values())
        expected = (np.median(values), min(values), max(values))
        assert cell.strip() == "{:.4g} ({:.4g} to {:.4g})".format(*expected)
    table = section[section.index("**Gradients and steps: median over layers") :]
    cells = re.search(r"^\| gralora-r32-k4 \|.*$", table, re.MULTILINE)[0].split("|")[2:-1]
    shown = [*found["alignment"].values(), found["step_concentration"]]
    for cell, by_layer in zip(cells, shown, strict=True):
        values = list(by_layer.values())
        expected = (np.median(values), min(values), max(values))
        assert cell.strip() == "{:.4g} ({:.4g} to {:.4g})".format(*expected)
    for method in METHODS:
        assert f"**{method}: share of the squared gradient norm, mean over layers**" in section
        folded = section[section.index(f"<summary>{method}, layer by layer</summary>\n\n**") :]
        assert folded[: folded.index("\n\n</details>")].count("\n| blocks.") == 2 * 12
    assert section.count("<details>") == section.count("</details>") == len(METHODS)


def test_a_star_is_explained_where_there_is_one(tmp_path):
    note = "There is no interval, or only one over the seeds of one subject."
    for name, subjects in (("few", SUBJECTS[:2]), ("many", SUBJECTS)):
        write_report([trial(key) for key in keys(subjects)], tmp_path / name)
        text = (tmp_path / name / "report.md").read_text()
        page = Page((tmp_path / name / "index.html").read_text())
        starred = [t for t in page.tables.values() if any(c[-1:] == "*" for r in t for c in r)]
        assert len(starred) == (2 if name == "few" else 0)  # means and differences
        assert page.text.count(f"* {note}") == text.count(f"\n\n\\* {note}\n") == len(starred)
        assert "## Limits" in text


def test_a_single_method_leaves_no_heading_empty(tmp_path):
    for methods in (["lora-r32"], ["gralora-r32-k2"]):
        write_report([trial(key) for key in keys(methods=methods)], tmp_path)
        text = (tmp_path / "report.md").read_text()
        assert re.findall(r"^#+ [^\n]*\n+(?=#|\Z)", text, re.MULTILINE) == []
        page = re.sub(r">\s+<", "><", (tmp_path / "index.html").read_text())
        assert (
            re.findall(
                r"<h(\d)>[^<]*</h\1>(?:<div class=\"\w+\"></div>)*(?=<h|</(?!summary))", page
            )
            == []
        )


def test_the_csv_has_every_trial(made):
    results, folder = made
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {(r["protocol"], r["subject"], r["method"], int(r["seed"])): r for r in rows}
    assert len(rows) == len(results) == 54
    for result in results:
        row = found[result.key]
        assert {s: float(row[s]) for s in result.scores} == dict(result.scores)
        assert float(row["train_seconds"]) == result.train_seconds
        assert int(row["update_rank"]) == result.update_rank


def test_what_is_missing_is_named(page, content):
    wanted = [["subject", SUBJECTS[-1], METHODS[-1], seed] for seed in ("0", "1")]
    assert page.tables["Missing trials"][1:] == wanted
    assert page.tables["Unusable results"][1][1] == "not readable as JSON"
    assert "Missing trials are listed at the end: 2 of 56." in page.text
    assert "Unusable results are listed at the end: 1." in page.text
    assert "the methods do not all have the same trials" in page.text
    assert len(content["missing"]) == 2


def test_the_mechanism_is_the_mean_of_its_trials(made, content):
    results, _ = made
    found = content["protocols"]["subject"]["mechanism"]["gralora-r32-k4"]
    logs = [r.mechanism for r in results if r.method == "gralora-r32-k4"]
    layer = "blocks.3.attn.to_v"
    squares = [np.square(log.gradient_norms[layer]["norms"]) for log in logs]
    shares = np.concatenate([s / s.sum(axis=(1, 2), keepdims=True) for s in squares])
    assert found["concentration"][layer] == pytest.approx(16 * shares.mean(0).max(), rel=1e-12)
    rank = np.mean([log.effective_rank[layer] for log in logs])
    assert found["effective_rank"][layer] == pytest.approx(rank, rel=1e-12)
    values = [v for log in logs for v in log.alignment[layer]["step_cosine"]["values"]]
    assert found["alignment"]["step_cosine"][layer] == pytest.approx(np.mean(values), rel=1e-12)
    squares = [np.square(log.step_norms[layer]["norms"]) for log in logs]
    steps = np.concatenate([s / s.sum(axis=(1, 2), keepdims=True) for s in squares])
    assert found["step_concentration"][layer] == pytest.approx(16 * steps.mean(0).max(), rel=1e-12)
    assert np.sum(found["mean_share"]["4"]) == pytest.approx(1, rel=1e-12)
    assert np.shape(found["mean_share"]["4"]) == (4, 4)


def test_a_heat_map_is_as_dark_as_its_shares(page, content):
    share = content["protocols"]["subject"]["mechanism"]["gralora-r32-k2"]["mean_share"]["2"]
    start = page.tags.index(
        next(
            (tag, a)
            for tag, a in page.tags
            if tag == "svg" and a["aria-label"] == "gralora-r32-k2: mean over 12 layers, k = 2"
        )
    )
    cells = [a for tag, a in page.tags[start:] if tag == "rect"][:4]
    opacity = np.array([float(a["fill-opacity"]) for a in cells]).reshape(2, 2)
    assert np.allclose(opacity, 0.04 + 0.56 * np.array(share) / np.max(share), atol=1e-3)
    corners = [(float(a["x"]), float(a["y"])) for a in cells]
    assert corners[0][1] == corners[1][1]  # a row is an output block
    assert corners[0][0] == corners[2][0]


def test_an_interval_plot_is_to_scale(page, content):
    """Places of points and ends are a straight line over their values."""
    means = content["protocols"]["subject"]["scores"]["drift"]["means"]
    start = page.tags.index(
        next((t, a) for t, a in page.tags if t == "svg" and a["aria-label"] == "drift: means")
    )
    after = page.tags[start + 1 :]
    drawing = after[: next(i for i, (tag, _) in enumerate(after) if tag == "svg")]
    dots = [float(a["cx"]) for tag, a in drawing if tag == "circle"]
    lines = [a for tag, a in drawing if tag == "line" and "thick" in a["class"]]
    bars = [(float(a["x1"]), float(a["x2"])) for a in lines if a["y1"] == a["y2"]]
    values = [v for m in means.values() for v in (m["mean"], m["low"], m["high"])]
    places = [x for dot, bar in zip(dots, bars, strict=True) for x in (dot, *bar)]
    slope, offset = np.polyfit(values, places, 1)
    assert slope > 0
    assert np.allclose(np.array(values) * slope + offset, places, atol=0.11)


def test_hostile_text_is_only_text(tmp_path):
    expected = keys(SUBJECTS[:2], ("lora-r32", "<i>gralora & 'co'\" |"), seeds=(0,))
    results = [
        trial(
            key,
            mechanism=True,
            prompts=(replace(trial(key).prompts[0], prompt=HOSTILE, images=("no.png",)),),
            settings={HOSTILE: HOSTILE, "same": 1},
            versions={HOSTILE: HOSTILE + key.subject},
            scores={"dinov2": 0.5, "</text></svg><b>": 0.1},
            folder=tmp_path,
        )
        for key in expected
    ]
    write_report(
        results,
        tmp_path / "report",
        title=HOSTILE,
        unreadable=[Unreadable(tmp_path / "<b>.json", HOSTILE)],
        settings={HOSTILE: [HOSTILE], "path": tmp_path, "nan": float("inf")},
    )
    page = Page((tmp_path / "report/index.html").read_text(encoding="utf-8"))
    assert not {"script", "i"} & {tag for tag, _ in page.tags}
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert page.text.count(HOSTILE) >= 8  # title twice, prompts, settings, versions, the reason
    assert "<i>gralora & 'co'\" |" in page.text
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    outside = re.sub(r"^(`{3,})yaml\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search("<(script|i>)", outside)
    assert outside.count("&lt;script&gt;") >= 4
    grids = re.findall(r"(?:^\|.*\n)+", outside, re.MULTILINE)
    assert len(grids) >= 8
    for grid in grids:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in grid.splitlines()}
        assert len(columns) == 1, grid
    json.loads((tmp_path / "report/report.json").read_text(), parse_constant=pytest.fail)


def test_control_characters_are_shown(tmp_path):
    results = [
        trial(
            key,
            mechanism=True,
            prompts=(replace(trial(key).prompts[0], prompt=CONTROLS, images=("no.png",)),),
            settings={CONTROLS: CONTROLS},
            scores={CONTROLS: 0.5},
            folder=tmp_path,
        )
        for key in keys(methods=("lora-r32", f"gralora{CONTROLS}"))
    ]
    write_report(results, tmp_path, title=CONTROLS, settings={"a": CONTROLS})
    for name in ("index.html", "report.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert {letter for letter in text if not letter.isprintable()} == {"\n"}
        assert text.count("\\x9bb") > 10
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.text.count(SHOWN) > 10
    assert any(SHOWN in (plot["aria-label"] or "") for plot in page.of("svg"))


def test_the_same_trials_in_any_order_make_the_same_bytes(made, tmp_path):
    results, _ = made
    for name, order in (("a", results), ("b", results[::-1])):
        write_report(order, tmp_path / name)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_one_subject_and_one_seed_are_inconclusive(tmp_path):
    write_report([trial(key) for key in keys(SUBJECTS[:1], seeds=(0,))], tmp_path)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "no interval for 1 subject and 1 trial." in page.text
    rows = page.tables["Differences from lora-r32, trial by trial"][1:]
    assert all("[" not in row[2] and row[2].endswith("*") for row in rows)


def test_two_references_are_compared_once(tmp_path):
    methods = ("lora-r32", "lora-r64", "gralora-r32-k2")
    write_report([trial(key) for key in keys(methods=methods)], tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())["protocols"]["subject"]["scores"]
    compared = {a: list(b) for a, b in found["dinov2"]["comparisons"].items()}
    assert compared == {
        "lora-r32": ["gralora-r32-k2", "lora-r64"],
        "lora-r64": ["gralora-r32-k2"],
    }


def test_an_unknown_score_has_no_winner(tmp_path):
    results = [trial(key) for key in keys()]
    results = [replace(r, scores={"news": r.scores["dinov2"]}) for r in results]
    write_report(results, tmp_path)
    found = json.loads((tmp_path / "report.json").read_text())["protocols"]["subject"]
    assert found["verdicts"][0].startswith("No verdict.")
    assert found["scores"]["news"]["comparisons"]["lora-r32"]["dora-r32"]["win_rate"] is None


def test_settings_that_vary_within_a_method_are_warned_of(tmp_path):
    results = [trial(key) for key in keys()]
    odd = replace(results[3], settings={**results[3].settings, "learning_rate": 5e-4})
    odd = replace(odd, versions={**odd.versions, "torch": "2.8.0"})
    write_report([*results[:3], odd, *results[4:]], tmp_path)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert (
        "learning_rate varies within gralora-r32-k2: 0.0001 in 55 trials, 0.0005 in 1 trial."
        in page.text
    )
    assert "Not all trials used the same torch: 2.7.0 in 55 trials, 2.8.0 in 1 trial." in page.text
    assert [row[-1] for row in page.tables["Settings by method"][1:]] == sorted(METHODS)


def test_layers_with_a_lowered_k_are_reported(tmp_path):
    of_k4 = {"layers": 1032, "lowered_k": {1: 4, 2: 3}}
    results = [
        trial(key, **(of_k4 if key.method == "gralora-r32-k4" else {"layers": 1032}))
        for key in keys(methods=("lora-r32", "gralora-r32-k4"))
    ]
    write_report(results, tmp_path)
    said = "gralora-r32-k4: k is 1 in 4 and 2 in 3 of 1,032 layers, because their widths allow no"
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert said in page.text
    assert said in (tmp_path / "report.md").read_text()
    head, k4, lora = page.tables["Size, time and memory of a trial: mean (minimum to maximum)"]
    assert head[2:4] == ["layers", "lowered k, in layers"]
    assert (k4[2:4], lora[2:4]) == (["1,032", "1 in 4, 2 in 3"], ["1,032", "-"])
    methods = json.loads((tmp_path / "report.json").read_text())["protocols"]["subject"]["methods"]
    assert methods["gralora-r32-k4"]["lowered_k"] == {"1": 4, "2": 3}


def test_what_a_method_does_not_have_is_a_dash(tmp_path):
    ranks = {"lora-r32": 32, "full": None, "base": None}
    results = [
        trial(key, settings={"rank": ranks[key.method], "unset": None})
        for key in keys(methods=tuple(ranks), seeds=(0,))
    ]
    write_report(results, tmp_path, expected=[r.key for r in results])
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.tables["Settings by method"] == [
        *(["method", "rank"], ["lora-r32", "32"], ["full", "-"], ["base", "-"]),
    ]
    assert page.tables["Settings of all trials"][1:] == [["unset", "-"]]


def test_before_the_first_result_there_is_a_report_too(tmp_path):
    write_report([], tmp_path, expected=keys())
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "There are no results yet." in page.text
    assert len(page.tables["Missing trials"]) == 57
    write_report([], tmp_path)
    assert set(os.listdir(tmp_path)) == FILES


def test_wrong_arguments_leave_the_old_report(tmp_path):
    results = [trial(key) for key in keys(SUBJECTS[:2])]
    write_report(results, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="more than one of subject, made-up ant, lora-r32, seed 0"):
        write_report([*results, results[0]], tmp_path)
    with pytest.raises(ValueError, match=r"lora-r9\. Methods: dora-r32, gralora-r32-k2"):
        write_report(results, tmp_path, references=["lora-r9"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(OutputError):
        write_report(results, tmp_path / "notes.txt")
