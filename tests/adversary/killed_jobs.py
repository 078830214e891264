"""Jobs that a test kills.

`python -m tests.adversary.killed_jobs` imports all that they need once and forks a process for each line of JSON on its input,
`{"job": NAME, "folder": PATH, "resume": BOOL, "at": NUMBER, "mode": NUMBER, "place": TEXT}` (`tests.adversary.disk`; or killed at a
beginning or end of one of `PLACES`). The process says its number when the hospitals are laid out and the job begins; then a line of JSON
follows, `{"code": NUMBER, "place": TEXT, "changes": NUMBER}`: 0, 1, or the number of the signal that ended it as a negative number; what
it was at last doing; how many changes it made to its folder. What a job that failed says to its user lies in `said` there.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import torch
import yaml

import pneumofed.client.privacy.dp_sgd  # noqa: F401  imported before the fork
import pneumofed.server.export.export as exporting
import pneumofed.server.federation.run as running
from pneumofed.client.privacy.ledger import Ledger
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.errors import PneumofedError
from pneumofed.common.privacy.randomness import NOISE_KEY_FILE, write_secret
from pneumofed.server.export.export import ExportPlan, export_run
from pneumofed.server.federation.rounds import Coordinator
from pneumofed.simulation.baselines import run_baselines
from tests.adversary import disk
from tests.model_bundles import signing_key, small_graph
from tests.tiny import TinyFederation, tiny_experiment

ROUNDS = 4
SITES = 2
RUN_TOKEN = "0123456789abcdef"
"""Of every run here, and with it and the noise keys the noise: so that the weights of private runs can be compared."""
SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "learning_rate": 1.0}
DP_SGD = {"mechanism": "dp_sgd", "noise_multiplier": 2.0, "delta": 1e-3, "expected_batch_size": 4}
POLICY = {"min_patients": 2, "min_patients_private": 2, "min_validation_patients": 1}
"""With a policy the sites keep audit logs."""
PLACES = {
    "training": (Coordinator, "_train"),
    "aggregation": (Coordinator, "_aggregate"),
    "evaluation": (Coordinator, "_evaluate"),
    "central evaluation": (Coordinator, "_evaluate_centrally"),
    "history and checkpoint": (running, "_keep_round"),
    "results": (running, "_with_results"),
    "ledger": (Ledger, "spend"),
    "packing the bundle": (exporting, "pack"),
}
_place, _changes = mmap.mmap(-1, 64), mmap.mmap(-1, 8)


def experiment(job: str) -> ExperimentConfig:
    """The experiment of a job: with differential privacy, or with momentum at the coordinator, whose state a resumed run needs too."""
    if job == "private":
        return tiny_experiment(
            rounds=ROUNDS, model={"norm": "group"}, loss={"logit_adjustment": False}, training=SGD, privacy=DP_SGD
        )
    return tiny_experiment(rounds=ROUNDS, strategy={"name": "fedadam"})


def lay_out(job: str, folder: Path) -> TinyFederation:
    """The hospitals of a run, as they were if they are there: nothing here is under attack."""
    federation = TinyFederation(folder, sites=SITES, patients=12)
    for number in range(SITES):
        write_secret(federation.sites / f"site-{number}" / NOISE_KEY_FILE, bytes([number]) * 32)
        if job == "private":
            file = federation.sites / f"{number}.yaml"
            file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "policy": "../policy.yaml"}))
    (folder / "policy.yaml").write_text(yaml.safe_dump(POLICY))
    return federation


def train(job: str, folder: Path, resume: bool) -> None:
    """A run of two hospitals in this process: training, aggregation, checkpoints, audit logs, and the ledgers of a private one."""
    federation = TinyFederation.__new__(TinyFederation)
    federation.folder, federation.sites, federation.key_roster = folder, folder / "sites", None
    federation.run("run", experiment(job), resume=resume, audit_log=folder / "audit.jsonl")


def baselines(_: str, folder: Path, __: bool) -> None:
    """The baselines of a finished run in `folder`, whose hospitals lie in `hospitals` beside it."""
    hospitals = folder.parent / "hospitals"
    settings = CoordinatorConfig(run_dir=str(folder / "run"), test_manifest=str(hospitals / "test.csv"), device="cpu", threads=1)
    (folder / "coordinator.yaml").write_text(yaml.safe_dump(settings.model_dump()))
    sites = sorted((hospitals / "sites").glob("*.yaml"))
    run_baselines(folder / "run", experiment("plain"), sites, folder / "coordinator.yaml", print)


def export(_: str, folder: Path, __: bool) -> None:
    """The bundle of the finished run in `folder`."""
    export_run(ExportPlan(folder / "run", folder / "bundle", signing_key()))


JOBS = {"plain": train, "private": train, "baselines": baselines, "export": export}


def note_places() -> None:
    """Has the functions of `PLACES` say when they begin and end."""
    for name, (owner, function) in PLACES.items():
        setattr(owner, function, _noted(name, getattr(owner, function)))


def _noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def noted(*arguments: Any, **options: Any) -> Any:
        before, _place[:] = _place[:], name.encode().ljust(64)
        try:
            _die_at(name)
            result = function(*arguments, **options)
            _die_at(name)
            return result
        finally:
            _place[:] = before

    return noted


_deadly: list[Any] = ["", 0]
"""A place, and how often its beginnings and ends still pass before the process is killed at one."""


def _die_at(name: str) -> None:
    if name == _deadly[0]:
        if _deadly[1] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        _deadly[1] -= 1


def write_graph(network: torch.nn.Module, _: int, __: int, path: Path) -> None:
    """In the place of torch's exporter, which takes most of a minute here, in memory; its file is written as the exporter's is."""
    path.write_bytes(small_graph(network))


def work(order: dict[str, Any]) -> int:
    """Does the job; its exit code."""
    folder = Path(order["folder"])
    _deadly[:] = order["place"], order["at"]
    disk.arm(folder, order["at"], order["mode"])
    try:
        JOBS[order["job"]](order["job"], folder, order["resume"])
    except BaseException as error:
        disk.disarm()  # what follows is the test's own
        expected = isinstance(error, PneumofedError | OSError)
        (folder / "said").write_text(f"{type(error).__name__}: {error}" if expected else f"Traceback: {traceback.format_exc()}")
        return 1
    _changes[:] = disk.changes().to_bytes(8, "little")
    return 0


def main() -> None:
    """Serves until its input ends."""
    torch.set_num_threads(1)
    PIL.Image.init()
    note_places()
    running.secrets = SimpleNamespace(token_hex=lambda _: RUN_TOKEN)  # type: ignore[assignment]
    exporting.export_onnx = write_graph  # type: ignore[assignment]
    for line in sys.stdin:
        order = json.loads(line)
        _place[:], _changes[:] = order["job"].encode().ljust(64), bytes(8)
        pid = os.fork()
        if pid == 0:
            if JOBS[order["job"]] is train:
                lay_out(order["job"], Path(order["folder"]))
            _reply(os.getpid())
            log = os.open(Path(order["folder"]) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os._exit(work(order))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        place = _place[:].decode().strip()
        _reply({"code": code, "place": place, "changes": int.from_bytes(_changes[:], "little")})


def _reply(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
