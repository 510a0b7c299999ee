"""The metadata of an exported file for user interfaces: ``modelspec.*``, ``ss_*``, and its origin.

Sources: Stability AI's ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec); kohya's sd-scripts
(``library/sai_model_spec.py``, ``train_network.py``, ``networks/resize_lora.py``). Readers: SwarmUI
finds the class of a model in ``modelspec.architecture``, and AUTOMATIC1111 finds a LoRA's base in
``ss_base_model_version`` and ``ss_v2``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from safetensors.torch import save

from gralora_diffusion.adapters.adapter_file import Adapter
from gralora_diffusion.adapters.placement.layer_config import PATTERNS
from gralora_diffusion.families import ModelFamily, PublishedNames
from gralora_diffusion.io.file_names import SOURCE_KEY
from gralora_diffusion.io.tensor_files import HASH_FIELDS
from gralora_diffusion.lora_files.keys import DIFFUSERS_METADATA

from .choices import USER_FIELDS

Kind = Literal["checkpoint", "lora", "diff"]

#: Fields of its base's metadata that a fused file keeps: how to compute with it, and its license.
#: Title, date, author, hash and image describe another model.
_KEPT_OF_BASE = (
    *("architecture", "implementation", "implementation_version", "resolution", "license"),
    *("prediction_type", "encoder_layer", "timestep_range", "unet_dtype", "vae_dtype"),
    "predict_key",  # ComfyUI's name for prediction_type
)


def export_metadata(
    adapter: Adapter,
    *,
    kind: Kind,
    family: ModelFamily,
    original_names: bool = True,
    ranks: Mapping[str, int] = MappingProxyType({}),
    alpha: int | None = None,
    scale: float = 1.0,
    names: PublishedNames | None = None,
    base_metadata: Mapping[str, str] | None = None,
    base_name: str | None = None,
    made: Mapping[str, Any] | None = None,
    hashes: bool = True,
    **user_fields: str | None,
) -> dict[str, str]:
    """Return the metadata of a file that an adapter was exported to.

    The metadata of the adapter's own file is carried over and corrected for the new file. It does
    not depend on the time, so the same export gives the same bytes.

    Args:
        kind: a fused checkpoint, a LoRA, or a file of dense ``.diff`` updates.
        original_names: whether keys are those of the original layout or kohya's, not diffusers'.
        ranks: ranks of the LoRA's layers, by their names in the file.
        alpha: alpha of all layers.
        scale: the scale that is folded in.
        names: names of the base, if known; otherwise those of the adapter's file, or the family's.
        base_metadata: metadata of the single file that the adapter was fused into.
        base_name: name of that file, without a folder.
        made: further settings of the export, ready for JSON, such as ``{"energy": 0.95}``.
        hashes: reserve room for ``HASH_FIELDS``. They must be filled in, because readers trust
            them.
        user_fields: values for fields of ``choices.USER_FIELDS``; they override the adapter's.

    Raises:
        ValueError: a field is not in ``choices.USER_FIELDS``.
    """
    if unknown := sorted(set(user_fields) - set(USER_FIELDS)):
        raise ValueError(
            f"unknown metadata fields: {', '.join(unknown)}. Choose from {', '.join(USER_FIELDS)}"
        )
    carried = {k: v for k, v in adapter.metadata.items() if not _is_of_its_tensors(k)}
    names = names or _names_of(carried, family)
    fields = carried | names.fields
    if not original_names:
        fields["modelspec.implementation"] = "diffusers"
    fields.setdefault("modelspec.title", f"GraLoRA for {names.architecture}")
    network = {key: fields.pop(key) for key in list(fields) if key.startswith("ss_network_")}
    if kind == "checkpoint":
        fields.pop("modelspec.timestep_range", None)  # the adapter's: the base is for its own
        fields |= _of_base(base_metadata or {})
        base_title = (base_metadata or {}).get("modelspec.title", base_name)
        merged = [name for name in (base_title, carried.get("modelspec.title")) if name]
        if merged:
            fields["modelspec.merged_from"] = ", ".join(merged)
    else:
        fields["modelspec.architecture"] += "/lora"
        if dropout := network.get("ss_network_dropout"):
            fields["ss_network_dropout"] = dropout
        fields |= _lora_fields(names, ranks, alpha) if kind == "lora" else _DIFF_FIELDS
        if kind == "lora" and not original_names:
            fields[DIFFUSERS_METADATA] = diffusers_metadata(ranks)
    fields |= {
        f"modelspec.{name}": value for name, value in user_fields.items() if value is not None
    }
    source = {SOURCE_KEY: _source(adapter, scale, made or {})}
    return {**fields, **source, **(HASH_FIELDS if hashes else {})}


#: LyCORIS's description of a file of dense updates (``lycoris/modules/full.py``).
_DIFF_FIELDS = {
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": json.dumps({"algo": "full"}),
}


def _lora_fields(
    names: PublishedNames, ranks: Mapping[str, int], alpha: int | None
) -> dict[str, str]:
    different = set(ranks.values())
    rank = different.pop() if len(different) == 1 else None
    return {
        "ss_network_module": names.lora_module,
        "ss_network_dim": "Dynamic" if rank is None else str(rank),
        "ss_network_alpha": str(float(alpha or 0)),
        "ss_network_args": "{}",
    }


def diffusers_metadata(ranks: Mapping[str, int]) -> str:
    """Return PEFT's config of each component as ``save_lora_weights`` of diffusers writes it.

    Without it, diffusers before 0.42 uses one alpha for layers of every rank, and all versions
    guess the rank of a text projection.

    Args:
        ranks: ranks by component and path, in diffusers' names. The alpha of a layer is its rank.
    """
    components: dict[str, dict[str, int]] = {}
    for name, rank in ranks.items():
        component, _, path = name.partition(".")
        components.setdefault(component, {})[path] = rank
    config: dict[str, Any] = {}
    for component, layers in components.items():
        usual = Counter(layers.values()).most_common(1)[0][0]
        is_text = component.startswith("text_encoder")
        # transformers 5 has no such level in some encoders, so the end of a path is used there
        paths = {path: path.removeprefix("text_model.") if is_text else path for path in layers}
        others = {
            paths[path] if is_text else f"^{path}": rank
            for path, rank in layers.items()
            if rank != usual
        }
        fields = {
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted(paths.values()),
        }
        config |= {f"{component}.{field}": value for field, value in fields.items()}
    return json.dumps(config, sort_keys=True)


def _names_of(carried: Mapping[str, str], family: ModelFamily) -> PublishedNames:
    """Return the names in an adapter's own file, completed from the family."""
    general = family.published_names()
    return PublishedNames(
        carried.get("modelspec.architecture", general.architecture).partition("/")[0],
        carried.get("ss_base_model_version", general.version),
        general.implementation,
        general.lora_module,
        carried["ss_v2"] == "True" if "ss_v2" in carried else general.is_v2,
    )


def _of_base(metadata: Mapping[str, str]) -> dict[str, str]:
    keys = [f"modelspec.{name}" for name in _KEPT_OF_BASE]
    return {key: metadata[key] for key in keys if key in metadata}


def _is_of_its_tensors(key: str) -> bool:
    """Whether a field describes the tensors of its own file."""
    names = (SOURCE_KEY, DIFFUSERS_METADATA, "_quantization_metadata")
    return key in names or key.startswith(("modelspec.hash_", "sshs_"))


def _source(adapter: Adapter, scale: float, made: Mapping[str, Any]) -> str:
    """Return JSON with the identity and settings of the adapter, and the settings of the export."""
    components = {}
    for name, part in sorted(adapter.components.items()):
        fields = ("r", "gralora_k", "alpha", "hybrid_r", *PATTERNS)
        values = {field: getattr(part.config, field, None) for field in fields}
        components[name] = {k: v for k, v in values.items() if v or k not in PATTERNS}
    source = {
        "adapter": {"family": adapter.family, "hash_sha256": adapter_hash(adapter)},
        "components": components,
        "scale": scale,
        **made,
    }
    return json.dumps(source, ensure_ascii=False)


def adapter_hash(adapter: Adapter) -> str:
    """Return ``modelspec.hash_sha256`` of the native file that ``save_adapter`` would write."""
    data = save(adapter.tensors)
    return "0x" + hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
