"""A run from its first message to its summary, also when it fails or goes on from a checkpoint."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from common.config import ExperimentConfig
from common.data.manifest import CLASSES
from common.errors import CheckpointError, PneumofedError
from common.layout import ArraysLayout
from common.messages import ModelArrays
from common.models import build_model
from common.party_config import CoordinatorConfig
from common.schedule import rate_of_round
from common.seeds import derive_seed
from server.activity import HEARTBEAT_FILE, Heartbeat
from server.central_privacy import CentralPrivacy
from server.checkpoints import Checkpoint, check_same_experiment, read_checkpoint, write_checkpoint
from server.chronicle import Chronicle
from server.judge import build_judge
from server.parent import describe_parent
from server.progress import best_round, course, stalled
from server.rounds import Coordinator
from server.run_folder import RunFolder
from server.secure_sum.rounds import read_key_roster
from server.strategies import build_strategy, restore_state, strategy_state

logger = logging.getLogger(__name__)

SUCCEEDED, FAILED, STOPPED, RUNNING = "succeeded", "failed", "stopped", "running"


def run_study(grid: Grid, experiment: ExperimentConfig, settings: CoordinatorConfig) -> dict[str, Any]:
    """Runs or resumes the study and returns its summary, which also lies in the run folder with the history and checkpoints.

    Raises:
        PneumofedError: the run cannot start or a round failed; the summary then says `failed` and why.
        CheckpointError: the folder holds another run, or `resume` is asked for and there is nothing to resume.
    """
    folder = RunFolder(Path(settings.run_dir))
    checkpoint = _start_or_resume(folder, experiment, settings.resume)
    chronicle = Chronicle.of(settings, checkpoint.run if checkpoint else secrets.token_hex(8))
    started = time.perf_counter()
    before = float(folder.read_summary().get("seconds", 0.0)) if checkpoint else 0.0
    summary: dict[str, Any] = {"status": RUNNING, "name": experiment.name, "seed": experiment.seed}
    folder.write_summary({**summary, **course(folder), "seconds": before})
    try:
        with Heartbeat(folder.path / HEARTBEAT_FILE):
            chronicle.begins(experiment, grid.run.fab_hash, checkpoint.round if checkpoint else None)
            summary |= describe_parent(experiment, folder.read_summary(), resumed=checkpoint is not None)
            coordinator = _build_coordinator(grid, experiment, settings, chronicle, checkpoint)
            summary["data"] = coordinator.judge.data_reports()
            summary["app_bundle"] = grid.run.fab_hash
            coordinator.roll_call.assemble()
            _run_rounds(coordinator, folder, checkpoint.round if checkpoint else 0)
            summary.update(_final_results(coordinator, folder), status=SUCCEEDED)
    except BaseException as error:
        summary.update(status=FAILED if isinstance(error, Exception) else STOPPED, error=_sentence(error))
        raise
    finally:
        folder.write_summary({**summary, **course(folder), "seconds": before + time.perf_counter() - started})
        chronicle.ends(summary["status"], len(folder.read_history()), summary.get("error"))
    return folder.read_summary()


def _start_or_resume(folder: RunFolder, experiment: ExperimentConfig, resume: bool) -> Checkpoint | None:
    folder.prepare()
    if not resume:
        if folder.read_history():
            raise CheckpointError(f"{folder.path} already holds a run; use --resume to go on with it, or another folder")
        folder.write_config(experiment)
        folder.write_environment()
        return None
    checkpoint = read_checkpoint(folder.last_checkpoint)
    check_same_experiment(checkpoint, experiment)
    folder.keep_history_until(checkpoint.round)
    return checkpoint


def _build_coordinator(
    grid: Grid, experiment: ExperimentConfig, settings: CoordinatorConfig, chronicle: Chronicle, checkpoint: Checkpoint | None
) -> Coordinator:
    key_roster = read_key_roster(settings.key_roster) if experiment.secure_aggregation.enabled else None
    strategy = build_strategy(experiment.strategy, partial(rate_of_round, experiment))
    judge = build_judge(experiment, settings)
    network_config = experiment.model.without_weights() if checkpoint else experiment.model
    network = build_model(network_config, experiment.task, derive_seed(experiment.seed, "initial weights"))
    arrays = kept = ModelArrays(*ArraysLayout.of(network).flatten(network))
    if checkpoint:
        arrays, kept = checkpoint.training or checkpoint.arrays, checkpoint.arrays
        restore_state(strategy, checkpoint.strategy_state)
    central = CentralPrivacy.of(experiment, Path(settings.run_dir))
    return Coordinator(grid, experiment, chronicle, strategy, arrays, network, judge, kept, central, key_roster)


def _run_rounds(coordinator: Coordinator, folder: RunFolder, completed: int) -> None:
    experiment = coordinator.experiment
    for number in range(completed + 1, experiment.rounds + 1):
        if stalled(folder.read_history(), experiment.early_stopping):
            logger.info("stopped after round %d: validation AUROC no longer grows", number - 1)
            break
        line = coordinator.run_round(number)
        _remember(coordinator, folder, line)
        _log_round(line, experiment.rounds)


def _remember(coordinator: Coordinator, folder: RunFolder, line: dict[str, Any]) -> None:
    """History first, then the checkpoint: a run that dies between them repeats the round and writes the same line again."""
    checkpoint = Checkpoint(
        coordinator.experiment, coordinator.chronicle.run, line["round"], coordinator.kept, strategy_state(coordinator.strategy)
    )
    folder.append_history(line)
    if best_round(folder.read_history()) == line["round"]:
        write_checkpoint(folder.best_checkpoint, checkpoint, coordinator.network)
        if coordinator.validation is not None:
            folder.write_validation(line["round"], coordinator.validation)
    training = None if coordinator.kept is coordinator.arrays else coordinator.arrays
    write_checkpoint(folder.last_checkpoint, replace(checkpoint, training=training), coordinator.network)


def _final_results(coordinator: Coordinator, folder: RunFolder) -> dict[str, Any]:
    """The best round's model on the central sets with intervals, at the threshold that validation chose in that round."""
    best = read_checkpoint(folder.best_checkpoint)
    coordinator.kept = best.arrays
    line = next(line for line in folder.read_history() if line["round"] == best.round)
    predictions = coordinator.judge.predict(coordinator.load_network())
    for name, found in predictions.items():
        found.write_csv(folder.predictions(name))
    results: Mapping[str, Any] = coordinator.judge.intervals(predictions, line["threshold"]["value"])
    return {
        "threshold": line["threshold"],
        "validation": line["validation"],
        "classes": CLASSES[coordinator.experiment.task],
        "sites": {name: dict(presence.report) for name, presence in sorted(coordinator.roster.presences.items())},
        "absent": coordinator.roster.absences(),
        **results,
    }


def _log_round(line: Mapping[str, Any], rounds: int) -> None:
    shown = {name: line[name]["auroc"] for name in ("validation", "test", "external") if name in line}
    areas = "  ".join(f"{name} AUROC {value:.4f}" for name, value in shown.items())
    counts = f"{len(line['drawn']) - len(line['left_out'])} of {len(line['drawn'])} sites"
    logger.info("round %d/%d  %s  %s  %.1f s", line["round"], rounds, counts, areas, line["seconds"]["total"])


def _sentence(error: BaseException) -> str:
    """Why the run ended. Ours are written for people; of others the class is told, since their text may name files."""
    if isinstance(error, PneumofedError):
        return str(error)
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "stopped by the user; --resume goes on after the last completed round"
    return f"{type(error).__name__} in the coordinator's process; its log has the details"
