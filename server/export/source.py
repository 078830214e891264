"""What an export takes from a run folder: the run and its kept model (`read_finished_run`), and the limits of the suitability check from
the hospitals' own patients, where the run asked for them (`find_hospital_limits`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.errors import BundleError, ConfigError
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.model_bundle.manifest import CardFacts, PrivacySpent, Provenance
from pneumofed.common.model_bundle.suitability import Suitability
from pneumofed.server.report.course import describe_privacy
from pneumofed.server.report.read_run import StoredRun, read_run
from pneumofed.server.runs.checkpoints import Checkpoint, read_checkpoint
from pneumofed.server.runs.records import StoredThreshold


@dataclass(frozen=True, eq=False)
class Source:
    """A finished run.

    Attributes:
        run: its folder as the report reads it.
        experiment: its settings.
        point: the threshold that the run's validation chose.
        checkpoint: the model that was kept.
        validation: the hospitals' pooled validation statistics of that model; None where the run kept none, and under FedBN, where they
            are of networks that each have the hospital's own normalisation layers.
        coordinator: where the central sets lie; None where the run does not say.
    """

    run: StoredRun
    experiment: ExperimentConfig
    point: StoredThreshold
    checkpoint: Checkpoint
    validation: Statistics | None
    coordinator: CoordinatorConfig | None

    @property
    def classes(self) -> tuple[str, ...]:
        return classes_of(self.experiment.task)

    @property
    def threshold(self) -> float:
        """On the network's own probability."""
        return self.point.value

    @property
    def design_effect(self) -> float:
        """How many images count as one where images of a patient are alike: sum(m^2) / sum(m) for m images a patient (Kish 1965).

        Hospitals report counts alone, so all patients of one hospital are taken to have equally many; 1 where they reported none.
        """
        counts = [
            (report.used, report.patients) for report in self.run.site_reports().values() if report.used and report.patients
        ]
        images = sum(used for used, _ in counts)
        return float(sum(Fraction(used**2, patients) for used, patients in counts) / images) if images else 1.0


def read_finished_run(path: Path) -> Source:
    """Reads the finished run in `path`.

    Raises:
        ConfigError: `path` is no run folder.
        BundleError: the run did not succeed, so that there is no evaluated model to give to hospitals.
        CheckpointError: its model or its history cannot be read.
    """
    if not (path / "config.yaml").exists():
        raise ConfigError(f"{path} is no run folder: it holds no config.yaml")
    run = read_run(path)
    if run.status != "succeeded" or run.experiment is None or run.threshold is None:
        raise BundleError(f"{path} is no run that succeeded (it is {run.status}): only a finished and judged model is exported")
    run.folder.read_history()  # a damaged one would leave out what the run spent of privacy
    run.folder.remember_study_code(run.experiment)
    checkpoint = read_checkpoint(run.folder.best_checkpoint)
    kept = run.folder.read_validation(len(classes_of(run.experiment.task)))
    is_shared = run.experiment.strategy.name != "fedbn"
    validation = kept[1] if kept and kept[0] == checkpoint.round and is_shared else None
    return Source(run, run.experiment, run.threshold, checkpoint, validation, run.folder.read_coordinator())


def describe_source(source: Source) -> CardFacts:
    """Collects the facts of the card that the run folder holds."""
    reports = source.run.site_reports()
    counted = [report for report in reports.values() if report.used is not None]
    classes = {name: sum((report.classes or {}).get(name, 0) for report in counted) for name in source.classes}
    return CardFacts(
        sites=len(reports),
        training_images=sum((report.used or 0) if report.train is None else report.train for report in counted)
        if counted
        else None,
        training_patients=sum(report.patients or 0 for report in counted) if counted else None,
        training_classes=classes if counted else {},
        phantom=bool(source.run.summary.phantom),
        virtual=source.run.virtual,
        privacy=_privacy(source),
        provenance=_provenance(source),
    )


def _privacy(source: Source) -> PrivacySpent | None:
    described = describe_privacy(source.run)
    if described is None or source.run.summary.personal_of:  # trained in its hospital, and nothing of it left
        return None
    return PrivacySpent(
        mechanism=source.experiment.privacy.mechanism,
        largest_epsilon=max(described.spent.values()) if described.spent else None,
        secure_aggregation=source.experiment.secure_aggregation.enabled,
        protected=tuple(described.protected),
        unprotected=tuple(described.unprotected),
    )


def _provenance(source: Source) -> Provenance:
    git = source.run.environment.get("git") or {}
    return Provenance(
        pneumofed=version("pneumofed"),
        run=source.checkpoint.run,
        round=source.checkpoint.round,
        checkpoint=_sha256(source.run.folder.best_checkpoint),
        config=_sha256(source.run.folder.config),
        split_seed=source.checkpoint.experiment.split_seed,
        validation_fraction=source.checkpoint.experiment.training.validation_fraction,
        parent=source.checkpoint.experiment.parent,
        git_commit=git.get("commit"),
        git_dirty=git.get("dirty"),
        app_bundle=source.run.summary.app_bundle or None,
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class HospitalLimits:
    """A suitability check with the hospitals' limits, and whom they come from in a sentence."""

    suitability: Suitability
    sentence: str


def find_hospital_limits(source: Source, say: Callable[[str], None]) -> HospitalLimits | None:
    """Finds the hospitals' limits for the kept model; None where the run has none, or of too few patients.

    Args:
        source: the run.
        say: takes a sentence on how many of the hospitals' patients are refused.

    Raises:
        CheckpointError: the run's file is damaged.
    """
    reference = source.run.folder.read_hospital_reference()
    if reference is None or reference.round != source.checkpoint.round:
        return None
    patients = reference.patients()
    if not reference.is_enough:
        say(
            f"the hospitals scored {sum(patients.values())} validation patients, too few for a refusal rate of "
            f"{reference.suitability.refusal_rate:g}: the limits of the suitability check come from the central set"
        )
        return None
    pooled = reference.pooled()
    refused, before = reference.most_refused(pooled.limits), reference.most_refused(reference.suitability.limits)
    total = sum(patients.values())
    by_site = ", ".join(f"{site} {refused[site]} of {count} (before {before[site]})" for site, count in patients.items())
    sentence = (
        f"at most {sum(refused.values())} of {total} cannot be judged ({sum(refused.values()) / total:.1%}); with limits from the "
        f"central set it were at most {sum(before.values())}. By hospital: {by_site}."
    )
    say(f"limits of the suitability check from the hospitals' validation patients: {sentence}")
    return HospitalLimits(pooled, sentence)
