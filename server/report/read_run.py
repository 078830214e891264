"""A run folder as the report reads it: whatever is there, in any state of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig, foreign_names
from pneumofed.common.config.reader import read_yaml
from pneumofed.common.errors import PneumofedError
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.server.report.numbers import ReportedEstimate, approximate
from pneumofed.server.runs.folder import RunFolder, best_round
from pneumofed.server.runs.records import CENTRAL_SETS, Metrics, RoundRecord, StoredThreshold
from pneumofed.server.runs.summary_records import RunSummary, SiteSummary

STATUS_WORDS = {"succeeded": "Succeeded", "failed": "Failed", "stopped": "Stopped"}


@dataclass(frozen=True)
class SetSize:
    """How many images of each class a set holds; `patients` is None where nobody reported it."""

    images: int
    patients: int | None
    classes: Mapping[str, int]

    @property
    def normal(self) -> int:
        return self.classes.get("normal", 0)

    @property
    def pneumonia(self) -> int:
        return self.images - self.normal


@dataclass(frozen=True)
class StoredRun:
    """What a run folder holds. `experiment` is None where config.yaml is missing or damaged; `problems` names damaged files."""

    folder: RunFolder
    experiment: ExperimentConfig | None
    summary: RunSummary
    history: list[RoundRecord]
    environment: Mapping[str, Any]
    simulation: Mapping[str, Any]
    predictions: Mapping[str, Predictions]
    problems: list[str] = field(default_factory=list)
    coordinator: CoordinatorConfig | None = None

    @property
    def name(self) -> str:
        return self.experiment.name if self.experiment else self.summary.name or self.folder.path.resolve().name

    @property
    def status(self) -> str:
        """`succeeded`, `failed`, `stopped` or, of a run that left no end, `unfinished`."""
        status = self.summary.status
        return status if status in STATUS_WORDS else "unfinished"

    @property
    def completed(self) -> int:
        return len(self.history)

    @property
    def kept_round(self) -> int:
        """The round whose model was kept; 0 if none was completed."""
        return best_round(self.history)

    @property
    def kept_line(self) -> RoundRecord | None:
        """The round whose model was kept; None if none was completed."""
        return next((line for line in self.history if line.round == self.kept_round), None)

    @property
    def classes(self) -> tuple[str, ...]:
        """The task's classes, `normal` first."""
        task = self.experiment.task if self.experiment else "binary"
        return self.summary.classes or classes_of(task)

    @property
    def sets(self) -> list[str]:
        """Held-out sets that were evaluated at least once: `test` and `external` first."""
        measured = [name for line in self.history for name in line.measured if name != "validation"]
        found = dict.fromkeys([*self.summary.results, *measured])
        return [name for name in CENTRAL_SETS if name in found] + [name for name in found if name not in CENTRAL_SETS]

    @property
    def foreign_sets(self) -> list[str]:
        """Those of `sets` with results that are of other hospitals than the ones that train, as far as the coordinator's settings tell."""
        known = foreign_names(self.coordinator) if self.coordinator else ["external"]
        return [name for name in self.sets if name in known and self.results(name) and self.size(name).images]

    @property
    def reported_line(self) -> RoundRecord | None:
        """The best round in which a central set was evaluated; the kept one where none was."""
        evaluated = [line for line in self.history if line.measured.keys() - {"validation"}]
        best = best_round(evaluated)
        return next((line for line in evaluated if line.round == best), self.kept_line)

    @property
    def threshold(self) -> StoredThreshold | None:
        """The threshold that the reported results were made with; None before one was chosen."""
        return self.summary.threshold or (self.reported_line.threshold if self.reported_line else None)

    @property
    def threshold_value(self) -> float | None:
        """In [0, 1], or just above 1; None before one was chosen."""
        return self.threshold.value if self.threshold else None

    @property
    def partition_kind(self) -> str | None:
        """How virtual hospitals were dealt their patients; None for real ones."""
        return (self.summary.partition and self.summary.partition.kind) or self.simulation.get("partition")

    @property
    def virtual(self) -> bool:
        """Whether the hospitals were simulated on one machine."""
        return bool(self.simulation)

    def is_final(self, central_set: str) -> bool:
        """Says whether the set was evaluated at the end, with bootstrap intervals.

        Args:
            central_set: name of a held-out set.
        """
        return bool(self.summary.central(central_set))

    def interval_name(self, central_set: str) -> str:
        """Names the intervals: `95% CI`; approximate ones of unfinished runs are of 95% whatever was asked for.

        Args:
            central_set: name of a held-out set.
        """
        if self.is_final(central_set) and self.experiment:
            return f"{100 * self.experiment.evaluation.confidence:g}% CI"
        return "CI" if self.is_final(central_set) else "95% CI"

    def results(self, central_set: str) -> dict[str, ReportedEstimate]:
        """Reads the set's metrics: the final ones, else those of `reported_line`; empty if there are none.

        Args:
            central_set: name of a held-out set.
        """
        if self.is_final(central_set):
            return {metric: ReportedEstimate.of(found) for metric, found in self.summary.central(central_set).items()}
        found = self._reported(central_set)
        return approximate(found) if found else {}

    def size(self, central_set: str) -> SetSize:
        """Counts the set's images as the coordinator's data report has it, else as counted in a round.

        Args:
            central_set: name of a held-out set.
        """
        report = self.summary.data.get(central_set)
        if report:
            return SetSize(report.used or 0, report.patients, report.classes or {})
        counts = self._reported(central_set) or Metrics()
        images, positive = counts.n or 0, counts.n_positive or 0
        return SetSize(images, None, {"normal": images - positive})

    def site_reports(self) -> dict[str, SiteSummary]:
        """Counts of each hospital's images by name; of a run without an end those that the deal and the rounds show."""
        if self.summary.sites:
            return dict(self.summary.sites)
        dealt = self.summary.partition.hospitals if self.summary.partition else ()
        reports = {row.name: SiteSummary(found=row.images, patients=row.patients, classes=row.classes) for row in dealt}
        for line in self.history:
            for name, site in line.sites.items():
                seen = {
                    "train": site.train.num_examples if site.train else None,
                    "validation": site.validation.n if site.validation else None,
                }
                known = {key: n for key, n in seen.items() if n is not None}
                reports[name] = reports.get(name, SiteSummary()).updated(**known)
        return dict(sorted(reports.items()))

    def _reported(self, central_set: str) -> Metrics | None:
        return self.reported_line.central(central_set) if self.reported_line else None

    def kept_back(self, kind: str) -> list[str]:
        """Hospitals whose policy keeps back so much (`common.config.experiment.Withheld`), or noises its counts (`count_noise`)."""
        if kind == "count_noise":
            return sorted(name for name, report in self.summary.sites.items() if report.count_noise)
        return sorted(name for name, report in self.summary.sites.items() if kind in (report.withheld or ()))

    def absent(self) -> dict[str, str]:
        """Lists why each party, by name, was not a site of the run at its end."""
        last = self.history[-1].absent if self.history else {}
        return dict(last if self.summary.absent is None else self.summary.absent)


def read_run(path: Path) -> StoredRun:
    """Reads the run in `path`; what is missing or damaged is left out, the latter named in `problems`."""
    folder, problems = RunFolder(path), list[str]()
    summary: RunSummary = _or_note(problems, RunSummary(), folder.read_summary)
    predictions = {
        name: _or_note(problems, None, lambda name=name: Predictions.read_csv(folder.predictions(name)))
        for name in summary.results
        if summary.threshold and folder.predictions(name).exists()
    }
    return StoredRun(
        folder=folder,
        experiment=_or_note(problems, None, folder.read_config) if folder.config.exists() else None,
        summary=summary,
        history=_or_note(problems, [], folder.read_history),
        environment=_or_note(problems, {}, lambda: _read_json(path / "environment.json")),
        simulation=_or_note(problems, {}, lambda: _read_if_there(path / "simulation.yaml")),
        predictions={name: found for name, found in predictions.items() if found is not None},
        problems=problems,
        coordinator=_or_note(problems, None, folder.read_coordinator),
    )


def _or_note(problems: list[str], otherwise: Any, read: Any) -> Any:
    try:
        return read()
    except (PneumofedError, ValueError) as error:
        problems.append(str(error))
        return otherwise


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_yaml(path) if path.exists() else {}
