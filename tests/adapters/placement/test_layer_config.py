"""Rank, k and alpha of single layers: the same answers as PEFT's LoRA, and configs as files."""

import json
import random
from typing import Any

import pytest
from peft import GraloraConfig as StockConfig
from peft import LoraConfig, inject_adapter_in_model
from peft.utils.other import get_pattern_key
from torch import nn

from gralora_diffusion import GraloraConfig
from gralora_diffusion.adapters.placement.layer_config import (
    describe_unused,
    exact_pattern,
    invalid_values,
    layer_settings,
    rename_layers,
    unused_patterns,
)
from tests import models

PATHS = [name for name, m in models.unet().named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def config(**changes) -> GraloraConfig:
    return GraloraConfig(
        **{"r": 8, "gralora_k": 4, "alpha": 6, "target_modules": ["to_q"]} | changes
    )


class TestLayerSettings:
    @pytest.mark.parametrize(
        "pattern",
        [
            {"to_q": 4},
            {"to_q": 4, "attn1.to_q": 12},
            {"attn1.to_q": 12, "to_q": 4},
            {r"attn[12]\.to_(q|k)": 4, r".*mid_block.*": 12, "o_v": 16},
            {"^conv_in": 4, "^conv": 12, r"^down_blocks\.\d\..*conv1": 16},
            {"to_out.0|proj_in": 4, "0": 12},
            {"down_blocks.0.resnets.0.conv1": 4},
            {},
            {"nowhere": 4},
        ],
        ids=str,
    )
    def test_as_pefts_lora(self, pattern):
        """The layers that PEFT itself makes have the ranks and alphas that we read."""
        targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_in"]
        lora = LoraConfig(r=8, lora_alpha=6, target_modules=targets)
        lora.rank_pattern, lora.alpha_pattern = pattern, {k: v + 0.5 for k, v in pattern.items()}
        model = inject_adapter_in_model(lora, models.unet())
        layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
        assert len(layers) > 40
        ours = config(
            rank_pattern=lora.rank_pattern,
            k_pattern=lora.rank_pattern,
            alpha_pattern=lora.alpha_pattern,
        )
        for path, layer in layers.items():
            r, k, alpha = layer_settings(ours, path)
            assert (r, alpha) == (layer.r["default"], layer.lora_alpha["default"]), path
            assert k == (r if alpha != 6 else 4), path

    def test_pefts_own_config(self):
        assert layer_settings(StockConfig(r=6, gralora_k=3, alpha=5), "x.to_q") == (6, 3, 5)


class TestUnused:
    def test_says_which_and_why(self):
        patterns = {
            "rank_pattern": {"to_q": 4, "attn1.to_q": 16, "to_z": 4},
            "k_pattern": {".*": 2, "^mid_block.*": 1},
            "alpha_pattern": {"proj_in": 3},
        }
        unused = unused_patterns(config(**patterns), PATHS)
        assert unused == {
            "rank_pattern": ["attn1.to_q", "to_z"],
            "k_pattern": ["^mid_block.*"],
            "alpha_pattern": [],
        }
        late, absent, covered = describe_unused(unused, PATHS)
        count = sum(path.endswith("attn1.to_q") for path in PATHS)
        assert late.startswith(
            f"rank_pattern 'attn1.to_q' has no effect: earlier patterns match all {count} layers"
        )
        assert absent == (
            f"rank_pattern 'to_z' matches none of the {len(PATHS)} target layers, such as conv_in."
        )
        assert covered.startswith("k_pattern '^mid_block.*' has no effect")

    def test_nothing_to_say_of_pefts_own_config(self):
        assert not any(unused_patterns(StockConfig(), PATHS).values())


class TestExactPattern:
    @pytest.mark.parametrize("seed", range(5))
    def test_gives_each_path_its_value_and_no_other(self, seed):
        draw = random.Random(seed)
        values = {path: draw.choice([1, 2, 4]) for path in PATHS if draw.random() < 0.4}
        pattern = exact_pattern(values, PATHS)
        assert sorted(pattern.values()) == [1, 2, 4]
        for path in PATHS:
            assert pattern.get(get_pattern_key(pattern, path)) == values.get(path), path

    def test_paths_that_differ_by_numbers_are_one(self):
        values = {path: 2 for path in PATHS if path.endswith("attn1.to_q")} | {"conv_in": 1}
        assert len(values) > 4
        mid = r"mid_block\.attentions\.\d+\.transformer_blocks\.\d+\.attn\d+\.to_q"
        everywhere = exact_pattern(values, list(values))
        assert everywhere["^conv_in"] == 1
        assert mid in next(key for key, value in everywhere.items() if value == 2)
        beside_attn2 = exact_pattern(values, PATHS)
        assert mid not in str(list(beside_attn2))
        assert r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.to_q" in next(
            key for key, value in beside_attn2.items() if value == 2
        )

    def test_odd_names(self):
        paths = ["a.b", "aXb", "x.a.b", "a+b", "a-1", "a-2", "a|b", "a"]
        for path in paths:
            pattern = exact_pattern({path: 7}, paths)
            assert [p for p in paths if get_pattern_key(pattern, p) in pattern] == [path]
        assert exact_pattern({}, paths) == {}


def test_rename_layers():
    names = {path: f"old.{path}" for path in PATHS}
    patterns = {
        "rank_pattern": {r"^old\..*to_q": 4, "conv1": 16},
        "alpha_pattern": {r"old\.conv_in": 2.5},
    }
    before, after = config(**patterns), config(**patterns)
    rename_layers(after, names)
    assert after.k_pattern == {}
    for new, old in names.items():
        assert layer_settings(after, new) == layer_settings(before, old)
    assert layer_settings(after, "conv_in").alpha == 2.5


class TestFiles:
    PATTERNS: dict[str, dict[str, Any]] = {  # noqa: RUF012  sorted they would mean something else
        "rank_pattern": {"to_q": 4, "attn1.to_q": 16},
        "k_pattern": {"x": 2, "^a": 1},
        "alpha_pattern": {"z": 0.5, "y": 3},
    }

    def test_without_patterns_as_pefts(self, tmp_path):
        values = {"r": 6, "gralora_k": 3, "alpha": 5, "target_modules": ["to_q"]}
        ours, stock = GraloraConfig(**values), StockConfig(**values)
        assert ours.to_dict() == stock.to_dict()
        texts = []
        for one in (ours, stock):
            one.save_pretrained(tmp_path)
            texts.append((tmp_path / "adapter_config.json").read_bytes())
            assert StockConfig.from_pretrained(tmp_path) == stock
        assert texts[0] == texts[1]
        none = dict.fromkeys(("rank_pattern", "k_pattern", "alpha_pattern", "exclude_modules"))
        assert GraloraConfig(**values, **none) == ours

    def test_patterns_come_back_in_their_order(self, tmp_path):
        saved = config(**self.PATTERNS, exclude_modules=["to_k"])
        saved.save_pretrained(tmp_path)
        read = GraloraConfig.from_pretrained(tmp_path)
        assert type(read) is GraloraConfig
        assert read == saved
        for name, pattern in self.PATTERNS.items():
            assert list(getattr(read, name).items()) == list(pattern.items())
        assert read.exclude_modules == {"to_k"}

    def test_stock_peft_says_that_it_passes_over_them(self, tmp_path):
        config(**self.PATTERNS).save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match=r"alpha_pattern', 'k_pattern', 'rank_pattern'.*ignor"):
            assert type(StockConfig.from_pretrained(tmp_path)) is StockConfig

    def test_other_methods_are_left_to_peft(self, tmp_path):
        LoraConfig(r=2).save_pretrained(tmp_path)
        assert isinstance(GraloraConfig.from_pretrained(tmp_path), LoraConfig)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"rank_pattern": {"to_(q": 4}}, ["`rank_pattern` 'to_(q': not a regular expression"]),
        ({"k_pattern": {"(?i)to_q": 4}}, ["`k_pattern` '(?i)to_q': not a regular expression"]),
        ({"k_pattern": {3: 4}}, ["`k_pattern` 3: not a regular expression"]),
        ({"rank_pattern": ["to_q"]}, ["`rank_pattern` should be a mapping"]),
        ({"rank_pattern": {"a": 0, "b": 2.0}}, ["'a' should give a positive", "'b' should give"]),
        ({"k_pattern": {"a": "2"}}, ["`k_pattern` 'a' should give a positive integer but is '2'"]),
        (
            {"alpha_pattern": {"a": float("nan"), "b": None}, "k_pattern": {"c": -1}},
            ["'c' should give a positive", "'a' should give a finite number", "'b' should give"],
        ),
        ({"exclude_modules": "*x", "r": 0}, ["`r` should be", "exclude_modules '*x' is not a reg"]),
    ],
)
def test_invalid_values(changes, texts):
    found = invalid_values(config(**changes))
    assert len(found) == len(texts)
    for problem, text in zip(found, texts, strict=True):
        assert text in problem
