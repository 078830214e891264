"""The tables of the report: key numbers, metrics of each set, baselines beside the federated model, hospitals and their data.

`result_tiles`, `run_tiles` and `metric_rows` show the results, `comparisons` and `untrained` the baselines; `hospital_rows`, `data_rows`
and `describe_partition` show the hospitals and their images in counts. The template puts these texts and estimates in their places.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pneumofed.common.config.classes import in_words
from pneumofed.common.errors import counted
from pneumofed.server.report.news import leads_of
from pneumofed.server.report.numbers import ReportedEstimate, approximate, duration, megabytes, number, whole
from pneumofed.server.report.read_run import StoredRun
from pneumofed.server.report.wording import PARTITION_WORDS
from pneumofed.server.runs.records import Metrics, RoundRecord, set_noun
from pneumofed.server.runs.summary_records import (
    BaselineResult,
    BaselineTable,
    DataCounts,
    MetricSpread,
    PartitionRecord,
    Results,
    RunSummary,
    SiteSummary,
)

METRIC_WORDS = {
    "auroc": ("AUROC", "chance that an image with pneumonia scores above one without"),
    "average_precision": ("Average precision", "mean precision over all sensitivities; depends on the share of pneumonia"),
    "sensitivity": ("Sensitivity", "share of the images with pneumonia that are found"),
    "specificity": ("Specificity", "share of the images without pneumonia that are called normal"),
    "accuracy": ("Accuracy", "share of all images that are called right"),
    "balanced_accuracy": ("Balanced accuracy", "mean of sensitivity and specificity"),
    "precision": ("Precision", "share of pneumonia among the images called so; depends on the share of pneumonia"),
    "f1": ("F1", "harmonic mean of precision and sensitivity"),
    "mcc": ("MCC", "Matthews correlation: 0 is chance, 1 is perfect"),
    "brier": ("Brier score", "mean squared error of the probabilities; 0 is best"),
    "ece": ("Calibration error", "mean gap between probability and frequency (ECE); 0 is best, and chance alone adds to it"),
    "log_loss": ("Log loss", "mean negative log probability of the truth; 0 is best"),
    "accuracy_three_class": ("Accuracy of the most probable class", "share of images whose most probable class is right"),
    "auroc_macro": ("AUROC, mean over classes", "mean of the areas of each class against the rest"),
    "sensitivity_macro": ("Sensitivity, mean over classes", "mean share of each class's images whose most probable class it is"),
}
COMPARED_METRICS = ("auroc", "accuracy", "sensitivity", "specificity")


@dataclass(frozen=True)
class MetricRow:
    """One metric on each evaluated set."""

    name: str
    meaning: str
    estimates: list[ReportedEstimate]


@dataclass(frozen=True)
class Tile:
    """One key number and the line below it."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class ComparedRow:
    """One way of training: its results, or a range over hospitals in `ranges`."""

    name: str
    estimates: list[ReportedEstimate]
    ranges: list[str]


@dataclass(frozen=True)
class TrainingComparison:
    """All ways of training on one central set."""

    noun: str
    interval_name: str
    rows: list[ComparedRow]
    leads: list[str]


def metric_rows(run: StoredRun, sets: Sequence[str]) -> list[MetricRow]:
    """Builds a row for each metric that any of `sets` has, in the order of METRIC_WORDS. Each class's own are in
    `server.report.class_results`.

    Args:
        run: whose results are shown.
        sets: central sets that were evaluated, a column each.
    """
    results = [run.results(name) for name in sets]
    return [
        MetricRow(name, in_words(meaning, run.classes), [found.get(key, ReportedEstimate()) for found in results])
        for key, (name, meaning) in METRIC_WORDS.items()
        if any(key in found for found in results)
    ]


def result_tiles(run: StoredRun, central_set: str) -> list[Tile]:
    """Builds the three numbers that a clinician asks for first, on one central set.

    Args:
        run: whose results are shown.
        central_set: `test` or `external`; it must have been evaluated.
    """
    results, shown = run.results(central_set), []
    for key in ("auroc", "sensitivity", "specificity"):
        found = results[key]
        span = f"{run.interval_name(central_set)} {found.span}" if found.span else "no interval"
        shown.append(Tile(f"{METRIC_WORDS[key][0]}, {set_noun(central_set)}", found.number, span))
    return shown


def run_tiles(run: StoredRun) -> list[Tile]:
    """Builds the tiles of the size and cost of the run."""
    planned = run.experiment.rounds if run.experiment else None
    of_planned = f"of {planned} planned" if planned else ""
    kept = f"; round {run.kept_round} kept" if run.kept_round else ""
    moved = run.summary.bytes
    return [
        Tile("Hospitals", str(len(run.site_reports())), "simulated" if run.virtual else ""),
        Tile("Rounds", str(run.completed), of_planned + kept),
        _wall_tile(run.summary),
        Tile(
            "Weights sent",
            megabytes(moved.total if moved else None),
            f"{megabytes(moved.down if moved else None)} down, {megabytes(moved.up if moved else None)} up",
        ),
    ]


def _wall_tile(summary: RunSummary) -> Tile:
    """The whole of a simulation with its parts; of a federation the time from the first message to the end."""
    wall = summary.wall
    if wall is None or not wall.total:
        return Tile("Wall time", duration(summary.seconds), "training and judging")
    return Tile("Wall time", duration(wall.total), ", ".join(f"{name} {duration(sec)}" for name, sec in wall.parts.items()))


def comparisons(run: StoredRun) -> list[TrainingComparison]:
    """Compares federated training, pooled training and hospitals alone on each central set; empty without baselines."""
    baselines = run.summary.baselines
    return [_compare(run, baselines, name) for name in run.sets if run.is_final(name)] if baselines else []


def _compare(run: StoredRun, baselines: BaselineTable, name: str) -> TrainingComparison:
    alone = {site: found for site, result in baselines.alone.items() if (found := result.central(name))}
    ranked = sorted(alone, key=lambda site: _area(alone[site]))
    rows = [_compared_row("Federated", run.summary.central(name))]
    if baselines.pooled and (pooled := baselines.pooled.central(name)):
        rows.append(_compared_row("All images pooled", pooled))
    if ranked:
        rows.append(_compared_row(f"Best hospital alone ({ranked[-1]})", alone[ranked[-1]]))
        rows.append(_mean_row(len(alone), baselines.alone_summary.get(name, {})))
        rows.append(_compared_row(f"Worst hospital alone ({ranked[0]})", alone[ranked[0]]))
    return TrainingComparison(set_noun(name), run.interval_name(name), rows, leads_of(run, name))


def _area(results: Results) -> float:
    value = ReportedEstimate.of(results.get("auroc")).value
    return -math.inf if value is None else value


def _compared_row(name: str, results: Results) -> ComparedRow:
    return ComparedRow(name, [ReportedEstimate.of(results.get(metric)) for metric in COMPARED_METRICS], [])


def _mean_row(hospitals: int, found: Mapping[str, MetricSpread]) -> ComparedRow:
    spreads = [found.get(metric, MetricSpread()) for metric in COMPARED_METRICS]
    ranges = [f"from {number(spread.worst)} to {number(spread.best)}" for spread in spreads]
    return ComparedRow(
        f"Mean of {counted(hospitals, 'hospital')} alone", [ReportedEstimate(spread.mean) for spread in spreads], ranges
    )


def untrained(run: StoredRun) -> dict[str, str]:
    """Lists baselines without a result and why."""
    baselines = run.summary.baselines or BaselineTable()
    results = {"all images pooled": baselines.pooled or BaselineResult(), **baselines.alone}
    return {name: result.error for name, result in results.items() if result.error is not None}


@dataclass(frozen=True)
class HospitalResult:
    """One hospital: its counts, its part in the rounds, and the kept model on its validation patients."""

    name: str
    images: str
    patients: str
    classes: list[str]
    train: str
    validation: str
    skipped: list[str]
    auroc: ReportedEstimate
    evaluated: str
    rounds: str
    failures: int
    staleness: str
    """Of its updates in asynchronous rounds; empty in synchronous ones."""


@dataclass(frozen=True)
class Participation:
    """In how many rounds each hospital was asked to train, did so, and failed or was left out."""

    drawn: Counter[str]
    trained: Counter[str]
    failed: Counter[str]
    staleness: Mapping[str, Sequence[int]]
    """Of each update in asynchronous rounds."""


@dataclass(frozen=True)
class DataRow:
    """The images of one party in counts."""

    name: str
    found: str
    used: str
    patients: str
    classes: list[str]
    notes: list[str]


def class_names(run: StoredRun) -> list[str]:
    """Lists the classes that the hospitals' counts have, the task's own first."""
    reported = {label for report in run.site_reports().values() for label in report.classes or {}}
    return [label for label in run.classes if label in reported] + sorted(reported - set(run.classes))


def class_counts(run: StoredRun) -> dict[str, Mapping[str, int]]:
    """Counts images by class of each hospital that reported them."""
    return {name: report.classes for name, report in run.site_reports().items() if report.classes}


def describe_partition(run: StoredRun) -> str:
    """Describes how virtual hospitals were dealt their images, in a sentence; empty for real ones."""
    dealt, kind = run.summary.partition or PartitionRecord(), run.partition_kind
    if not run.virtual or not kind:
        return ""
    concentration = (
        f" (Dirichlet draws, concentration {dealt.alpha:g})"
        if dealt.alpha is not None and kind in ("dirichlet", "quantity")
        else ""
    )
    text = f"Patients were dealt to simulated hospitals, {PARTITION_WORDS.get(kind, kind)}{concentration}."
    if dealt.label_skew_bits is None:
        return text
    skew = number(dealt.label_skew_bits)
    return f"{text} Label skew: {skew} bits, where 0 is the same mix of classes in every hospital and 1 the most there can be."


def hospital_rows(run: StoredRun) -> list[HospitalResult]:
    """Builds a row for each hospital that took part."""
    labels, history = class_names(run), run.history
    part = Participation(
        drawn=Counter(site for line in history for site in line.drawn),
        trained=Counter(site for line in history for site in line.trained),
        failed=Counter(site for line in history for site in line.trouble),
        staleness=_staleness(history),
    )
    return [_hospital_row(run, name, report, labels, part) for name, report in run.site_reports().items()]


def _hospital_row(run: StoredRun, name: str, report: SiteSummary, labels: Sequence[str], part: Participation) -> HospitalResult:
    line, evaluated = _evaluated_at(run, name)
    in_another_round = f", round {line}" if line != run.kept_round else ""
    return HospitalResult(
        name=name,
        images=whole(report.images),
        patients=whole(report.patients),
        classes=[whole((report.classes or {}).get(label)) for label in labels],
        train=whole(report.train),
        validation=whole(report.validation),
        skipped=_list_counts(report.skipped) + _list_counts(report.warnings),
        auroc=approximate(evaluated or Metrics())["auroc"],
        evaluated=_mix(evaluated) + in_another_round if evaluated else "",
        rounds=f"{part.trained[name]} of {part.drawn[name]}",
        failures=part.failed[name],
        staleness=_describe_staleness(part.staleness.get(name, ())),
    )


def _staleness(history: Sequence[RoundRecord]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for line in history:
        for site, rounds in line.staleness.items():
            found.setdefault(site, []).append(rounds)
    return found


def _describe_staleness(staleness: Sequence[int]) -> str:
    return f"{statistics.mean(staleness):.1f} (at most {max(staleness)})" if staleness else ""


def _evaluated_at(run: StoredRun, site: str) -> tuple[int, Metrics | None]:
    """The round and the validation metrics of `site` in the kept round, else in its last one."""
    known = {line.round: found for line in run.history if site in line.sites and (found := line.sites[site].validation)}
    number = run.kept_round if run.kept_round in known else max(known, default=0)
    return number, known.get(number)


def _mix(found: Metrics) -> str:
    positive = found.n_positive or 0
    return f"of {(found.n or 0) - positive} + {positive}"


def describe_spread(rows: Sequence[HospitalResult]) -> str:
    """Describes the spread of validation AUROC over hospitals; empty where fewer than two have one."""
    values = [row.auroc.value for row in rows if row.auroc.value is not None]
    if len(values) < 2:
        return ""
    middle = statistics.median(values)
    return (
        f"Over {len(values)} hospitals with both classes in validation, its AUROC ranges from {number(min(values))} to "
        f"{number(max(values))} (median {number(middle)})."
    )


def data_rows(run: StoredRun) -> list[DataRow]:
    """Builds a row for all hospitals together and one for each central set: images found, used and left out."""
    reports: dict[str, DataCounts] = {"hospitals together": _joined(list(run.site_reports().values()))}
    reports |= {set_noun(name): counts for name, counts in run.summary.data.items()}
    return [
        DataRow(
            name=name,
            found=whole(report.found),
            used=whole(report.used),
            patients=whole(report.patients),
            classes=_list_counts(report.classes),
            notes=_list_counts(report.skipped) + _list_counts(report.warnings),
        )
        for name, report in reports.items()
        if report.model_fields_set
    ]


def _joined(reports: Sequence[SiteSummary]) -> SiteSummary:
    """The sum of the hospitals' counts; those that no hospital reported are missing."""
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
    names = dict.fromkeys(name for one in known for name in one)
    return {name: sum(one.get(name, 0) for one in known) for name in names} if known else None


def _list_counts(counts: Mapping[str, int] | None) -> list[str]:
    """`3 × image data truncated or corrupt`, one text a reason."""
    return [f"{n:,} × {reason}" for reason, n in (counts or {}).items()]
