"""The promise: a run that is killed (-9) or meets a full disk, at whatever moment, resumes to the weights of an unbroken one, bit for bit;
nothing that a hospital gave is missing in its ledger; no process is left and no folder is unusable. The same of baselines and exports.

A kill comes after a random time, or at a random change of the job's folder (`disk.c`): within a write, or before a rename. The long form
prints how many there were, and at what.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from pneumofed.client.privacy.ledger import Ledger
from pneumofed.common.audit.log import read_entries
from pneumofed.common.audit.verify import verify_log
from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from tests.adversary import disk
from tests.adversary.killed_jobs import ROUNDS, SITES
from tests.adversary.marked import VARIABLE, Marked
from tests.server.export.finished_run import write_finished_run

ROOT = Path(__file__).parents[2]
KILLED = -signal.SIGKILL
GROUPS = int(os.environ.get("PNEUMOFED_KILLS", "180")) // 18
"""Of the long form: a job is killed three times in each. Six parts are runs, plain and private, the rest baselines and exports."""


@dataclass(frozen=True)
class Order:
    """How a job is to end: after so many seconds, at a change of its folder (`disk.FULL`, `disk.KILL`), or in a place; else by itself."""

    seconds: float | None = None
    at: int = 0
    mode: int = disk.COUNT
    place: str = ""


UNDISTURBED = Order()


@dataclass
class Jobs:
    """The process that forks a job's, and what became of them: kills by what the job was doing, and how the first, unbroken, ones went."""

    kills: Counter[str] = field(default_factory=Counter)
    full: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.family = Marked()
        variables = {**os.environ, **disk.environment(), "OMP_NUM_THREADS": "1", VARIABLE: self.family.mark}
        command = [sys.executable, "-m", "tests.adversary.killed_jobs"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )

    def run(self, job: str, folder: Path, order: Order = UNDISTURBED, resume: bool = False) -> int:
        """The exit code of the job, or the number of the signal that ended it, below zero. None of its processes is left."""
        folder.mkdir(parents=True, exist_ok=True)
        assert self.process.stdin and self.process.stdout
        asked = {"job": job, "folder": str(folder), "resume": resume, "at": order.at, "mode": order.mode, "place": order.place}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        pid, began = int(self.process.stdout.readline()), time.monotonic()
        if order.seconds is not None:
            time.sleep(order.seconds)
            with suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGKILL)
        answer = json.loads(self.process.stdout.readline())
        self.seconds.setdefault(job, time.monotonic() - began)
        if answer["code"] == KILLED:
            self.kills[f"{job}: {answer['place']}"] += 1
        elif job == "baselines" and order.mode == disk.KILL and answer["code"]:
            self.kills[f"{job}: a worker process"] += 1
        elif order.mode == disk.FULL and answer["code"]:
            self.full[f"{job}: {answer['place']}"] += 1
        self.changes.setdefault(job, answer["changes"])
        self.none_left()
        return int(answer["code"])

    def none_left(self) -> None:
        """Waits for the job's own processes to end."""
        deadline = time.monotonic() + 10
        while len(left := self.family.living()) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(left) == [self.process.pid], left

    def finish(self, job: str, folder: Path) -> None:
        """What a person does afterwards: resumes, or starts anew where the run never completed a round."""
        assert self.run(job, folder, resume=RunFolder(folder / "run").last_checkpoint.exists()) == 0, said(folder)

    def unbroken(self, job: str, folder: Path) -> None:
        assert self.run(job, folder) == 0, said(folder)

    def draw(self, job: str, draw: random.Random) -> Order:
        """A kill at random: a third each by time, by change, and of runs by place, so that the short ones are met too."""
        if job in ("plain", "private") and draw.random() < 1 / 3:
            places = ["training", "aggregation", "evaluation", "central evaluation", "history and checkpoint"]
            place = draw.choice([*places, *["ledger"] * (job == "private")])
            return Order(at=draw.randrange(2 * ROUNDS), place=place)
        if disk.library() is None or draw.random() < 0.5:
            return Order(draw.uniform(0.0, self.seconds[job]))
        return Order(at=draw.randrange(self.changes[job]), mode=disk.KILL)


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    server = Jobs()
    yield server
    server.process.kill()  # nothing of a job runs now
    server.process.wait(20)
    counted = f"{server.kills.total()} kills {dict(server.kills)}\n{server.full.total()} full disks {dict(server.full)}"
    sys.stdout.write(f"\n{counted}\n")


@pytest.fixture(scope="module")
def unbroken(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the unbroken run of each job."""
    folder = tmp_path_factory.mktemp("unbroken")
    for job in ("plain", "private"):
        jobs.unbroken(job, folder / job)
    return folder


@disk.needs_library
@pytest.mark.parametrize(("job", "share"), [("plain", 0.7), ("private", 0.6)])
def test_a_killed_run_resumes_to_the_same_end(jobs: Jobs, unbroken: Path, tmp_path: Path, job: str, share: float) -> None:
    assert jobs.run(job, tmp_path, Order(at=int(share * jobs.changes[job]), mode=disk.KILL)) == KILLED
    check_end(jobs, unbroken, tmp_path, job)


@disk.needs_library
@pytest.mark.parametrize("share", [0.3])
def test_a_full_disk_is_said_and_the_run_resumes(jobs: Jobs, unbroken: Path, tmp_path: Path, share: float) -> None:
    fill_and_finish(jobs, unbroken, tmp_path, "private", int(share * jobs.changes["private"]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("job", ["plain", "private"])
@pytest.mark.parametrize("number", range(2 * GROUPS))
def test_a_run_killed_three_times(jobs: Jobs, unbroken: Path, tmp_path: Path, job: str, number: int) -> None:
    draw = random.Random(f"{job} {number}")
    for _ in range(3):
        jobs.run(job, tmp_path, jobs.draw(job, draw), resume=RunFolder(tmp_path / "run").last_checkpoint.exists())
    check_end(jobs, unbroken, tmp_path, job)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@disk.needs_library
@pytest.mark.parametrize("job", ["plain", "private"])
@pytest.mark.parametrize("number", range(20))
def test_a_disk_full_at_any_change(jobs: Jobs, unbroken: Path, tmp_path: Path, job: str, number: int) -> None:
    fill_and_finish(jobs, unbroken, tmp_path, job, (2 * number + 1) * jobs.changes[job] // 40)


def fill_and_finish(jobs: Jobs, unbroken: Path, folder: Path, job: str, at: int) -> None:
    if jobs.run(job, folder, Order(at=at, mode=disk.FULL)) != 0:
        words = said(folder)
        assert "No space left" in words or "full" in words or "disk" in words, words
        assert "Traceback" not in words, words
    check_end(jobs, unbroken, folder, job)


def check_end(jobs: Jobs, unbroken: Path, folder: Path, job: str) -> None:
    """Lets the job end, and compares it with the unbroken one."""
    run = RunFolder(folder / "run")
    jobs.finish(job, folder)
    assert run.read_summary().status == "succeeded"
    assert [line.round for line in run.read_history()] == list(range(1, ROUNDS + 1))
    for name in ("last", "best"):
        for found, expected in zip(state(folder, name), state(unbroken / job, name), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert verify_log(folder / "audit.jsonl").intact
    for number in range(SITES if job == "private" else 0):
        check_ledger(folder / "sites" / f"site-{number}")


def check_ledger(site: Path) -> None:
    """Each answer that left the site is an entry of its ledger: as many as the audit log has, of each round, and perhaps more."""
    assert verify_log(site / "audit.jsonl").intact
    lines = read_entries(site / "audit.jsonl")
    left = Counter(line.facts["round"] for line in lines if line.event == "answer" and line.facts["work"] == "train")
    counted = Counter(
        entry.entry.round
        for lineage in Ledger(site / "ledger.sqlite").lineages()
        for entry in lineage.entries
        if entry.entry.purpose == "training"
    )
    assert set(left) == set(range(1, ROUNDS + 1))
    assert all(counted[number] >= answers for number, answers in left.items()), (left, counted)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_baselines_end_with_the_same_results(jobs: Jobs, unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken / "plain", tmp_path / "hospitals")
    for name in ("whole", "run"):
        shutil.copytree(unbroken / "plain" / "run", tmp_path / name / "run")
    jobs.unbroken("baselines", tmp_path / "whole")
    expected = results_of(tmp_path / "whole")
    assert len(expected) == 1 + SITES
    draw = random.Random(5)
    for number in range(2 * GROUPS):
        order = Order(draw.uniform(0.0, jobs.seconds["baselines"]))
        if disk.library() and number % 2:  # changes are counted in each of its processes
            order = Order(at=draw.randrange(12), mode=disk.FULL if number % 6 == 5 else disk.KILL)
        jobs.run("baselines", tmp_path / "run", order)
        if number % 3 == 2:
            jobs.finish("baselines", tmp_path / "run")
            assert results_of(tmp_path / "run") == expected
            shutil.rmtree(tmp_path / "run" / "run" / "baselines")
    assert RunFolder(tmp_path / "run" / "run").read_summary().status == "succeeded"


def results_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "run" / "baselines").glob("*.json"))}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_export_that_was_killed_or_met_a_full_disk_is_made_by_the_same_command(jobs: Jobs, tmp_path: Path) -> None:
    write_finished_run(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "whole" / "run")
    jobs.unbroken("export", tmp_path / "whole")
    draw, folder = random.Random(3), tmp_path
    for number in range(4 * GROUPS):
        full = disk.library() and number % 4 == 3
        order = Order(at=draw.randrange(jobs.changes["export"]), mode=disk.FULL) if full else jobs.draw("export", draw)
        jobs.run("export", folder, order)
        if number % 3 == 2:
            check_export(jobs, folder)
    assert RunFolder(folder / "run").read_summary().status == "succeeded"


def check_export(jobs: Jobs, folder: Path) -> None:
    """The same command makes the bundle, or it is there whole; then it is taken away."""
    if jobs.run("export", folder) != 0:
        assert "whole now" in said(folder) or "never overwritten" in said(folder), said(folder)
    bundle, archive = folder / "bundle", folder / "bundle.zip"
    assert load_bundle(bundle, None).digest == load_bundle(archive, None).digest
    assert not (folder / ".bundle.export").exists()
    shutil.rmtree(bundle)
    archive.unlink()


def state(folder: Path, name: str) -> list[np.ndarray]:
    checkpoint = read_checkpoint(folder / "run" / "checkpoints" / f"{name}.pt")
    own = [checkpoint.strategy_state[key] for key in sorted(checkpoint.strategy_state)]
    return [np.array(checkpoint.round), checkpoint.arrays.parameters, checkpoint.arrays.statistics, *own]


def said(folder: Path) -> str:
    words = folder / "said"
    return words.read_text() if words.exists() else ""
