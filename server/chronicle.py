"""Notes what happens to a run for those who watch it (event lines) and in the coordinator's audit log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.audit import AuditLog
from common.audit_events import COORDINATOR, ROUND, hash_arrays, record_run_ended, record_run_started
from common.config import ExperimentConfig
from common.messages import ModelArrays
from common.party_config import CoordinatorConfig
from server.activity import EVENTS_FILE, Activity, Kind
from server.records import RoundRecord


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

    def finishes(self, line: RoundRecord, arrays: ModelArrays, heads: Mapping[str, str]) -> None:
        """Notes a completed round.

        Args:
            line: the round.
            arrays: the weights that the round's model is judged with.
            heads: head of each site's audit log as its reply gave it.

        Raises:
            AuditError: the audit log is damaged.
        """
        self.activity.note(Kind.ROUND_DONE, round=line.round, seconds=line.seconds.total)
        if self.audit:
            record_round(self.audit, self.run, line, arrays, heads)

    def ends(self, status: str, rounds: int, reason: str | None) -> None:
        self.activity.note(Kind.RUN_ENDED, round=rounds, status=status, reason=reason)
        if self.audit:
            record_run_ended(self.audit, self.run, status, rounds)


def record_round(log: AuditLog, run: str, line: RoundRecord, arrays: ModelArrays, heads: Mapping[str, str]) -> str:
    """Writes a completed round into the audit log and returns the log's head.

    Args:
        log: the coordinator's.
        run: the run's token.
        line: the round.
        arrays: the weights that the round's model is judged with.
        heads: head of each site's log as its reply gave it.
    """
    return log.record(
        ROUND,
        run=run,
        round=line.round,
        participants=[site for site in line.drawn if site not in line.trouble],
        failures=sorted(line.failures),
        left_out=sorted(line.left_out),
        bytes=line.bytes.to_json(),
        weights=hash_arrays(arrays),
        heads=dict(heads),
    )
