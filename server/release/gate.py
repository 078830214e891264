"""What the coordinator demands of a model before it goes out (`release.yaml` in its folder, and the defaults where there is none), and the
decision: a new model is released if on every set it is shown not to be worse than the old one by more than the margin.

The policy belongs to the coordinator and not to a run: nothing in a run's configuration changes it.

Each set and each metric is a test of its own at the full level, and all must pass. Their union needs no correction: a model that is worse
beyond a margin anywhere passes that one test, and so the gate, with probability alpha at most (intersection-union test: Berger 1982,
Technometrics 24:295). What cannot be decided refuses: no evidence of harm is no evidence of no harm. Besides, every release must reach
the policy's floor on each held-out set, and losses that add up over releases are refused (see `server.release.chain`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType

import numpy as np

from pneumofed.common.config.experiment import Fraction, Section
from pneumofed.common.config.reader import build_config, read_yaml
from pneumofed.common.errors import ConfigError
from pneumofed.common.evaluation.class_comparison import AUROC_MACRO, ClassesComparison, class_lower_ends
from pneumofed.common.evaluation.comparison import (
    AUROC,
    SENSITIVITY,
    SPECIFICITY,
    MarginOutcome,
    Margins,
    ModelComparison,
    NonInferiority,
    Rates,
    area_limit,
    patients_needed,
)
from pneumofed.common.evaluation.plots import wilson_interval
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.release import Check, Kind, Place, ReleasedModel, ReleaseRecord
from pneumofed.server.release.chain import Losses

METRIC_NAMES = {
    AUROC: "AUROC",
    SENSITIVITY: "sensitivity",
    SPECIFICITY: "specificity",
    AUROC_MACRO: "mean AUROC over classes",
}
_Z_95 = NormalDist().inv_cdf(0.975)


class Floor(Section):
    """What every released model must be shown to reach on each held-out set: the lower ends of 95 % intervals.

    The defaults keep out what is of no use to a reader, and are no clinical standard: state your own.
    """

    auroc: Fraction = 0.80
    sensitivity: Fraction = 0.70
    """At the bundle's own threshold, as the next."""
    specificity: Fraction = 0.60
    auroc_macro: Fraction = 0.80
    """Of more than two classes: mean of their AUROCs, each against the rest."""
    auroc_class: Fraction = 0.70
    """Likewise, of each class."""


class ReleasePolicy(Section):
    """`release.yaml`. A margin on the command line may be smaller than the policy's, never larger."""

    floor: Floor = Floor()
    margins: Margins = Margins()
    """Of one release against the one before, on held-out sets."""
    site_margins: Margins | None = None
    """The same at the sites; unset, as on held-out sets."""
    total: Margins | None = None
    """How far a model may lie below the best of all releases so far, on held-out sets and at sites; unset, as far as in one release.
    Its `alpha` is not used."""


DEFAULT_POLICY = ReleasePolicy()


def read_release_policy(path: Path | None) -> ReleasePolicy | None:
    """Reads the policy in `path`; None where there is no file.

    Raises:
        ConfigError: the file is wrong.
    """
    return build_config(ReleasePolicy, read_yaml(path), str(path)) if path is not None and path.is_file() else None


def check_margins(policy: ReleasePolicy, margins: tuple[Margins, Margins]) -> None:
    """Refuses margins that are wider than the policy's.

    Args:
        policy: of the coordinator.
        margins: for held-out sets, and for sites, as the command line asks for.

    Raises:
        ConfigError: one is wider.
    """
    for allowed, asked in zip((policy.margins, policy.site_margins or policy.margins), margins, strict=True):
        if asked.auroc > allowed.auroc or asked.point > allowed.point or asked.alpha > allowed.alpha:
            raise ConfigError("a margin or --alpha is wider than release.yaml allows; leave it out, or change the policy")


def describe_floor(name: str, comparison: ModelComparison, floor: Floor) -> tuple[list[str], list[str]]:
    """Compares the new model of `comparison` with the floor, metric by metric.

    Args:
        name: of the held-out set.
        comparison: on that set; only the new model's numbers count.
        floor: of the policy.

    Returns:
        (a sentence for each metric that is shown to reach it, one for each that is not).
    """
    reached: list[str] = []
    missed: list[str] = []
    for metric, (value, low) in lower_ends(comparison).items():
        wanted = getattr(floor, metric)
        shown = "unknown" if math.isnan(value) else f"{value:.3f}, 95 % interval from {low:.3f}"
        sentence = f"{name}: {METRIC_NAMES[metric]} {shown}; the floor is {wanted:g}"
        (reached if low >= wanted else missed).append(sentence)  # NaN is missed
    for what, (value, low) in class_lower_ends(comparison).items() if isinstance(comparison, ClassesComparison) else ():
        of_mean = what == AUROC_MACRO
        wanted = floor.auroc_macro if of_mean else floor.auroc_class
        shown = "unknown" if math.isnan(value) else f"{value:.3f}, 95 % interval from {low:.3f}"
        title = METRIC_NAMES[AUROC_MACRO] if of_mean else f"AUROC of {what} against the rest"
        (reached if low >= wanted else missed).append(f"{name}: {title} {shown}; the floor is {wanted:g}")
    return reached, missed


def lower_ends(comparison: ModelComparison) -> Mapping[str, tuple[float, float]]:
    """Computes (value, lower end of its 95 % interval) of each metric of the new model; NaN where a class is missing.

    For AUROC the lower one of the normal interval with the variance by patients and of Newcombe 2006, method 5; for shares Wilson's
    (1927) with patients for images, since images of one patient are alike, each counting as `effective_number` says.
    """
    area, (sick, well) = comparison.auroc, comparison.effective_patients
    value = low = math.nan
    if area.new is not None and sick and well:
        value, low = area.new, area_limit(area.new, sick, well, _Z_95, upper=False)
        if area.var_new is not None:
            low = min(low, value - _Z_95 * math.sqrt(area.var_new))
    return {AUROC: (value, low), SENSITIVITY: _share(comparison.sensitivity), SPECIFICITY: _share(comparison.specificity)}


def _share(rates: Rates) -> tuple[float, float]:
    count = rates.paired().effective_patients
    if not rates.images or not count:
        return math.nan, math.nan
    share = rates.new / rates.images
    low, _ = wilson_interval(np.array([share]), np.array([count]))
    return share, float(low[0])


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
    *,
    policy: ReleasePolicy = DEFAULT_POLICY,
    losses: Losses = MappingProxyType({}),
) -> ReleaseRecord:
    """Decides whether the new model is released and returns the record of it.

    Args:
        models: the old and the new one.
        evidence: comparisons of the two.
        margins: for held-out sets, and for sites.
        now: the clock.
        policy: its floor and its total margins count.
        losses: of the releases before, see `ReleaseChain.losses`.
    """
    places = [_place(name, "held-out set", comparison, margins[0]) for name, comparison in evidence.central.items()]
    places += [_place(name, "site", comparison, margins[1]) for name, comparison in sorted(evidence.sites.items())]
    reasons = [*_missing(evidence), *(sentence for place in places for sentence in _refusals(place))]
    if not places:
        reasons.append("nothing was compared: without a comparison no model is released")
    reasons += _below_floor(evidence.central, policy.floor)
    for place in places:
        total = policy.total or margins[0 if place.kind == "held-out set" else 1]
        reasons += _added_up(place, losses, total)
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


def first_release(
    bundle: Bundle,
    measured: Mapping[str, ModelComparison],
    margins: tuple[Margins, Margins],
    now: datetime,
    floor: Floor = DEFAULT_POLICY.floor,
) -> ReleaseRecord:
    """Decides on a first model, which nothing can be compared with: it must reach the floor on every held-out set, of at least one.

    Args:
        bundle: the model.
        measured: by held-out set, the comparison of the model with itself, for its own numbers.
        margins: for held-out sets, and for sites: those of later releases.
        now: time of the record.
        floor: of the policy.
    """
    refused = _below_floor(measured, floor)
    if not measured:
        refused.append("there is no held-out set: a model of which nothing is known is not released")
    reached = [sentence for name, comparison in measured.items() for sentence in describe_floor(name, comparison, floor)[0]]
    return ReleaseRecord(
        time=now,
        decision="refused" if refused else "released",
        new=_model(bundle),
        old=None,
        margins=margins[0],
        site_margins=margins[1],
        reasons=tuple(refused or ["a first model: there is none to compare it with", *reached]),
    )


def _below_floor(measured: Mapping[str, ModelComparison], floor: Floor) -> list[str]:
    return [sentence for name, comparison in measured.items() for sentence in describe_floor(name, comparison, floor)[1]]


def _added_up(place: Place, losses: Losses, total: Margins) -> list[str]:
    """Where the loss of this release and of those before it are together beyond the total margin."""
    found = []
    for check in place.checks:
        before = losses.get((place.kind, place.name, check.metric), 0.0)
        loss, margin = before - (check.difference or 0.0), total.auroc if check.metric in (AUROC, AUROC_MACRO) else total.point
        if check.verdict is NonInferiority.NOT_WORSE and loss > margin:  # what is worse is refused anyway
            name = METRIC_NAMES[check.metric]
            found.append(f"{place.name}: {name} would lie {loss:.3f} below the best release, {margin:g} is allowed in all")
    return found


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
    checks = tuple(_check(metric, outcome, _patients(metric, comparison), margins.alpha) for metric, outcome in outcomes.items())
    return Place(name=name, kind=kind, comparison=comparison, checks=checks)


def _patients(metric: str, comparison: ModelComparison) -> tuple[int, int]:
    """Whom a metric is about: with and without; of the mean over classes, with the rarest class and without it."""
    if metric == AUROC_MACRO and isinstance(comparison, ClassesComparison):
        return comparison.classes[comparison.rarest[0]].patients
    return comparison.patients


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
    if check.metric == AUROC_MACRO and isinstance(place.comparison, ClassesComparison):
        rarest, patients = place.comparison.rarest
        more = "" if check.needed is None else f", about {check.needed[0]} would be needed"
        return f"{name}: {check.verdict.value} (it may be {max(-check.lower, 0.0):.3f} lower); of {rarest} it has {patients} patients{more}"
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
