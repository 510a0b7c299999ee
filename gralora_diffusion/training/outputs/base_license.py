"""The license of a base, as the base's own model card states it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from gralora_diffusion.base_models.options import BaseModelOptions
from gralora_diffusion.io.hub import fetch
from gralora_diffusion.io.regular_files import read_regular
from gralora_diffusion.io.yaml_files import compose

_CARD = "README.md"
#: As the Hub finds it (``REGEX_YAML_BLOCK`` of huggingface_hub).
_FRONT_MATTER = re.compile(r"\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:[\r\n]|$)")
#: Bytes of a card at most.
_MOST_BYTES = 1 << 20
#: The Hub's identifiers, such as creativeml-openrail-m, and the names that go with ``other``.
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}")
_ADDRESS = re.compile(r"https://[!-~]{1,500}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def base_license(options: BaseModelOptions) -> dict[str, str]:
    """Return the license of the base for a model card's metadata; empty if it is not known.

    The base's card is in its folder, or is fetched from the Hub. Nothing is claimed if there is no
    card, or if the Hub cannot be asked. A single file has no card.

    Returns:
        ``license``, and ``license_name`` and ``license_link`` where the card has them.
    """
    base = Path(options.pretrained_model_name_or_path)
    if base.is_file():
        return {}
    on_hub = not base.exists()
    try:
        folder = base
        if on_hub:
            versions = {"revision": options.revision, "cache_dir": options.cache_dir}
            folder = fetch(options.pretrained_model_name_or_path, [_CARD], **versions)
        card = read_regular(folder / _CARD, _MOST_BYTES).decode("utf-8-sig")
        stated = _front_matter(card)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return _license_in(stated, options.pretrained_model_name_or_path if on_hub else None)


def _front_matter(card: str) -> dict[str, str]:
    """Return the texts in the YAML that a card begins with; other values are left out.

    Raises:
        ValueError, yaml.YAMLError: it is not YAML, or exceeds the limits of ``io.yaml_files``.
    """
    found = _FRONT_MATTER.match(card)
    root = compose(found[1]) if found else None
    return {
        key.value: value.value
        for key, value in (root.value if isinstance(root, yaml.MappingNode) else ())
        if isinstance(key, yaml.ScalarNode) and value.tag == "tag:yaml.org,2002:str"
    }


def _license_in(stated: Mapping[str, str], repository: str | None) -> dict[str, str]:
    """Return the fields of a license whose values are what they should be."""
    if not _matches(_IDENTIFIER, stated.get("license")):
        return {}
    found = {"license": stated["license"]}
    if _matches(_NAME, stated.get("license_name")):
        found["license_name"] = stated["license_name"]
    link = stated.get("license_link", "")
    if _matches(_ADDRESS, link):
        found["license_link"] = link
    elif repository and _matches(_FILE, link):
        found["license_link"] = f"https://huggingface.co/{repository}/blob/main/{link}"
    return found


def _matches(form: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and form.fullmatch(value) is not None
