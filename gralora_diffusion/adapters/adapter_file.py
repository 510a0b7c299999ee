"""The adapter file: its content, how it is read and written, and which files are refused.

One file holds the adapters of a pipeline, ``pytorch_gralora_weights.safetensors``:

* tensors named ``<component>.<module path>.gralora_A`` and so on, as PEFT names them, where the
  component is the attribute of the pipeline (``unet``, ``text_encoder``, ...);
* metadata ``gralora_adapter_metadata``: JSON with ``format_version``, ``family`` and
  ``components``, the config of each component. A file without it is refused, because alpha does
  not follow from the shapes.

PEFT's folder is read and written as well: ``adapter_config.json`` beside
``adapter_model.safetensors``, either directly (the adapter of one component) or in a sub-folder per
component.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import GraloraConfig as PeftGraloraConfig
from torch import Tensor, float32, promote_types

from gralora_diffusion.adapters.placement.layer_config import (
    PATTERNS,
    invalid_values,
    layer_settings,
    mistyped_values,
)
from gralora_diffusion.io.errors import AdapterFileError
from gralora_diffusion.io.file_names import (
    METADATA_KEY,
    PEFT_CONFIG_NAME,
    PEFT_PREFIX,
    PEFT_WEIGHTS_NAME,
    WEIGHTS_NAME,
    looks_like_hub_id,
    no_such,
)
from gralora_diffusion.io.hub import fetch
from gralora_diffusion.io.json_files import parse_object, read_object
from gralora_diffusion.io.tensor_files import read_safetensors, replacing, write_safetensors

from .config import GraloraConfig

FORMAT_VERSION = 1
#: Name of the only component of a PEFT folder, which does not record its component's name.
DENOISER = "denoiser"


@dataclass
class ComponentAdapter:
    """The adapter of one component: its config and its tensors by PEFT's key."""

    config: PeftGraloraConfig
    tensors: dict[str, Tensor]


@dataclass
class Adapter:
    """The adapters of a pipeline's components, and the family of base model they were trained for.

    ``metadata`` holds the file's other strings: ``modelspec.*``, ``ss_*``, ...
    """

    components: dict[str, ComponentAdapter]
    family: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "state dict"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors on the CPU, by the keys of the native file."""
        return {
            f"{component}.{key}": tensor.detach().to("cpu").contiguous()
            for component, part in self.components.items()
            for key, tensor in part.tensors.items()
        }


# -- writing ---------------------------------------------------------------------------------------


def save_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> Path:
    """Write the native file and return its path. It appears under its name once it is complete."""
    path = Path(path)
    parts = sorted(adapter.components.items())
    description = {
        "components": {name: config_to_dict(part.config) for name, part in parts},
        "family": adapter.family,
        "format_version": FORMAT_VERSION,
    }
    text = json.dumps(description, indent=2)
    metadata = {**adapter.metadata, "format": "pt", METADATA_KEY: text}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(adapter.tensors, path, metadata)
    return path


def save_peft_folders(adapter: Adapter, folder: str | os.PathLike[str]) -> list[Path]:
    """Write ``<folder>/<component>`` for ``PeftModel.from_pretrained``; return these folders.

    PEFT reads neither ``alpha_pattern`` nor ``exclude_modules`` of GraLoRA, so both are resolved:
    alphas are multiplied into B, and the layers are named one by one. With a ``rank_pattern`` or a
    ``k_pattern``, PEFT rejects the shapes whatever else the folder says; it is then written as it
    is, and this package reads it back.
    """
    folders = []
    for name, part in adapter.components.items():
        part = _for_peft(part)
        target = Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{PEFT_PREFIX}{k}": v.detach().cpu().contiguous() for k, v in part.tensors.items()
        }
        write_safetensors(tensors, target / PEFT_WEIGHTS_NAME, {"format": "pt"})
        text = json.dumps(config_to_dict(part.config), indent=2)
        with replacing(target / PEFT_CONFIG_NAME) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        folders.append(target)
    return folders


def _for_peft(part: ComponentAdapter) -> ComponentAdapter:
    """Return the same update without fields that PEFT's GraLoRA does not read."""
    ours: Any = part.config
    alphas, excluded = getattr(ours, "alpha_pattern", None), getattr(ours, "exclude_modules", None)
    shapes = getattr(ours, "rank_pattern", None) or getattr(ours, "k_pattern", None)
    if shapes or not (alphas or excluded):
        return part
    config, tensors = copy.deepcopy(ours), dict(part.tensors)
    paths = sorted({path for key in tensors if (path := key.partition(".gralora_")[0]) != key})
    if excluded:
        names = "|".join(re.escape(path) for path in paths)
        config.target_modules, config.exclude_modules = f"(?:{names})", None
    if alphas:
        # 1 if the config's own alpha is zero, so that B can include the alpha of any layer
        config.alpha, config.alpha_pattern = ours.alpha or 1, {}
        for key, tensor in tensors.items():
            path, _, factor = key.partition(".gralora_")
            if factor.startswith("B"):
                ratio = layer_settings(ours, path).alpha / config.alpha
                dtype = promote_types(tensor.dtype, float32)
                tensors[key] = (tensor.double() * ratio).to(dtype)
    return replace(part, config=config, tensors=tensors)


def config_to_dict(config: PeftGraloraConfig) -> dict[str, Any]:
    """Return the config as JSON-ready values, without the fields that describe a single machine.

    Everything is sorted except the patterns: the first one that matches counts.
    """
    values = config.to_dict()
    values.pop("runtime_config", None)
    values.update(base_model_name_or_path=None, inference_mode=True)
    for key, value in values.items():
        if isinstance(value, set):
            values[key] = sorted(value)
        elif isinstance(value, dict) and key not in PATTERNS:
            values[key] = dict(sorted(value.items()))
    return dict(sorted(values.items()))


def config_from_dict(values: Mapping[str, Any], where: str) -> GraloraConfig:
    """Rebuild a config. A field that this version does not know is refused, not dropped.

    Raises:
        AdapterFileError: the config is of another method, or has unknown, missing or invalid
            values.
    """
    if not isinstance(values, Mapping):
        raise AdapterFileError(f"{where}: the adapter's config is not a mapping but {values!r}.")
    kind = str(values.get("peft_type", "GRALORA")).split(".")[-1]
    if kind != "GRALORA":
        raise AdapterFileError(
            f"{where}: this is a {kind} adapter, not a GraLoRA adapter. Load a LoRA with "
            "`pipe.load_lora_weights(...)`."
        )
    known = set(GraloraConfig.__dataclass_fields__)
    if unknown := sorted(set(values) - known):
        raise AdapterFileError(
            f"{where}: the config has fields that this version does not know: "
            f"{', '.join(unknown)}. A newer version wrote it; upgrade gralora-diffusion (and peft)."
        )
    if missing := [name for name in ("r", "gralora_k", "alpha") if name not in values]:
        raise AdapterFileError(
            f"{where}: these fields are missing in the adapter's config: {', '.join(missing)}."
        )
    if not (problems := mistyped_values(values)):
        try:
            config = GraloraConfig(**{k: v for k, v in values.items() if k != "peft_type"})
            problems = invalid_values(config)
        except (TypeError, ValueError, ArithmeticError) as error:  # k may be 0
            problems = [str(error)]
    if problems:
        raise AdapterFileError(f"{where}: the adapter's config is not valid: {'; '.join(problems)}")
    return config


# -- reading ---------------------------------------------------------------------------------------


def read_adapter(
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub_options: Any,
) -> Adapter:
    """Read an adapter from a file, a folder, a PEFT folder or a Hub repository.

    Args:
        source: path, or repository id on the Hub.
        weight_name: file name in the folder or repository, if not ``WEIGHTS_NAME``.
        subfolder: folder inside the folder or repository.
        hub_options: for ``huggingface_hub.snapshot_download``: ``revision``, ``token``,
            ``cache_dir``, ``force_download``, ``local_files_only``.

    Raises:
        AdapterFileError: no adapter was found, or its file is not safetensors, is truncated or has
            no config.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path / subfolder if subfolder else path, weight_name)
    if not isinstance(source, str) or not looks_like_hub_id(source):
        raise AdapterFileError(f"{source}: {no_such(Path(source))}")
    return _read_from_hub(source, weight_name, subfolder, hub_options)


def _read_folder(folder: Path, weight_name: str | None) -> Adapter:
    if weight_name:
        if not (folder / weight_name).is_file():
            raise AdapterFileError(f"{folder}: this folder contains no file named {weight_name}.")
        return _read_file(folder / weight_name)
    if (folder / WEIGHTS_NAME).is_file():
        return _read_file(folder / WEIGHTS_NAME)
    if (folder / PEFT_CONFIG_NAME).is_file():
        return Adapter({DENOISER: _read_peft_folder(folder)}, source=str(folder))
    parts = {
        config.parent.name: _read_peft_folder(config.parent)
        for config in sorted(folder.glob(f"*/{PEFT_CONFIG_NAME}"))
    }
    if parts:
        return Adapter(parts, source=str(folder))
    raise AdapterFileError(
        f"{folder}: this folder contains no GraLoRA adapter. Expected {WEIGHTS_NAME}, a PEFT "
        f"folder ({PEFT_CONFIG_NAME} beside {PEFT_WEIGHTS_NAME}), or a PEFT folder for each "
        "component. If the file has another name, pass weight_name=..."
    )


def _read_from_hub(
    repository: str, weight_name: str | None, subfolder: str | None, options: Mapping[str, Any]
) -> Adapter:
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    peft_names = [f"{d}{n}" for d in ("", "*/") for n in (PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME)]
    try:
        for names in ([weight_name or WEIGHTS_NAME], peft_names):
            patterns = [inside + name for name in names]
            snapshot = fetch(repository, patterns, **options)
            if weight_name or any(any(snapshot.glob(pattern)) for pattern in patterns):
                break
    except OSError as error:
        raise AdapterFileError(f"{repository}: {error}") from error
    try:
        adapter = _read_folder(snapshot / inside, weight_name)
    except AdapterFileError as error:
        raise AdapterFileError(f"{repository} on the Hub: {error}") from error
    return replace(adapter, source=f"{repository}/{inside}".rstrip("/"))


def _read_peft_folder(folder: Path) -> ComponentAdapter:
    config_path = folder / PEFT_CONFIG_NAME
    weights_path = folder / PEFT_WEIGHTS_NAME
    if not weights_path.is_file():
        raise AdapterFileError(
            f"{folder}: this folder contains {PEFT_CONFIG_NAME} but no {PEFT_WEIGHTS_NAME}."
        )
    try:
        values = read_object(config_path)
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{config_path} cannot be read as JSON: {error}") from error
    config = config_from_dict(values, str(config_path))
    tensors, _ = read_safetensors(weights_path)
    return ComponentAdapter(config, {k.removeprefix(PEFT_PREFIX): v for k, v in tensors.items()})


def _read_file(path: Path) -> Adapter:
    tensors, metadata = read_safetensors(path)
    described = metadata.pop(METADATA_KEY, None)
    if described is None:
        raise AdapterFileError(_why_no_metadata(path, tensors))
    try:
        description = parse_object(described)
        version, configs = description["format_version"], description["components"]
        family = description.get("family")
        if not (isinstance(configs, dict) and isinstance(family, str | None)):
            raise ValueError("components must map names to configs, and family must be a string")
        if not configs:
            raise ValueError("components is empty, so the adapter has no weights")
    except (ValueError, KeyError) as error:
        raise AdapterFileError(f"{path}: metadata {METADATA_KEY} is damaged: {error!r}") from error
    if version != FORMAT_VERSION:
        raise AdapterFileError(
            f"{path}: the file has format_version {version}, but this version of "
            f"gralora-diffusion reads {FORMAT_VERSION}. Upgrade gralora-diffusion."
        )
    parts = {
        name: ComponentAdapter(config_from_dict(values, f"{path}, {name}"), {})
        for name, values in configs.items()
    }
    for key, tensor in tensors.items():
        component, _, rest = key.partition(".")
        if component not in parts:
            raise AdapterFileError(
                f"{path}: key {key!r} does not belong to any component in its metadata "
                f"({', '.join(parts)})."
            )
        parts[component].tensors[rest] = tensor
    metadata.pop("format", None)
    return Adapter(parts, family, metadata, str(path))


def _why_no_metadata(path: Path, tensors: Mapping[str, Tensor]) -> str:
    if not any("gralora_" in key for key in tensors):
        if any("lora_A" in key or "lora_down" in key or ".lora." in key for key in tensors):
            return (
                f"{path}: this is a LoRA file, not a GraLoRA file. Load it with "
                "`pipe.load_lora_weights(...)`, or convert it with `gralora import`."
            )
        first = next(iter(tensors), None)
        return f"{path}: this file contains no GraLoRA weights (first key: {first!r})."
    return (
        f"{path}: the file's metadata does not contain `{METADATA_KEY}`, and alpha does not follow "
        "from the shapes. Pass the state dict with its config: "
        "`pipe.load_gralora_weights(safetensors.torch.load_file(path), "
        "config=GraloraConfig(r=..., gralora_k=..., alpha=..., target_modules=[...]))`."
    )


def adapter_from_state_dict(
    state_dict: Mapping[str, Tensor],
    config: PeftGraloraConfig | Mapping[str, PeftGraloraConfig | Mapping[str, Any]] | None,
    component_names: tuple[str, ...],
) -> Adapter:
    """Make an :class:`Adapter` from tensors in memory and their config.

    Args:
        state_dict: keys that start with the component (``unet.``); the keys of a single component
            may leave it out.
        config: one config for every component, or a mapping from component to config.
        component_names: the pipeline's components; the first is the denoiser.

    Raises:
        AdapterFileError: a config is missing or invalid, or a value is not a tensor.
    """
    if config is None:
        raise AdapterFileError(
            "A state dict does not contain rank, k and alpha. Pass `config=GraloraConfig(...)`, "
            "or a mapping from component to config such as {'unet': GraloraConfig(...)}."
        )
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise AdapterFileError(f"{key!r} is not a tensor but a {type(tensor).__name__}.")
        bare = key.removeprefix(PEFT_PREFIX)
        component, _, rest = bare.partition(".")
        if component not in component_names:
            component, rest = component_names[0], bare
        tensors.setdefault(component, {})[rest] = tensor
    parts = {}
    for name, part in tensors.items():
        chosen = config.get(name) if isinstance(config, Mapping) else config
        if chosen is None:
            raise AdapterFileError(
                f"The state dict has weights for {name}, but `config` has no {name!r}."
            )
        if isinstance(chosen, Mapping):
            chosen = config_from_dict(chosen, f"config[{name!r}]")
        elif problems := invalid_values(chosen):
            raise AdapterFileError(f"The config for {name} is not valid: {'; '.join(problems)}")
        parts[name] = ComponentAdapter(chosen, part)
    return Adapter(parts)
