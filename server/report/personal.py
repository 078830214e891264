"""Hospitals' own models beside the global one, each on its hospital's validation images.

personal_table        a row a hospital with a personalised model (`personal.method`): AUROC of both models, their difference, the images
alone_table           the same of hospitals that trained once by themselves (`evaluation.alone`)
personal_sentences    who does better with which, and by how much on average; `alone_sentences` for those who trained by themselves
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pneumofed.common.errors import counted
from pneumofed.server.report.numbers import ReportedEstimate, approximate, difference, number
from pneumofed.server.report.read_run import StoredRun
from pneumofed.server.runs.records import Metrics
from pneumofed.server.runs.summary_records import PersonalComparison, compare_personal

MOST_NAMES = 5
"""So many hospitals are named in a sentence; of more, only the number is said."""
LEAST_FOR_MEAN = 3


@dataclass(frozen=True)
class PersonalRow:
    """One hospital. `lead` is AUROC of its own model minus that of the global one; its interval takes the two as independent."""

    name: str
    images: str
    shared: ReportedEstimate
    own: ReportedEstimate
    lead: ReportedEstimate
    log_losses: tuple[str, str]
    """Of the global model and of its own."""
    rounds: str


def personal_table(run: StoredRun) -> list[PersonalRow]:
    """Builds a row for each hospital whose own model was judged; none where no run trained such models."""
    return _rows(compare_personal(run.history, run.kept_round))


def alone_table(run: StoredRun) -> list[PersonalRow]:
    """Builds a row for each hospital that trained by itself and told how its model does."""
    return _rows(run.summary.alone)


def _rows(found: Mapping[str, PersonalComparison]) -> list[PersonalRow]:
    return [
        PersonalRow(
            name,
            _images(both.shared, both.personal),
            *_areas(both.shared, both.personal),
            (number(both.shared.log_loss), number(both.personal.log_loss)),
            f"{both.shared_round} and {both.round}",
        )
        for name, both in found.items()
    ]


def _areas(shared: Metrics, own: Metrics) -> tuple[ReportedEstimate, ReportedEstimate, ReportedEstimate]:
    first, second = approximate(shared)["auroc"], approximate(own)["auroc"]
    return first, second, difference(second, first)


def _images(shared: Metrics, own: Metrics) -> str:
    texts = [f"{(found.n or 0) - (found.n_positive or 0)} + {found.n_positive or 0}" for found in (shared, own)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} and {texts[1]}"


def personal_sentences(run: StoredRun) -> list[str]:
    """Says how many hospitals do better with their own model, on the images of their own validation patients.

    Args:
        run: without own models there is nothing to say; where none was judged, why.
    """
    cfg = run.experiment
    if cfg is None or not cfg.personal.is_on or not run.completed:
        return []
    rows = personal_table(run)
    known = [row for row in rows if row.lead.value is not None]
    if not rows:
        return [_why_none(run)]
    if not known:
        return [
            f"Of {counted(len(rows), 'hospital')} with a model of its own, none has validation images of both classes to compare it on."
        ]
    texts = [_who(known, len(rows)), _mean(known)]
    return [" ".join(text for text in texts if text)]


def alone_sentences(run: StoredRun) -> list[str]:
    """Says whether hospitals do better with the global model than with what each trained by itself.

    Args:
        run: of one without `evaluation.alone` there is nothing to say; where no hospital told anything, that.
    """
    if run.experiment is None or not run.experiment.evaluation.alone or not run.completed:
        return []
    rows = alone_table(run)
    known = [row for row in rows if row.lead.value is not None]
    if not known:
        return [
            "Hospitals were asked to train once by themselves; none told how its model does (its policy's "
            "`train_alone`, too few validation patients, or none of one class)."
        ]
    return [" ".join(text for text in (_who(known, len(rows), "a model trained alone"), _mean(known)) if text)]


def _why_none(run: StoredRun) -> str:
    if run.experiment is not None and run.experiment.secure_aggregation.enabled:
        return (
            "Each hospital trained a model of its own; secure aggregation shows no hospital's own numbers, so each compares it for itself "
            "(`pneumofed site export-personal`)."
        )
    return (
        "Each hospital was to train a model of its own; no statistics of one left a hospital, which compares it for itself "
        "(`pneumofed site export-personal`)."
    )


def _who(rows: Sequence[PersonalRow], of: int, model: str = "") -> str:
    """By value, and by intervals that leave out 0; `model` names the models, where they are not just the hospitals' own."""
    better = [row.name for row in rows if (row.lead.value or 0.0) > 0]
    worse = [row.name for row in rows if (row.lead.value or 0.0) < 0]
    clear = [row for row in rows if row.lead.clear]
    gains = sum((row.lead.value or 0.0) > 0 for row in clear)
    left = (
        f" Of {counted(of - len(rows), 'hospital')} more it cannot be told without images of both classes."
        if of > len(rows)
        else ""
    )
    does, model = ("does", model or "its own model") if len(better) == 1 else ("do", model or "their own model")
    return (
        f"By AUROC on their own validation images, {len(better)} of {counted(len(rows), 'hospital')} {does} better with {model}"
        f"{_named(better)}, {len(worse)} worse{_named(worse)}; beyond what chance explains {gains} {'does' if gains == 1 else 'do'} better "
        f"and {len(clear) - gains} worse.{left}"
    )


def _named(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if 0 < len(names) <= MOST_NAMES else ""


def _mean(rows: Sequence[PersonalRow]) -> str:
    """The mean lead over hospitals, which are independent of each other, with Student's interval; each hospital counts the same."""
    leads = np.array([row.lead.value for row in rows], dtype=np.float64)
    if len(leads) < LEAST_FOR_MEAN:
        return ""
    from scipy.stats import t as student  # half a second to import, and few runs have personal models

    mean = float(leads.mean())
    half = float(student.ppf(0.975, len(leads) - 1)) * float(leads.std(ddof=1)) / math.sqrt(len(leads))
    estimate = ReportedEstimate(mean, mean - half, mean + half)
    return (
        f"Own minus global AUROC is {estimate.number} on average over these hospitals (95% CI {estimate.span}, each hospital paired with "
        "itself)."
    )
