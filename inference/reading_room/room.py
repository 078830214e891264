"""The room at work: what the routes do, without HTTP.

`Room` holds the parts of one open room. `delete_old_cases` keeps the retention time.

The audit log (`state/audit.jsonl`) has as actor a user, or a program by the name of its token, and these events. A case that is added,
read or removed is in the log first: a room that is killed may have a line too many, and never a case that no line knows.

    login / login-refused / logout / password-changed        no facts; a refused login has no name, which may be a mistyped password
    case-added / case-opened / case-removed                  case id, which is random; model and verdict where judged
    finding                                                  case id, label, whether it agrees with the model
    clinical-given                                           case id, model, verdict, how many values are known; never the values
    image-judged                                             by a program, nothing kept: model, verdict, how many values were given
    labels-exported / cleaned                                counts
    user-added / user-changed / user-removed / token-added / token-removed / room-started / room-stopped
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import Engine

from pneumofed.common.audit.log import AuditLog
from pneumofed.common.errors import ImageError
from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.common.ops.web import Sessions
from pneumofed.inference.reading_room.cases import Case, Cases, ClinicalRow
from pneumofed.inference.reading_room.clinical import (
    ClinicalValueError,
    GivenValue,
    Values,
    describe_sources,
    named_values,
    read_given,
    rebuild_values,
    schema_of,
)
from pneumofed.inference.reading_room.errors import Refusal, cause_of, error_code, sentence, with_cause
from pneumofed.inference.reading_room.file_judge import ImageJob
from pneumofed.inference.reading_room.schema import ErrorCode, ModelInfo, Uploaded
from pneumofed.inference.reading_room.settings import GIB, CaseFiles, RoomFolder, UploadLimits
from pneumofed.inference.reading_room.upload import Arrived, Gate
from pneumofed.inference.reading_room.users import BackOff, Users
from pneumofed.inference.reading_room.viewing import JudgedFile, write_map
from pneumofed.inference.reading_room.views import CaseValues, case_row, values_row
from pneumofed.inference.reading_room.watching import RoomMetrics, RoomMonitor
from pneumofed.inference.reading_room.worker import Workers

if TYPE_CHECKING:
    from pneumofed.inference.monitor.monitor import Monitor


SESSION_SEC = 12 * 3600.0
RETRY_SEC = 5
"""After which to try again while the model starts."""

logger = logging.getLogger(__name__)


class Room:
    """One room, open.

    Args:
        folder: the room's.
        engine: on its database.
        model: which model judges.
        workers: who judge.
        monitor: of drift, for the bundle that judges; None watches nothing.
    """

    def __init__(
        self, folder: RoomFolder, engine: Engine, model: ModelInfo, workers: Workers, monitor: Monitor | None = None
    ) -> None:
        self.folder, self.settings, self.model, self.workers = folder, folder.settings, model, workers
        self.users, self.cases, self.values = Users(engine), Cases(engine), CaseValues(engine)
        self.clinical = schema_of(model.clinical)
        self.store = CaseFiles(folder.store, folder.quarantine)
        self.sessions = Sessions(SESSION_SEC, 60.0 * self.settings.idle_min)
        self.back_off = BackOff()
        self.gate = Gate(self.limits)
        self.sign_ins = asyncio.Semaphore(2)  # scrypt takes 32 MiB and a core each
        self.metrics = RoomMetrics(lambda: workers.waiting)
        self.watch = RoomMonitor(monitor, self.metrics.unwatched)
        self.rendering = asyncio.Semaphore(self.settings.workers)
        """Held while a picture is made: one of a large image takes some hundred megabytes."""
        self._audit_lock = threading.Lock()
        self._engine = engine

    def record(self, actor: str, event: str, **facts: Any) -> None:
        """Appends to the audit log. Threads wait here, since those that wait for a file lock look only now and then.

        Args:
            actor: user, or `token:NAME` of a program; empty for the room itself, and for a login that was refused.
            event: one of those in the module's text.
            facts: further keys of the entry; nothing of a patient.
        """
        with self._audit_lock:
            AuditLog(self.folder.audit, actor).record(event, **facts)

    @property
    def takes_volumes(self) -> bool:
        """Whether the room's model judges CT series in place of radiographs."""
        return self.model.slices > 0

    @property
    def limits(self) -> UploadLimits:
        """What a request may hold."""
        return self.settings.upload.for_series() if self.takes_volumes else self.settings.upload

    @property
    def ready(self) -> bool:
        return self.workers.ready and self.store.has_room()

    def require_model(self) -> None:
        """Does nothing once the model can judge.

        Raises:
            Refusal: 503, with the seconds after which to try again; it is still starting.
        """
        if not self.workers.ready:
            raise Refusal(503, "not_ready", retry_sec=RETRY_SEC)

    def has_room(self) -> bool:
        """Checks whether the store takes more: neither its own limit nor the disk is full."""
        return self.store.has_room() and self.cases.bytes() < self.settings.store_gb * GIB

    async def take(self, index: int, arrived: Arrived, by: str) -> Uploaded:
        """Takes one uploaded file or series: as a new case, as one that has the same file already, or not, with the reason.

        Args:
            index: of the file in its request.
            arrived: the file in quarantine; moved into the store if the case is new.
            by: the reader, for the audit log.
        """
        if arrived.error:
            return self._refused(index, arrived.error)
        try:
            values = read_given(arrived.given, self.clinical) if arrived.given else None
            if known := await asyncio.to_thread(self.cases.with_content, arrived.sha256):
                await self._judge_known(known, arrived.given, by)
                return Uploaded(index=index, outcome="known", case=known, error=None, detail="")
            file = await self.judge(ImageJob(arrived.folder, keep=True, explain=True, values=values), by)
        except ClinicalValueError as error:
            self.metrics.refused(error.problem)
            detail = str(error)
            return Uploaded(index=index, outcome="refused", case=None, error=error.problem, detail=detail, column=error.column)
        except ImageError as error:
            return self._refused(index, error_code(error), cause_of(error))
        case, outcome = await asyncio.to_thread(self._add, arrived, file, by)
        kind: Literal["new", "known"] = "new" if outcome else "known"
        return Uploaded(index=index, outcome=kind, case=case, error=None, detail="", patient_name=file.patient_name)

    async def judge(self, job: ImageJob, by: str) -> JudgedFile:
        """Has a worker do the job, and counts the verdict.

        Args:
            job: with `keep` the caller records it as a case; without, it is recorded here as judged for a program.
            by: who asked, for the audit log.

        Raises:
            ImageError: it cannot be used.
        """
        file = await self.workers.run(job)
        self.metrics.judged(file.judgement.verdict)
        if not job.keep:
            given = {} if job.values is None else {"known": len(named_values(job.values, self.clinical))}
            await asyncio.to_thread(self.record, by, "image-judged", **_audit_facts(file.judgement), **given)
        return file

    async def give_values(self, case: Case, given: Mapping[str, GivenValue | None], by: str) -> None:
        """Judges a case anew with other clinical values; what was said before is kept beside it.

        Args:
            case: of the database.
            given: all its values by column; what is not named is not known, also where its file states it.
            by: the reader.

        Raises:
            ClinicalValueError: a value does not fit; nothing is changed.
            Refusal: another model judged the case, or it is gone.
            ImageError: its file cannot be read any more.
        """
        self._require_own(case)
        values = read_given(given, self.clinical)
        folder = self.store.path(case.id)
        file = await self.workers.run(ImageJob(folder, explain=True, values=values, stated=False))
        self.metrics.judged(file.judgement.verdict)
        await asyncio.to_thread(self._give, case, values, file, by)

    async def _judge_known(self, identifier: str, given: Mapping[str, GivenValue | None], by: str) -> None:
        """Values that come with an image that is here already are the case's, unless it has some or another model judged it."""
        case = await asyncio.to_thread(self.cases.find, identifier) if given else None
        if case is not None and case.model_digest == self.model.digest:
            row = await asyncio.to_thread(self.values.latest, case)
            if row is None or not row.known:
                await self.give_values(case, given, by)

    async def find_evidence(self, case: Case) -> dict[str, Any]:
        """Computes what the case's answer rests on, as `EvidenceView`, or finds it where it was computed before.

        Raises:
            Refusal: no value is known, the case cannot be judged, the network is a study's own, or another model judged the case.
            ImageError: its file cannot be read any more.
        """
        row = await asyncio.to_thread(self.values.latest, case)
        if row is not None and row.evidence is not None:
            return row.evidence
        self._require_own(case)
        if row is None or not row.known or self.clinical is None:
            raise Refusal(404, "no_evidence")
        values = rebuild_values(row.known, self.clinical)
        file = await self.workers.run(ImageJob(self.store.path(case.id), values=values, stated=False, evidence=True))
        if file.evidence is None:
            raise Refusal(404, "no_evidence")
        await asyncio.to_thread(self.values.keep_evidence, row, file.evidence)
        return file.evidence

    def _require_own(self, case: Case) -> None:
        if case.model_digest != self.model.digest:
            raise Refusal(409, "other_model")

    def _give(self, case: Case, values: Values, file: JudgedFile, by: str) -> None:
        before, named = self.values.latest(case), named_values(values, self.clinical)
        known = describe_sources(named, named, "given", before.known if before else None)
        self.record(by, "clinical-given", case=case.id, known=len(known), **_audit_facts(file.judgement))
        write_map(self.store.path(case.id), file.viewing)
        if not self.values.give(case.id, values_row(by, known, file.judgement), file):
            raise Refusal(404, "not_found")

    def close(self) -> None:
        self.workers.close()
        self._engine.dispose()

    def _refused(self, index: int, code: ErrorCode, cause: str = "") -> Uploaded:
        self.metrics.refused(code)
        detail = with_cause(sentence(code), cause)
        return Uploaded(index=index, outcome="refused", case=None, error=code, detail=detail, cause=cause)

    def _add(self, arrived: Arrived, file: JudgedFile, by: str) -> tuple[str, bool]:
        """(id of the case, whether it is new). The files are in place before the row names them, and the log before there is a case."""
        identifier, content = secrets.token_hex(16), file.sha256 or arrived.sha256
        size = self.store.keep(arrived.folder, identifier)
        self.record(by, "case-added", case=identifier, **_audit_facts(file.judgement))
        if arrived.given:
            self.record(by, "clinical-given", case=identifier, known=len(arrived.given), **_audit_facts(file.judgement))
        if self.cases.add(case_row(identifier, content, size, file), self._values_at_arrival(arrived, file, by)):
            if (image := self.watch.judged(file)) is not None:
                self.cases.set_monitored(identifier, image)
            return identifier, True
        self.store.remove(identifier)
        self.record(by, "case-removed", case=identifier)
        return self.cases.with_content(content) or identifier, False

    def _values_at_arrival(self, arrived: Arrived, file: JudgedFile, by: str) -> ClinicalRow | None:
        """Of the upload's table and the file itself; None where none is known."""
        if file.values is None:
            return None
        table = named_values(read_given(arrived.given, self.clinical), self.clinical)
        return values_row(by, describe_sources(named_values(file.values, self.clinical), table, "table"), file.judgement)


@dataclass(frozen=True)
class Cleaned:
    """What `delete_old_cases` deleted."""

    cases: int
    left_behind: int


def delete_old_cases(
    cases: Cases, store: CaseFiles, retention_days: int, record: Callable[[str], None], now: datetime | None = None
) -> Cleaned:
    """Deletes cases that arrived more than `retention_days` ago, with their findings, and what crashes left behind.

    Args:
        cases, store: of the same room.
        retention_days: at least 1.
        record: puts it into the audit log that a case goes, before it does.
        now: with a time zone; the clock without it.
    """
    old = cases.older_than((now or datetime.now(UTC)) - timedelta(days=retention_days))
    for identifier in old:
        record(identifier)
        cases.remove(identifier)  # first, so that no row names files that are gone
        store.remove(identifier)
    return Cleaned(len(old), store.sweep(cases.ids()))


def _audit_facts(judgement: Judgement) -> dict[str, str]:
    return {"model": judgement.model_digest, "verdict": judgement.verdict}
