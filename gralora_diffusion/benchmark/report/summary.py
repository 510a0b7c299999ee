"""What was found and what must be kept in mind, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gralora_diffusion.benchmark.evaluation.scores import Score
from gralora_diffusion.benchmark.evaluation.statistics import Comparison, Estimate

from .report_data import ProtocolData, ReportData

#: Verdicts in the order in which they are told.
_VERDICTS = {
    "better": "Better",
    "worse": "Worse",
    "higher": "Higher",
    "lower": "Lower",
    "open": "Nothing can be told, the interval includes zero",
    "too few": "Nothing can be told, there are too few units for an interval",
}
#: How far chance reaches, said once.
_CHANCE = (
    "{} differences have an interval. Where there is no difference at all, about one in twenty "
    "is still off zero by chance: look at all of them, not at the best one."
)


@dataclass(frozen=True)
class Headline:
    """What was found in one score against one reference: who wins and who loses."""

    about: str
    findings: list[str]

    def __str__(self) -> str:
        return f"{self.about}. {' '.join(self.findings)}"


def headlines(protocol: ProtocolData) -> list[Headline]:
    """One per score and reference: who wins, who loses, of whom nothing can be told."""
    return [
        headline(content.score, reference, comparisons)
        for content in protocol.scores.values()
        for reference, comparisons in content.comparisons.items()
        if comparisons
    ]


def headline(score: Score, reference: str, comparisons: Mapping[str, Comparison]) -> Headline:
    """Say how the methods stand to the reference in this score."""
    by_verdict: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
    for method, comparison in comparisons.items():
        text = f"{method} ({difference_text(comparison.difference)})"
        by_verdict[comparison.verdict].append(text)
    always = () if score.higher_is_better is None else ("better", "worse")
    findings = [
        f"{_VERDICTS[verdict]}: {', '.join(found) or 'none'}."
        for verdict, found in by_verdict.items()
        if found or verdict in always
    ]
    if {c.difference.over for c in comparisons.values()} == {"seeds"}:
        findings.append("This holds for the subjects of this run only.")
    return Headline(f"{score.label}, against {reference} ({direction(score)})", findings)


def cautions(content: ReportData) -> list[str]:
    """What a reader must know before he believes the numbers."""
    found = []
    total = len(content.trials) + len(content.missing)
    if content.missing:
        found.append(f"{len(content.missing)} of {total} units are missing; see the end.")
    if content.unreadable:
        found.append(
            f"{len(content.unreadable)} result files could not be used and were left out; see the "
            "end."
        )
    if not content.trials:
        return [*found, "There is no result yet."]
    if not content.references:
        found.append("There is no LoRA among the methods: nothing is compared.")
    for protocol in content.protocols:
        places: dict[str, set[tuple[str, int]]] = {}
        for trial in content.trials:
            if trial.protocol == protocol.name:
                places.setdefault(trial.method, set()).add((trial.subject, trial.seed))
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
        for method, costs in protocol.methods.items():
            if costs.lowered_k:
                some = " and ".join(f"k {k} in {n:,}" for k, n in costs.lowered_k.items())
                found.append(f"{method}: {some} of {costs.layers:,} layers, for their widths.")
    found += content.provenance.warnings
    if content.comparisons > 1:
        found.append(_CHANCE.format(content.comparisons))
    return found


def method_note(content: ReportData) -> str:
    """How means and intervals were computed."""
    return (
        "Mean: of the subjects' means, each over its seeds. Interval (95%): cluster bootstrap over "
        f"subjects, each with all of its seeds, {content.resamples:,} resamples, random seed "
        f"{content.bootstrap_seed} (Davison and Hinkley 1997, section 3.8; Field and Welsh 2007), "
        "percentiles expanded for small numbers (Hesterberg, arXiv 1411.5279). Difference: of "
        "units of the same subject and seed. Win rate: units in which the method is better, and "
        "half of those in which both are equal, of all that both have. A method is called better "
        "or worse if the interval of its difference does not include zero."
    )


def direction(score: Score) -> str:
    """Which way is better, in words."""
    if score.higher_is_better is None:
        return "it is not known which way is better"
    return "higher is better" if score.higher_is_better else "lower is better"


def difference_text(difference: Estimate) -> str:
    """A difference with its sign and interval."""
    if difference.low is None or difference.high is None:
        return signed(difference.mean)
    low, high = signed(difference.low), signed(difference.high)
    return f"{signed(difference.mean)} [{low}, {high}]"


def signed(value: float) -> str:
    """Four decimals; more where a value beside zero would look like zero."""
    return f"{value:+.4f}" if value == 0 or abs(value) >= 5e-5 else f"{value:+.1e}"
