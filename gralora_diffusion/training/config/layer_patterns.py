"""Rank, k and alpha of single layers, given as options of the form REGEX=VALUE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gralora_diffusion.adapters.placement.layer_config import PATTERNS, pattern_problem

from .options import AdapterOptions

#: Option, and field of GraloraConfig -> kind of its values.
KINDS: dict[str, type[int] | type[float]] = {
    name: float if name == "alpha_pattern" else int for name in PATTERNS
}


def given_patterns(options: AdapterOptions) -> dict[str, dict[str, Any]]:
    """Return option -> regular expression -> value, as the user gave them."""
    return {
        name: {
            regex: kind(value)
            for regex, _, value in (text.rpartition("=") for text in getattr(options, name) or ())
        }
        for name, kind in KINDS.items()
    }


def layer_patterns(options: AdapterOptions) -> dict[str, dict[str, Any]]:
    """Return the patterns for ``GraloraConfig``.

    Without ``lora_alpha`` the scaling is 1, so layers of another rank get another alpha, too.
    """
    patterns = given_patterns(options)
    if options.lora_alpha is None:
        for regex, rank in patterns["rank_pattern"].items():
            patterns["alpha_pattern"].setdefault(regex, rank + options.hybrid_rank)
    return patterns


def check_patterns(options: AdapterOptions) -> Iterator[str]:
    read: dict[str, dict[str, float]] = {}
    for name in KINDS:
        read[name] = {}
        for text in getattr(options, name) or ():
            regex, _, value = text.rpartition("=")
            if problem := _problem(name, text):
                yield f"--{name} contains {text!r}: {problem}"
            elif regex in read[name]:
                yield f"--{name} contains {regex!r} twice. Keep one of them"
            else:
                read[name][regex] = KINDS[name](value)
    if options.rank >= 1 and options.gralora_k >= 1:
        yield from _indivisible(options, read["rank_pattern"], read["k_pattern"])


def _problem(name: str, text: str) -> str | None:
    regex, _, value = text.rpartition("=")
    if not regex:
        return (
            "it must be REGEX=VALUE, where REGEX matches the end of a layer's path and VALUE is a "
            "number, such as 'attn1\\.to_q=8'"
        )
    if problem := pattern_problem(regex):
        return f"{regex!r} is {problem}"
    whole = KINDS[name] is int
    try:
        number = KINDS[name](value)
        fits = number >= 1 if whole else 0 < number < float("inf")
    except ValueError:
        fits = False
    if not fits:
        wanted = "a whole number of at least 1" if whole else "a number above 0"
        return f"{value!r} must be {wanted}"
    return None


def _indivisible(
    options: AdapterOptions, ranks: Mapping[str, float], ks: Mapping[str, float]
) -> Iterator[str]:
    """Report ranks that no k for the same layers divides, and ks that divide no rank there."""
    for regex, rank in ranks.items():
        possible = _possible(regex, ks, options.gralora_k)
        if all(rank % k for k in possible):
            yield (
                f"--rank_pattern contains '{regex}={rank}', and {_names('k', possible)} for these "
                "layers; k must divide the rank. Give another rank, or use --k_pattern "
                f"'{regex}=...' to give these layers a k that divides {rank}"
            )
    for regex, k in ks.items():
        possible = _possible(regex, ranks, options.rank)
        if regex not in ranks and all(rank % k for rank in possible):
            yield (
                f"--k_pattern contains '{regex}={k}', and {_names('the rank', possible)} for these "
                "layers; k must divide the rank. Give another k, or use --rank_pattern "
                f"'{regex}=...' to give these layers a rank that {k} divides"
            )


def _possible(regex: str, values: Mapping[str, float], otherwise: int) -> list[float]:
    """Return the values that may apply to layers that match. Their paths are not known yet."""
    if next(iter(values), None) == regex:  # the first match applies
        return [values[regex]]
    return list(dict.fromkeys([otherwise, *values.values()]))


def _names(what: str, values: list[float]) -> str:
    return f"{what} is {' or '.join(map(str, values))}"
