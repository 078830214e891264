"""Federations in one process each, several at once: what benchmarks that compare many runs have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pneumofed.server.runs.summary_records import RunSummary


Deed = Literal["honest", "absent", "flipped", "scaled", "nan"]
"""What the last hospital does: takes part, is not there, swaps normal and pneumonia in its labels, sends its update a hundredfold,
or sends no numbers."""

SCALE = 100.0


@dataclass(frozen=True)
class Run:
    """One federation; plain values, to cross processes. `experiment` and `simulation` are nested dictionaries of settings."""

    name: str
    experiment: dict[str, Any]
    simulation: dict[str, Any]
    folder: str
    deed: Deed = "honest"


def build_parser(description: str) -> argparse.ArgumentParser:
    """Options of a benchmark that compares many small federations on real images."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", required=True, help="folder in the Kaggle layout")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--hospitals", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser


def run_all(runs: Sequence[Run], runs_per_process: int | None = 1) -> list[RunSummary]:
    """The summaries of `runs`, in their order; as many at once as there are CPUs, with one thread each.

    Small runs share processes with `runs_per_process` None, which saves the import of torch for each.
    """
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), max_tasks_per_child=runs_per_process) as pool:
        return list(pool.map(run_one, runs))


def run_one(run: Run) -> RunSummary:
    """Lays out the federation of `run`, runs it and returns its summary."""
    from pneumofed.client.app import app as client_app
    from pneumofed.common.wire.messages import COORDINATOR_KEY, EXPERIMENT_KEY, SITES_KEY
    from pneumofed.server.app import experiment_of, read_coordinator
    from pneumofed.server.federation.run import run_federation
    from pneumofed.simulation.hospitals.federation import lay_out
    from pneumofed.simulation.local_grid import LocalGrid
    from pneumofed.simulation.plan import build_plan

    folder = Path(run.folder) / run.name
    experiment, simulation = build_plan(folder, run.experiment, run.simulation)
    federation = lay_out(simulation, experiment, folder, resume=False)
    last = federation.hospitals - 1
    if run.deed == "flipped":
        _flip_labels(folder, last, federation.hospitals)
    present = federation.hospitals - (run.deed == "absent")
    if run.deed == "absent":
        experiment = experiment.model_copy(
            update={"strategy": experiment.strategy.model_copy(update={"wait_for_sites": present})}
        )
    config = {
        EXPERIMENT_KEY: experiment.model_dump_json(),
        COORDINATOR_KEY: str(federation.coordinator_file),
        SITES_KEY: str(federation.sites_dir),
    }
    app = _meddling(client_app, last, run.deed) if run.deed in ("scaled", "nan") else client_app
    grid = LocalGrid(app, [{"partition-id": number} for number in range(present)], config)
    return run_federation(grid, experiment_of(config), read_coordinator(config))


def _flip_labels(folder: Path, number: int, hospitals: int) -> None:
    from dataclasses import replace

    from pneumofed.common.data.manifest import Manifest, read_manifest, write_manifest
    from pneumofed.simulation.hospitals.study import numbered_name

    path = folder / "sites" / numbered_name("hospital", number, hospitals) / "manifest.csv"
    records = read_manifest(path).records
    flipped = (replace(record, label="pneumonia" if record.label == "normal" else "normal") for record in records)
    write_manifest(Manifest(tuple(flipped)), path)


def _meddling(client_app: Any, number: int, deed: Deed) -> Any:
    """`client_app`, but training replies of hospital `number` are changed on their way out."""
    import numpy as np

    from pneumofed.client.federation.held_model import restore_model
    from pneumofed.client.federation.site_data import find_site_config
    from pneumofed.common.wire.instructions import unpack_instruction
    from pneumofed.common.wire.messages import ARRAYS, ModelArrays, pack_arrays, unpack_arrays

    def answer(message: Any, context: Any) -> Any:
        reply = client_app(message, context)
        if context.node_config["partition-id"] == number and message.metadata.message_type == "train":
            site = find_site_config(context.node_config, context.run_config)
            base = restore_model(site, unpack_instruction(message.content)).weights.parameters
            arrays = unpack_arrays(reply.content.array_records[ARRAYS])
            change = np.float32("nan") if deed == "nan" else np.float32(SCALE)
            reply.content[ARRAYS] = pack_arrays(ModelArrays(base + change * (arrays.parameters - base), arrays.statistics))
        return reply

    return answer
