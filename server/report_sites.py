"""The hospitals and the data as the report shows them, in counts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from server.records import Metrics
from server.report_numbers import Estimate, approximate, number, whole
from server.report_run import SETS, Run
from server.report_words import PARTITIONS
from server.summary_records import DataCounts, PartitionRecord, SiteSummary


@dataclass(frozen=True)
class HospitalRow:
    """One hospital: its counts, its part in the rounds, and the kept model on its validation patients."""

    name: str
    images: str
    patients: str
    classes: list[str]
    train: str
    validation: str
    skipped: list[str]
    auroc: Estimate
    judged: str
    rounds: str
    failures: int


@dataclass(frozen=True)
class Participation:
    """In how many rounds each hospital was asked to train, did so, and failed or was left out."""

    drawn: Counter[str]
    trained: Counter[str]
    failed: Counter[str]


@dataclass(frozen=True)
class DataRow:
    """What became of the images of one party."""

    name: str
    found: str
    used: str
    patients: str
    classes: list[str]
    notes: list[str]


def class_names(run: Run) -> list[str]:
    """The classes that the hospitals' counts speak of, the task's own first."""
    told = {label for report in run.site_reports().values() for label in report.classes or {}}
    return [label for label in run.classes if label in told] + sorted(told - set(run.classes))


def class_counts(run: Run) -> dict[str, Mapping[str, int]]:
    """Images by class of each hospital that told them."""
    return {name: report.classes for name, report in run.site_reports().items() if report.classes}


def describe_partition(run: Run) -> str:
    """How virtual hospitals were dealt their images, in a sentence; empty for real ones."""
    dealt, kind = run.summary.partition or PartitionRecord(), run.partition_kind
    if not run.virtual or not kind:
        return ""
    concentration = (
        f" (Dirichlet draws, concentration {dealt.alpha:g})"
        if dealt.alpha is not None and kind in ("dirichlet", "quantity")
        else ""
    )
    text = f"Patients were dealt to simulated hospitals, {PARTITIONS.get(kind, kind)}{concentration}."
    if dealt.label_skew_bits is None:
        return text
    skew = number(dealt.label_skew_bits)
    return f"{text} Label skew: {skew} bits, where 0 is the same mix of classes in every hospital and 1 the most there can be."


def hospital_rows(run: Run) -> list[HospitalRow]:
    """A row for each hospital that took part."""
    labels, history = class_names(run), run.history
    part = Participation(
        drawn=Counter(site for line in history for site in line.drawn),
        trained=Counter(site for line in history for site in line.trained),
        failed=Counter(site for line in history for site in line.trouble),
    )
    return [_hospital_row(run, name, report, labels, part) for name, report in run.site_reports().items()]


def _hospital_row(run: Run, name: str, report: SiteSummary, labels: Sequence[str], part: Participation) -> HospitalRow:
    line, judged = _judged_at(run, name)
    in_another_round = f", round {line}" if line != run.kept_round else ""
    return HospitalRow(
        name=name,
        images=whole(report.images),
        patients=whole(report.patients),
        classes=[whole((report.classes or {}).get(label)) for label in labels],
        train=whole(report.train),
        validation=whole(report.validation),
        skipped=_told(report.skipped) + _told(report.warnings),
        auroc=approximate(judged or Metrics())["auroc"],
        judged=_mix(judged) + in_another_round if judged else "",
        rounds=f"{part.trained[name]} of {part.drawn[name]}",
        failures=part.failed[name],
    )


def _judged_at(run: Run, site: str) -> tuple[int, Metrics | None]:
    """The round and the validation metrics of `site` in the kept round, else in its last one."""
    known = {line.round: found for line in run.history if site in line.sites and (found := line.sites[site].validation)}
    number = run.kept_round if run.kept_round in known else max(known, default=0)
    return number, known.get(number)


def _mix(found: Metrics) -> str:
    positive = found.n_positive or 0
    return f"of {(found.n or 0) - positive} + {positive}"


def describe_spread(rows: Sequence[HospitalRow]) -> str:
    """The spread of validation AUROC over hospitals, in words; empty where fewer than two have one."""
    values = [row.auroc.value for row in rows if row.auroc.value is not None]
    if len(values) < 2:
        return ""
    middle = statistics.median(values)
    return (
        f"Over {len(values)} hospitals with both classes in validation, its AUROC ranges from {number(min(values))} to "
        f"{number(max(values))} (median {number(middle)})."
    )


def data_rows(run: Run) -> list[DataRow]:
    """What became of the images of all hospitals together and of each central set."""
    reports: dict[str, DataCounts] = {"hospitals together": _joined(list(run.site_reports().values())), **run.summary.data}
    return [
        DataRow(
            name=SETS.get(name, name),
            found=whole(report.found),
            used=whole(report.used),
            patients=whole(report.patients),
            classes=_told(report.classes),
            notes=_told(report.skipped) + _told(report.warnings),
        )
        for name, report in reports.items()
        if report.model_fields_set
    ]


def _joined(reports: Sequence[SiteSummary]) -> SiteSummary:
    """The sum of the hospitals' counts; those that no hospital told are missing."""
    sums = {
        "found": _sum(report.found for report in reports),
        "used": _sum(report.used for report in reports),
        "patients": _sum(report.patients for report in reports),
        "train": _sum(report.train for report in reports),
        "validation": _sum(report.validation for report in reports),
        "classes": _sum_by_name(report.classes for report in reports),
        "skipped": _sum_by_name(report.skipped for report in reports),
        "warnings": _sum_by_name(report.warnings for report in reports),
    }
    return SiteSummary.model_validate({key: total for key, total in sums.items() if total is not None})


def _sum(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _sum_by_name(counts: Iterable[Mapping[str, int] | None]) -> dict[str, int] | None:
    known = [one for one in counts if one is not None]
    return {name: sum(one.get(name, 0) for one in known) for one in known for name in one} if known else None


def _told(counts: Mapping[str, int] | None) -> list[str]:
    """`3 × image data truncated or corrupt`, one text a reason."""
    return [f"{n:,} × {reason}" for reason, n in (counts or {}).items()]
