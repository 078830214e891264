"""What the coordinator demands of a model before it goes out: `release.yaml` in its folder, and the defaults where there is none.

The policy belongs to the coordinator and not to a run: nothing in a run's configuration changes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist

import numpy as np

from pneumofed.common.config.experiment import Fraction, Section
from pneumofed.common.config.reader import build_config, read_yaml
from pneumofed.common.errors import ConfigError
from pneumofed.common.evaluation.comparison import (
    AUROC,
    SENSITIVITY,
    SPECIFICITY,
    Margins,
    ModelComparison,
    Rates,
    area_limit,
)
from pneumofed.common.evaluation.plots import wilson_interval

METRIC_NAMES = {AUROC: "AUROC", SENSITIVITY: "sensitivity", SPECIFICITY: "specificity"}
_Z_95 = NormalDist().inv_cdf(0.975)


class Floor(Section):
    """What every released model must be shown to reach on each held-out set: the lower ends of 95 % intervals.

    The defaults keep out what is of no use to a reader, and are no clinical standard: state your own.
    """

    auroc: Fraction = 0.80
    sensitivity: Fraction = 0.70
    """At the bundle's own threshold, as the next."""
    specificity: Fraction = 0.60


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
    return reached, missed


def lower_ends(comparison: ModelComparison) -> Mapping[str, tuple[float, float]]:
    """Computes (value, lower end of its 95 % interval) of each metric of the new model; NaN where a class is missing.

    For AUROC the lower one of the normal interval with the variance by patients and of Newcombe 2006, method 5; for shares Wilson's
    (1927) with patients for images, since images of one patient are alike.
    """
    area, (sick, well) = comparison.auroc, comparison.patients
    value = low = math.nan
    if area.new is not None and sick and well:
        value, low = area.new, area_limit(area.new, sick, well, _Z_95, upper=False)
        if area.var_new is not None:
            low = min(low, value - _Z_95 * math.sqrt(area.var_new))
    return {AUROC: (value, low), SENSITIVITY: _share(comparison.sensitivity), SPECIFICITY: _share(comparison.specificity)}


def _share(rates: Rates) -> tuple[float, float]:
    if not rates.images or not rates.patients:
        return math.nan, math.nan
    share = rates.new / rates.images
    low, _ = wilson_interval(np.array([share]), np.array([rates.patients]))
    return share, float(low[0])
