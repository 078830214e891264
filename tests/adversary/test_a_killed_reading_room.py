"""The promise: a reading room that is killed (-9) or meets a full disk while files come opens again; every case that was answered for is
there, judged once and as an undisturbed room judges it, with its files, its line in the audit log and its findings.

The server is the real one, with a worker process. It is killed after a random time, or at a random change of its folder (`disk.c`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from pneumofed.common.audit.log import AuditLog, read_entries
from pneumofed.common.audit.verify import verify_log
from pneumofed.common.ops.processes import free_port
from pneumofed.common.ops.web import CSRF_HEADER
from pneumofed.inference.reading_room import worker as worker_module
from pneumofed.inference.reading_room.cases import Cases, open_room_database
from pneumofed.inference.reading_room.file_judge import ImageJob
from pneumofed.inference.reading_room.serve import init_room
from pneumofed.inference.reading_room.settings import CaseFiles
from pneumofed.inference.reading_room.users import Users
from pneumofed.inference.reading_room.viewing import ORIGINAL_FILE, JudgedFile
from pneumofed.inference.reading_room.worker import JobOutcome
from tests.adversary import disk
from tests.adversary.marked import PYTHON, Marked, marked
from tests.inference.reading_room.stage import (
    PASSWORD,
    READER,
    Stage,
    bundle,
    inline_reader,
    phantom_dicom,
    phantom_png,
    problem,
    upload,
)

KILLS = int(os.environ.get("PNEUMOFED_KILLS", "180")) // 6
FILES = 5
"""Sent in each life of a server."""


class Attacked:
    """A room, all files that were ever sent to it, and what it answered for."""

    def __init__(self, path: Path) -> None:
        self.folder, _ = init_room(path / "room", bundle().folder, "North", None, None)
        self.port = free_port()
        with self.folder.settings_file.open("a") as file:
            file.write(f"port: {self.port}\nworkers: 1\n")
        Users(open_room_database(self.folder.database)).add(READER, "radiologist", PASSWORD)
        self.path = path
        self.sent: dict[str, bytes] = {}
        self.answered: dict[str, str] = {}
        self.found: Counter[str] = Counter()

    def new_files(self) -> list[bytes]:
        """Files that nobody has sent before."""
        count = len(self.sent)
        files = [phantom_dicom(number % 12, PatientID=f"{number}") for number in range(count, count + FILES)]
        self.sent |= {hashlib.sha256(file).hexdigest(): file for file in files}
        return files

    @contextmanager
    def server(self, family: Marked, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """The room's process; it and its worker are gone afterwards."""
        command = [PYTHON, "-m", "pneumofed.cli.main", "reading-room", "start", "-C", str(self.folder.path)]
        process = family.start(command, self.path, {"OMP_NUM_THREADS": "1", **environment})
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            assert family.all_gone(), family.living()

    def send(self, process: subprocess.Popen[bytes], files: list[bytes], until: float = float("inf")) -> None:
        """Signs in and sends the files one by one, with a finding on each, while the server lives; kills it when it is `until`."""
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60) as client:
            if not self._ready(client, process, until):
                return
            try:
                answer = client.post("/api/login", json={"user": READER, "password": PASSWORD})
                client.headers[CSRF_HEADER] = answer.json().get("csrf", "")
                for file in files:
                    self._send(client, file)
            except (httpx.TransportError, ValueError):  # killed, or no answer in its form
                return

    def _ready(self, client: httpx.Client, process: subprocess.Popen[bytes], until: float) -> bool:
        while process.poll() is None and time.monotonic() < until:
            try:
                if client.get("/api/health").status_code == 200:
                    return True
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        return False

    def _send(self, client: httpx.Client, file: bytes) -> None:
        answer = client.post("/api/cases", files=[("files", ("image", file))])
        if answer.status_code != 200:
            assert answer.status_code >= 500 or answer.status_code == 401, answer.text
            return
        one = answer.json()["files"][0]
        assert one["outcome"] in ("new", "known"), one
        case = self.answered.setdefault(hashlib.sha256(file).hexdigest(), one["case"])
        assert case == one["case"]
        if client.post(f"/api/cases/{case}/findings", json={"label": "normal", "note": ""}).status_code == 201:
            self.found[case] += 1

    def check(self) -> None:
        """What must hold between any two lives of the server."""
        engine = open_room_database(self.folder.database)
        cases, store = Cases(engine), CaseFiles(self.folder.store, self.folder.quarantine)
        ids = cases.ids()
        assert set(self.answered.values()) <= ids
        lines = read_entries(self.folder.audit)
        added = Counter(line.facts["case"] for line in lines if line.event == "case-added")
        read = Counter(line.facts["case"] for line in lines if line.event == "finding")
        for identifier in ids:
            case = cases.find(identifier)
            assert case is not None and added[identifier] == 1
            file = (store.path(identifier) / ORIGINAL_FILE).read_bytes()
            assert hashlib.sha256(file).hexdigest() == case.sha256 and case.sha256 in self.sent
            assert self.found[identifier] <= len(cases.findings(case)) <= read[identifier]
        assert not self.folder.audit.exists() or verify_log(self.folder.audit).intact
        engine.dispose()

    def finish(self, family: Marked) -> None:
        """An undisturbed server takes all files: each is a case, once, judged as it should be; nothing else is left."""
        with self.server(family, {}) as process:
            self.send(process, list(self.sent.values()))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, 130)
        self.check()
        assert set(self.answered) == set(self.sent)
        engine = open_room_database(self.folder.database)
        cases, store = Cases(engine), CaseFiles(self.folder.store, self.folder.quarantine)
        assert cases.ids() == set(self.answered.values()) and len(cases.ids()) == len(self.sent)
        for sha256, identifier in self.answered.items():
            self._check_judgement(cases, identifier, self.sent[sha256])
        store.sweep(cases.ids(), now=time.time() + 7200)
        assert {path.name for path in self.folder.store.glob("??/*")} == cases.ids()
        assert not list(self.folder.quarantine.iterdir())
        engine.dispose()

    def _check_judgement(self, cases: Cases, identifier: str, file: bytes) -> None:
        folder = self.path / "judged"
        folder.mkdir(exist_ok=True)
        (folder / ORIGINAL_FILE).write_bytes(file)
        outcome = inline_reader()(ImageJob(folder))
        assert isinstance(outcome, JudgedFile)
        expected = outcome.judgement
        case = cases.find(identifier)
        assert case is not None and case.verdict == expected.verdict
        if expected.prediction is not None:
            assert case.probability == pytest.approx(expected.prediction.probability, abs=1e-6)


@pytest.fixture
def room(tmp_path: Path) -> Attacked:
    return Attacked(tmp_path)


def full(*_: object, **__: object) -> JobOutcome:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter((full, inline_reader(), inline_reader()))
    stage = Stage(tmp_path, read=lambda job: worker_module._outcome(next(reads), job))
    with stage.signed_in() as client:
        answer = client.post("/api/cases", files=[("files", ("image", phantom_png()))])
        assert problem(answer) == (507, "disk_full")
        monkeypatch.setattr(AuditLog, "record", full)
        answer = client.post("/api/cases", files=[("files", ("image", phantom_png()))])
        assert problem(answer) == (507, "disk_full")
        monkeypatch.undo()
        assert stage.room.cases.ids() == set()  # no case without its line
        assert upload(client, phantom_png())[0]["outcome"] == "new"


def measured(room: Attacked, family: Marked) -> tuple[float, float, int]:
    """How long an undisturbed server starts and works, in seconds, and how many changes its process makes to the room's folder."""
    started = time.monotonic()
    with room.server(family, disk.environment(room.folder.path)) as process:
        room.send(process, [])
        ready = time.monotonic() - started
        room.send(process, room.new_files())
        busy = time.monotonic() - started - ready
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    counts = re.findall(r"disk: (\d+) changes", (room.path / "out").read_text())
    return ready, busy, max(map(int, counts), default=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_room_killed_at_any_moment_loses_no_case_and_judges_none_twice(room: Attacked) -> None:
    draw, kills = random.Random(7), Counter[str]()
    with marked() as family:
        ready, busy, changes = measured(room, family)
        for number in range(KILLS):
            by_change = disk.library() is not None and number % 2 == 1
            environment = disk.environment(room.folder.path, draw.randrange(changes), disk.KILL) if by_change else {}
            seconds = ready * draw.uniform(0.0, 1.0) if number % 6 == 0 else ready + busy * draw.uniform(0.0, 1.0)
            with room.server(family, environment) as process:
                if not by_change:
                    timer = subprocess.Popen(["sh", "-c", f"sleep {seconds:.3f}; kill -9 {process.pid}"])
                room.send(process, room.new_files())
                if not by_change:
                    timer.wait()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                how = "at a change" if by_change else "starting" if number % 6 == 0 else "serving"
                kills["after its work" if process.poll() is None else how] += 1
            room.check()
        room.finish(family)
    sys.stdout.write(f"\n{kills.total()} kills of the reading room {dict(kills)}; {len(room.answered)} cases\n")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@disk.needs_library
def test_a_room_whose_disk_is_full_at_any_moment_loses_no_case(room: Attacked) -> None:
    draw, said = random.Random(8), Counter[str]()
    with marked() as family:
        _, _, changes = measured(room, family)
        for _ in range(max(KILLS // 3, 1)):
            environment = disk.environment(room.folder.path, draw.randrange(changes), disk.FULL)
            with room.server(family, environment) as process:
                room.send(process, room.new_files())
                said["served on" if process.poll() is None else "ended"] += 1
                process.send_signal(signal.SIGTERM)
                process.wait(60)
            room.check()
        room.finish(family)
    sys.stdout.write(f"\n{said.total()} full disks of the reading room {dict(said)}; {len(room.answered)} cases\n")
