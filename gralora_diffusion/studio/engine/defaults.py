"""The values that options have when they are left empty, where the base decides.

They are read from files on this machine, and nothing large is imported for them: a form is checked
whenever a field is left.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

from gralora_diffusion.base_models.folder import (
    PIPELINE_INDEX,
    native_side,
    read_json,
)
from gralora_diffusion.base_models.single_file_header import OriginalFile
from gralora_diffusion.families import (
    ModelFamily,
    find_pipeline_family,
    get_family,
    list_families,
)
from gralora_diffusion.training.config.training_config import TrainingConfig

from .form import all_fields


@cache
def decided_by_base() -> tuple[str, ...]:
    """Return the options for which a base or its family has values."""
    of_families = [get_family(name).training_defaults for name in list_families()]
    names = _filled(TrainingConfig()).keys() | {"resolution"}.union(*of_families)
    return tuple(f.name for f in all_fields() if f.name in names)


def base_defaults(config: TrainingConfig) -> dict[str, str]:
    """Return option -> its value as a text, for options that ``config`` leaves to the base.

    Options whose values are not known yet are left out: those of a base that is not on this
    machine, for example.
    """
    family, folder = _base(config)
    if family is None:
        return {}
    known = dict(family.training_defaults)
    side = native_side(folder, family) if folder else None
    if side is not None:
        known["resolution"] = side
    return {name: f"{value}" for name, value in _filled(config, known).items()}


def _filled(config: TrainingConfig, known: dict[str, object] | None = None) -> dict[str, object]:
    """Return option -> value, for options that have one only with the family's defaults."""
    full = config.with_defaults(known or {}).as_record()
    return {name: full[name] for name, value in config.as_record().items() if value != full[name]}


def _base(config: TrainingConfig) -> tuple[ModelFamily | None, Path | None]:
    """Return the family of the base, and its folder if it has one; None if it is not known."""
    chosen = get_family(config.family) if config.family in list_families() else None
    base = Path(config.pretrained_model_name_or_path).expanduser()
    try:
        if base.is_file():
            changed = base.stat().st_mtime_ns
            return chosen or _family_of_file(base, changed), None
        index = _index(config, base)
        if index is None:
            return chosen, None
        pipeline_class = str(read_json(index).get("_class_name"))
        return chosen or find_pipeline_family(pipeline_class), index.parent
    except (OSError, ValueError):  # a check of the form says so, or the run
        return chosen, None


def _index(config: TrainingConfig, base: Path) -> Path | None:
    """Return the pipeline's index, in its folder or in the Hub's cache."""
    name = config.pretrained_model_name_or_path
    if base.is_dir():
        return base / PIPELINE_INDEX
    if not name:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, PIPELINE_INDEX, config.cache_dir, config.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


@lru_cache(maxsize=16)
def _family_of_file(path: Path, changed: int) -> ModelFamily | None:
    del changed  # another content
    families = OriginalFile(path).families
    return families[0] if len(families) == 1 else None
