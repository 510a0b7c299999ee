"""What was found and what must be kept in mind, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from ..scores import Score
from ..statistics import Comparison, Estimate
from .content import Content, ProtocolContent

#: How far chance reaches, said once.
_CHANCE = (
    "{} differences have an interval. Where there is no difference at all, about one in twenty "
    "is still off zero by chance: look at all of them, not at the best one."
)


def headlines(protocol: ProtocolContent) -> list[str]:
    """One sentence per score and reference: who wins, who loses, of whom nothing can be told."""
    return [
        headline(content.score, reference, comparisons)
        for content in protocol.scores.values()
        for reference, comparisons in content.comparisons.items()
        if comparisons
    ]


def headline(score: Score, reference: str, comparisons: Mapping[str, Comparison]) -> str:
    """Say how the methods stand to the reference in this score."""
    by_verdict: dict[str, list[str]] = {}
    for method, comparison in comparisons.items():
        text = f"{method} ({difference_text(comparison.difference)})"
        by_verdict.setdefault(comparison.verdict, []).append(text)
    clauses = [
        f"{verdict} with {_listed(by_verdict[verdict])}"
        for verdict in ("better", "worse", "higher", "lower")
        if verdict in by_verdict
    ]
    parts = ["it is " + "; ".join(clauses)] if clauses else []
    if not clauses and "open" in by_verdict:
        parts.append("no method is seen to differ")
    if "open" in by_verdict:
        found = _listed(by_verdict["open"])
        parts.append(f"nothing can be told of {found}: the interval includes zero")
    if "too few" in by_verdict:
        found = _listed(by_verdict["too few"])
        parts.append(f"nothing can be told of {found}: there are too few units for an interval")
    alone = {c.difference.over for c in comparisons.values()} == {"seeds"}
    scope = " This holds for the subjects of this run only." if alone else ""
    return f"{score.label} ({direction(score)}), against {reference}: {'; '.join(parts)}.{scope}"


def cautions(content: Content) -> list[str]:
    """What a reader must know before he believes the numbers."""
    found = []
    total = len(content.units) + len(content.missing)
    if content.missing:
        found.append(f"{len(content.missing)} of {total} units are missing; see the end.")
    if content.unreadable:
        found.append(
            f"{len(content.unreadable)} result files could not be used and were left out; see the "
            "end."
        )
    if not content.units:
        return [*found, "There is no result yet."]
    if not content.references:
        found.append("There is no LoRA among the methods: nothing is compared.")
    for protocol in content.protocols:
        places: dict[str, set[tuple[str, int]]] = {}
        for unit in content.units:
            if unit.protocol == protocol.name:
                places.setdefault(unit.method, set()).add((unit.subject, unit.seed))
        if len(set(map(frozenset, places.values()))) > 1:
            found.append(
                f"Protocol {protocol.name}: not all methods have the same units. Their means are "
                "over different ones; the differences are over those that both have."
            )
        caveats: dict[str, None] = {}
        for score in protocol.scores.values():
            for comparisons in score.comparisons.values():
                caveats |= {c.difference.caveat: None for c in comparisons.values()}
            if not score.comparisons:
                caveats |= {mean.caveat: None for mean in score.means.values()}
        found += [f"Protocol {protocol.name}: {caveat}." for caveat in caveats if caveat]
        if unknown := [s.score.name for s in protocol.scores.values() if s.score.meaning == ""]:
            found.append(
                f"Protocol {protocol.name}: it is not known which way {', '.join(unknown)} is "
                "better; no method wins or loses there."
            )
    found += content.provenance.warnings
    if content.comparisons > 1:
        found.append(_CHANCE.format(content.comparisons))
    return found


def method_note(content: Content) -> str:
    """How means and intervals were computed."""
    return (
        "Mean: of the subjects' means, each over its seeds. Interval (95%): cluster bootstrap over "
        f"subjects, each with all of its seeds, {content.resamples:,} resamples, random seed "
        f"{content.bootstrap_seed} (Davison and Hinkley 1997, section 3.8; Field and Welsh 2007), "
        "percentiles expanded for small numbers (Hesterberg, arXiv 1411.5279). Difference: of "
        "units of the same subject and seed. Win rate: units in which the method is better, and half of "
        "those in which both are equal, of all that both have. A method is called better or worse "
        "if the interval of its difference does not include zero."
    )


def direction(score: Score) -> str:
    """Which way is better, in words."""
    if score.higher_is_better is None:
        return "it is not known which way is better"
    return "higher is better" if score.higher_is_better else "lower is better"


def difference_text(difference: Estimate) -> str:
    """A difference with its sign and interval."""
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
