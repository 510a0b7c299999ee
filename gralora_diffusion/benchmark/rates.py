"""Several learning rates per method, so that methods are compared along curves.

At one learning rate, a comparison also compares sizes of steps. A GraLoRA's update starts out as a
LoRA's does, but its factors then align within blocks only, and the norm of its update grows about
sqrt(k) times slower. A LoRA of a higher rank takes larger steps. The rates of a method are
therefore those of the first one, scaled by sqrt(k) and by sqrt(first rank / rank). The latter does
for the rate what a rank-stabilized alpha does for the scaling (D. Kalajdzievski, arXiv 2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from gralora_diffusion.io.errors import ConfigError

from .methods import Method

AUTO = "auto"
#: ``auto``: the learning rate times these, which makes the range of a curve.
AUTO_FACTORS = (0.5, math.sqrt(0.5), 1.0, math.sqrt(2))
_KINDS = ("lora", "dora", "gralora")


def rate_factor(method: Method, first_rank: int) -> float:
    """Return by how much a method's rates differ from those of a LoRA of the first rank."""
    if method.kind not in _KINDS:
        return 1.0
    return math.sqrt(method.k * first_rank / (method.rank + method.hybrid_rank))


def base_rates(rates: Sequence[str], learning_rate: float | None) -> list[float]:
    """Return the rates of a LoRA of the first method's rank.

    Raises:
        ValueError: a rate is not a positive number, or ``auto`` has no learning rate to start from.
    """
    if list(rates) == [AUTO]:
        if learning_rate is None:
            raise ValueError("auto needs --learning_rate, around which the rates lie")
        return [learning_rate * factor for factor in AUTO_FACTORS]
    found = []
    for text in rates:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf):
            raise ValueError(f"{text!r} is neither auto alone nor a positive number")
        found.append(value)
    return found


def at_rates(
    methods: Sequence[str], rates: Sequence[str], learning_rate: float | None
) -> list[str]:
    """Return the names of the methods at each of their rates, to two significant digits.

    ``base``, ``full`` and methods with a rate of their own are returned as they are.

    Raises:
        ConfigError: a name is not a method's.
        ValueError: as ``base_rates``.
    """
    values = base_rates(rates, learning_rate)
    parsed = [Method.parse(name) for name in methods]
    ranks = [method.rank + method.hybrid_rank for method in parsed if method.kind in _KINDS]
    names = []
    for method in parsed:
        if method.learning_rate or method.kind in ("base", "full"):
            names.append(method.name)
            continue
        factor = rate_factor(method, ranks[0] if ranks else 1)
        names += [replace(method, learning_rate=_written(factor * v)).name for v in values]
    return list(dict.fromkeys(names))


def rate_problems(
    methods: Sequence[str], rates: Sequence[str], learning_rate: float | None
) -> list[str]:
    """Return why the methods cannot be trained at these rates; wrong names are not among it."""
    try:
        at_rates(methods, rates, learning_rate)
    except ConfigError:
        return []
    except ValueError as error:
        return [f"--rates: {error}"]
    return []


def _written(rate: float) -> str:
    """Two significant digits, as a method's name has them: 2.1e-3."""
    digits, _, power = f"{rate:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"
