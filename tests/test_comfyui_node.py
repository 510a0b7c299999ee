"""What the ComfyUI node makes of a native file: pairs, names and refusals, without ComfyUI.

The names in NAMES were seen to be taken by ComfyUI 0.3.64, and to reach the right weights; those of
FLUX.2, which that version does not have, were read in the source of 0.38.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gralora_diffusion import get_family, inject
from gralora_diffusion.adapters.adapter_file import METADATA_KEY, WEIGHTS_NAME, read_adapter
from gralora_diffusion.adapters.layers import functional
from gralora_diffusion.adapters.placement import path_patterns
from gralora_diffusion.adapters.placement.layer_config import exact_pattern, layer_settings
from tests import ROOT, models
from tests.comfyui_node import conversion as node
from tests.reference import dense_update, relative_error
from tests.tiny import PIPELINES

FOLDER = ROOT / "samples/comfyui_gralora"

#: component, path -> what ComfyUI may call the layer
NAMES = [
    ("unet", "conv_in", ["lora_unet_conv_in"]),
    (
        "unet",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
        ["lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"],
    ),
    ("unet", "up_blocks.1.upsamplers.0.conv", ["lora_unet_up_blocks_1_upsamplers_0_conv"]),
    (
        "transformer",
        "transformer_blocks.0.attn.add_q_proj",
        ["transformer.transformer_blocks.0.attn.add_q_proj"],
    ),
    ("transformer", "norm_out.linear", ["transformer.norm_out.linear"]),
    (
        "transformer",
        "single_transformer_blocks.3.attn.to_qkv_mlp_proj",
        ["transformer.single_transformer_blocks.3.attn.to_qkv_mlp_proj"],
    ),
    (
        "transformer",
        "double_stream_modulation_img.linear",
        ["diffusion_model.double_stream_modulation_img.lin"],
    ),
    (
        "transformer",
        "time_guidance_embed.guidance_embedder.linear_2",
        ["diffusion_model.guidance_in.out_layer"],
    ),
    *(
        (
            "text_encoder",
            f"{level}encoder.layers.0.mlp.fc1",
            [
                "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
                "text_encoders.clip_h.transformer.text_model.encoder.layers.0.mlp.fc1",
            ],
        )
        for level in ("", "text_model.")
    ),
    (
        "text_encoder_2",
        "text_model.encoder.layers.2.self_attn.q_proj",
        ["text_encoders.clip_g.transformer.text_model.encoder.layers.2.self_attn.q_proj"],
    ),
    ("text_encoder_2", "text_projection", ["text_encoders.clip_g.transformer.text_projection"]),
    *(
        (
            component,
            "encoder.block.1.layer.0.SelfAttention.q",
            ["text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q"],
        )
        for component in ("text_encoder_2", "text_encoder_3")
    ),
    *(
        (
            "text_encoder",
            f"{start}layers.9.self_attn.q_proj",
            [
                f"text_encoders.{name}.transformer.model.layers.9.self_attn.q_proj"
                for name in ("mistral3_24b", "qwen3_4b", "qwen3_8b")
            ],
        )
        for start in ("model.", "model.language_model.")
    ),
]


#: What a third of the layers each have in place of r = 4, k = 2 and alpha = 6.
PATTERNS = {"rank_pattern": 8, "k_pattern": 1, "alpha_pattern": 1.5}


def adaptable(model: nn.Module) -> list[str]:
    """Paths of all layers whose widths two divides, but for what only sees images."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and not any(size % 2 for size in module.weight.shape[:2])
        and not any(part in path for part in ("vision_tower", "multi_modal", "lm_head"))
    ]


def save(family: str, folder: Path) -> Path:
    """An adapter on every layer of every model, hybrid in part, with ranks, k and alphas of their
    own; returns the file."""
    pipe = PIPELINES[family]()
    for number, component in enumerate(get_family(family).components):
        model = getattr(pipe, component)
        paths, hybrid_r = adaptable(model), 3 * (number % 2 == 0)
        patterns = {
            field: exact_pattern(dict.fromkeys(paths[start::3], value), paths)
            for start, (field, value) in enumerate(PATTERNS.items())
        }
        changes = {"r": 4, "gralora_k": 2, "alpha": 6, "hybrid_r": hybrid_r, **patterns}
        inject(model, models.config(paths, **changes))
    pipe.save_gralora_weights(folder)
    return folder / WEIGHTS_NAME


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return {family: save(family, tmp_path_factory.mktemp(family)) for family in PIPELINES}


@pytest.mark.parametrize("family", PIPELINES)
def test_every_layer_is_its_exact_pair(files, family):
    file, adapter = node.read_gralora(str(files[family])), read_adapter(files[family])
    assert file.family == family
    layers = {(layer.component, layer.path): layer for layer in file.layers}
    assert len(layers) == len(file.layers)
    for component, part in adapter.components.items():
        for key, A in part.tensors.items():
            if not key.endswith(".gralora_A"):
                continue
            path, hybrid = key.removesuffix(".gralora_A"), part.config.hybrid_r
            B, settings = part.tensors[f"{path}.gralora_B"], layer_settings(part.config, path)
            down, up = functional.lora_factors(A, B)
            update = dense_update(A, B)
            if hybrid:
                plain_down = part.tensors[f"{path}.gralora_A_general.weight"]
                plain_up = part.tensors[f"{path}.gralora_B_general.weight"].flatten(1)
                down, up = torch.cat([down, plain_down]), torch.cat([up, plain_up], 1)
                product = torch.einsum("or,ri...->oi...", plain_up.double(), plain_down.double())
                update += product
            scaling = settings.alpha / (settings.r + hybrid)
            layer = layers.pop((component, path))
            assert torch.equal(layer.down, down)
            assert torch.equal(layer.up.flatten(1), up * scaling)
            assert layer.up.shape[2:] == (1,) * (down.ndim - 2)
            # as ComfyUI applies it: matrices
            applied = layer.up.double().flatten(1) @ layer.down.double().flatten(1)
            assert relative_error(applied.reshape(update.shape), update * scaling) < 1e-6
    assert not layers


@pytest.mark.parametrize(("component", "path", "names"), NAMES)
def test_names(component, path, names):
    assert list(node.comfyui_names(component, path)) == names


@pytest.mark.parametrize("family", PIPELINES)
def test_no_two_layers_share_a_name_and_all_are_used(files, family):
    layers = node.read_gralora(str(files[family])).layers
    names = [node.comfyui_names(layer.component, layer.path)[0] for layer in layers]
    assert len(set(names)) == len(names)
    named = dict(zip(names, layers, strict=True))
    shapes = {f"{name}.weight": (len(x.up), *x.down.shape[1:]) for name, x in named.items()}
    lora = node.lora_for(layers, {name: f"{name}.weight" for name in names}, shapes)
    assert len(lora) == 3 * len(layers)
    for name, layer in named.items():
        assert torch.equal(lora[f"{name}.lora_up.weight"], layer.up)
        assert torch.equal(lora[f"{name}.lora_down.weight"], layer.down)
        # ComfyUI multiplies by alpha / rank
        assert lora[f"{name}.alpha"] == len(layer.down)


def layer(component: str = "transformer", path: str = "attn.to_q") -> object:
    return node.Layer(component, path, torch.ones(6, 2), torch.ones(2, 4))


class PackedLinear(nn.Linear):
    """Saves two of its values as one, as ComfyUI's layers in NVFP4 do."""

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        state = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        weight = state[f"{prefix}weight"]
        state[f"{prefix}weight"] = torch.zeros(len(weight), weight.shape[1] // 2, dtype=torch.uint8)
        state[f"{prefix}weight_scale"] = torch.ones(())
        return state


def test_a_model_whose_weights_are_packed_has_their_logical_shapes():
    model = nn.Sequential(PackedLinear(4, 6), nn.BatchNorm1d(6))
    assert model.state_dict()["0.weight"].shape == (6, 2)
    shapes = node.weight_shapes(model)
    assert shapes["0.weight"] == (6, 4)
    assert shapes["1.running_mean"] == (6,)
    assert shapes.keys() == nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).state_dict().keys()
    assert len(node.lora_for([layer()], {"transformer.attn.to_q": "0.weight"}, shapes)) == 3


def test_a_layer_that_is_some_rows_of_a_weight():
    targets = {"transformer.attn.to_q": ("qkv.weight", (0, 6, 6))}
    assert len(node.lora_for([layer()], targets, {"qkv.weight": (18, 4)})) == 3
    swapped = {"transformer.attn.to_q": ("mod.weight", None, lambda weight: weight)}
    assert len(node.lora_for([layer()], swapped, {"mod.weight": (6, 4)})) == 3
    with pytest.raises(node.GraloraError, match=r"\(18, 4\) in the model, \(6, 4\) in the file"):
        node.lora_for([layer()], swapped, {"mod.weight": (18, 4)})


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (
            "transformer",
            r"The model does not have 1 layers of this GraLoRA, such as transformer.attn.to_q",
        ),
        ("text_encoder_2", r"not loaded.*text_encoder_2; such as.*strength_clip to 0"),
    ],
)
def test_a_layer_that_the_model_misses_stops_it(component, message):
    with pytest.raises(node.GraloraError, match=message):
        node.lora_for([layer(component)], {"lora_unet_attn_to_q": "to_q.weight"}, {})


@pytest.mark.parametrize(
    ("family", "classes", "right"),
    [
        ("stable-diffusion", ["SD15", "BASE"], True),
        ("stable-diffusion", ["SD21UnclipL", "SD20", "BASE"], True),
        ("stable-diffusion-xl", ["SSD1B", "SDXL", "BASE"], True),
        ("stable-diffusion-3", ["SD3", "BASE"], True),
        ("flux", ["FluxSchnell", "Flux", "BASE"], True),
        ("flux2", ["Flux2", "Flux", "BASE"], True),
        ("flux2-klein", ["Flux2", "Flux", "BASE"], True),
        (None, ["Chroma", "BASE"], True),
        ("flux", ["Flux2", "Flux", "BASE"], False),
        ("flux", ["Chroma", "BASE"], False),
        ("stable-diffusion", ["SDXL", "BASE"], False),
    ],
)
def test_family(family, classes, right):
    file = node.GraloraFile((), family)
    if right:
        node.check_family(file, classes)
    else:
        with pytest.raises(
            node.GraloraError, match=f"family {family}, but the model is {classes[0]}"
        ):
            node.check_family(file, classes)


def test_every_family_of_the_package_is_known():
    assert {name for names in node.FAMILIES.values() for name in names} == set(PIPELINES)


def changed(path, tensors=None, description=None, metadata=None):
    """Write a file of one layer with the changes."""
    plain = {"unet.to_q.gralora_A": torch.ones(2, 3, 4), "unet.to_q.gralora_B": torch.ones(2, 4, 5)}
    config = {"r": 4, "gralora_k": 2, "alpha": 4, "hybrid_r": 0, "peft_type": "GRALORA"}
    said = {"components": {"unet": config}, "family": None, "format_version": 1}
    said = {**said, **(description or {})}
    text = {METADATA_KEY: json.dumps(said)} if metadata is None else metadata
    kept = {key: t for key, t in {**plain, **(tensors or {})}.items() if t is not None}
    save_file(kept, path, text)
    return str(path)


UNET = {"r": 4, "gralora_k": 2, "alpha": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {}}, "alpha is not known"),
        ({"metadata": {METADATA_KEY: "{"}}, "damaged"),
        ({"description": {"components": {"unet": {"r": 4}}}}, "damaged: KeyError"),
        ({"description": {"format_version": 2}}, "format_version 2"),
        ({"description": {"components": {"unet": {**UNET, "peft_type": "LORA"}}}}, "kind, LORA"),
        ({"description": {"components": {"transformer": UNET}}}, "does not describe unet"),
        ({"description": {"components": {"unet": {**UNET, "gralora_k": 4}}}}, "k 4"),
        ({"description": {"components": {"unet": {**UNET, "r": 8}}}}, "rank 8"),
        ({"description": {"components": {"unet": {**UNET, "hybrid_r": 2}}}}, "must have"),
        (
            {"description": {"components": {"unet": {**UNET, "alpha": 10**400}}}},
            "damaged: Overflow",
        ),
        ({"description": {"components": {"unet": {**UNET, "r": 4.0}}}}, "rank 4.0.*no ranks"),
        ({"description": {"components": {"unet": {**UNET, "gralora_k": 0}}}}, "k 0.*no ranks"),
        ({"description": {"components": {"unet": {**UNET, "r": 20_000}}}}, "LoRA of rank 40,000"),
        ({"description": {"components": {"unet": {**UNET, "rank_pattern": [1]}}}}, "damaged: Attr"),
        (
            {"description": {"components": {"unet": {**UNET, "alpha_pattern": {"(a+)+\\b": 2}}}}},
            "not matched in bounded time",
        ),
        ({"tensors": {"unet.to_q.gralora_B": torch.ones(2, 4, 5).int()}}, "dtype torch.int32"),
        ({"tensors": {"unet.to_q.gralora_B": torch.ones(2, 4, 5, 1, 1, 1)}}, "and 6 axes"),
        ({"tensors": {"unet.to_q\x1b[2J.bias": torch.ones(1)}}, r"to_q\\x1b\[2J.bias"),
        ({"tensors": {"unet.to_q.bias": torch.ones(10)}}, "unet.to_q.bias.*gralora export"),
        ({"tensors": {"unet.to_q.gralora_B": None}}, "must have"),
        ({"tensors": {"unet.to_q.gralora_B": torch.ones(2, 2, 5)}}, "do not fit"),
        ({"tensors": {"unet.to_q.gralora_A": torch.full((2, 3, 4), torch.nan)}}, "NaN"),
        (
            {"tensors": {"unet.to_q.gralora_A": None, "unet.to_q.gralora_B": None}},
            "no layers",
        ),
    ],
)
def test_refused(tmp_path, changes, message):
    path = changed(tmp_path / "file.safetensors", **changes)
    with pytest.raises(node.GraloraError, match=message):
        node.read_gralora(path)


def test_a_general_pair_of_another_width_is_refused(tmp_path):
    pair = {
        "unet.to_q.gralora_A_general.weight": torch.ones(2, 8),
        "unet.to_q.gralora_B_general.weight": torch.ones(10, 2),
    }
    description = {"components": {"unet": {**UNET, "hybrid_r": 2}}}
    path = changed(tmp_path / "file.safetensors", pair, description)
    with pytest.raises(node.GraloraError, match="general pair"):
        node.read_gralora(path)
    down = pair["unet.to_q.gralora_A_general.weight"]
    flat = {**pair, "unet.to_q.gralora_A_general.weight": down.flatten()}
    with pytest.raises(node.GraloraError, match="general pair"):
        node.read_gralora(changed(tmp_path / "flat.safetensors", flat, description))
    pair["unet.to_q.gralora_A_general.weight"] = torch.ones(2, 6)
    changed(tmp_path / "file.safetensors", pair, description)
    assert node.read_gralora(path).layers[0].down.shape == (2 * 4 + 2, 6)


def test_other_and_damaged_files_are_refused(tmp_path, files):
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.to_q.lora_A.weight": torch.ones(2, 4)}, lora)
    with pytest.raises(node.GraloraError, match="Use the node Load LoRA for a LoRA"):
        node.read_gralora(str(lora))
    whole = files["flux"].read_bytes()
    lora.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(node.GraloraError, match="not a complete safetensors file"):
        node.read_gralora(str(lora))
    with pytest.raises(node.GraloraError, match="not a complete safetensors file"):
        node.read_gralora(str(tmp_path / "none.safetensors"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(node.GraloraError, match="not a regular file"):
        node.read_gralora(str(tmp_path / "pipe"))


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_fp8(fp8, tmp_path, files):
    text = _header(files["flux"])["__metadata__"]
    stored = {key: t.to(fp8) for key, t in load_file(files["flux"]).items()}
    save_file(stored, tmp_path / "fp8.safetensors", text)
    save_file({k: t.float() for k, t in stored.items()}, tmp_path / "fp32.safetensors", text)
    read, expected = (
        {(x.component, x.path): x for x in node.read_gralora(str(tmp_path / name)).layers}
        for name in ("fp8.safetensors", "fp32.safetensors")
    )
    assert read.keys() == expected.keys()
    for key, layer in expected.items():
        assert torch.equal(read[key].up, layer.up)
        assert torch.equal(read[key].down, layer.down)


def test_half_precision_factors_are_computed_with_in_single(tmp_path, files):
    adapter = read_adapter(files["flux"])
    halves = {key: t.half() for key, t in load_file(files["flux"]).items()}
    text = json.loads(_header(files["flux"])["__metadata__"][METADATA_KEY])
    save_file(halves, tmp_path / "half.safetensors", {METADATA_KEY: json.dumps(text)})
    layers = node.read_gralora(str(tmp_path / "half.safetensors")).layers
    assert len(layers) == sum(
        key.endswith("_A") for part in adapter.components.values() for key in part.tensors
    )
    assert all(x.up.dtype == x.down.dtype == torch.float32 for x in layers)


def _header(path: Path) -> dict:
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def test_the_folder_needs_nothing_but_torch_safetensors_and_comfyui(tmp_path, files):
    """Run where the package cannot be imported, nor what it stands on."""
    (folder := tmp_path / "node").mkdir()
    for name in ("conversion.py", "path_patterns.py"):
        shutil.copy(FOLDER / name, folder)
    blocked = ("gralora_diffusion", "peft", "diffusers", "transformers", "comfy")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from node import conversion\n"
        f"print(len(conversion.read_gralora({str(files['flux'])!r}).layers))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) == len(node.read_gralora(str(files["flux"])).layers)
    tree = ast.parse((FOLDER / "__init__.py").read_text(encoding="utf-8"))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported == {"os", "comfy.lora", "comfy.sd", "folder_paths"}
    categories = [
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CATEGORY"
    ]
    assert categories == ["model/loaders"]  # where ComfyUI 0.33 has its own


def test_its_matcher_of_paths_is_the_package_s():
    copy = FOLDER / "path_patterns.py"
    assert copy.read_bytes() == Path(path_patterns.__file__).read_bytes()


def test_a_pattern_that_would_keep_re_busy_for_years(tmp_path):
    """The automaton answers at once, with what ``re`` would say in the end."""
    pattern = {"([a-z_]+)+!": 100, "([a-z_.]+)+": 2}
    description = {"components": {"unet": {**UNET, "alpha_pattern": pattern}}}
    path = changed(tmp_path / "file.safetensors", description=description)
    (read,) = node.read_gralora(path).layers
    (plain,) = node.read_gralora(changed(tmp_path / "plain.safetensors")).layers
    assert torch.equal(read.up, plain.up / 2)


def test_the_workflow_names_the_node_and_its_inputs():
    workflow = json.loads((FOLDER / "workflow_api.json").read_text(encoding="utf-8"))
    inputs = [w["inputs"] for w in workflow.values() if w["class_type"] == "GraloraLoader"]
    expected = {"model", "clip", "gralora_name", "strength_model", "strength_clip"}
    assert [set(i) for i in inputs] == [expected]
    linked = [v for w in workflow.values() for v in w["inputs"].values() if isinstance(v, list)]
    assert all(source in workflow for source, _ in linked)
