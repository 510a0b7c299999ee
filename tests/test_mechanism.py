"""The measured mechanism: its summary, and the numbers of the documents against it."""

import json

import pytest

from tests import ROOT
from tests.performance import mechanism

PAGE = (ROOT / "docs/how_it_works.md").read_text(encoding="utf-8")
FOUND = json.loads((ROOT / "docs/images/mechanism.json").read_text(encoding="utf-8"))


def test_the_summary_is_of_all_layers():
    names = ("concentration", "step_concentration", "stable_rank", "effective_rank")
    layers = {"a": 3.0, "b": 1.0, "c": 5.0, "d": 2.0}
    logged = dict.fromkeys(names, layers) | {"units": 2}
    logged["alignment"] = {
        name: {key: -value for key, value in layers.items()}
        for name in mechanism.MEASURES.keys() - names
    }
    report = {"protocols": {"subject": {"subjects": ["owl"], "mechanism": {"lora-r4": logged}}}}
    found = mechanism.summary(report, {"torch": "2"})
    assert (found["subjects"], found["versions"]) == (["owl"], {"torch": "2"})
    values = found["methods"]["lora-r4"]
    assert values.keys() == {*mechanism.MEASURES, "layers", "trials"}
    assert (values["layers"], values["trials"]) == (4, 2)
    assert values["stable_rank"] == {"median": 2.5, "least": 1.0, "most": 5.0}
    assert values["step_cosine"] == {"median": -2.5, "least": -5.0, "most": -1.0}


def test_numbers_of_the_documents():
    assert mechanism.table(FOUND) in PAGE
    section = PAGE[PAGE.index("## On a trained base") : PAGE.index("## Scaling")]
    flat = " ".join(section.split())
    methods = list(FOUND["methods"].values())
    medians = [{name: m[name]["median"] for name in mechanism.MEASURES} for m in methods]
    first, last = (
        "{full_share:.1f}, {gradient_share:.1f} and {step_share:.1f}".format(**medians[n])
        for n in (0, -1)
    )
    assert f"{first} times an even share with LoRA, and {last} with k = 4" in flat
    cosines = [f"{m['gradient_cosine']:.3f}" for m in medians]
    assert "its cosine is {}, {} and {}".format(*cosines) in flat
    assert cosines == sorted(cosines, reverse=True)
    assert all(m["full_share"] > m["gradient_share"] > m["step_share"] > 1 for m in medians)
    for rising in ("concentration", "step_concentration", "stable_rank", "effective_rank"):
        values = [m[rising] for m in medians]
        assert values == sorted(values)
    assert {m["layers"] for m in methods} == {125}
    assert {m["trials"] for m in methods} == {len(FOUND["subjects"])} == {4}
    for name in ("torch", "diffusers", "peft"):
        title = "PEFT" if name == "peft" else name
        assert f"{title} {FOUND['versions'][name].partition('+')[0]}" in flat


@pytest.mark.parametrize("method", FOUND["methods"])
def test_the_measured_methods_are_those_of_the_command(method):
    assert method in (mechanism.__doc__ or "")
