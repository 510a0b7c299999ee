"""The settings and versions of the trials, and where they differ."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gralora_diffusion.benchmark.evaluation.results import TrialResult


@dataclass(frozen=True)
class Provenance:
    """Values as text.

    Attributes:
        common: setting -> its value in all trials.
        by_method: setting -> method -> its value in all trials of this method.
        by_place: settings that depend only on protocol, subject and seed.
        versions: program -> versions, with the number of trials of each if there are several.
        warnings: why trials may not be comparable.
    """

    common: dict[str, str]
    by_method: dict[str, dict[str, str]]
    by_place: list[str]
    versions: dict[str, str]
    warnings: list[str]


def provenance_of(results: Sequence[TrialResult]) -> Provenance:
    """Sort settings into those that all trials share and those that differ, and how."""
    flat = [_flat(result.settings) for result in results]
    common: dict[str, str] = {}
    by_method: dict[str, dict[str, str]] = {}
    by_place, warnings = [], []
    for name in sorted({name for settings in flat for name in settings}):
        values = [settings.get(name, "not set") for settings in flat]
        methods, places = defaultdict(set), defaultdict(set)
        for result, value in zip(results, values, strict=True):
            methods[result.method].add(value)
            places[result.protocol, result.subject, result.seed].add(value)
        if len(set(values)) == 1:
            common[name] = values[0]
        elif all(len(found) == 1 for found in methods.values()):
            by_method[name] = {method: min(found) for method, found in methods.items()}
        elif all(len(found) == 1 for found in places.values()) or len(set(values)) == len(values):
            by_place.append(name)
        else:
            mixed = [method for method, found in methods.items() if len(found) > 1]
            warnings.append(
                f"The setting {name} varies within {', '.join(mixed)}: {_counted(values)}."
            )
    versions = {}
    for name in sorted({name for result in results for name in result.versions}):
        found = [result.versions.get(name, "not recorded") for result in results]
        versions[name] = _counted(found) if len(set(found)) > 1 else found[0]
        if len(set(found)) > 1:
            warnings.append(f"Not all trials used the same {name}: {versions[name]}.")
    return Provenance(common, by_method, by_place, versions, warnings)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of dotted names."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is None:  # a method without this setting, such as a rank
            flat[f"{prefix}{name}"] = "-"
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flat[f"{prefix}{name}"] = text
    return flat


def _counted(values: Sequence[str]) -> str:
    parts = [
        f"{value} in {count} {'trial' if count == 1 else 'trials'}"
        for value, count in Counter(values).most_common(5)
    ]
    return ", ".join(parts) + (", and others" if len(set(values)) > len(parts) else "")
