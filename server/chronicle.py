"""Who is told that a run begins and ends: those who watch it (event lines) and the coordinator's audit log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.audit import AuditLog
from common.audit_events import COORDINATOR, record_run_ended, record_run_started
from common.config import ExperimentConfig
from common.party_config import CoordinatorConfig
from server.activity import EVENTS_FILE, Activity, Kind


@dataclass(frozen=True)
class Chronicle:
    """The books of one run; `run` is its token. `audit` is None in simulation."""

    run: str
    activity: Activity
    audit: AuditLog | None

    @classmethod
    def of(cls, settings: CoordinatorConfig, run: str) -> Chronicle:
        audit = AuditLog(Path(settings.audit_log), COORDINATOR) if settings.audit_log else None
        return cls(run, Activity(Path(settings.run_dir) / EVENTS_FILE), audit)

    def begins(self, experiment: ExperimentConfig, app: str, completed: int | None) -> None:
        """Notes the beginning; `completed` is the last completed round of a run that goes on, None of a new one.

        Raises:
            AuditError: the audit log is damaged; no run begins without it.
        """
        kind = Kind.RUN_STARTED if completed is None else Kind.RUN_RESUMED
        self.activity.note(kind, round=completed or 0, rounds=experiment.rounds)
        if self.audit:
            record_run_started(self.audit, self.run, experiment, app or "unknown", resumed=completed is not None)

    def ends(self, status: str, rounds: int, reason: str | None) -> None:
        self.activity.note(Kind.RUN_ENDED, round=rounds, status=status, reason=reason)
        if self.audit:
            record_run_ended(self.audit, self.run, status, rounds)
