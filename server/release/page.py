"""A release record as a page of Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.evaluation.comparison import AUROC, Comparison, Margins
from common.evaluation.noninferiority import Verdict
from common.release.record import Check, Place, ReleaseRecord
from server.release.gate import NAMES

DASH = "–"


def write_page(record: ReleaseRecord) -> str:
    """The page: the decision, why, and every comparison with its bound."""
    parts = [_head(record), _reasons(record), _table(record), _method(record)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(record: ReleaseRecord) -> str:
    old = f"`{record.old.name}` ({record.old.digest[:16]})" if record.old else "none"
    return "\n".join(
        (
            f"# {'Released' if record.released else 'Not released'}: {record.new.name}",
            "",
            f"- new model: `{record.new.name}`, {record.new.digest}",
            f"- compared with: {old}",
            f"- decided: {record.time:%d %B %Y, %H:%M} UTC",
        )
    )


def _reasons(record: ReleaseRecord) -> str:
    if not record.reasons:
        return "On every set the new model is shown not to be worse than the old one by more than the margin."
    return "\n".join(f"- {reason}" for reason in record.reasons)


def _table(record: ReleaseRecord) -> str:
    if not record.places:
        return ""
    head = (
        "set",
        "patients with / without pneumonia",
        "images",
        "metric",
        "old",
        "new",
        "difference",
        "at least",
        "margin",
        "shown",
    )
    rows = [_row(place, check) for place in record.places for check in place.checks]
    return "\n".join(_line(cells) for cells in (head, ["---"] * len(head), *rows))


def _row(place: Place, check: Check) -> list[str]:
    comparison = place.comparison
    old, new = _values(comparison, check.metric)
    sick, well = comparison.patients
    numbers = (old, new, _number(check.difference, sign=True), _number(check.lower, sign=True), f"{check.margin:g}")
    return [place.name, f"{sick} / {well}", str(comparison.images), NAMES[check.metric], *numbers, check.verdict.value]


def _values(comparison: Comparison, metric: str) -> tuple[str, str]:
    if metric == AUROC:
        return _number(comparison.auroc.old), _number(comparison.auroc.new)
    rates = getattr(comparison, metric)
    return (f"{rates.old}/{rates.images}", f"{rates.new}/{rates.images}") if rates.images else (DASH, DASH)


def _method(record: ReleaseRecord) -> str:
    if record.old is None:
        return ""
    confidence = f"{100 * (1 - record.margins.alpha):g} %"
    central, sites = (
        _margins("On held-out sets", record.margins),
        _margins("on the sites' validation patients", record.site_margins),
    )
    return (
        f"At least: the one-sided {confidence} lower confidence bound of new minus old, patients being the unit. {central}; {sites}. "
        "All tests must pass, so no correction for their number is needed (intersection-union test). Sites' own numbers are of patients "
        "whom neither model was trained on; they are few, and cases that readers added to them are no random sample."
    )


def _margins(where: str, margins: Margins) -> str:
    return f"{where} the margin is {margins.auroc:g} for AUROC and {margins.point:g} for sensitivity and specificity"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, *, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return DASH
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def summarise(record: ReleaseRecord) -> list[str]:
    """A few lines for the terminal."""
    checks = [check for place in record.places for check in place.checks]
    passed = sum(check.verdict is Verdict.NOT_WORSE for check in checks)
    lines = [f"{record.new.name}: {record.decision}; {passed} of {len(checks)} comparisons passed on {len(record.places)} sets"]
    return [*lines, *(f"  {reason}" for reason in record.reasons)]
