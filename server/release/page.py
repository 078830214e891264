"""A release record as a page of Markdown."""

from __future__ import annotations

import math

from common.evaluation.comparison import AUROC, Comparison
from common.evaluation.noninferiority import Verdict
from common.release.record import ReleaseRecord
from common.render import render
from server.release.gate import NAMES

DASH = "–"


def write_page(record: ReleaseRecord) -> str:
    """The page: the decision, why, and every comparison with its bound."""
    return render(__package__, "release.md", {"signed": _signed}, record=record, names=NAMES, values=_values)


def _values(comparison: Comparison, metric: str) -> tuple[str, str]:
    if metric == AUROC:
        return _number(comparison.auroc.old), _number(comparison.auroc.new)
    rates = getattr(comparison, metric)
    return (f"{rates.old}/{rates.images}", f"{rates.new}/{rates.images}") if rates.images else (DASH, DASH)


def _number(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:+.3f}"


def summarise(record: ReleaseRecord) -> list[str]:
    """A few lines for the terminal."""
    checks = [check for place in record.places for check in place.checks]
    passed = sum(check.verdict is Verdict.NOT_WORSE for check in checks)
    lines = [f"{record.new.name}: {record.decision}; {passed} of {len(checks)} comparisons passed on {len(record.places)} sets"]
    return [*lines, *(f"  {reason}" for reason in record.reasons)]
