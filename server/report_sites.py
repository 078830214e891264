"""The hospitals and the data as the report shows them, in counts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.report_numbers import Estimate, approximate, number, whole
from server.report_run import SETS, Run
from server.report_words import PARTITIONS


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
    told = {label for report in run.site_reports().values() for label in report.get("classes", {})}
    return [label for label in run.classes if label in told] + sorted(told - set(run.classes))


def class_counts(run: Run) -> dict[str, Mapping[str, int]]:
    """Images by class of each hospital that told them."""
    return {name: report["classes"] for name, report in run.site_reports().items() if report.get("classes")}


def describe_partition(run: Run) -> str:
    """How virtual hospitals were dealt their images, in a sentence; empty for real ones."""
    dealt = run.summary.get("partition") or {}
    kind, alpha, skew = dealt.get("kind", run.simulation.get("partition")), dealt.get("alpha"), dealt.get("label_skew_bits")
    if not run.virtual or not kind:
        return ""
    concentration = (
        f" (Dirichlet draws, concentration {alpha:g})" if alpha is not None and kind in ("dirichlet", "quantity") else ""
    )
    text = f"Patients were dealt to simulated hospitals, {PARTITIONS.get(str(kind), str(kind))}{concentration}."
    if skew is None:
        return text
    return f"{text} Label skew: {number(skew)} bits, where 0 is the same mix of classes in every hospital and 1 the most there can be."


def hospital_rows(run: Run) -> list[HospitalRow]:
    """A row for each hospital that took part."""
    labels, history = class_names(run), run.history
    part = Participation(
        drawn=Counter(site for line in history for site in line["drawn"]),
        trained=Counter(site for line in history for site, told in line.get("sites", {}).items() if "train" in told),
        failed=Counter(site for line in history for site in {*line["failures"], *line["left_out"]}),
    )
    return [_hospital_row(run, name, report, labels, part) for name, report in run.site_reports().items()]


def _hospital_row(run: Run, name: str, report: Mapping[str, Any], labels: Sequence[str], part: Participation) -> HospitalRow:
    line, judged = _judged_at(run, name)
    in_another_round = f", round {line}" if line != run.kept_round else ""
    return HospitalRow(
        name=name,
        images=whole(report.get("used", report.get("found"))),
        patients=whole(report.get("patients")),
        classes=[whole(report.get("classes", {}).get(label)) for label in labels],
        train=whole(report.get("train")),
        validation=whole(report.get("validation")),
        skipped=_told(report.get("skipped", {})) + _told(report.get("warnings", {})),
        auroc=approximate(judged)["auroc"],
        judged=_mix(judged) + in_another_round if judged else "",
        rounds=f"{part.trained[name]} of {part.drawn[name]}",
        failures=part.failed[name],
    )


def _judged_at(run: Run, site: str) -> tuple[int, Mapping[str, Any]]:
    """The round and the validation metrics of `site` in the kept round, else in its last one."""
    lines = {line["round"]: line.get("sites", {}).get(site, {}).get("validation") for line in run.history}
    known = {number: found for number, found in lines.items() if found}
    number = run.kept_round if run.kept_round in known else max(known, default=0)
    return number, known.get(number, {})


def _mix(found: Mapping[str, Any]) -> str:
    positive = int(found.get("n_positive") or 0)
    return f"of {int(found.get('n') or 0) - positive} + {positive}"


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
    reports = {"hospitals together": _joined(run.site_reports().values()), **(run.summary.get("data") or {})}
    return [
        DataRow(
            name=SETS.get(name, name),
            found=whole(report.get("found")),
            used=whole(report.get("used")),
            patients=whole(report.get("patients")),
            classes=_told(report.get("classes", {})),
            notes=_told(report.get("skipped", {})) + _told(report.get("warnings", {})),
        )
        for name, report in reports.items()
        if report
    ]


def _joined(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of the hospitals' counts; keys that no hospital told are missing."""
    total: dict[str, Any] = {}
    for report in reports:
        for key, value in report.items():
            if isinstance(value, Mapping):
                counts = total.setdefault(key, {})
                counts.update({name: counts.get(name, 0) + n for name, n in value.items()})
            else:
                total[key] = total.get(key, 0) + (value or 0)
    return total


def _told(counts: Mapping[str, int]) -> list[str]:
    """`3 × image data truncated or corrupt`, one text a reason."""
    return [f"{n:,} × {reason}" for reason, n in counts.items()]
