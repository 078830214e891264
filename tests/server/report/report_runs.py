"""Run folders as the study, the simulation and the baselines leave them, made of drawn scores: no image, no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pneumofed.common.config.classes import LabelTask, classes_of
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.evaluation.bootstrap import Bootstrap, bootstrap, bootstrap_difference
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import RoundRecord
from pneumofed.server.runs.summary_records import RunSummary

THRESHOLD = {"value": 0.43, "policy": "youden", "reason_of_fallback": None, "sensitivity": 0.96, "specificity": 0.94}
COMPARED = ("auroc", "accuracy", "sensitivity", "specificity")
IMAGES = {"test": (60, 100), "external": (12, 120)}


def draw_predictions(
    normal: int, pneumonia: int, skill: float, draw: np.random.Generator, task: LabelTask = "binary"
) -> Predictions:
    """Scores of `normal` and `pneumonia` images, the further apart the higher `skill`; two images a patient."""
    classes = len(classes_of(task))
    labels = np.concatenate([np.zeros(normal, np.int64), 1 + np.arange(pneumonia) % (classes - 1)])
    logits = draw.normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += skill
    patients = tuple(f"p{index // 2:05d}" for index in range(len(labels)))
    return Predictions.from_logits(logits, labels, patients)


class RunMaker:
    """Writes a run folder step by step; `size` multiplies the images of all sets."""

    def __init__(
        self, path: Path, sites: Sequence[str] = ("north", "south"), task: LabelTask = "binary", size: int = 1, **changes: Any
    ) -> None:
        self.folder, self.sites, self.task, self.size = RunFolder(path), list(sites), task, size
        self.folder.prepare()
        self.experiment = build_config(ExperimentConfig, {"name": "study", "rounds": 4, "task": task, **changes})
        self.folder.write_config(self.experiment)
        self.draw = np.random.default_rng(7)
        environment = {"python": "3.11.9", "packages": {"torch": "2.13.0"}, "git": {"commit": "4f1c2a9", "dirty": True}}
        (path / "environment.json").write_text(json.dumps(environment))

    @property
    def path(self) -> Path:
        return self.folder.path

    def counts(self, found: Predictions) -> dict[str, int]:
        names = classes_of(self.task)
        return {name: int((found.labels == k).sum()) for k, name in enumerate(names)}

    def predict(self, name: str, skill: float) -> Predictions:
        normal, pneumonia = (self.size * n for n in IMAGES[name])
        return draw_predictions(normal, pneumonia, skill, self.draw, self.task)

    def rounds(self, count: int, sets: Sequence[str] = ("test", "external"), **changes: Any) -> RunMaker:
        """Appends `count` rounds in which every site trains; `changes` are laid over each line."""
        for number in range(1, count + 1):
            self.folder.append_history(RoundRecord.model_validate({**self._line(number, sets), **changes}))
        return self

    def _line(self, number: int, sets: Sequence[str]) -> dict[str, Any]:
        skill = 2.2 * (1 - np.exp(-0.6 * number))
        validation = {name: draw_predictions(8, 24, skill + 0.6, self.draw, self.task) for name in self.sites}
        judged = {name: metrics(Statistics.of(found), 0.43) for name, found in validation.items()}
        pooled = metrics(Statistics.of(draw_predictions(80, 240, skill + 0.6, self.draw, self.task)), 0.43)
        central = {name: metrics(Statistics.of(self.predict(name, skill)), 0.43) for name in sets}
        told = {name: {"train": self._training(number), "validation": found} for name, found in judged.items()}
        clock = {"train": 31.2, "aggregate": 0.2, "evaluate": 3.1, "central": 4.4, "total": 38.9}
        sizes = {"down": 89_400_000 * len(self.sites), "up": 44_700_000 * len(self.sites)}
        return {
            "round": number, "drawn": self.sites, "failures": {}, "left_out": {}, "threshold": THRESHOLD, "validation": pooled, **central,
            "sites": told, "absent": {}, "seconds": clock, "bytes": sizes,
        }  # fmt: skip

    def _training(self, number: int) -> dict[str, float]:
        loss = 0.65 * np.exp(-0.3 * number) + 0.03 * self.draw.random()
        return {"num_examples": int(self.draw.integers(50, 900)), "train_loss": loss, "train_accuracy": 0.9, "steps": 12}

    def end(self, status: str, sets: Sequence[str] = (), **changes: Any) -> RunMaker:
        """Writes the summary; with `sets` the final results of these, too."""
        history = self.folder.read_history()
        summary: dict[str, Any] = {"status": status, "name": self.experiment.name, "seed": 0, "rounds_completed": len(history)}
        summary |= {"bytes": {"down": 7e9, "up": 3e9, "total": 1e10}, "seconds": 512.3}
        if sets:
            summary |= self._results(sets, history)
        self.folder.write_summary(RunSummary.model_validate({**summary, **changes}))
        return self

    def _results(self, sets: Sequence[str], history: Sequence[RoundRecord]) -> dict[str, Any]:
        results: dict[str, Any] = {"threshold": THRESHOLD, "validation": history[-1].validation, "classes": classes_of(self.task)}
        results |= {"data": {}, "absent": {}, "sites": {name: self._report(k) for k, name in enumerate(self.sites)}}
        for name in sets:
            found = self.predict(name, 2.2)
            found.write_csv(self.folder.predictions(name))
            results[name] = bootstrap(found, 0.43, Bootstrap(60))
            results["data"][name] = {
                "found": len(found) + 2, "used": len(found), "skipped": {"same image content seen before": 2},
                "classes": self.counts(found), "patients": len(set(found.patients)), "warnings": {},
            }  # fmt: skip
        return results

    def _report(self, index: int) -> dict[str, Any]:
        mix = self.draw.dirichlet(np.full(len(classes_of(self.task)), 0.8)) * (900 / (1 + 0.3 * index))
        classes = {name: int(n) for name, n in zip(classes_of(self.task), mix, strict=True)}
        used = sum(classes.values())
        report = {"found": used + index % 3, "used": used, "classes": classes, "patients": used * 2 // 3, "warnings": {}}
        skipped = {"image data truncated or corrupt": index % 3} if index % 3 else {}
        return {**report, "skipped": skipped, "train": used - used // 10, "validation": used // 10}

    def add_baselines(self) -> RunMaker:
        """The table of `simulation.baselines.compare_baselines`, of drawn scores."""
        summary = self.folder.read_summary()
        sets = list(summary.results)
        federated = {name: Predictions.read_csv(self.folder.predictions(name)) for name in sets}
        alone = {site: self._judge_baseline(federated, 0.4 + 1.5 * self.draw.random())[0] for site in self.sites}
        pooled, better = self._judge_baseline(federated, 2.3)
        table: dict[str, Any] = {"pooled": pooled, "alone": alone, "alone_summary": {}, "lead": {}}
        for name in sets:
            values = {key: [result[name][key]["value"] for result in alone.values()] for key in COMPARED}
            table["alone_summary"][name] = {
                key: {"mean": float(np.mean(v)), "best": max(v), "worst": min(v), "hospitals": len(v)}
                for key, v in values.items()
            }
            lead = bootstrap_difference(federated[name], better[name], Bootstrap(60))
            table["lead"][name] = {"best_alone": self.sites[0], "over_pooled": lead, "over_best_alone": lead}
        self.folder.write_summary(summary.updated(baselines=table))
        return self

    def _judge_baseline(
        self, federated: Mapping[str, Predictions], skill: float
    ) -> tuple[dict[str, Any], dict[str, Predictions]]:
        found = {}
        for name, own in federated.items():
            logits = self.draw.normal(size=own.probabilities.shape)
            logits[np.arange(len(own)), own.labels] += skill
            found[name] = Predictions.from_logits(logits, own.labels, own.patients, own.images)
        return {"train": 700, **{name: bootstrap(one, 0.5, Bootstrap(60)) for name, one in found.items()}}, found

    def simulated(self) -> RunMaker:
        """The settings of a simulation beside the run, and the deal in the summary."""
        values = {
            "data": "/data/chest_xray",
            "external": "/data/external",
            "hospitals": len(self.sites),
            "partition": "dirichlet",
            "alpha": 0.5,
        }
        (self.path / "simulation.yaml").write_text(yaml.safe_dump({**values, "threads": 1}))
        rows = [
            {"name": name, "hospital": k, "images": 90, "patients": 60, "classes": {"normal": 30, "pneumonia": 60}}
            for k, name in enumerate(self.sites)
        ]
        deal = {"kind": "dirichlet", "alpha": 0.5, "label_skew_bits": 0.21, "hospitals": rows}
        self.folder.write_summary(self.folder.read_summary().updated(partition=deal, phantom=False))
        return self
