"""For whom a run's model was judged (`measure_population`): the groups of its held-out sets, and the mix of hospitals that trained it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from pneumofed.common.data.manifest import ImageRecord
from pneumofed.common.errors import ConfigError
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.imaging.patient_groups import AGE, KINDS, AgeGroup, PatientGroups, groups_of
from pneumofed.common.model_bundle.population import GroupKind, IntervalEstimate, JudgedGroup, JudgedPopulation, SiteMix
from pneumofed.server.export.source import Source
from pneumofed.server.report.numbers import approximate
from pneumofed.server.runs.records import Metrics

SHOWN_METRICS = ("auroc", "sensitivity", "specificity")
SHARE_STEP = 20
"""Shares of hospitals are rounded to a twentieth: the bundle goes to all of them, and a count would say how large each is."""

Records = Mapping[str, Mapping[str, ImageRecord]]
StatedAges = Mapping[str, Sequence[AgeGroup]]


def read_stated_ages(texts: Sequence[str]) -> dict[str, tuple[AgeGroup, ...]]:
    """Reads `SET=GROUP,GROUP`: the age groups of all patients of a held-out set whose images do not state them.

    Raises:
        ConfigError: a text has another form, a group has no such name, or a set stands twice.
    """
    found: dict[str, tuple[AgeGroup, ...]] = {}
    for text in texts:
        name, _, words = text.partition("=")
        groups = words.replace(" ", "").split(",")
        if not name or name in found or not set(groups) <= set(AgeGroup):
            raise ConfigError(
                f"--ages {text}: expected SET=GROUP,GROUP once for a held-out set, with groups out of "
                f"{', '.join(AgeGroup)}; e.g. test=infant,child"
            )
        found[name] = tuple(group for group in AgeGroup if group in groups)
    return found


def measure_population(source: Source, records: Records, stated: StatedAges) -> JudgedPopulation:
    """Measures each group of each held-out set at the run's threshold; calibration changes none of these numbers.

    Args:
        source: the finished run with its predictions.
        records: by set, its manifest rows by the first 16 digits of their file's SHA-256.
        stated: by set, the age groups of those of its patients whose age no row states.

    Raises:
        ConfigError: ages are stated for a set that the run was not judged on, or whose rows all state them.
    """
    groups: list[JudgedGroup] = []
    unknown = 0
    _check_sets(stated, source.run.predictions)
    for name, predictions in source.run.predictions.items():
        known = [_groups(records.get(name, {}).get(image)) for image in predictions.images]
        groups += _measure_set(name, predictions, known, source.threshold)
        without = np.flatnonzero([found.age is None for found in known]).astype(np.int64)
        if name in stated and not len(without):
            raise ConfigError(f"--ages {name}: the manifest of this set states the age of every image; leave the option out")
        if name in stated:
            groups.append(_measure_group((name, AGE, stated[name]), predictions.rows(without), source.threshold, stated=True))
        else:
            unknown += len(without)
    return JudgedPopulation(groups=tuple(groups), unknown_age=unknown, mix=_site_mix(source))


def _check_sets(stated: StatedAges, sets: Mapping[str, Predictions]) -> None:
    for name in stated:
        if name not in sets:
            raise ConfigError(
                f"--ages {name}: the run was not judged on such a set; its held-out sets: {', '.join(sets) or 'none'}"
            )


def _groups(record: ImageRecord | None) -> PatientGroups:
    return groups_of(record.age_years, record.sex, record.view) if record else PatientGroups()


def _measure_set(name: str, predictions: Predictions, known: Sequence[PatientGroups], threshold: float) -> list[JudgedGroup]:
    found = []
    of_image = [dict(groups.known()) for groups in known]
    for kind, groups in KINDS.items():
        for group in groups:
            rows = np.flatnonzero([one.get(kind) == group for one in of_image]).astype(np.int64)
            if len(rows):
                found.append(_measure_group((name, kind, (group,)), predictions.rows(rows), threshold))
    return found


def _measure_group(
    which: tuple[str, str, Sequence[str]], predictions: Predictions, threshold: float, stated: bool = False
) -> JudgedGroup:
    name, kind, groups = which
    positive = predictions.labels != 0
    counted = Metrics.model_validate(metrics(Statistics.of(predictions), threshold))
    closed = approximate(counted)
    return JudgedGroup(
        held_out=name,
        kind=cast("GroupKind", kind),
        groups=tuple(map(str, groups)),
        stated=stated,
        images=len(predictions),
        patients=len(set(predictions.patients)),
        patients_with_pneumonia=_patients(predictions, positive),
        patients_without=_patients(predictions, ~positive),
        images_with_pneumonia=int(positive.sum()),
        metrics={
            one: IntervalEstimate(value=closed[one].value, low=closed[one].low, high=closed[one].high) for one in SHOWN_METRICS
        },
    )


def _patients(predictions: Predictions, rows: npt.NDArray[np.bool_]) -> int:
    return len({patient for patient, inside in zip(predictions.patients, rows, strict=True) if inside})


def _site_mix(source: Source) -> SiteMix:
    """Under masks, or with noise on what a site reports, there are no single counts, and so no shares."""
    reports = source.run.site_reports().values()
    counts = [report.used if report.train is None else report.train for report in reports]
    total = sum(count or 0 for count in counts)
    if not total or any(count is None for count in counts):
        return SiteMix(sites=len(counts))
    shares = sorted((round(SHARE_STEP * (count or 0) / total) / SHARE_STEP for count in counts), reverse=True)
    return SiteMix(sites=len(counts), shares=tuple(shares))
