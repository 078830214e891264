"""The decision: a new model is released if on every set it is shown not to be worse than the old one by more than the margin.

Each set and each metric is a test of its own at the full level, and all must pass. Their union needs no correction: a model that is worse
beyond a margin anywhere passes that one test, and so the gate, with probability alpha at most (intersection-union test: Berger 1982,
Technometrics 24:295). What cannot be decided refuses: no evidence of harm is no evidence of no harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pneumofed.common.evaluation.comparison import (
    AUROC,
    SENSITIVITY,
    SPECIFICITY,
    MarginOutcome,
    Margins,
    ModelComparison,
    NonInferiority,
    patients_needed,
)
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.release import Check, Kind, Place, ReleasedModel, ReleaseRecord

METRIC_NAMES = {AUROC: "AUROC", SENSITIVITY: "sensitivity", SPECIFICITY: "specificity"}


@dataclass(frozen=True)
class Evidence:
    """What the coordinator has to decide on.

    Attributes:
        central: comparisons on its held-out sets, by name.
        sites: comparisons that the sites made, by site.
        expected: sites that took part in the new model's run, as far as their names are known.
        expected_number: how many took part.
    """

    central: Mapping[str, ModelComparison]
    sites: Mapping[str, ModelComparison]
    expected: Sequence[str] = ()
    expected_number: int = 0
    sets_needed: Sequence[str] = field(default=("test", "external"))


def decide_release(
    models: tuple[Bundle, Bundle],
    evidence: Evidence,
    margins: tuple[Margins, Margins],
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> ReleaseRecord:
    """Decides whether the new model is released and returns the record of it.

    Args:
        models: the old and the new one.
        evidence: comparisons of the two.
        margins: for held-out sets, and for sites.
        now: the clock.
    """
    places = [_place(name, "held-out set", comparison, margins[0]) for name, comparison in evidence.central.items()]
    places += [_place(name, "site", comparison, margins[1]) for name, comparison in sorted(evidence.sites.items())]
    reasons = [*_missing(evidence), *(sentence for place in places for sentence in _refusals(place))]
    return ReleaseRecord(
        time=now(),
        decision="refused" if reasons else "released",
        old=_model(models[0]),
        new=_model(models[1]),
        margins=margins[0],
        site_margins=margins[1],
        places=tuple(places),
        reasons=tuple(reasons),
    )


def first_release(bundle: Bundle, margins: tuple[Margins, Margins], now: datetime) -> ReleaseRecord:
    """Builds the record that releases a first model, which nothing can be compared with.

    Args:
        bundle: the model.
        margins: for held-out sets, and for sites: those of later releases.
        now: time of the record.
    """
    return ReleaseRecord(
        time=now,
        decision="released",
        new=_model(bundle),
        old=None,
        margins=margins[0],
        site_margins=margins[1],
        reasons=("a first model: there is none to compare it with",),
    )


def _missing(evidence: Evidence) -> list[str]:
    """What should have been compared and was not."""
    found = [f"{name} set: not compared" for name in evidence.sets_needed if name not in evidence.central]
    absent = sorted(set(evidence.expected) - set(evidence.sites))
    found += [f"{site}: no verdict" for site in absent]
    lacking = evidence.expected_number - len(evidence.sites) - len(absent)
    if lacking > 0:
        found.append(f"{lacking} of {evidence.expected_number} sites that trained the model: no verdict")
    return found


def _place(name: str, kind: Kind, comparison: ModelComparison, margins: Margins) -> Place:
    outcomes = comparison.judge(margins)
    checks = tuple(_check(metric, outcome, comparison.patients, margins.alpha) for metric, outcome in outcomes.items())
    return Place(name=name, kind=kind, comparison=comparison, checks=checks)


def _check(metric: str, outcome: MarginOutcome, patients: tuple[int, int], alpha: float) -> Check:
    return Check(
        metric=metric,
        difference=None if math.isnan(outcome.difference) else outcome.difference,
        lower=outcome.lower,
        margin=outcome.margin,
        verdict=outcome.verdict,
        needed=patients_needed(outcome, patients, alpha) if outcome.verdict is NonInferiority.TOO_FEW else None,
    )


def _refusals(place: Place) -> list[str]:
    return [
        f"{place.name}: {describe_check(check, place)}" for check in place.checks if check.verdict is not NonInferiority.NOT_WORSE
    ]


def describe_check(check: Check, place: Place) -> str:
    """Describes why a check did not pass, in a sentence.

    Args:
        check: one metric on one set; it did not pass.
        place: the set, for its numbers of patients.
    """
    name = METRIC_NAMES[check.metric]
    if check.verdict is NonInferiority.WORSE:
        return f"{name} was {-(check.difference or 0.0):.3f} lower on these cases, the margin is {check.margin:g}"
    sick, well = place.comparison.patients
    has = f"it has {sick} patients with pneumonia and {well} without"
    if check.needed is None:
        return f"{name}: {check.verdict.value}; {has}"
    wanted = {
        AUROC: f"about {check.needed[0]} and {check.needed[1]} would be needed",
        SENSITIVITY: f"about {check.needed[0]} with pneumonia would be needed",
        SPECIFICITY: f"about {check.needed[1]} without would be needed",
    }[check.metric]
    return f"{name}: {check.verdict.value} (it may be {max(-check.lower, 0.0):.3f} lower); {has}, {wanted}"


def _model(bundle: Bundle) -> ReleasedModel:
    return ReleasedModel(name=bundle.manifest.name, digest=bundle.digest)
