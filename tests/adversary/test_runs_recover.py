"""A run folder has one owner, what was damaged is not gone on from, and what has succeeded stays so."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import CheckpointError, ConfigError, PolicyError
from pneumofed.common.files import StateFile
from pneumofed.common.folder_lock import check_free, owned
from pneumofed.common.models.build import build_model
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.runs.checkpoints import Checkpoint, read_checkpoint, read_last, set_damaged_aside, write_checkpoint
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import RoundRecord
from pneumofed.simulation.plan import Plan, build_plan, default_run_dir
from pneumofed.simulation.runner import run_simulation
from pneumofed.simulation.superlink import Resources
from tests.tiny import TINY, tiny_experiment

OWNER = """
import os, subprocess, sys, time
from pathlib import Path
from pneumofed.common.folder_lock import owned
with owned(Path(sys.argv[1]), "run", "pneumofed simulate", ""):
    program = subprocess.Popen(["sleep", "60"])
    ready, begun = os.pipe()
    fork = os.fork()
    if fork == 0:
        os.write(begun, b"1")
        time.sleep(60)
    os.read(ready, 1)  # a fork has the lock until its first line runs
    print(program.pid, fork, flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_at_once_and_free_when_its_owner_is_killed_though_his_children_live(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    children = [int(pid) for pid in owner.stdout.readline().split()]
    try:
        expected = rf"in use by `pneumofed simulate` \(process {owner.pid} on .* since .*\); wait for it"
        with pytest.raises(ConfigError, match=expected), owned(tmp_path, "run", "another", "wait for it"):
            pass
        with pytest.raises(ConfigError, match=expected):
            check_free(tmp_path, "run", "wait for it")
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        with owned(tmp_path, "run", "another", ""):
            assert all(Path(f"/proc/{pid}").exists() for pid in children)
    finally:
        owner.kill()
        owner.stdout.close()
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def checkpoint_of(experiment: ExperimentConfig, number: int, folder: Path) -> Path:
    network = build_model(experiment.model, experiment.task, seed=number)
    arrays = ModelArrays(*ArraysLayout.of(network).flatten(network))
    write_checkpoint(folder / "last.pt", Checkpoint(experiment, "run-0", number, arrays, {"m": np.ones(3)}), network)
    return folder / "last.pt"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, experiment = tmp_path_factory.mktemp("checkpoints"), tiny_experiment()
    checkpoint_of(experiment, 1, folder)
    return checkpoint_of(experiment, 2, folder)


def flip(content: bytes, place: float, bit: int) -> bytes:
    changed = bytearray(content)
    changed[int(place * len(content))] ^= 1 << bit
    return bytes(changed)


PLACES = st.floats(0.0, 1.0, exclude_max=True)


@settings(max_examples=60, deadline=None)
@given(PLACES, st.integers(0, 7))
def test_no_checkpoint_with_a_flipped_bit_is_read_and_the_one_before_takes_its_place(
    checkpoint: Path, place: float, bit: int
) -> None:
    whole = checkpoint.read_bytes()
    assert read_last(checkpoint).round == 2
    try:
        checkpoint.write_bytes(flip(whole, place, bit))
        with pytest.raises(CheckpointError, match=r"last\.pt cannot be read"):
            read_checkpoint(checkpoint)
        assert read_last(checkpoint).round == 1
    finally:
        checkpoint.write_bytes(whole)


@settings(max_examples=60, deadline=None)
@given(PLACES, st.integers(0, 7), st.booleans(), st.booleans())
def test_a_flipped_bit_in_a_state_file_never_gives_another_value(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, falls_back: bool, in_sums: bool
) -> None:
    def refuse(problem: str) -> PolicyError:
        return PolicyError("count", problem)

    folder = tmp_path_factory.mktemp("state")
    file: StateFile[list[int]] = StateFile(
        folder / "count.json", "a count", json.loads, [], "restore it", refuse, falls_back=falls_back
    )
    for value in ([1], [1, 1234567]):
        file.write(value)
    target = folder / ".count.json.sum" if in_sums else file.path
    target.write_bytes(flip(target.read_bytes(), place, bit))
    if in_sums:
        assert file.read() == [1, 1234567]
    elif falls_back:
        assert file.read() == [1]
    else:
        with pytest.raises(PolicyError, match="damaged"):
            file.read()


def plan_of(out: Path, resume: bool = False, baselines: bool = False, **changes: Any) -> Plan:
    virtual = {} if resume else {"phantom_patients": 12, "hospitals": 2, "device": "cpu", "partition": "iid"}
    values = changes if resume else {**TINY, "rounds": 1, **changes}
    return Plan(*build_plan(out, values, virtual, resume=resume), out, Resources(2), "local", resume, baselines)


def silent(_: str) -> None:
    """Says nothing."""


def test_a_finished_run_is_never_demoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, heard = RunFolder(tmp_path / "run"), list[str]()
    run_simulation(plan_of(folder.path), silent)
    before = folder.summary.read_bytes(), folder.last_checkpoint.read_bytes()
    with pytest.raises(CheckpointError, match=r"rounds was 1, now 5; it has finished; a new run"):
        plan_of(folder.path, resume=True, rounds=5)
    assert (folder.summary.read_bytes(), folder.last_checkpoint.read_bytes()) == before

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pneumofed.simulation.baselines.run_baselines", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_simulation(plan_of(folder.path, resume=True, baselines=True), silent)
    assert (folder.has_succeeded, folder.read_summary().error) == (True, None)
    monkeypatch.setattr("pneumofed.server.report.report.close_with_report", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_simulation(plan_of(folder.path, resume=True), heard.append)
    assert folder.has_succeeded and any("finished" in line for line in heard)
    assert folder.last_checkpoint.read_bytes() == before[1]


def test_a_run_without_a_round_is_not_called_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pneumofed.server.federation.run._run_rounds", interrupt)
    out = tmp_path / "runs" / "never"
    with pytest.raises(KeyboardInterrupt):
        run_simulation(plan_of(out), silent)
    summary = RunFolder(out).read_summary()
    assert summary.status == "stopped" and "start it again without --resume" in str(summary.error)
    with pytest.raises(CheckpointError, match="start it again without --resume"):
        plan_of(out, resume=True)
    with pytest.raises(CheckpointError, match="has completed a round"):
        default_run_dir(resume=True)
    monkeypatch.undo()
    assert run_simulation(plan_of(out), silent).status == "succeeded"


def test_a_run_that_ended_between_its_first_line_and_its_checkpoint_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr("pneumofed.server.federation.run.write_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        run_simulation(plan_of(folder.path), silent)
    assert len(folder.read_history()) == 1 and not folder.last_checkpoint.exists()
    monkeypatch.undo()
    with folder.history.open("a") as file:
        file.write('{"round": 2, "cut')
    with pytest.raises(CheckpointError, match="start it again without --resume"):
        plan_of(folder.path, resume=True)
    assert run_simulation(plan_of(folder.path), silent).status == "succeeded"
    assert [line.round for line in folder.read_history()] == [1]
    with pytest.raises(CheckpointError, match="already holds a run"):
        run_simulation(plan_of(folder.path), silent)
    folder.last_checkpoint.unlink()
    with pytest.raises(CheckpointError, match="already holds a run"):  # its results could be had from nothing else
        run_simulation(plan_of(folder.path), silent)


def test_a_line_that_meets_a_full_disk_is_not_in_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = RunFolder(tmp_path), os.write
    folder.append_history(RoundRecord(round=1))
    before = folder.history.read_bytes()
    calls = iter((False, True))

    def write(descriptor: int, data: bytes) -> int:
        if next(calls):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        folder.append_history(RoundRecord(round=2))
    monkeypatch.undo()
    assert folder.history.read_bytes() == before


def test_a_damaged_checkpoint_is_set_aside_without_a_moment_in_which_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        last = checkpoint_of(tiny_experiment(), number, tmp_path)
    damaged = flip(last.read_bytes(), 0.5, 1)
    last.write_bytes(damaged)
    real = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if "previous" in path.name:
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        set_damaged_aside(last)
    monkeypatch.undo()
    assert read_last(last).round == 1
    set_damaged_aside(last)
    assert read_checkpoint(last).round == 1 and (tmp_path / "last.damaged.pt").read_bytes() == damaged


def test_a_second_simulation_in_a_folder_changes_nothing_there(tmp_path: Path) -> None:
    with owned(tmp_path, "simulation", "pneumofed simulate", ""):
        with pytest.raises(ConfigError, match=r"in use by .* wait for it or choose another --out"):
            run_simulation(plan_of(tmp_path), silent)
        assert [path.name for path in tmp_path.iterdir()] == [".simulation.lock"]
