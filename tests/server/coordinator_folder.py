"""A coordinator folder without its processes, and a Flower that does what a test tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pneumofed.common.errors import FlowerError
from pneumofed.server.operations.settings import CoordinatorFolder
from pneumofed.server.runs.events import EVENTS_FILE, Activity
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import RoundRecord
from pneumofed.server.runs.registry import Registry, default_url, open_registry_database
from pneumofed.server.runs.runs import Runs
from pneumofed.server.runs.summary_records import RunSummary

APP_HASH = "ab" * 32
METRICS = {"n": 40, "auroc": 0.9, "accuracy": 0.8, "sensitivity": 0.85, "specificity": 0.75, "log_loss": 0.4}


@dataclass
class FakeFlower:
    """Statuses by run number; `down` answers nothing; `meanwhile` happens while a run is handed over."""

    statuses: dict[int, str] = field(default_factory=dict)
    submitted: list[Mapping[str, str]] = field(default_factory=list)
    down: bool = False
    meanwhile: Callable[[], None] = lambda: None

    def submit(self, folder: Path, run_config: Mapping[str, str]) -> int:
        self._check()
        self.meanwhile()
        self.submitted.append(run_config)
        self.statuses[len(self.submitted)] = "pending"
        return len(self.submitted)

    def run_status(self, folder: Path, run_id: int) -> str:
        self._check()
        return self.statuses[run_id]

    def stop_run(self, folder: Path, run_id: int) -> None:
        self._check()
        if not self.statuses[run_id].startswith("finished"):
            self.statuses[run_id] = "finished:stopped"

    def _check(self) -> None:
        if self.down:
            raise FlowerError("the SuperLink does not answer")


def write_coordinator(path: Path, **settings: Any) -> CoordinatorFolder:
    """A folder with settings alone."""
    for folder in (path, path / "state", path / "runs"):
        folder.mkdir(exist_ok=True, mode=0o700)
    content = {"federation": "test", "hosts": ["127.0.0.1"], **settings}
    (path / "coordinator.yaml").write_text(yaml.safe_dump(content))
    return CoordinatorFolder(path)


def open_runs(folder: CoordinatorFolder, flower: FakeFlower) -> Runs:
    folder.state.mkdir(parents=True, exist_ok=True)
    return Runs(folder, Registry(open_registry_database(default_url(folder.state))), flower, lambda: APP_HASH)


class FakeServerApp:
    """Writes into a run folder what the real one would, step by step."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.folder.prepare()
        self.activity = Activity(path / EVENTS_FILE)

    def begin(self, rounds: int = 3) -> None:
        self.folder.write_summary(RunSummary(status="running", name="test"))
        self.activity.note("run_started", round=0, rounds=rounds)
        self.beat()

    def beat(self) -> None:
        self.folder.heartbeat.touch()

    def begin_round(self, number: int, sites: tuple[str, ...] = ("north", "south")) -> None:
        self.activity.note("round_started", round=number, sites=list(sites), deadline_sec=60.0)
        for site in sites:
            self.activity.note("asked", round=number, site=site, task="train")

    def finish_round(self, number: int, sites: tuple[str, ...] = ("north", "south"), judged: bool = True, **changes: Any) -> None:
        for site in sites:
            self.activity.note("answered", round=number, site=site, task="train", seconds=1.5)
        train = {"num_examples": 30, "train_loss": 0.5}
        line = {
            "round": number, "drawn": list(sites), "failures": {}, "left_out": {}, "late": [], "absent": {},
            "sites": {site: {"train": train, **({"validation": METRICS} if judged else {})} for site in sites},
            **({"threshold": {"value": 0.5}, "validation": METRICS, "test": METRICS} if judged else {}),
            "seconds": {"total": 2.0}, "bytes": {"down": 100, "up": 100},
        }  # fmt: skip
        self.folder.append_history(RoundRecord.model_validate({**line, **changes}))
        self.folder.last_checkpoint.write_bytes(b"weights")
        self.activity.note("round_done", round=number, seconds=2.0)

    def end(self, status: str, **summary: Any) -> None:
        self.folder.write_summary(RunSummary(status=status, name="test").updated(**summary))
