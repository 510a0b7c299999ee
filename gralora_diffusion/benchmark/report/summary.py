"""The verdict and its limits, in sentences. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from gralora_diffusion.benchmark.evaluation.endpoint import UPDATE_NORM, Endpoint
from gralora_diffusion.benchmark.evaluation.scores import Score, score_named
from gralora_diffusion.benchmark.evaluation.statistics import Decision, Estimate

from .report_data import ProtocolData, ReportData

_NOTHING_DECLARED = "No comparison was declared before this run. All differences are exploratory."
_EXPLORATORY = (
    "These differences are exploratory: they were not declared before the run. Their intervals are "
    "not corrected for their number, so about one in twenty excludes zero by chance."
)


@dataclass(frozen=True)
class Verdict:
    """What a declared comparison decided.

    Attributes:
        kind: "better", "worse", "inconclusive", "too few" or "none".
        answer: who won, in a few words.
        evidence: by how much, and how sure.
    """

    kind: str
    answer: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.answer} {self.evidence}".strip()


def verdicts(protocol: ProtocolData, content: ReportData) -> list[Verdict]:
    """One for each declared comparison; one that says so if nothing was declared or can be."""
    declared = content.declared
    if declared is None or not declared.comparisons:
        return [Verdict("none", "No verdict.", _NOTHING_DECLARED)]
    what = endpoint_label(declared.endpoint)
    known = [_verdict(one, what, len(protocol.decisions)) for one in protocol.decisions]
    return known + [
        Verdict(
            "too few",
            f"{method} against {reference}: no verdict.",
            f"{_capital(what)} cannot be compared, because no subject has trials of "
            f"both{' whose curves overlap' if declared.endpoint.along else ''}.",
        )
        for method, reference in protocol.undecided
    ]


def _verdict(decision: Decision, what: str, count: int) -> Verdict:
    d, method, reference = decision.difference, decision.method, decision.reference
    over = f"{d.subjects} subjects" if d.over == "subjects" else f"{d.seeds} seeds of one subject"
    if d.low is None or d.high is None:
        evidence = f"{what}: {signed(d.mean, 3)}, without an interval."
        answer = f"{method} against {reference}: too few trials for a verdict."
        return Verdict("too few", answer, _capital(evidence))
    sure = f"95% interval {signed(d.low, 3)} to {signed(d.high, 3)}, {over}, {p_text(decision.p)}"
    if count > 1:
        sure += f"; {p_text(decision.holm_p)} after correction for {count} comparisons"
    evidence = f"{what} differs by {signed(d.mean, 3)} ({sure})."
    answer = {
        "better": f"{method} beats {reference}.",
        "worse": f"{method} loses to {reference}.",
    }.get(decision.verdict, f"{method} against {reference}: undecided.")
    return Verdict(decision.verdict, answer, _capital(evidence))


def meaning(content: ReportData) -> str:
    """What the deciding score and its cost measure; empty if nothing was declared."""
    if content.declared is None:
        return ""
    endpoint = content.declared.endpoint
    score = score_named(endpoint.score)
    text = f"{_capital(score.label)} ({direction(score)}) is the {score.meaning}."
    if endpoint.along == UPDATE_NORM:
        text += " Equal norm of the update: both have moved the weights equally far."
    elif endpoint.along is not None:
        cost = score_named(endpoint.along)
        text += f" {_capital(cost.label)} ({direction(cost)}) is {cost.meaning}."
    return text


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def endpoint_label(endpoint: Endpoint) -> str:
    """An endpoint in words."""
    label = score_named(endpoint.score).label
    if endpoint.along is None:
        return label
    return f"{label} at equal {cost_label(endpoint.along)}"


def cost_label(name: str) -> str:
    """A cost in words."""
    return "norm of the update" if name == UPDATE_NORM else score_named(name).label


def p_text(p: float | None) -> str:
    """A p-value to two digits."""
    if p is None:
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def exploratory_note() -> str:
    """What to know before reading differences that were not declared."""
    return _EXPLORATORY


def limits(content: ReportData) -> list[str]:
    """How far the verdict reaches, then every caution."""
    found = cautions(content)
    if not content.trials:
        return found
    base = content.settings.get("pretrained_model_name_or_path")
    subjects = len({(trial.protocol, trial.subject) for trial in content.trials})
    seeds = len({trial.seed for trial in content.trials})
    on = f"the base {PurePath(str(base)).name} with" if base else "one base with"
    counts = f"{subjects} subject{'s' * (subjects > 1)} and {seeds} seed{'s' * (seeds > 1)}"
    return [f"Measured on {on} {counts}; other bases, subjects and settings may differ.", *found]


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
        for decision in protocol.decisions:
            if decision.difference.caveat:
                pair = f"{decision.method} against {decision.reference}"
                found.append(f"{pair}: {decision.difference.caveat}.")
            if decision.difference.subjects < len(protocol.subjects):
                found.append(
                    f"{decision.method} against {decision.reference}: only "
                    f"{decision.difference.subjects} of {len(protocol.subjects)} subjects can be "
                    "compared."
                )
        if not protocol.decisions:
            caveats: dict[str, None] = {}
            for score in protocol.scores.values():
                for comparisons in score.comparisons.values():
                    caveats |= {c.difference.caveat: None for c in comparisons.values()}
                if not score.comparisons:
                    caveats |= {mean.caveat: None for mean in score.means.values()}
            found += [f"Protocol {protocol.name}: {caveat}." for caveat in caveats if caveat]
        if len(protocol.seeds) == 1 and len(protocol.subjects) > 1 and _seeds_are_shared(content):
            found.append(
                "All subjects share the random numbers of one seed. Its effect on all of them is "
                "not in the intervals."
            )
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
    return found


def _seeds_are_shared(content: ReportData) -> bool:
    return content.settings.get("seeding", "shared") != "subject"


def method_note(content: ReportData) -> str:
    """How means and intervals were computed."""
    return (
        "A method's mean is the mean of its subjects' means, and a subject's mean is over its "
        "seeds. The 95% intervals are Student's over the subjects' means. A difference is between "
        "trials of the same subject and seed. A gap at equal cost is the mean difference of two "
        "curves over the costs that both reach, for each subject and seed; a curve joins a "
        "method's learning rates by straight lines for as long as the cost grows. Declared "
        "comparisons are decided by Student's t at a family-wise error of 5% (Holm 1979). The "
        "sign-flip test is exact and assumes only symmetry. The win rate is the share of pairs in "
        "which the method is better; ties count half."
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


def signed(value: float, decimals: int = 4) -> str:
    """Some decimals, or more if a value close to zero would be shown as zero."""
    least = 0.5 * 10**-decimals
    return f"{value:+.{decimals}f}" if value == 0 or abs(value) >= least else f"{value:+.1e}"
