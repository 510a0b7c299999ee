"""Images of the page: which, how large, and how those that cannot be shown are reported."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from gralora_diffusion.benchmark.report import write_report
from gralora_diffusion.benchmark.report.images import data_uri
from tests.benchmark.pages import Page
from tests.benchmark.trials import METHODS, SUBJECTS, keys, trial, written


def decoded(uri):
    head, data = uri.split(",", 1)
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image


def shown(folder, **options):
    """The page from its section of all images on, without the strip at its top."""
    write_report(options.pop("results"), folder, **options)
    text = (folder / "index.html").read_text(encoding="utf-8")
    section = re.search(r'<section id="images">.*?</section>', text, re.DOTALL)
    return Page(section[0] if section else text)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Two subjects whose images do not compress."""
    folder = tmp_path_factory.mktemp("noisy")
    results = written(folder, [trial(key) for key in keys(SUBJECTS[:2])], size=16)
    rng = np.random.default_rng(0)
    for path in sorted(folder.rglob("*.png")):
        Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8)).save(path)
    return results


def test_all_methods_side_by_side_with_the_real_ones(tmp_path):
    results = written(tmp_path / "run", [trial(key) for key in keys(SUBJECTS[:2])], size=64)
    real = tmp_path / "real.jpg"
    Image.new("RGB", (600, 300), "red").save(real)
    page = shown(tmp_path, results=results, real_images={SUBJECTS[0]: [real]})
    images = page.of("img")
    assert [i["alt"] for i in images[:1]] == [f"{SUBJECTS[0]}, real"]
    assert decoded(images[0]["src"]).size == (256, 128)
    alts = [i["alt"] for i in images[1:]]
    assert len(alts) == 2 * 3 * len(METHODS)
    assert alts[: len(METHODS)] == sorted(METHODS)
    by_key = {r.key: r for r in results}
    for place, alt in enumerate(alts[: len(METHODS)]):  # of one prompt and seed 0, pixel by pixel
        trial_ = next(r for k, r in by_key.items() if (k[1], k[2], k[3]) == (SUBJECTS[0], alt, 0))
        wanted = np.array(Image.open(trial_.folder / trial_.prompts[0].images[0]))
        assert np.array_equal(np.array(decoded(images[1 + place]["src"])), wanted)
    assert f"{SUBJECTS[0]} 3 of 3 prompts, seed 0" in page.text


@pytest.mark.parametrize("mib", [2.0, 0.5, 0.2, 0.06])
def test_they_keep_to_the_budget(tmp_path, noisy, mib):
    page = shown(tmp_path / "report", results=noisy, image_mib=mib)
    uris = [i["src"] for i in page.of("img")]
    assert uris
    assert sum(map(len, uris)) <= mib * 2**20
    sizes = {decoded(uri).size for uri in uris}
    assert len(sizes) == 1  # all methods alike
    methods = [i["alt"] for i in page.of("img")]
    assert {methods.count(m) for m in METHODS} == {len(uris) // len(METHODS)}


def test_larger_budgets_give_larger_images_and_none_is_said(tmp_path, noisy):
    sides = []
    for mib in (4.0, 0.5, 0.06):
        page = shown(tmp_path / "report", results=noisy, image_mib=mib)
        sides.append(decoded(page.of("img")[0]["src"]).width)
    assert sides == sorted(set(sides), reverse=True)
    page = shown(tmp_path / "report", results=noisy, image_mib=0.001)
    assert page.of("img") == []
    assert "they do not fit into a page of this size" in page.text


def test_broken_and_lost_images_and_lost_trials_are_said(tmp_path):
    results = written(tmp_path / "run", [trial(key) for key in keys(SUBJECTS[:1], seeds=(0,))])
    broken, lost = (results[i].folder / results[i].prompts[0].images[0] for i in (0, 1))
    broken.write_bytes(broken.read_bytes()[:60])
    lost.unlink()
    page = shown(tmp_path, results=results[:3], expected=[r.key for r in results])
    assert page.text.count("not readable") == 2
    assert page.text.count("not generated") == 0
    assert len(page.of("img")) == 3 * 3 - 2
    # a method that has no trial of this subject, but of another
    more = written(tmp_path / "run", [trial(key) for key in keys(SUBJECTS[1:2], seeds=(0,))])
    page = shown(tmp_path, results=[*results[:3], *more])
    assert page.text.count("not generated") == 3


def test_the_real_image_of_a_caption_stands_first(tmp_path):
    results = written(tmp_path, [trial(key) for key in keys(SUBJECTS[:1], ("lora-r32",), (0,))])
    real = tmp_path / "held out.png"
    Image.new("RGB", (40, 40), (0, 200, 0)).save(real)
    prompts = results[0].prompts
    entry = type(prompts[0])(prompts[0].prompt, prompts[0].images, {}, str(real))
    changed = [type(results[0])(**{**vars(results[0]), "prompts": (entry, *prompts[1:])})]
    page = shown(tmp_path / "report", results=changed)
    first, second = page.of("img")[:2]
    assert (first["alt"], second["alt"]) == ("real", "lora-r32")
    assert decoded(first["src"]).getpixel((5, 5)) == (0, 200, 0)


def test_kinds_of_images(tmp_path):
    Image.new("RGBA", (50, 50), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert decoded(data_uri(tmp_path / "clear.png", 256)).getpixel((3, 3)) == (255, 255, 255)
    Image.new("CMYK", (500, 100)).save(tmp_path / "print.jpg")
    assert decoded(data_uri(tmp_path / "print.jpg", 128)).size == (128, 26)
    Image.new("I;16", (90, 90), 60000).save(tmp_path / "deep.png")
    assert decoded(data_uri(tmp_path / "deep.png", 64)).format == "JPEG"
    turned = Image.new("RGB", (200, 100), "blue")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert decoded(data_uri(tmp_path / "turned.jpg", 64)).size == (32, 64)
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "nothing.png", "."):
        assert data_uri(tmp_path / name, 64) is None
