"""The code of a model card, run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def draw_by_card(card: str, places: Mapping[str, Path]) -> Any:
    """Run the code of a card; returns its pipeline.

    Args:
        places: what the card calls a place -> where that is here.
    """
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for shown, path in places.items():
        assert f'"{shown}"' in code
        code = code.replace(f'"{shown}"', f'"{path}"')
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert isinstance(namespace["image"], Image.Image)
    return namespace["pipe"]
