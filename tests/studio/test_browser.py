"""The studio in a real browser, as somebody uses it who only clicks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio")
from safetensors.torch import load_file

from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME
from tests import ROOT

sync = pytest.importorskip("playwright.sync_api")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")
SUBJECT = ROOT / "samples/subjects/robot/train"
#: Milliseconds; a process that imports torch takes many seconds on a busy machine.
SOON, LATER = 60_000, 240_000


class Server:
    """``gralora studio`` in a process of its own, which may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start()

    def start(self) -> None:
        line = [sys.executable, "-m", "gralora_diffusion", "studio", str(self.folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*line, "--no_browser"], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        told = (next(self.process.stdout) for _ in range(3))
        self.address = next(text.strip() for text in told if text.startswith("http"))

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("studio"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    page = opened(server, browser)
    yield page
    close(page)


def opened(server, browser):
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.set_default_timeout(SOON)
    here = (server.address.partition("?")[0], "data:", "blob:")
    page.errors = []  # what it asks others for, and exceptions of its scripts
    page.route(
        lambda url: not url.startswith(here), lambda route: page.errors.append(route.request)
    )
    page.on("pageerror", lambda error: page.errors.append(error))
    page.goto(server.address)
    return page


def close(page):
    assert page.errors == []
    page.context.close()


def fill(page, name, text):
    field = page.locator(f"#{name}").locator("textarea, input").first
    field.fill(text)
    field.blur()


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def upload(page):
    with page.expect_file_chooser() as chooser:
        page.locator("#images-upload").click()
    chooser.value.set_files(sorted(SUBJECT.iterdir()))
    page.locator(".card").nth(4).wait_for()


def test_from_five_images_to_a_lora_by_clicks(server, browser):
    page = opened(server, browser)
    upload(page)
    assert page.locator("textarea[data-caption]").nth(1).input_value() == "a sks toy on stripes"
    page.locator("#images-use").click()
    page.locator("#train-preset input").click()
    page.get_by_role("option", name=re.compile("tiny_robot:")).click()
    page.locator("#train-problems").get_by_text("ready to start").wait_for()
    for name, text in {"max_train_steps": "3", "lr_warmup_steps": "1", "rank": "3"}.items():
        fill(page, f"opt-{name}", text)
    problem = "--rank is 3 and --gralora_k is 2; k must divide the rank"
    page.locator("#opt-rank .problem-here").get_by_text(problem).wait_for()
    fill(page, "opt-rank", "4")
    page.locator("#train-problems").get_by_text("ready to start").wait_for()
    page.locator("#train-start").click()

    # the studio is killed in the middle of the run, and started again
    page.locator("#runs-state .running").wait_for(timeout=LATER)
    server.kill()
    close(page)
    server.start()
    page = opened(server, browser)
    open_tab(page, "Runs")
    page.locator("#runs-state .finished").wait_for(timeout=LATER)
    page.locator("#runs-plots figcaption").get_by_text("gradient norm").wait_for()
    run = server.folder / "runs/my-adapter"
    assert (run / WEIGHTS_NAME).is_file()
    assert str(server.folder / "images/my-images") in (run / "training_config.yaml").read_text()

    page.locator("#runs-compare").click()
    fill(page, "compare-prompts", "a sks toy\na sks toy at night")
    fill(page, "compare-steps", "2")
    page.locator("#compare-generate").click()
    page.get_by_text("the grid as one image").wait_for(timeout=LATER)
    cells = page.locator("#compare-result td img")
    assert cells.count() == 4
    assert cells.nth(2).get_attribute("title").startswith("prompt: a sks toy, seed: 0, steps: 2")
    assert page.locator("#compare-result td img").evaluate_all("a => a.every(i => i.complete)")

    # the third is enlarged and kept, by keyboard alone
    pictures = page.locator("#compare-result a.picture")
    pictures.nth(1).focus()
    for key in ("Enter", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.locator("#viewer output").get_by_text("kept as").wait_for()
    page.keyboard.press("Escape")
    page.locator("#compare-kept a.picture").wait_for()
    assert pictures.nth(2).evaluate("a => a === document.activeElement")
    (kept,) = (server.folder / "kept").iterdir()
    (folder,) = (server.folder / "comparisons").iterdir()
    assert kept.read_bytes() == (folder / "01-00.png").read_bytes()

    open_tab(page, "Share")
    page.locator("#share-card").get_by_text("An upload sends these").wait_for()
    fill(page, "share-token", "hf_secret")
    page.locator("#share-publish").click()
    page.locator("#share-published").get_by_text("HF_HUB_OFFLINE is set").wait_for()
    assert page.locator("#share-token input").input_value() == ""
    page.locator("#share-style input").click()
    page.get_by_role("option", name=re.compile("diffusers")).click()
    page.locator("#share-export").click()
    link = page.get_by_role("link", name="Download my-adapter-diffusers.safetensors")
    link.wait_for(timeout=LATER)
    with page.expect_download() as download:
        link.click()
    lora = load_file(download.value.path())
    close(page)

    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(ROOT / "samples/tiny-base")
    pipe.load_lora_weights(lora, adapter_name="robot")
    assert pipe.get_list_adapters() == {"unet": ["robot"]}


def test_captions_are_text_and_two_pages_see_the_same(server, page, browser):
    folder = server.folder / "set"
    folder.mkdir()
    for file in SUBJECT.glob("0[01].*"):
        (folder / file.name).write_bytes(file.read_bytes())
    fill(page, "images-folder", str(folder))
    page.locator("#images-open").click()
    area = page.locator("textarea[data-caption]").first
    caption = "</textarea><script>window.harm = 1</script> ${1 + 1} {{value}} <img src=x>"
    area.fill(caption)
    area.blur()
    page.locator(".card output").get_by_text("saved").wait_for()
    assert (folder / "00.txt").read_text() == f"{caption}\n"
    other = opened(server, browser)
    fill(other, "images-folder", str(folder))
    other.locator("#images-open").click()
    assert other.locator("textarea[data-caption]").first.input_value() == caption
    assert other.locator(".card img").count() == 2
    assert other.evaluate("window.harm") is None
    close(other)


def test_what_is_typed_while_a_caption_is_saved_is_kept(server, page):
    folder = server.folder / "typed"
    folder.mkdir()
    for file in SUBJECT.glob("00.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    fill(page, "images-folder", str(folder))
    page.locator("#images-open").click()
    area = page.locator("textarea[data-caption]")

    def type_more(route):
        area.fill("one  two three")
        route.continue_()

    page.route("**/studio/caption/*", type_more, times=1)
    area.fill("one  two")
    with page.expect_response("**/studio/caption/*"):
        area.blur()
    page.wait_for_function("document.querySelector('.card output').textContent === ''")
    assert (folder / "00.txt").read_text() == "one two\n"
    assert area.input_value() == "one  two three"
    area.blur()
    page.locator(".card output").get_by_text("saved").wait_for()
    assert area.input_value() == "one two three"
    assert (folder / "00.txt").read_text() == "one two three\n"


@pytest.mark.parametrize("text", ["nowhere", "samples/subjects/prompts_and_classes.txt", ""])
def test_a_folder_that_is_none(page, text):
    fill(page, "images-folder", text)
    page.locator("#images-open").click()
    page.locator("#images-summary .problem").wait_for()


def test_the_form_for_the_token(server, browser):
    address, _, token = server.address.partition("?token=")
    page = browser.new_context().new_page()
    page.set_default_timeout(SOON)
    page.goto(address)
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Open").click()
    page.get_by_role("tab", name="Images", exact=True).wait_for()
    page.context.close()


def test_the_form_on_a_phone(server, page):
    page.set_viewport_size({"width": 390, "height": 800})
    open_tab(page, "Train")
    assert page.locator("#opt-snr_gamma").is_hidden()
    page.get_by_text("all", exact=True).click()
    page.locator("#opt-snr_gamma").wait_for()
    page.get_by_text("basic", exact=True).click()
    page.locator("#train-search").fill("min-snr")
    page.locator("#opt-snr_gamma").wait_for()
    assert page.locator("#opt-rank").is_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#train-search").fill("")
    # the whole form is above the problems, but not above the button
    box = page.locator("#train-start").bounding_box()
    assert 0 < box["y"] < 800 - box["height"]
    page.locator("#train-card").evaluate("e => scrollBy(0, e.getBoundingClientRect().top - 765)")
    assert (
        page.evaluate("(b) => document.elementFromPoint(b.x + 9, b.y + 9).id", box) == "train-start"
    )
    page.locator("#train-start").click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.problem-here')].map((p) => "
        "p.getBoundingClientRect().top).some((top) => 0 < top && top < 700)"
    )


def test_an_idle_page_does_not_ask_gradio(page):
    for name in ("Train", "Runs", "Compare", "Share", "Benchmark", "Runs"):
        open_tab(page, name)
    page.locator("#live-runs-state p").wait_for(state="attached")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    end = time.monotonic() + SOON / 1000
    while time.monotonic() < end:  # what was asked when the tabs were opened may still come
        asked.clear()
        began = time.monotonic()
        page.wait_for_timeout(5000)
        seconds = time.monotonic() - began  # more than 5 on a busy machine
        if not any("/gradio_api/" in url for url in asked):
            break
    assert not [url for url in asked if "/gradio_api/" in url]
    assert 1 <= sum("/studio/live/runs" in url for url in asked) <= seconds / 2 + 2


def test_pages_are_answered_quickly(server, page):
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        assert page.request.get(server.address.partition("?")[0]).ok
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 1  # far above what an idle machine takes
