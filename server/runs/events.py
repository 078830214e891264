"""What happens in a run while it happens: event lines, heartbeat and audit lines, and the sentences that show them.

`Activity` writes `events.jsonl` in the run folder, one line an event; `Heartbeat` touches the file `heartbeat` beside it. history.jsonl
has a round when it is over; these lines show it while it goes on. Nothing in the run depends on them, so that a full disk costs lines
and never the run. `RunLog` notes the run's course in both the event lines and the coordinator's audit log. `describe_event` is an event
line as a sentence for the activity log.

    {"time": "2026-01-31T09:15:02.1Z", "kind": "answered", "round": 3, "site": "north", "task": "train", "seconds": 41.2, "bytes": 449}

kind            facts
run_started     rounds
run_resumed     rounds; `round` is the last completed one
joined          the site is enrolled: it answered the roll call
absent          reason; the site, or node, cannot take part
round_started   sites [names], deadline_sec; of an asynchronous round, without deadline, also at_work [names], since earlier rounds
asked           task (roll call, train, evaluate; in a secure sum also keys, shares, confirmation, unmasking), bytes of arrays, deadline_sec
answered        task, seconds, bytes of arrays; staleness of an update in an asynchronous round
late            task, seconds; no reply within the deadline, a later one is dropped
refused         task, reason; the site's policy, by the name of its rule
lost            task, reason; the node went away or could not be reached
failed          task, reason; the site said that it could not
left_out        reason; the reply came and did not pass the checks
round_done      seconds
run_ended       status, reason
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from pneumofed.common.audit.log import COORDINATOR_ACTOR, ROUND_EVENT, AuditLog, hash_arrays, record_run_ended, record_run_started
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.evaluation.metrics import without_nan
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.server.runs.records import RoundRecord

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"
HEARTBEAT_SEC = 5.0
TASK_WORDS = {
    "train": "training",
    "evaluate": "evaluation",
    "roll call": "the roll call",
    "clinical sums": "the sums of clinical numbers",
    "survey": "the survey",
    "keys": "its keys",
    "shares": "its shares",
    "confirmation": "its confirmation",
    "unmasking": "unmasking",
}


class Kind(StrEnum):
    """What may happen; the table above says which facts belong to each."""

    RUN_STARTED = "run_started"
    RUN_RESUMED = "run_resumed"
    JOINED = "joined"
    ABSENT = "absent"
    ROUND_STARTED = "round_started"
    ASKED = "asked"
    ANSWERED = "answered"
    LATE = "late"
    REFUSED = "refused"
    LOST = "lost"
    FAILED = "failed"
    LEFT_OUT = "left_out"
    ROUND_DONE = "round_done"
    RUN_ENDED = "run_ended"


def kind_of_failure(error: str) -> Kind:
    """Finds the kind of event that a `common.wire.messages.Failure` with this `error` is."""
    if error == "Timeout":
        return Kind.LATE
    if error in ("PolicyError", "BudgetError"):
        return Kind.REFUSED
    if error == "Unreachable" or error.startswith("Flower error"):
        return Kind.LOST
    return Kind.FAILED


class Activity:
    """Writer of the event lines in `path`. It never raises: what cannot be written is logged, once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._troubled = False

    def note(self, kind: str, *, round: int, site: str | None = None, **facts: Any) -> None:
        """Adds one line, which is in the file when this returns.

        Args:
            kind: one of `Kind`.
            round: the round that it happened in; 0 before the first one.
            site: whom it concerns; None for events of the whole run.
            facts: what belongs to the kind (see the table above), in plain values for JSON.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        event = {"time": now, "kind": str(kind), "round": round, **({"site": site} if site is not None else {}), **facts}
        try:
            text = json.dumps(without_nan(event), allow_nan=False, default=str)
            _append(self.path, text.encode("utf-8"))
        except (OSError, TypeError, ValueError) as error:
            if not self._troubled:
                logger.warning("%s cannot be written (%s); the run goes on without these lines", self.path, error)
            self._troubled = True


@dataclass(frozen=True)
class RunLog:
    """The log of one run: its event lines and the coordinator's audit log. `run` is its token; `audit` is None in simulation."""

    run: str
    activity: Activity
    audit: AuditLog | None

    @classmethod
    def of(cls, settings: CoordinatorConfig, run: str) -> RunLog:
        """Opens the log of a run in the files that the settings name.

        Args:
            settings: run folder and audit log; without `audit_log` none is kept.
            run: the run's token.
        """
        audit = AuditLog(Path(settings.audit_log), COORDINATOR_ACTOR) if settings.audit_log else None
        return cls(run, Activity(Path(settings.run_dir) / EVENTS_FILE), audit)

    def begins(self, experiment: ExperimentConfig, app: str, completed: int | None) -> None:
        """Notes the beginning.

        Args:
            experiment: what is run.
            app: SHA-256 of the app bundle; empty in one process.
            completed: the last completed round of a run that is resumed; None of a new one.

        Raises:
            AuditError: the audit log is damaged; no run begins without it.
        """
        kind = Kind.RUN_STARTED if completed is None else Kind.RUN_RESUMED
        self.activity.note(kind, round=completed or 0, rounds=experiment.rounds)
        if self.audit:
            record_run_started(self.audit, self.run, experiment, app or "unknown", resumed=completed is not None)

    def finishes(self, record: RoundRecord, arrays: ModelArrays, heads: Mapping[str, str]) -> None:
        """Notes a completed round.

        Args:
            record: the round.
            arrays: the weights that the round's model is evaluated with.
            heads: head of each site's audit log as its reply gave it.

        Raises:
            AuditError: the audit log is damaged.
        """
        self.activity.note(Kind.ROUND_DONE, round=record.round, seconds=record.seconds.total)
        if self.audit:
            record_round(self.audit, self.run, record, arrays, heads)

    def ends(self, status: str, rounds: int, reason: str | None) -> None:
        """Notes the end.

        Args:
            status: `succeeded`, `failed` or `stopped`.
            rounds: how many were completed.
            reason: why the run did not succeed; None where it did.

        Raises:
            AuditError: the audit log is damaged.
        """
        self.activity.note(Kind.RUN_ENDED, round=rounds, status=status, reason=reason)
        if self.audit:
            record_run_ended(self.audit, self.run, status, rounds)


class Heartbeat:
    """Touches a file every few seconds while its block runs, so that a slow round looks different from a dead process."""

    def __init__(self, path: Path, every_sec: float = HEARTBEAT_SEC) -> None:
        self._path, self._every_sec = path, every_sec
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        while True:
            try:
                self._path.touch(mode=0o600)
            except OSError as error:
                logger.debug("no heartbeat: %s", error)
            if self._end.wait(self._every_sec):
                return


def read_activity(path: Path) -> list[dict[str, Any]]:
    """Reads every event that can be read, oldest first; a line that a crash or a full disk cut short is left out."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return parse_activity(text)


def parse_activity(text: str) -> list[dict[str, Any]]:
    """Reads every event of some lines that can be read, in their order."""
    return [event for line in text.splitlines() if (event := _parse(line)) is not None]


def _append(path: Path, line: bytes) -> None:
    """One write of one line; it starts a new line if a full disk cut the last one."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(descriptor, line + b"\n")
    finally:
        os.close(descriptor)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    known = isinstance(event, Mapping) and isinstance(event.get("kind"), str) and isinstance(event.get("round"), int)
    return dict(event) if known and isinstance(event.get("time"), str) else None


def record_round(log: AuditLog, run: str, record: RoundRecord, arrays: ModelArrays, heads: Mapping[str, str]) -> str:
    """Writes a completed round into the audit log and returns the log's head.

    Args:
        log: the coordinator's.
        run: the run's token.
        record: the round.
        arrays: the weights that the round's model is evaluated with.
        heads: head of each site's log as its reply gave it.
    """
    asynchronous = {"staleness": dict(record.staleness)} if record.staleness else {}
    return log.record(
        ROUND_EVENT,
        run=run,
        round=record.round,
        participants=[site for site in record.staleness or record.drawn if site not in record.trouble],
        failures=sorted(record.failures),
        left_out=sorted(record.left_out),
        bytes=record.bytes.to_json(),
        weights=hash_arrays(arrays),
        heads=dict(heads),
        **asynchronous,
    )


def describe_event(event: Mapping[str, Any]) -> str:
    """Writes one sentence on the event; facts that are missing are left out."""
    site, task = event.get("site") or "a site", TASK_WORDS.get(str(event.get("task")), "this round")
    reason = f": {event['reason']}" if event.get("reason") else ""
    words = {
        Kind.RUN_STARTED: f"the run began, {event.get('rounds', '?')} rounds are planned",
        Kind.RUN_RESUMED: f"the run went on after round {event['round']}",
        Kind.JOINED: f"{site} joined",
        Kind.ABSENT: f"{site} takes no part{reason}",
        Kind.ROUND_STARTED: f"round {event['round']} began with {_count(event.get('sites'))}",
        Kind.ASKED: f"{site} was asked for {task}",
        Kind.ANSWERED: f"{site} answered for {task}{_after(event)}",
        Kind.LATE: f"{site} was late with {task}{reason}",
        Kind.REFUSED: f"{site} refused {task}{reason}",
        Kind.LOST: f"{site} was lost in {task}{reason}",
        Kind.FAILED: f"{site} failed in {task}{reason}",
        Kind.LEFT_OUT: f"the reply of {site} was left out{reason}",
        Kind.ROUND_DONE: f"round {event['round']} was done{_after(event)}",
        Kind.RUN_ENDED: f"the coordinator's process ended the run as {event.get('status', 'unknown')}",
    }
    if event["kind"] == Kind.LATE and event.get("arrived"):
        return f"the late reply of {site} for {task} arrived and was dropped"
    return words.get(event["kind"], f"{event['kind']}{reason}")


def _after(event: Mapping[str, Any]) -> str:
    seconds, size = event.get("seconds"), event.get("bytes")
    words = f" after {seconds:.1f} s" if isinstance(seconds, int | float) else ""
    words += f" with {size / 1e6:.1f} MB" if isinstance(size, int | float) else ""
    return words + describe_staleness(event.get("staleness"))


def describe_staleness(staleness: object) -> str:
    """Writes how old the weights were that an update began from, as the end of a sentence; nothing of a fresh one."""
    if not isinstance(staleness, int) or not staleness:
        return ""
    return f", from the weights of {staleness} round{'' if staleness == 1 else 's'} before"


def _count(sites: Any) -> str:
    number = len(sites) if isinstance(sites, list) else 0
    return f"{number} site{'' if number == 1 else 's'}"
