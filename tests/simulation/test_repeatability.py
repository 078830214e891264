"""On ResNet18, over Flower's simulation on Ray, through the command line: one seed gives one model, also across an interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pneumofed.server.runs.checkpoints import read_checkpoint
from pneumofed.server.runs.folder import RunFolder

ROUNDS, STOP_AFTER = 5, 3
COMMAND = [sys.executable, "-m", "pneumofed.cli.main", "simulate"]
SETTINGS = [
    "--engine",
    "flower",
    "--hospitals",
    "3",
    "--image-size",
    "32",
    "--rounds",
    str(ROUNDS),
    "--set",
    "evaluation.bootstrap_samples=0",
]


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    script = [*COMMAND, *SETTINGS, "--out", str(out), *more]
    return subprocess.Popen(
        script,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell starts background jobs with SIGINT ignored, and this test may be one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], code: int) -> None:
    said, _ = process.communicate(timeout=280)
    assert process.returncode == code, said


def weights(out: Path) -> np.ndarray:
    checkpoint = read_checkpoint(RunFolder(out).last_checkpoint)
    assert checkpoint.experiment.model.name == "resnet18" and checkpoint.round == ROUNDS
    return np.concatenate([checkpoint.arrays.parameters, checkpoint.arrays.statistics])


def interrupt_after_round(process: subprocess.Popen[str], out: Path) -> None:
    history = RunFolder(out)
    while process.poll() is None and len(history.read_history()) < STOP_AFTER:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_and_one_stopped_after_round_three_and_resumed_are_equal_bit_for_bit(tmp_path: Path) -> None:
    for name in ("first", "second"):
        finish(start(tmp_path / name), 0)
    stopped = start(tmp_path / "stopped")
    interrupt_after_round(stopped, tmp_path / "stopped")
    finish(stopped, 130)
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["status"] == "stopped" and STOP_AFTER <= summary["rounds_completed"] < ROUNDS
    finish(start(tmp_path / "stopped", "--resume"), 0)
    expected = weights(tmp_path / "first")
    np.testing.assert_array_equal(weights(tmp_path / "second"), expected)
    np.testing.assert_array_equal(weights(tmp_path / "stopped"), expected)
