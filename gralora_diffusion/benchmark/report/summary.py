"""The findings and their caveats, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gralora_diffusion.benchmark.evaluation.scores import Score
from gralora_diffusion.benchmark.evaluation.statistics import Comparison, Estimate

from .report_data import ProtocolData, ReportData

#: Verdicts in the order in which they are reported.
_VERDICTS = {
    "better": "Better",
    "worse": "Worse",
    "higher": "Higher",
    "lower": "Lower",
    "open": "Inconclusive (the interval includes zero)",
    "too few": "Inconclusive (too few trials for an interval)",
}
#: How far chance reaches.
_CHANCE = (
    "{} differences have an interval. Even without any real difference, about one interval in "
    "twenty excludes zero by chance. Look at all of them, not only at the best one."
)


@dataclass(frozen=True)
class Headline:
    """How methods compare with one reference in one score."""

    about: str
    findings: list[str]

    def __str__(self) -> str:
        return f"{self.about}. {' '.join(self.findings)}"


def headlines(protocol: ProtocolData) -> list[Headline]:
    """One per score and reference: which methods are better, worse, or inconclusive."""
    return [
        headline(content.score, reference, comparisons)
        for content in protocol.scores.values()
        for reference, comparisons in content.comparisons.items()
        if comparisons
    ]


def headline(score: Score, reference: str, comparisons: Mapping[str, Comparison]) -> Headline:
    """Say how the methods compare with the reference in this score."""
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
        findings.append("This holds only for the subjects in this run.")
    return Headline(f"{score.label} compared with {reference} ({direction(score)})", findings)


def cautions(content: ReportData) -> list[str]:
    """What a reader must know before trusting the numbers."""
    found = []
    total = len(content.trials) + len(content.missing)
    if content.missing:
        found.append(f"Missing trials are listed at the end: {len(content.missing)} of {total}.")
    if content.unreadable:
        found.append(f"Unusable results are listed at the end: {len(content.unreadable)}.")
    if not content.trials:
        return [*found, "There are no results yet."]
    if not content.references:
        found.append("None of the methods is LoRA, so nothing is compared.")
    for protocol in content.protocols:
        places: dict[str, set[tuple[str, int]]] = {}
        for trial in content.trials:
            if trial.protocol == protocol.name:
                places.setdefault(trial.method, set()).add((trial.subject, trial.seed))
        if len(set(map(frozenset, places.values()))) > 1:
            found.append(
                f"Protocol {protocol.name}: the methods do not all have the same trials. A mean is "
                "over all trials of its method. A difference is over the trials that both have."
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
                f"Protocol {protocol.name}: no method wins or loses on {', '.join(unknown)}, "
                "because the benchmark does not know which direction is better."
            )
        for method, costs in protocol.methods.items():
            if costs.lowered_k:
                some = " and ".join(f"{k} in {n:,}" for k, n in costs.lowered_k.items())
                found.append(
                    f"{method}: k is {some} of {costs.layers:,} layers, because their widths allow "
                    "no larger one."
                )
    found += content.provenance.warnings
    if content.comparisons > 1:
        found.append(_CHANCE.format(content.comparisons))
    return found


def method_note(content: ReportData) -> str:
    """How means and intervals were computed."""
    return (
        "A method's mean is the mean of its subjects' means, and a subject's mean is over its "
        "seeds. The 95% intervals come from a cluster bootstrap over subjects, each with all of "
        f"its seeds, with {content.resamples:,} resamples and random seed {content.bootstrap_seed} "
        "(Davison and Hinkley 1997, section 3.8; Field and Welsh 2007). Their percentiles are "
        "expanded for small samples (Hesterberg, arXiv 1411.5279). A difference is between trials "
        "of the same subject and seed. The win rate is the share of these pairs in which the "
        "method is better; ties count half. A method is called better or worse if the interval "
        "of its difference excludes zero."
    )


def direction(score: Score) -> str:
    """Which direction is better, in words."""
    if score.higher_is_better is None:
        return "better direction unknown"
    return "higher is better" if score.higher_is_better else "lower is better"


def difference_text(difference: Estimate) -> str:
    """A difference with its sign and interval."""
    if difference.low is None or difference.high is None:
        return signed(difference.mean)
    low, high = signed(difference.low), signed(difference.high)
    return f"{signed(difference.mean)} [{low}, {high}]"


def signed(value: float) -> str:
    """Four decimals, or more if a value close to zero would be shown as zero."""
    return f"{value:+.4f}" if value == 0 or abs(value) >= 5e-5 else f"{value:+.1e}"
