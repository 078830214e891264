"""A run from its first message to its summary, also when it fails or is resumed from a checkpoint.

`run_federation` starts or resumes the run folder, builds the `Coordinator` of `server.federation.rounds`, runs the rounds, evaluates the
best round's model at the end and writes the summary whatever happened. `describe_parent` checks the model bundle that a run starts
from before the first round.
"""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import replace
from pathlib import Path

from flwr.serverapp import Grid

from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.errors import CheckpointError, PneumofedError
from pneumofed.common.folder_lock import owned
from pneumofed.common.model_bundle.bundle import check_start, open_trusted, read_start_weights
from pneumofed.common.models.build import build_model
from pneumofed.common.seeds import derive_seed
from pneumofed.common.wire.messages import ModelArrays
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.after_rounds import keep_alone, keep_hospital_reference
from pneumofed.server.federation.asynchronous import VirtualClock
from pneumofed.server.federation.central_evaluation import build_central_evaluator
from pneumofed.server.federation.central_privacy import CentralPrivacy
from pneumofed.server.federation.cross_site import keep_cross_site
from pneumofed.server.federation.round_choices import LearningRate
from pneumofed.server.federation.rounds import Coordinator, ModelJudgement
from pneumofed.server.federation.strategies import build_strategy, restore_state, strategy_state
from pneumofed.server.runs.checkpoints import (
    Checkpoint,
    check_same_experiment,
    read_last,
    read_of_round,
    set_damaged_aside,
    write_checkpoint,
)
from pneumofed.server.runs.events import Heartbeat, RunLog
from pneumofed.server.runs.folder import RUN_LOCK, RunFolder, best_round, stalled, with_course
from pneumofed.server.runs.records import RoundRecord, RunState, by_field
from pneumofed.server.runs.resume import check_resumable, describe_way_on
from pneumofed.server.runs.summary_records import ParentBundle, RunSummary
from pneumofed.server.secure_aggregation.rounds import read_key_roster

logger = logging.getLogger(__name__)


def run_federation(grid: Grid, experiment: ExperimentConfig, settings: CoordinatorConfig) -> RunSummary:
    """Runs or resumes a run and returns its summary, which also lies in the run folder with the history and checkpoints.

    A run that succeeded is over: to resume it gives its summary again, and changes nothing.

    Args:
        grid: Flower's way to the connected nodes.
        experiment: what is run; a resumed run needs the same one.
        settings: run folder, central sets, audit log, and whether to resume.

    Raises:
        PneumofedError: the run cannot start or a round failed; the summary then says `failed` and why.
        CheckpointError: the folder holds another run, or `resume` is asked for and there is nothing to resume.
        ConfigError: another process runs it.
    """
    folder = RunFolder(Path(settings.run_dir))
    way_on = "wait for it, or stop it first"
    with owned(folder.path, RUN_LOCK, f"the run {experiment.name}", way_on):
        if settings.resume and folder.has_succeeded:
            check_resumable(folder, experiment)
            return folder.read_summary()
        return _run(grid, experiment, settings, folder)


def _run(grid: Grid, experiment: ExperimentConfig, settings: CoordinatorConfig, folder: RunFolder) -> RunSummary:
    checkpoint = _start_or_resume(folder, experiment, settings.resume)
    run_log = RunLog.of(settings, checkpoint.run if checkpoint else secrets.token_hex(8))
    started = time.perf_counter()
    earlier = folder.read_summary() if checkpoint else None
    before = (earlier.seconds if earlier else None) or 0.0
    summary = RunSummary(status=RunState.RUNNING.value, name=experiment.name, seed=experiment.seed)
    if earlier and earlier.baselines:
        summary = summary.updated(baselines=earlier.baselines)
    folder.write_summary(with_course(summary, folder.read_history()).updated(seconds=before))
    try:
        with Heartbeat(folder.heartbeat):
            run_log.begins(experiment, grid.run.fab_hash, checkpoint.round if checkpoint else None)
            parent = describe_parent(experiment, earlier)
            summary = summary.updated(parent=parent) if parent else summary
            coordinator = _build_coordinator(grid, experiment, settings, run_log, checkpoint)
            summary = summary.updated(data=coordinator.central_evaluator.data_reports(), app_bundle=grid.run.fab_hash)
            coordinator.enrolment.assemble()
            if checkpoint is None:
                coordinator.enrolment.check_classes()
                coordinator.standardize_clinical()
            _run_rounds(coordinator, folder, checkpoint.round if checkpoint else 0)
            summary = _with_results(summary, coordinator, folder).updated(status=RunState.SUCCEEDED.value)
    except BaseException as error:
        sentence = _sentence(error, folder)
        summary = summary.updated(
            status=RunState.FAILED.value if isinstance(error, Exception) else RunState.STOPPED.value, error=sentence
        )
        raise
    finally:
        summary = with_course(summary, folder.read_history()).updated(seconds=before + time.perf_counter() - started)
        folder.write_summary(summary)
        run_log.ends(summary.status or RunState.FAILED.value, summary.rounds_completed, summary.error)
    return summary


def _start_or_resume(folder: RunFolder, experiment: ExperimentConfig, resume: bool) -> Checkpoint | None:
    folder.prepare()
    folder.remember_study_code(experiment)
    if not resume:
        if folder.holds_run:
            raise CheckpointError(f"{folder.path} already holds a run; use --resume to go on with it, or another folder")
        folder.keep_history_until(0)
        folder.write_config(experiment)
        folder.keep_study_code(experiment)
        folder.write_environment()
        return None
    checkpoint = read_last(folder.last_checkpoint)
    check_same_experiment(checkpoint, experiment)
    set_damaged_aside(folder.last_checkpoint)
    folder.keep_history_until(checkpoint.round)
    _judge_again_if_cut_off(folder, experiment, checkpoint.round)
    return checkpoint


def _judge_again_if_cut_off(folder: RunFolder, experiment: ExperimentConfig, number: int) -> None:
    """Takes back what the last line says of its model, where the run died before it had kept that model as the best one."""
    history = folder.read_history()
    if not experiment.judges_in_training(number + 1) or history[-1].judged_later or best_round(history) != number:
        return
    kept = folder.read_validation(len(classes_of(experiment.task)))
    if kept is None or kept[0] != number:
        folder.replace_last_line(history[-1].unjudged())


def _build_coordinator(
    grid: Grid, experiment: ExperimentConfig, settings: CoordinatorConfig, run_log: RunLog, checkpoint: Checkpoint | None
) -> Coordinator:
    key_roster = read_key_roster(settings.key_roster) if experiment.secure_aggregation.enabled else None
    history = RunFolder(Path(settings.run_dir)).read_history(sites=False)
    rate = LearningRate(experiment, history)
    strategy = build_strategy(experiment.strategy, rate, rate.weight, experiment.proximal_mu)
    central_evaluator = build_central_evaluator(experiment, settings)
    network_config = experiment.model.without_weights() if checkpoint else experiment.model
    seed, weights = derive_seed(experiment.seed, "initial weights"), read_start_weights(network_config)
    network = build_model(network_config, experiment.task, seed, weights=weights)
    arrays = kept = ModelArrays(*ArraysLayout.of(network).flatten(network))
    if checkpoint:
        arrays, kept = checkpoint.training or checkpoint.arrays, checkpoint.arrays
        restore_state(strategy, checkpoint.strategy_state)
    central = CentralPrivacy.of(experiment, Path(settings.run_dir))
    passed = (history[-1].simulated_time if history else None) or 0.0
    clock = None if settings.slow is None else VirtualClock(settings.slow, passed)
    return Coordinator(
        grid, experiment, run_log, strategy, arrays, network, central_evaluator, kept, rate, central, key_roster, clock
    )


def _run_rounds(coordinator: Coordinator, folder: RunFolder, completed: int) -> None:
    experiment = coordinator.experiment
    for number in range(completed + 1, experiment.rounds + 1):
        known = number - 1 - experiment.evaluation.with_training  # also where a run that died had judged the round after it
        if stalled([line for line in folder.read_history(sites=False) if line.round <= known], experiment.early_stopping):
            logger.info("stopped after round %d: validation AUROC no longer grows", number - 1)
            break
        record = coordinator.run_round(number)
        if coordinator.former is not None:
            _keep_judgement(coordinator, folder, coordinator.former)
        _keep_round(coordinator, folder, record)
        _log_round(record, experiment.rounds)
    if coordinator.buffered is not None:
        coordinator.buffered.release()
    if (history := folder.read_history(sites=False)) and history[-1].judged_later:
        _keep_judgement(coordinator, folder, coordinator.judge_last(history[-1].round))


def _keep_round(coordinator: Coordinator, folder: RunFolder, record: RoundRecord) -> None:
    """History first, then the checkpoint: a run that dies between them repeats the round and writes the same line again.

    A run is where its checkpoint says; of the first round `RunFolder.holds_run` says what its line by itself means.
    """
    checkpoint = Checkpoint(
        coordinator.experiment, coordinator.run_log.run, record.round, coordinator.kept, strategy_state(coordinator.strategy)
    )
    folder.append_history(record)
    best = best_round(folder.read_history(sites=False))
    coordinator.forget_predictions({best, record.round})
    places = [folder.last_checkpoint]
    training = None if coordinator.kept is coordinator.arrays else coordinator.arrays
    if best == record.round:
        if training is None:
            places.insert(0, folder.best_checkpoint)
        else:  # nobody goes on from the best one, which holds what is judged only
            write_checkpoint(folder.best_checkpoint, checkpoint, coordinator.network)
        if coordinator.judgement is not None:
            folder.write_validation(record.round, coordinator.judgement.outcome.pooled)
    write_checkpoint(places[0], replace(checkpoint, training=training), coordinator.network, also=places[1:])


def _keep_judgement(coordinator: Coordinator, folder: RunFolder, judgement: ModelJudgement) -> None:
    """Completes the last line of the history, whose round was judged only now, and keeps the model if it is the best one.

    A run that dies before the line has the model judged again when it is resumed, and one that dies before validation.json as well
    (`_judge_again_if_cut_off`). What the line says is not changed otherwise: the best model before it may be gone.
    """
    history = folder.read_history()
    if not history[-1].judged_later:
        return
    line = judgement.complete(history[-1])
    folder.replace_last_line(line)
    best = best_round([*history[:-1], line])
    if best == judgement.round:  # nobody goes on from the best one, so that it needs no strategy's state
        checkpoint = Checkpoint(coordinator.experiment, coordinator.run_log.run, best, judgement.arrays, {})
        write_checkpoint(folder.best_checkpoint, checkpoint, coordinator.network)
        folder.write_validation(best, judgement.outcome.pooled)
    coordinator.forget_predictions({best, judgement.round})
    coordinator.rate.complete(line)
    _log_round(line, coordinator.experiment.rounds)


def _with_results(summary: RunSummary, coordinator: Coordinator, folder: RunFolder) -> RunSummary:
    """The best round's model on the central sets with intervals, at the threshold that validation chose in that round."""
    history = folder.read_history()
    best = read_of_round([folder.best_checkpoint, folder.last_checkpoint], best_round(history))
    coordinator.kept = best.arrays
    keep_hospital_reference(coordinator, folder, best.round)
    line = next(line for line in history if line.round == best.round)
    predictions = coordinator.predict_centrally(best.round)
    for name, found in predictions.items():
        found.write_csv(folder.predictions(name))
    if line.threshold is None:
        raise CheckpointError(f"{folder.history}: round {line.round} has no threshold; restore the file from a backup")
    alone = keep_alone(coordinator, folder, best.round, line.threshold.value)
    matrix = keep_cross_site(coordinator, folder, line, alone)
    return summary.updated(
        threshold=line.threshold,
        validation=line.validation,
        classes=classes_of(coordinator.experiment.task),
        sites={name: dict(presence.report) for name, presence in sorted(coordinator.directory.presences.items())},
        absent=coordinator.directory.absences(),
        **({"alone": alone} if alone else {}),
        **({"cross_site": matrix} if matrix else {}),
        subgroups=coordinator.central_evaluator.subgroups(predictions, line.threshold.value),
        **by_field(coordinator.central_evaluator.intervals(predictions, line.threshold.value)),
    )


def _log_round(line: RoundRecord, rounds: int) -> None:
    areas = [f"{name} AUROC {_shown(found.auroc)}" for name, found in line.measured.items()]
    facts = [f"{len(line.trained)} of {len(line.drawn)} sites", *areas, f"{line.seconds.total or 0.0:.1f} s"]
    if line.judged_later:
        return
    logger.info("round %d/%d  %s", line.round, rounds, "  ".join(facts))


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _sentence(error: BaseException, folder: RunFolder) -> str:
    """Why the run ended. Our errors are written for people; of others only the class is named, since their text may name files."""
    if isinstance(error, PneumofedError):
        return str(error)
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return f"stopped by the user; {describe_way_on(folder)}"
    return f"{type(error).__name__} in the coordinator's process; its log has the details"


def describe_parent(experiment: ExperimentConfig, earlier: RunSummary | None) -> ParentBundle | None:
    """Describes the model bundle that the run starts from; None for a run without one.

    Args:
        experiment: of the run.
        earlier: the summary of the attempt that is resumed, which has the bundle's weights already; None of a new run.

    Raises:
        ConfigError: the bundle at `model.weights` is another one than `parent`, or of another network or task.
        BundleError: it is damaged.
    """
    if experiment.parent is None:
        return None
    if earlier is not None:
        return earlier.parent or ParentBundle(digest=experiment.parent)
    bundle = open_trusted(Path(experiment.model.weights), trusted=[])
    check_start(experiment, bundle)
    card = bundle.manifest.card
    private = card.privacy is not None and card.privacy.mechanism != "none"
    return ParentBundle(digest=bundle.digest, name=bundle.manifest.name, signer=bundle.signer, trained_privately=private)
