"""A run folder as the report reads it: whatever is there, in any state of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import ExperimentConfig
from common.config_reader import read_yaml
from common.data.manifest import CLASSES
from common.errors import PneumofedError
from common.evaluation.predictions import Predictions
from server.progress import best_round
from server.report_numbers import Estimate, approximate
from server.run_folder import RunFolder

SETS = {"test": "test set", "external": "external set"}
COUNTS, COUNTS_BY_NAME = ("found", "used", "patients", "train", "validation"), ("classes", "skipped", "warnings")
"""What a site's data report holds: see `common.data.report.DataReport.public`, and how many images train and validate."""
STATUSES = {"succeeded": "Succeeded", "failed": "Failed", "stopped": "Stopped"}


@dataclass(frozen=True)
class SetSize:
    """How many images of each class a set holds; `patients` is None where nobody told."""

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
class Run:
    """What a run folder holds. `experiment` is None where config.yaml is missing or damaged; `problems` tells of damaged files."""

    folder: RunFolder
    experiment: ExperimentConfig | None
    summary: Mapping[str, Any]
    history: list[dict[str, Any]]
    environment: Mapping[str, Any]
    simulation: Mapping[str, Any]
    predictions: Mapping[str, Predictions]
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.experiment.name if self.experiment else str(self.summary.get("name") or self.folder.path.resolve().name)

    @property
    def status(self) -> str:
        """`succeeded`, `failed`, `stopped` or, of a run that left no end, `unfinished`."""
        status = str(self.summary.get("status"))
        return status if status in STATUSES else "unfinished"

    @property
    def completed(self) -> int:
        return len(self.history)

    @property
    def kept_round(self) -> int:
        """The round whose model was kept; 0 if none was completed."""
        return best_round(self.history)

    @property
    def kept_line(self) -> Mapping[str, Any]:
        return next((line for line in self.history if line["round"] == self.kept_round), {})

    @property
    def classes(self) -> tuple[str, ...]:
        """The task's classes, `normal` first."""
        task = self.experiment.task if self.experiment else "binary"
        return tuple(self.summary.get("classes") or CLASSES[task])

    @property
    def reported_line(self) -> Mapping[str, Any]:
        """The best round in which a central set was judged; the kept one where none was."""
        judged = [line for line in self.history if any(line.get(name) for name in SETS)]
        best = best_round(judged)
        return next((line for line in judged if line["round"] == best), self.kept_line)

    @property
    def threshold(self) -> Mapping[str, Any]:
        """The threshold that the reported results were made with."""
        return self.summary.get("threshold") or self.reported_line.get("threshold") or {}

    @property
    def virtual(self) -> bool:
        """Whether the hospitals were simulated on one machine."""
        return bool(self.simulation)

    def is_final(self, central_set: str) -> bool:
        """Whether the set was judged at the end, with bootstrap intervals."""
        return bool(self.summary.get(central_set))

    def interval_name(self, central_set: str) -> str:
        """`95% CI`; approximate intervals of unfinished runs are of 95% whatever was asked for."""
        if self.is_final(central_set) and self.experiment:
            return f"{100 * self.experiment.evaluation.confidence:g}% CI"
        return "CI" if self.is_final(central_set) else "95% CI"

    def results(self, central_set: str) -> dict[str, Estimate]:
        """The set's metrics: the final ones, else those of `reported_line`; empty if there are none."""
        if self.is_final(central_set):
            return {metric: Estimate.of(found) for metric, found in self.summary[central_set].items()}
        found = self.reported_line.get(central_set)
        return approximate(found) if found else {}

    def size(self, central_set: str) -> SetSize:
        """The set's images as the coordinator's data report tells, else as counted in a round."""
        report = (self.summary.get("data") or {}).get(central_set)
        if report:
            return SetSize(int(report["used"]), int(report["patients"]), report["classes"])
        counts = self.reported_line.get(central_set) or {}
        images, positive = int(counts.get("n") or 0), int(counts.get("n_positive") or 0)
        return SetSize(images, None, {"normal": images - positive})

    def site_reports(self) -> dict[str, Mapping[str, Any]]:
        """Counts of each hospital's images by name; of a run without an end those that the deal and the rounds tell."""
        if self.summary.get("sites"):
            return {name: _counts_alone(report) for name, report in self.summary["sites"].items()}
        reports: dict[str, dict[str, Any]] = {}
        for row in (self.summary.get("partition") or {}).get("hospitals", []):
            reports[row["name"]] = {"found": row["images"], "patients": row["patients"], "classes": row["classes"]}
        for line in self.history:
            for name, told in line.get("sites", {}).items():
                seen = {"train": told.get("train", {}).get("num_examples"), "validation": told.get("validation", {}).get("n")}
                reports.setdefault(name, {}).update({key: n for key, n in seen.items() if n is not None})
        return dict(sorted(reports.items()))

    def kept_back(self, kind: str) -> list[str]:
        """Hospitals whose policy keeps back so much (`common.config_types.Withheld`), or noises its counts (`count_noise`)."""
        told = {name: report for name, report in (self.summary.get("sites") or {}).items() if isinstance(report, dict)}
        withheld = {name: found for name, report in told.items() if isinstance(found := report.get("withheld"), list)}
        return sorted(name for name, report in told.items() if report.get(kind) or kind in withheld.get(name, ()))

    def absent(self) -> dict[str, str]:
        """Reason by name of everyone who was not a site of the run at its end."""
        last = self.history[-1].get("absent", {}) if self.history else {}
        return dict(self.summary.get("absent", last) or {})


def read_run(path: Path) -> Run:
    """The run in `path`; what is missing or damaged is left out, the latter named in `problems`."""
    folder, problems = RunFolder(path), list[str]()
    summary = _or_note(problems, {}, folder.read_summary)
    predictions = {
        name: _or_note(problems, None, lambda name=name: Predictions.read_csv(folder.predictions(name)))
        for name in SETS
        if summary.get(name) and summary.get("threshold") and folder.predictions(name).exists()
    }
    return Run(
        folder=folder,
        experiment=_or_note(problems, None, folder.read_config) if folder.config.exists() else None,
        summary=summary,
        history=folder.read_history(),
        environment=_or_note(problems, {}, lambda: _read_json(path / "environment.json")),
        simulation=_or_note(problems, {}, lambda: _read_if_there(path / "simulation.yaml")),
        predictions={name: found for name, found in predictions.items() if found is not None},
        problems=problems,
    )


def _counts_alone(report: Any) -> dict[str, Any]:
    """The counts in a site's report, which came over the wire and may hold anything."""
    told = report if isinstance(report, dict) else {}
    counts = {key: told[key] for key in COUNTS if isinstance(told.get(key), int)}
    by_name = {key: told[key] for key in COUNTS_BY_NAME if isinstance(told.get(key), dict)}
    return {**counts, **{key: {name: n for name, n in mix.items() if isinstance(n, int)} for key, mix in by_name.items()}}


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
