"""The promise: a run that is killed (-9) or meets a full disk, at whatever moment, resumes to the weights of an unbroken one, bit for bit;
nothing that a hospital gave is missing in its ledger; no folder is unusable.

`PNEUMOFED_KILLS` is the number of kills of each job in the long form (60: with the others of this folder, 200).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pneumofed.client.privacy.ledger import Ledger
from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder
from tests.adversary.killed_jobs import ROUNDS
from tests.adversary.marked import moments

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("PNEUMOFED_KILLS", "60"))


class Jobs:
    """The process that forks a job's."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.adversary.killed_jobs"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(
        self, job: str, folder: Path, *, resume: bool = False, kill_after: float | None = None, writes: int | None = None
    ) -> int:
        """The exit code of the job, or the number of the signal that ended it, below zero."""
        folder.mkdir(parents=True, exist_ok=True)
        process = self._process
        assert process.stdin and process.stdout
        order = {"job": job, "folder": str(folder), "resume": resume, "writes": writes}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGKILL)
        return int(process.stdout.readline())

    def finish(self, job: str, folder: Path) -> None:
        """What a person does after a kill: resumes, or starts anew where the run never began."""
        resume = job != "export" and began(folder)
        assert self.run(job, folder, resume=resume) == 0, said(folder)

    def close(self) -> None:
        process = self._process
        process.kill()  # nothing of a job runs now
        process.wait(20)


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    server = Jobs()
    yield server
    server.close()


class Unbroken:
    """The unbroken run of each job: its weights, and how long it took."""

    def __init__(self, jobs: Jobs, folder: Path) -> None:
        self.folder, self.seconds = folder, {}
        for job in ("plain", "private"):
            started = time.monotonic()
            assert jobs.run(job, folder / job) == 0, said(folder / job)
            self.seconds[job] = time.monotonic() - started
        self.weights = weights(folder / "plain")


@pytest.fixture(scope="module")
def unbroken(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return Unbroken(jobs, tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize(("job", "share"), [("plain", 0.7), ("private", 0.6)])
def test_a_killed_run_resumes_to_the_same_end(jobs: Jobs, unbroken: Unbroken, tmp_path: Path, job: str, share: float) -> None:
    kill_and_finish(jobs, unbroken, tmp_path, job, [share])


@pytest.mark.parametrize(("job", "writes"), [("private", 14)])
def test_a_full_disk_is_said_and_the_run_resumes(jobs: Jobs, unbroken: Unbroken, tmp_path: Path, job: str, writes: int) -> None:
    fill_and_finish(jobs, unbroken, tmp_path, job, writes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("job", ["plain", "private"])
@pytest.mark.parametrize("number", range(KILLS // 3))
def test_killed_three_times(jobs: Jobs, unbroken: Unbroken, tmp_path: Path, job: str, number: int) -> None:
    kill_and_finish(jobs, unbroken, tmp_path, job, moments(3, 1.0, seed=number))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("job", ["plain", "private"])
@pytest.mark.parametrize("writes", range(0, 40, 2))
def test_a_full_disk_at_every_second_file(jobs: Jobs, unbroken: Unbroken, tmp_path: Path, job: str, writes: int) -> None:
    fill_and_finish(jobs, unbroken, tmp_path, job, writes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_export_leaves_no_half_bundle(jobs: Jobs, tmp_path: Path) -> None:
    from tests.server.export.finished_run import write_finished_run

    write_finished_run(tmp_path / "run")
    draw = random.Random(3)
    for _ in range(KILLS // 3):
        jobs.run("export", tmp_path, kill_after=draw.uniform(0.0, 6.0))
        assert RunFolder(tmp_path / "run").read_summary().status == "succeeded"
    jobs.finish("export", tmp_path)
    for bundle in tmp_path.glob("bundle*"):
        assert bundle.suffix == ".zip" or (bundle / "signature.json").exists()


def kill_and_finish(jobs: Jobs, unbroken: Unbroken, folder: Path, job: str, shares: list[float]) -> None:
    """Kills the job and each try to resume it, after these shares of an unbroken run's time, and lets it end."""
    resume = False
    for share in shares:
        jobs.run(job, folder, resume=resume, kill_after=share * unbroken.seconds[job])
        resume = began(folder)
    check_end(jobs, unbroken, folder, job)


def fill_and_finish(jobs: Jobs, unbroken: Unbroken, folder: Path, job: str, writes: int) -> None:
    if jobs.run(job, folder, writes=writes) != 0:
        words = said(folder)
        assert "No space left" in words or "full" in words or "disk" in words, words
        assert "Traceback" not in words, words
    check_end(jobs, unbroken, folder, job)


def check_end(jobs: Jobs, unbroken: Unbroken, folder: Path, job: str) -> None:
    run = RunFolder(folder / "run")
    if len(run.read_history()) < ROUNDS or run.read_summary().status != "succeeded":
        jobs.finish(job, folder)
    assert [line.round for line in run.read_history()] == list(range(1, ROUNDS + 1))
    if job == "plain":
        np.testing.assert_array_equal(weights(folder), unbroken.weights)
    else:
        for site in ("site-0", "site-1"):
            assert spent_rounds(folder, site) >= spent_rounds(unbroken.folder / job, site) > 0


def began(folder: Path) -> bool:
    """Whether the run asks to be resumed, and does not take a new start."""
    run = RunFolder(folder / "run")
    return run.last_checkpoint.exists() or bool(run.read_history())


def weights(folder: Path) -> np.ndarray:
    arrays = read_checkpoint(RunFolder(folder / "run").last_checkpoint).arrays
    return np.concatenate([arrays.parameters, arrays.statistics])


def said(folder: Path) -> str:
    words = folder / "said"
    return words.read_text() if words.exists() else ""


def spent_rounds(folder: Path, site: str) -> int:
    """How many entries the site's ledger has; one a round that it took part in, or tried to."""
    ledger = Ledger(folder / "sites" / site / "ledger.sqlite")
    return sum(len(lineage.entries) for lineage in ledger.lineages())
