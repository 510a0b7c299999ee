"""Several learning rates per method, so that methods are compared along curves.

At one learning rate, a comparison also compares sizes of steps, which differ by construction. An
optimizer like Adam moves each parameter by about the rate, so the first step of a LoRA moves a
weight by about ``rate sqrt(out / 3) sqrt(rank)`` in Frobenius norm, because PEFT's initial A has
rows of norm sqrt(1/3). ``first_step`` has the last factor for each method, counted in the same way
for a layer whose weight has torch's initial scale. The rates of a method are those of a LoRA of the
first rank, divided by it. They are where a sweep begins, and not where a method is best.

GraLoRA's first step is a LoRA's, but its factors then align within blocks only, and the norm of its
update grows about sqrt(k) times slower; this was measured, and takes the place of the count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from gralora_diffusion.io.errors import ConfigError

from .methods import KINDS, Method

AUTO = "auto"
#: ``auto``: the learning rate times these, which makes the range of a curve.
AUTO_FACTORS = (0.5, math.sqrt(0.5), 1.0, math.sqrt(2))
#: Kinds whose rank is that of factors as LoRA has them.
_RANKED = ("lora", "dora", "gralora", "rslora", "loraplus", "scaledlora", "pissa")


def rate_factor(method: Method, first_rank: int) -> float:
    """Return by how much a method's rates differ from those of a LoRA of the first rank.

    Methods that are not counted have the same rates: LoHa and full fine-tuning.
    """
    step = first_step(method)
    return 1.0 if step is None else math.sqrt(first_rank) / step


def first_step(method: Method) -> float | None:
    """Return how far a step moves a weight, in units of ``rate sqrt(out / 3)``; None if unknown.

    A LoRA's is sqrt(rank). rsLoRA multiplies it by its scaling, and LoRA+ by its ratio. PiSSA moves
    both factors, whose initial norms are roots of the largest singular values, about 1. LoKr moves
    its first matrix, whose second one starts as a product. OFT and BOFT rotate the weight by twice
    the angles, with ``block_size - 1`` of them in each row.
    """
    m = method
    root = math.sqrt
    return {
        "lora": lambda: root(m.rank),
        "dora": lambda: root(m.rank),
        "scaledlora": lambda: root(m.rank),
        "gralora": lambda: root((m.rank + m.hybrid_rank) / m.k),
        "rslora": lambda: float(m.rank),
        "loraplus": lambda: m.ratio * root(m.rank),
        "pissa": lambda: root(6 * m.rank),
        "lokr": lambda: root(m.factor / 3),
        "oft": lambda: root(4 * (m.block_size - 1)),
        "boft": lambda: root(4 * m.butterflies * (m.block_size - 1) + 1),
    }.get(m.kind, lambda: None)()


def _titles(counted: bool) -> list[str]:
    """Return methods whose first step is counted and is not that of a LoRA of their rank.

    Args:
        counted: False for those whose step is not counted.
    """
    tried = {kind: first_step(Method(kind, 4, ratio=16, block_size=4)) for kind in KINDS}
    others = (kind for kind in KINDS if kind not in ("gralora", "full", "base"))
    if counted:
        return [KINDS[k].title for k in others if tried[k] not in (None, tried["lora"])]
    return [KINDS[kind].title for kind in others if tried[kind] is None]


#: For help texts.
COUNTED, UNCOUNTED = _titles(counted=True), _titles(counted=False)


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
    ranks = [method.rank + method.hybrid_rank for method in parsed if method.kind in _RANKED]
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
