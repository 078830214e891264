"""Jobs that a test kills.

`python -m tests.adversary.killed_jobs` imports all that they need once and forks a process for each line of JSON on its input,
`{"job": NAME, "folder": PATH, "resume": BOOL, "writes": NUMBER or null}`. It says the process's number, then 0, the number of the signal
that ended it as a negative number, or 1; what a job that failed says to its user lies in `said` of the folder.

`writes`: so many files are written before the disk is full.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

import pneumofed.client.privacy.rounds  # noqa: F401  imported before the fork
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.errors import PneumofedError
from pneumofed.server.export.export import ExportPlan, export_run
from tests.model_bundles import signing_key
from tests.tiny import TinyFederation, tiny_experiment

ROUNDS = 4
SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "learning_rate": 1.0}
DP_SGD = {"mechanism": "dp_sgd", "noise_multiplier": 2.0, "delta": 1e-3, "expected_batch_size": 4}


def experiment(job: str) -> ExperimentConfig:
    """The experiment of a job: with differential privacy, or with momentum at the coordinator, whose state a resumed run needs too."""
    if job == "private":
        return tiny_experiment(
            rounds=ROUNDS, model={"norm": "group"}, loss={"logit_adjustment": False}, training=SGD, privacy=DP_SGD
        )
    return tiny_experiment(rounds=ROUNDS, strategy={"name": "fedadam"})


def train(job: str, folder: Path, resume: bool) -> None:
    """A run of two hospitals in this process: training, aggregation, checkpoints, and the ledgers of a private one."""
    federation = TinyFederation(folder, sites=2, patients=12)
    federation.run("run", experiment(job), resume=resume)


def export(_: str, folder: Path, __: bool) -> None:
    """The bundle of the finished run in `folder`; a second try takes another name, as the command asks for."""
    name = next(f"bundle{n}" for n in itertools.count() if not any((folder / f"bundle{n}{end}").exists() for end in ("", ".zip")))
    export_run(ExportPlan(folder / "run", folder / name, signing_key()))


JOBS = {"plain": train, "private": train, "export": export}


def fill_disk_after(writes: int) -> None:
    """Lets `atomic_write` meet a full disk from then on; it is where the product makes files that have to be whole."""
    made, real = itertools.count(), tempfile.mkstemp

    def mkstemp(*arguments: Any, **options: Any) -> tuple[int, str]:
        if next(made) >= writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    tempfile.mkstemp = mkstemp  # type: ignore[assignment]


def work(order: dict[str, Any]) -> int:
    """Does the job; its exit code."""
    folder = Path(order["folder"])
    if order["writes"] is not None:
        fill_disk_after(order["writes"])
    try:
        JOBS[order["job"]](order["job"], folder, order["resume"])
    except (PneumofedError, OSError) as error:
        (folder / "said").write_text(f"{type(error).__name__}: {error}")
        return 1
    except BaseException:
        (folder / "said").write_text(f"Traceback: {traceback.format_exc()}")
        return 1
    return 0


def main() -> None:
    """Serves until its input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(Path(order["folder"]) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os._exit(work(order))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
