"""Results as the report shows them: key numbers, metrics of each set, and the baselines beside the federated model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.report_numbers import Estimate, count, duration, megabytes, number
from server.report_run import SETS, Run
from server.report_words import tell_lead
from server.summary_records import BaselineLead, BaselineResult, BaselineTable, MetricSpread, Results

METRICS = {
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
    "ece": ("Calibration error", "mean gap between probability and frequency (ECE); 0 is best"),
    "log_loss": ("Log loss", "mean negative log probability of the truth; 0 is best"),
    "accuracy_three_class": ("Accuracy, three classes", "share of images whose most probable class is right"),
    "auroc_macro": ("AUROC, mean over classes", "mean of the areas of each class against the rest"),
}
COMPARED = ("auroc", "accuracy", "sensitivity", "specificity")


@dataclass(frozen=True)
class MetricRow:
    """One metric on each judged set."""

    name: str
    meaning: str
    estimates: list[Estimate]


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
    estimates: list[Estimate]
    ranges: list[str]


@dataclass(frozen=True)
class Comparison:
    """All ways of training on one central set."""

    noun: str
    interval_name: str
    rows: list[ComparedRow]
    leads: list[str]


def metric_rows(run: Run, sets: Sequence[str]) -> list[MetricRow]:
    """A row for each metric that any of `sets` has, in the order of METRICS, each class's own AUROC last."""
    results = [run.results(name) for name in sets]
    names = {f"auroc_class_{k}": (f"AUROC, {label} against the rest", "") for k, label in enumerate(run.classes)}
    rows = {**METRICS, **names}
    return [
        MetricRow(name, meaning, [found.get(key, Estimate()) for found in results])
        for key, (name, meaning) in rows.items()
        if any(key in found for found in results)
    ]


def result_tiles(run: Run, central_set: str) -> list[Tile]:
    """The three numbers that a clinician asks for first, on one judged set."""
    results, shown = run.results(central_set), []
    for key in ("auroc", "sensitivity", "specificity"):
        found = results[key]
        span = f"{run.interval_name(central_set)} {found.span}" if found.span else "no interval"
        shown.append(Tile(f"{METRICS[key][0]}, {SETS[central_set]}", found.number, span))
    return shown


def run_tiles(run: Run) -> list[Tile]:
    """Size and cost of the run."""
    planned = run.experiment.rounds if run.experiment else None
    of_planned = f"of {planned} planned" if planned else ""
    kept = f"; round {run.kept_round} kept" if run.kept_round else ""
    moved = run.summary.bytes
    return [
        Tile("Hospitals", str(len(run.site_reports())), "simulated" if run.virtual else ""),
        Tile("Rounds", str(run.completed), of_planned + kept),
        Tile("Wall time", duration(run.summary.seconds), "training and judging"),
        Tile(
            "Weights sent",
            megabytes(moved.total if moved else None),
            f"{megabytes(moved.down if moved else None)} down, {megabytes(moved.up if moved else None)} up",
        ),
    ]


def comparisons(run: Run) -> list[Comparison]:
    """Federated, pooled, and hospitals alone on each central set; empty without baselines."""
    baselines = run.summary.baselines
    return [_compare(run, baselines, name) for name in SETS if run.is_final(name)] if baselines else []


def _compare(run: Run, baselines: BaselineTable, name: str) -> Comparison:
    alone = {site: found for site, result in baselines.alone.items() if (found := result.central(name))}
    ranked = sorted(alone, key=lambda site: _area(alone[site]))
    rows = [_compared_row("Federated", run.summary.central(name))]
    if baselines.pooled and (pooled := baselines.pooled.central(name)):
        rows.append(_compared_row("All images pooled", pooled))
    if ranked:
        rows.append(_compared_row(f"Best hospital alone ({ranked[-1]})", alone[ranked[-1]]))
        rows.append(_mean_row(len(alone), baselines.alone_summary.get(name, {})))
        rows.append(_compared_row(f"Worst hospital alone ({ranked[0]})", alone[ranked[0]]))
    lead = baselines.lead.get(name, BaselineLead())
    interval_name = run.interval_name(name)
    told = [
        tell_lead(lead.over_pooled, "training on all images pooled", interval_name),
        tell_lead(lead.over_best_alone, f"the best hospital alone ({lead.best_alone})", interval_name),
    ]
    return Comparison(SETS[name], interval_name, rows, [text for text in told if text])


def _area(results: Results) -> float:
    value = Estimate.of(results.get("auroc")).value
    return -math.inf if value is None else value


def _compared_row(name: str, results: Results) -> ComparedRow:
    return ComparedRow(name, [Estimate.of(results.get(metric)) for metric in COMPARED], [])


def _mean_row(hospitals: int, found: Mapping[str, MetricSpread]) -> ComparedRow:
    spreads = [found.get(metric, MetricSpread()) for metric in COMPARED]
    ranges = [f"from {number(spread.worst)} to {number(spread.best)}" for spread in spreads]
    return ComparedRow(f"Mean of {count(hospitals, 'hospital')} alone", [Estimate(spread.mean) for spread in spreads], ranges)


def untrained(run: Run) -> dict[str, str]:
    """Baselines without a result and why."""
    baselines = run.summary.baselines or BaselineTable()
    results = {"all images pooled": baselines.pooled or BaselineResult(), **baselines.alone}
    return {name: result.error for name, result in results.items() if result.error is not None}
