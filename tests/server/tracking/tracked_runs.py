"""A run folder that a test moves on, and its event files read back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.server.runs.records import RoundRecord
from tests.server.coordinator_folder import FakeServerApp

RESULTS = {"auroc": {"value": 0.9, "low": 0.8, "high": 0.95}}


def begin_run(path: Path, **settings: Any) -> FakeServerApp:
    app = FakeServerApp(path)
    app.folder.write_config(ExperimentConfig(rounds=3, **settings))
    app.begin()
    return app


def append_line(app: FakeServerApp, number: int, **changes: Any) -> None:
    """A round's line without its checkpoint: what a process leaves that dies between the two."""
    line = {"round": number, "drawn": ["north"], "validation": {"auroc": 0.1}, "seconds": {"total": 9.0}, **changes}
    time.sleep(0.01)  # so that the times of change differ
    app.folder.append_history(RoundRecord.model_validate(line))


def succeed(app: FakeServerApp, **summary: Any) -> None:
    app.end("succeeded", test=RESULTS, best_round=3, rounds_completed=len(app.folder.read_history()), **summary)


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by name, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    reader.Reload()
    return {name: [(point.step, point.value) for point in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def read_texts(folder: Path) -> dict[str, list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {name: [one.tensor_proto.string_val[0].decode() for one in reader.Tensors(name)] for name in reader.Tags()["tensors"]}
