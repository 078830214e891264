"""Each class against the rest, of a task of more than two: tables for the report and the model card.

Which disease a model takes for which is not seen from sensitivity and specificity of "not normal". Here each class has its own area under
the curve, and its sensitivity and specificity where the most probable class is taken for the answer (`common.evaluation.metrics`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pneumofed.server.report.numbers import ReportedEstimate, whole
from pneumofed.server.report.read_run import StoredRun
from pneumofed.server.runs.records import set_noun

CLASS_METRICS = ("auroc", "sensitivity", "specificity")
"""With `_class_K` behind it, the metric of class K."""


@dataclass(frozen=True)
class ClassRow:
    """One class of a set: its images, and `CLASS_METRICS` with intervals."""

    name: str
    images: str
    estimates: list[ReportedEstimate]


@dataclass(frozen=True)
class ClassTable:
    """The classes of one set."""

    noun: str
    interval_name: str
    rows: list[ClassRow]


def class_tables(run: StoredRun, sets: Sequence[str]) -> list[ClassTable]:
    """Builds a table for each of `sets` that has results by class; none of a task of two classes.

    Args:
        run: whose results are shown.
        sets: central sets that were evaluated.
    """
    tables = []
    for name in sets:
        results, size = run.results(name), run.size(name)
        rows = [
            ClassRow(label, _count(size.classes, label), _estimates(results, k))
            for k, label in enumerate(run.classes)
            if f"auroc_class_{k}" in results
        ]
        if rows:
            tables.append(ClassTable(set_noun(name), run.interval_name(name), rows))
    return tables


def _count(classes: Mapping[str, int], label: str) -> str:
    return whole(classes[label]) if label in classes else whole(None)


def _estimates(results: Mapping[str, ReportedEstimate], k: int) -> list[ReportedEstimate]:
    return [results.get(f"{metric}_class_{k}", ReportedEstimate()) for metric in CLASS_METRICS]
