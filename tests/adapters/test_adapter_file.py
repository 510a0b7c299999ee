"""The formats, pinned: what is written today must be readable for ever."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import GraloraConfig as StockConfig
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gralora_diffusion import AdapterFileError, GraloraConfig
from gralora_diffusion.adapters.adapter_file import (
    Adapter,
    ComponentAdapter,
    adapter_from_state_dict,
    config_to_dict,
    read_adapter,
    save_adapter,
    save_peft_folders,
)

NAME = "pytorch_gralora_weights.safetensors"


def config(**changes) -> GraloraConfig:
    return GraloraConfig(
        **{"r": 4, "gralora_k": 2, "alpha": 6, "target_modules": ["to_q"], **changes}
    )


def tensors(hybrid: bool = False) -> dict[str, torch.Tensor]:
    made = {
        "block.to_q.gralora_A": torch.randn(2, 3, 4),
        "block.to_q.gralora_B": torch.ones(2, 4, 5),
    }
    if hybrid:
        made["block.to_q.gralora_A_general.weight"] = torch.randn(2, 6)
        made["block.to_q.gralora_B_general.weight"] = torch.randn(10, 2)
    return made


@pytest.fixture
def adapter() -> Adapter:
    parts = {
        "unet": ComponentAdapter(
            config(hybrid_r=2, target_modules=["to_v", "to_q"]), tensors(True)
        ),
        "text_encoder": ComponentAdapter(config(), tensors()),
    }
    return Adapter(parts, "stable-diffusion", {"modelspec.title": "cat"})


def equal(one: Adapter, other: Adapter) -> bool:
    assert one.components.keys() == other.components.keys()
    for name, part in one.components.items():
        twin = other.components[name]
        assert config_to_dict(part.config) == config_to_dict(twin.config)
        assert part.tensors.keys() == twin.tensors.keys()
        for key, tensor in part.tensors.items():
            assert torch.equal(tensor, twin.tensors[key])
            assert tensor.dtype == twin.tensors[key].dtype
    return True


def peft_configs(adapter: Adapter, folder: Path) -> list[Path]:
    return [part / "adapter_config.json" for part in save_peft_folders(adapter, folder)]


def described_in(path: Path) -> str:
    """The JSON of the configs in a native file or in a PEFT folder."""
    if path.suffix == ".json":
        return path.read_text().removesuffix("\n")
    return raw(path)[1]["gralora_adapter_metadata"]


def raw(path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), dict(file.metadata() or {})


class TestNativeFile:
    def test_keys_and_metadata(self, adapter, tmp_path):
        path = save_adapter(adapter, tmp_path / "new" / NAME)
        assert path == tmp_path / "new" / NAME
        stored, metadata = raw(path)
        assert sorted(stored) == [
            "text_encoder.block.to_q.gralora_A",
            "text_encoder.block.to_q.gralora_B",
            "unet.block.to_q.gralora_A",
            "unet.block.to_q.gralora_A_general.weight",
            "unet.block.to_q.gralora_B",
            "unet.block.to_q.gralora_B_general.weight",
        ]
        assert sorted(metadata) == ["format", "gralora_adapter_metadata", "modelspec.title"]
        assert metadata["format"] == "pt"
        described = json.loads(metadata["gralora_adapter_metadata"])
        described["components"]["unet"].pop("peft_version")
        unet = described["components"].pop("unet")
        assert list(described.pop("components")) == ["text_encoder"]
        assert described == {"family": "stable-diffusion", "format_version": 1}
        assert unet == {
            "alpha": 6,
            "auto_mapping": None,
            "base_model_name_or_path": None,
            "bias": "none",
            "fan_in_fan_out": False,
            "gralora_dropout": 0.0,
            "gralora_k": 2,
            "hybrid_r": 2,
            "inference_mode": True,
            "init_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "modules_to_save": None,
            "peft_type": "GRALORA",
            "r": 4,
            "revision": None,
            "target_modules": ["to_q", "to_v"],
            "task_type": None,
        }

    def test_metadata_is_written_as_ever(self, adapter, tmp_path):
        """Sorted and indented: an adapter without patterns has the bytes it always had."""
        adapter.components["text_encoder"].config = StockConfig(
            r=4, gralora_k=2, auto_mapping={"b": 1, "a": 2}, target_modules=["to_q"]
        )
        for path in (save_adapter(adapter, tmp_path / NAME), *peft_configs(adapter, tmp_path)):
            text = described_in(path)
            assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
            assert 'pattern"' not in text.replace("layers_pattern", "")
            assert "exclude_modules" not in text

    def test_read_again(self, adapter, tmp_path):
        adapter.components["unet"].tensors["block.to_q.gralora_B"] = torch.ones(2, 4, 5).bfloat16()
        path = save_adapter(adapter, tmp_path / NAME)
        for source, options in [
            (path, {}),
            (str(path), {}),
            (tmp_path, {}),
            (tmp_path, {"weight_name": NAME}),
            (tmp_path.parent, {"subfolder": tmp_path.name}),
        ]:
            read = read_adapter(source, **options)
            for part in adapter.components.values():
                part.config.inference_mode = True
            assert equal(read, adapter)
            assert read.family == "stable-diffusion"
            assert read.metadata == {"modelspec.title": "cat"}

    def test_same_adapter_same_bytes(self, adapter, tmp_path):
        adapter.metadata |= {f"key {n}": 'a "Katze" 🐈\n\x1f' for n in range(9)}
        first = save_adapter(adapter, tmp_path / "a")
        assert save_adapter(adapter, tmp_path / "b").read_bytes() == first.read_bytes()
        assert read_adapter(first).metadata == adapter.metadata

    def test_views_and_parameters_are_stored_as_they_look(self, tmp_path):
        whole = torch.nn.Parameter(torch.randn(4, 3, 2))
        part = ComponentAdapter(config(), {"x.gralora_A": whole.mT, "x.gralora_B": whole[1:]})
        stored, _ = raw(save_adapter(Adapter({"unet": part}), tmp_path / NAME))
        assert torch.equal(stored["unet.x.gralora_A"], whole.mT)
        assert torch.equal(stored["unet.x.gralora_B"], whole[1:])

    @pytest.mark.parametrize("peft", [False, True])
    def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(self, adapter, tmp_path, peft):
        def save():
            (
                save_peft_folders(adapter, tmp_path)
                if peft
                else save_adapter(adapter, tmp_path / NAME)
            )

        save()
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        for part in adapter.components.values():
            part.tensors["block.to_q.gralora_A"] = torch.zeros(2, 100, 100)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as on a full disk
        try:
            with pytest.raises(Exception, match=r"(?i)file too large"):
                save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        save()
        assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == len(before)

    def test_others_may_read_it(self, adapter, tmp_path):
        before = os.umask(0o027)
        try:
            path = save_adapter(adapter, tmp_path / NAME)
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == 0o640


class TestPatterns:
    PATTERNS: dict[str, dict[str, Any]] = {  # noqa: RUF012  sorted they would mean something else
        "rank_pattern": {"to_q": 2, r"attn1\.to_[qk]": 8},
        "k_pattern": {"to_v": 1, "^mid": 4, "a|b": 2},
        "alpha_pattern": {"z": 0.5, "y": 3},
    }

    @pytest.mark.parametrize("peft", [False, True])
    def test_come_back_exactly(self, adapter, tmp_path, peft):
        given = config(**self.PATTERNS, exclude_modules=["x", "w"], inference_mode=True)
        adapter.components["unet"].config = given
        if peft:
            (path, _) = peft_configs(adapter, tmp_path)
            described = json.loads(described_in(path))
        else:
            path = save_adapter(adapter, tmp_path / NAME)
            described = json.loads(described_in(path))["components"]["unet"]
        assert described["exclude_modules"] == ["w", "x"]
        read = read_adapter(tmp_path).components["unet"].config
        assert read == given
        for name, pattern in self.PATTERNS.items():
            assert list(described[name].items()) == list(pattern.items())
            assert list(getattr(read, name).items()) == list(pattern.items())

    def test_only_what_is_there_is_written(self, tmp_path):
        part = ComponentAdapter(config(k_pattern={"to_q": 1}), tensors())
        (path,) = peft_configs(Adapter({"unet": part}), tmp_path)
        text = path.read_text()
        assert '"k_pattern": {' in text
        assert "rank_pattern" not in text
        assert "alpha_pattern" not in text


class TestPeftFolders:
    def test_layout(self, adapter, tmp_path):
        folders = save_peft_folders(adapter, tmp_path)
        assert folders == [tmp_path / "unet", tmp_path / "text_encoder"]
        for folder in folders:
            assert sorted(os.listdir(folder)) == [
                "adapter_config.json",
                "adapter_model.safetensors",
            ]
        stored, metadata = raw(tmp_path / "text_encoder" / "adapter_model.safetensors")
        assert metadata == {"format": "pt"}
        assert sorted(stored) == [
            "base_model.model.block.to_q.gralora_A",
            "base_model.model.block.to_q.gralora_B",
        ]
        assert GraloraConfig.from_pretrained(tmp_path / "unet").hybrid_r == 2

    def test_read_again(self, adapter, tmp_path):
        save_peft_folders(adapter, tmp_path)
        for part in adapter.components.values():
            part.config.inference_mode = True
        assert equal(read_adapter(tmp_path), adapter)
        lone = read_adapter(tmp_path / "unet")
        assert list(lone.components) == ["denoiser"]
        assert equal(Adapter({"unet": lone.components["denoiser"]}), one(adapter, "unet"))

    @pytest.mark.parametrize(
        ("name", "content", "text"),
        [
            ("adapter_config.json", b"{", "cannot be read as JSON"),
            ("adapter_config.json", b"[1]", "contains a list, not an object"),
            (
                "adapter_config.json",
                b'{"r": 4}',
                "are missing in the adapter's config: gralora_k, alpha",
            ),
            ("adapter_model.safetensors", b"", "not a complete safetensors file"),
            (
                "adapter_model.safetensors",
                None,
                "adapter_config.json but no adapter_model.safetensors",
            ),
        ],
    )
    def test_refusals(self, adapter, tmp_path, name, content, text):
        save_peft_folders(one(adapter, "unet"), tmp_path)
        path = tmp_path / "unet" / name
        path.unlink() if content is None else path.write_bytes(content)
        for source in (tmp_path, tmp_path / "unet"):
            with pytest.raises(AdapterFileError, match=text):
                read_adapter(source)

    def test_a_lora(self, tmp_path):
        LoraConfig(r=2).save_pretrained(tmp_path)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(
            AdapterFileError, match=r"a LORA adapter, not a GraLoRA adapter.*load_lora_weights"
        ):
            read_adapter(tmp_path)


def one(adapter: Adapter, name: str) -> Adapter:
    return Adapter({name: adapter.components[name]}, adapter.family)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_short(path):
    path.write_bytes(path.read_bytes()[:20])


def emptied(path):
    path.write_bytes(b"")


def pickled(path):
    torch.save({"a": torch.ones(2)}, path)


def without_metadata(path):
    save_file(load_file(path), path)


def a_lora(path):
    save_file({"unet.to_q.lora_A.weight": torch.ones(2)}, path, {"format": "pt"})


def something_else(path):
    save_file({"conv.weight": torch.ones(2)}, path, {"format": "pt"})


def stray_key(path):
    stored, metadata = raw(path)
    save_file({**stored, "vae.x.gralora_A": torch.ones(2)}, path, metadata)


def described(change):
    def edit(path):
        stored, metadata = raw(path)
        description = json.loads(metadata["gralora_adapter_metadata"])
        change(description)
        metadata["gralora_adapter_metadata"] = json.dumps(description)
        save_file(stored, path, metadata)

    return edit


def not_json(path):
    stored, metadata = raw(path)
    save_file(stored, path, {**metadata, "gralora_adapter_metadata": "{"})


def nested(path):
    stored, metadata = raw(path)
    save_file(stored, path, {**metadata, "gralora_adapter_metadata": "[" * 100_000})


def deep(levels):
    return [deep(levels - 1)] if levels else []


def stored_as(dtype):
    def edit(path):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        entry = header[next(key for key in header if key != "__metadata__")]
        start, stop = entry["data_offsets"]
        entry |= {"dtype": dtype, "shape": [(stop - start) * 2]}
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    return edit


def unet_config(**values):
    return described(lambda d: d["components"]["unet"].update(values))


REFUSED = [
    (truncated, r"not a complete safetensors file \([\d,]+ bytes\)"),
    (cut_short, "not a complete safetensors file"),
    (emptied, r"not a complete safetensors file \(0 bytes\)"),
    (pickled, "a pickle .* which may run any program when it is read, so it was not read"),
    (
        without_metadata,
        "does not contain `gralora_adapter_metadata`.*Pass the state dict with its config",
    ),
    (a_lora, "this is a LoRA file, not a GraLoRA file"),
    (something_else, "this file contains no GraLoRA weights .first key: 'conv.weight'"),
    (stray_key, "'vae.x.gralora_A' does not belong to any component in its metadata"),
    (not_json, "metadata gralora_adapter_metadata is damaged"),
    (described(lambda d: d.pop("components")), "is damaged"),
    (described(lambda d: d.update(format_version=2)), "format_version 2.*reads 1. Upgrade"),
    (unet_config(gralora_magic=1), "unet: .*fields that this version does not know: gralora_magic"),
    (unet_config(r=5), "config is not valid: r should be divisible"),
    (unet_config(r="4"), "config is not valid"),
    (described(lambda d: d.update(components=[])), "components must map names to configs"),
    (described(lambda d: d.update(components={})), "components is empty"),
    (described(lambda d: d.update(family=["x"])), "and family must be a string"),
    (nested, "is damaged: .*nested too deeply"),
    (unet_config(auto_mapping={"a": deep(900)}), "is damaged: .*nested too deeply"),
    (unet_config(auto_mapping={"a": [1]}), "`auto_mapping` should be a mapping of plain values"),
    (unet_config(init_weights=deep(20)), "`init_weights` should be true or false"),
    (stored_as("F4"), "is stored as F4, with which torch cannot compute. Save"),
    (unet_config(r=True), "`r` should be an integer but is True"),
    (unet_config(gralora_k=0), "config is not valid"),
    (unet_config(hybrid_r=[]), r"`hybrid_r` should be an integer but is \[\]"),
    (unet_config(alpha=float("nan")), "`alpha` should be a finite number but is nan"),
    (unet_config(alpha=10**400), "`alpha` should be a finite number"),
    (unet_config(gralora_dropout="0"), "`gralora_dropout` should be a finite number but is '0'"),
    (unet_config(bias=[]), "`bias` should be a string"),
    (unet_config(fan_in_fan_out=0), "`fan_in_fan_out` should be true or false"),
    (unet_config(task_type={}), "`task_type` should be a string or nothing"),
    (unet_config(target_modules=5), "`target_modules` should be a list of strings, a string or"),
    (unet_config(exclude_modules=[None]), "`exclude_modules` should be a list of strings"),
    (unet_config(modules_to_save=["("]), r"`modules_to_save` should be .* but is \['\('\]"),
    (unet_config(modules_to_save="x"), "`modules_to_save` should be a list of names"),
    (unet_config(layers_to_transform="x"), "`layers_to_transform` should be an integer, a list"),
    (unet_config(layers_pattern=["(a*)*"]), "`layers_pattern` should be a name"),
    (
        unet_config(r="4", revision=3),
        "`r` should be an integer but is '4'; `revision` should be|"
        "`revision` should be a string or nothing but is 3; `r` should be",
    ),
    (unet_config(alpha=None), "config is not valid: `alpha` should be a finite number"),
    (unet_config(target_modules="*"), "config is not valid: .*not a regular expression"),
    (unet_config(rank_pattern={"(": 2}), r"not valid: `rank_pattern` '\(': not a regular expr"),
    (unet_config(rank_pattern=[8]), "not valid: `rank_pattern` should be a mapping"),
    (
        unet_config(k_pattern={"a": 0}, alpha_pattern={"b": "c"}),
        "not valid: `k_pattern` 'a' should give a positive.*; `alpha_pattern` 'b' should give",
    ),
    (unet_config(peft_type="LOHA"), "a LOHA adapter, not a GraLoRA adapter"),
    (
        described(lambda d: d["components"]["unet"].pop("alpha")),
        "are missing in the adapter's config: alpha",
    ),
    (described(lambda d: d["components"].update(unet=3)), "not a mapping but 3"),
]


class TestRefusals:
    @pytest.mark.parametrize(("damage", "text"), REFUSED)
    def test_files(self, adapter, tmp_path, damage, text):
        path = save_adapter(one(adapter, "unet"), tmp_path / NAME)
        damage(path)
        with pytest.raises(AdapterFileError, match=text) as caught:
            read_adapter(tmp_path)
        assert str(path) in str(caught.value)

    def test_folders(self, tmp_path):
        with pytest.raises(
            AdapterFileError, match=f"this folder contains no GraLoRA adapter. Expected {NAME}"
        ):
            read_adapter(tmp_path)
        with pytest.raises(AdapterFileError, match=r"contains no file named x\.safetensors"):
            read_adapter(tmp_path, weight_name="x.safetensors")
        with pytest.raises(
            AdapterFileError, match=r"/nowhere: this folder contains no GraLoRA adapter"
        ):
            read_adapter(tmp_path, subfolder="nowhere")

    @pytest.mark.parametrize(
        "source", ["./nowhere", "/no/where", "a/b/c", "x.safetensors", "~/nowhere", "a\\b"]
    )
    def test_paths_that_do_not_exist(self, source):
        with pytest.raises(AdapterFileError, match="no such file or folder"):
            read_adapter(source)


class TestStateDict:
    def test_components(self):
        state = {f"unet.{key}": tensor for key, tensor in tensors().items()}
        state |= {f"text_encoder.{key}": tensor for key, tensor in tensors().items()}
        configs = {"unet": config(), "text_encoder": config_to_dict(config(alpha=1))}
        made = adapter_from_state_dict(state, configs, ("unet", "text_encoder"))
        assert made.components.keys() == configs.keys()
        assert made.components["text_encoder"].config.alpha == 1
        assert made.components["unet"].tensors.keys() == tensors().keys()

    @pytest.mark.parametrize("prefix", ["", "base_model.model."])
    def test_one_component_without_its_name(self, prefix):
        state = {prefix + key: tensor for key, tensor in tensors().items()}
        made = adapter_from_state_dict(state, config(), ("unet", "text_encoder"))
        assert list(made.components) == ["unet"]
        assert made.components["unet"].tensors.keys() == tensors().keys()

    @pytest.mark.parametrize(
        ("config", "text"),
        [
            (None, "does not contain rank, k and alpha"),
            ({"text_encoder": config()}, "weights for unet, but `config` has no 'unet'"),
            (
                config(rank_pattern={"*": 2}),
                r"config for unet is not valid: `rank_pattern` '\*': not",
            ),
            (
                {"unet": {"r": 4}},
                r"config\['unet'\]: these fields are missing .*config: gralora_k, alpha",
            ),
        ],
    )
    def test_refusals(self, config, text):
        with pytest.raises(AdapterFileError, match=text):
            adapter_from_state_dict(tensors(), config, ("unet",))

    def test_not_tensors(self):
        with pytest.raises(AdapterFileError, match="'x' is not a tensor but a list"):
            adapter_from_state_dict({"x": [1.0]}, config(), ("unet",))


class TestHub:
    """A repository as it lies in the cache of huggingface_hub, read without any network."""

    COMMIT, OTHER = "1" * 40, "2" * 40

    @pytest.fixture
    def cache(self, adapter, tmp_path):
        repository = tmp_path / "models--someone--cat"
        for reference, commit in (("main", self.COMMIT), ("v2", self.OTHER)):
            (repository / "refs").mkdir(parents=True, exist_ok=True)
            (repository / "refs" / reference).write_text(commit)
        first, second = (repository / "snapshots" / commit for commit in (self.COMMIT, self.OTHER))
        save_adapter(adapter, first / NAME)
        save_adapter(one(adapter, "unet"), first / "other.safetensors")
        save_adapter(one(adapter, "unet"), first / "small" / NAME)
        save_peft_folders(adapter, first / "peft")
        save_adapter(one(adapter, "text_encoder"), second / NAME)
        return tmp_path

    @pytest.mark.parametrize(
        ("options", "components", "source"),
        [
            ({}, ["unet", "text_encoder"], "someone/cat"),
            ({"weight_name": "other.safetensors"}, ["unet"], "someone/cat"),
            ({"subfolder": "small"}, ["unet"], "someone/cat/small"),
            ({"subfolder": "peft"}, ["text_encoder", "unet"], "someone/cat/peft"),
            ({"subfolder": "peft/unet"}, ["denoiser"], "someone/cat/peft/unet"),
            ({"revision": "v2"}, ["text_encoder"], "someone/cat"),
            ({"revision": OTHER, "token": "secret"}, ["text_encoder"], "someone/cat"),
            ({"local_files_only": True}, ["unet", "text_encoder"], "someone/cat"),
        ],
    )
    def test_read(self, cache, options, components, source):
        read = read_adapter("someone/cat", cache_dir=cache, **options)
        assert sorted(read.components) == sorted(components)
        assert read.source == source
        assert not read.components[components[0]].tensors.keys() ^ tensors(
            "text" not in components[0]
        )

    @pytest.mark.parametrize(
        ("repository", "options", "text"),
        [
            ("some one/dog", {}, "some one/dog: this is not a local path, and it could not"),
            (
                "someone/dog",
                {},
                "someone/dog: there is no such folder, the Hub's cache does not contain",
            ),
            ("someone/cat", {"revision": "v3"}, "`hf download someone/cat --revision v3 --cache"),
            (
                "someone/cat",
                {"subfolder": "none"},
                "someone/cat on the Hub: .*contains no GraLoRA adapter",
            ),
            (
                "someone/cat",
                {"weight_name": "no.safetensors"},
                "on the Hub: .*contains no file named no.saf",
            ),
        ],
    )
    def test_what_is_not_there(self, cache, repository, options, text):
        with pytest.raises(AdapterFileError, match=text):
            read_adapter(repository, cache_dir=cache, **options)
