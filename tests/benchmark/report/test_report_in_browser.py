"""The page in a real browser: nothing fails, nothing is fetched, nothing is cut off on a phone."""

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from gralora_diffusion.benchmark.evaluation.endpoint import Declared
from gralora_diffusion.benchmark.report import write_report
from tests.benchmark.pages import Page
from tests.benchmark.trials import keys, trial, written

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)}")

#: As long as names of methods become.
LONG = "gralora-r128-k16-h128-lr1.5e-4"

#: A page around the report, as wide as a phone or a desk, that looks into it once all is loaded.
FRAME = """<!DOCTYPE html><p id="seen"></p>
<iframe srcdoc="%s" style="width:%dpx;height:900px;border:0"></iframe>
<script>
addEventListener("load", () => {
  const inner = document.querySelector("iframe").contentWindow, page = inner.document;
  const all = name => [...page.querySelectorAll(name)];
  const box = e => e.getBoundingClientRect();
  const cut = all("svg text").filter(t => {
    const a = box(t), b = box(t.closest("svg"));
    return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1
      || a.bottom > b.bottom + 1;
  });
  const wide = all("body *").filter(e => box(e).right > inner.innerWidth + 1);
  document.getElementById("seen").textContent = JSON.stringify({
    width: inner.innerWidth, scroll: page.documentElement.scrollWidth,
    images: page.images.length, broken: all("img").filter(i => !i.naturalWidth).length,
    named: all("svg").filter(s => [...s.querySelectorAll("text")].some(
      t => t.textContent.startsWith("%s"))).length,
    pointed: all("svg").filter(s => s.querySelector("circle")).length,
    cut: cut.map(t => t.textContent), wide: wide.map(e => e.outerHTML.slice(0, 80)),
    plots: all("svg").length, flat: all("svg").filter(s => box(s).height < 40).length,
    fetched: inner.performance.getEntriesByType("resource")
      .filter(r => !r.name.startsWith("data:")).map(r => r.name),
  });
});
</script>"""


def browse(tmp_path, *options):
    """Run the browser once; give what it printed and what it complained of."""
    command = [BROWSER, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*command, *options], capture_output=True, timeout=120, text=True, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    methods = ("lora-r32", LONG, "gralora-r32-k4", "a-method-with-a-rather-long-name-r32-k8")
    expected = keys(methods=methods)
    declared = Declared.parse("dinov2", [f"{LONG}:lora-r32", f"{methods[3]}:lora-r32"])
    results = written(output, [trial(key, mechanism=True) for key in expected[:-1]], size=150)
    real = {result.subject: [result.folder / "pictures/000_0.png"] for result in results}
    return write_report(
        results, output / "report", expected=expected, real_images=real, declared=declared
    )


def test_it_opens_without_a_complaint_and_with_all_it_has(report, tmp_path):
    printed, complaints = browse(tmp_path, "--dump-dom", report.as_uri())
    assert complaints == []
    seen, written_page = Page(printed), Page(report.read_text(encoding="utf-8"))
    for tag in ("table", "tr", "td", "data", "svg", "circle", "img", "figure", "details"):
        assert len(seen.of(tag)) == len(written_page.of(tag)), tag
    assert seen.numbers == written_page.numbers
    assert seen.tables == written_page.tables


@pytest.mark.parametrize("width", [360, 390, 1200])
def test_nothing_is_cut_off_fetched_or_broken(report, tmp_path, width):
    text = report.read_text(encoding="utf-8")
    text = text.replace("<details", "<details open").replace(' loading="lazy"', "")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME % (html.escape(text), width, LONG), encoding="utf-8")
    options = ("--window-size=1300,1000", "--dump-dom", frame.as_uri())
    printed, complaints = browse(tmp_path, *options)
    assert complaints == []
    found = re.search(r'<p id="seen">(.*?)</p>', printed, re.DOTALL)
    seen = json.loads(html.unescape(found[1]))
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert seen["wide"] == []
    assert seen["cut"] == []
    assert seen["named"] == seen["pointed"] > 5  # in all plots of several methods
    assert seen["fetched"] == []
    assert (seen["broken"], seen["flat"]) == (0, 0)
    assert seen["images"] > 80
    assert seen["plots"] > 15


def test_it_is_light_or_dark_as_the_reader_has_it(report, tmp_path):
    brightness = {}
    for name, scheme in (("light", 1), ("dark", 0)):
        image = tmp_path / f"{name}.png"
        browse(
            tmp_path,
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=800,1500",
            f"--screenshot={image}",
            report.as_uri(),
        )
        with Image.open(image) as taken:
            pixels = np.sort(np.asarray(taken.convert("L")).ravel())
        count = len(pixels)
        brightness[name] = pixels[count // 2], pixels[count // 500], pixels[-count // 500]
    paper, ink, _ = brightness["light"]
    assert paper > 240
    assert ink < 90
    paper, _, ink = brightness["dark"]
    assert paper < 40
    assert ink > 190
