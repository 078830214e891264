"""The events of both sides' audit logs and their facts, so that a reader of either knows what a line means.

    site                                                     coordinator
    request            what the coordinator asked            run-started     configuration and app by their hashes
    answer             what left the site                    round           who took part, bytes, hash of its model
    refusal            by which rule                         run-ended       status, and why
    failure            class of the error
    app-approved / app-revoked / site-started / site-stopped release         which model, against which, and the decision
    models-compared    two models on the site's validation
    labels-taken       readers' labels in the manifest, in counts

No line names a patient, a file or a folder. The fact `heads` keeps the other side's head (see `common.audit_report.anchors_in`).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from common.audit import AuditLog
from common.hash_chain import canonical

if TYPE_CHECKING:  # the names alone; Flower would be imported with the messages
    from common.config import ExperimentConfig
    from common.messages import ModelArrays

REQUEST, ANSWER, REFUSAL, FAILURE = "request", "answer", "refusal", "failure"
APP_APPROVED, APP_REVOKED = "app-approved", "app-revoked"
SITE_STARTED, SITE_STOPPED = "site-started", "site-stopped"
COMPARED, LABELS_TAKEN, RELEASE = "models-compared", "labels-taken", "release"
RUN_STARTED, ROUND, RUN_ENDED = "run-started", "round", "run-ended"

COORDINATOR = "coordinator"
"""Actor of the coordinator's log."""


def record_run_started(log: AuditLog, run: str, experiment: ExperimentConfig, app: str, *, resumed: bool = False) -> str:
    """Notes that a run begins or goes on; `app` is the hash of the app bundle. Returns the head."""
    return log.record(RUN_STARTED, run=run, name=experiment.name, config=hash_experiment(experiment), app=app, resumed=resumed)


def record_run_ended(log: AuditLog, run: str, status: str, rounds: int) -> str:
    """Notes how a run ended (`succeeded`, `failed` or `stopped`) and after how many rounds. Returns the head."""
    return log.record(RUN_ENDED, run=run, status=status, rounds=rounds)


def hash_experiment(experiment: ExperimentConfig) -> str:
    """SHA-256 of an experiment, the same at both sides and independent of how its file was written."""
    return hashlib.sha256(canonical(experiment.model_dump(mode="json"))).hexdigest()


def hash_arrays(arrays: ModelArrays) -> str:
    """SHA-256 of a model's weights: parameters, then statistics, as little-endian float32."""
    digest = hashlib.sha256(arrays.parameters.astype("<f4").tobytes())
    digest.update(arrays.statistics.astype("<f4").tobytes())
    return digest.hexdigest()
