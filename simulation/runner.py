"""A simulation from end to end: virtual hospitals are laid out, the two Flower apps run over them, baselines and report follow.

plan = plan_simulation(request)     what was asked, checked
run_simulation(plan, say)           lay out -> run -> baselines -> report; returns the summary; `watch` follows the run
survey_hospitals(plan, say)         lay out -> survey; trains nothing

What takes seconds to import, torch before all, is imported by the step that needs it: the worker processes are started before, and load
theirs in the meantime.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.errors import CheckpointError, ConfigError, FlowerError, PneumofedError, SkipReason, counted
from pneumofed.common.folder_lock import check_free, owned
from pneumofed.common.ops.app_bundle import build_bundle, hash_bundle, write_app
from pneumofed.common.ops.progress import NO_PROGRESS, Progress
from pneumofed.common.ops.study_code import names_in, study_codes_of
from pneumofed.server.runs.folder import RUN_LOCK, SIMULATION_LOCK, RunFolder, with_course
from pneumofed.server.runs.records import RunState
from pneumofed.server.runs.resume import check_resumable, clear_ending, describe_way_on
from pneumofed.server.runs.summary_records import BaselineTable, DealtHospital, PartitionRecord, RunSummary, WallTime
from pneumofed.server.tracking.follow import following
from pneumofed.server.tracking.targets import Tracking
from pneumofed.simulation.local_grid import LocalGrid
from pneumofed.simulation.plan import Plan
from pneumofed.simulation.superlink import Resources, private_superlink, run_app
from pneumofed.simulation.watch import RunWatch, Say
from pneumofed.simulation.workers import HospitalWorkers, no_collections

if TYPE_CHECKING:
    from pneumofed.simulation.hospitals.federation import Federation

LIBRARIES = "loading the libraries"
SURVEY_FOLDER = "survey"
"""Below the run folder."""


def run_simulation(plan: Plan, say: Say, progress: Progress = NO_PROGRESS) -> RunSummary:
    """Runs a simulation and returns the summary that the run folder holds.

    Args:
        plan: what to run; `plan.run_dir` must hold no run unless it is resumed. Of one that succeeded only the baselines are made that
            are asked for, and the report; its status and results stay.
        say: takes a sentence about each step and each round.
        progress: shows how far each step is.

    Raises:
        PneumofedError: the run could not start or failed; the summary says the same.
        ConfigError: another process works in `plan.run_dir`, or the study's own network cannot do what the run asks.
    """
    plan.resources.check()
    if names_in(plan.experiment) and not _is_finished(plan):
        from pneumofed.simulation.network_checks import check_study

        check_study(plan.experiment, say)  # before the run folder is made
    way_on = "wait for it or choose another --out"
    with owned(plan.run_dir, SIMULATION_LOCK, "pneumofed simulate", way_on):
        check_free(plan.run_dir, RUN_LOCK, way_on)  # of a simulation that was killed the coordinator may live on
        _check_beginning(plan)
        # The workers load their libraries while this process loads its own and lays the hospitals out.
        with following(RunFolder(plan.run_dir), _tracking(plan)), _start_workers(plan) as workers:
            return _simulate(plan, workers, say, progress)


def _tracking(plan: Plan) -> Tracking:
    """Where the run is tracked, with the app bundle: the code that runs here, of which a run in one process says nothing."""
    return replace(plan.tracking, app=hash_bundle(build_bundle())) if plan.tracking.targets else plan.tracking


def survey_hospitals(plan: Plan, say: Say, progress: Progress = NO_PROGRESS) -> Path:
    """Lays the hospitals of a simulation out and surveys them as a coordinator would; nothing is trained. A run may follow in its folder.

    Args:
        plan: whose hospitals are asked, of the local engine.
        say: takes a sentence about each step.
        progress: shows how far each step is.

    Returns:
        The survey's folder, below `plan.run_dir`, with its page.

    Raises:
        ConfigError: the plan is of a run that goes on, has baselines, or is of Flower's engine; or another process works in its folder.
        RoundError: no hospital told anything.
    """
    if plan.resume or plan.baselines or plan.engine != "local":
        raise ConfigError("survey: nothing is trained, so leave out resume, baselines and Flower's engine")
    with owned(plan.run_dir, SIMULATION_LOCK, "pneumofed simulate", "wait for it or choose another --out"):
        _check_beginning(plan)
        with _start_workers(plan) as workers, _quiet_flower():
            from pneumofed.common.wire.survey import survey_fields
            from pneumofed.server.federation.survey import run_survey, write_survey
            from pneumofed.simulation.hospitals.federation import lay_out

            federation = lay_out(plan.simulation, plan.experiment, plan.run_dir, False, progress)
            say(_size(federation))
            nodes = [{"partition-id": number} for number in range(federation.hospitals)]
            grid = _local_grid(nodes, run_config(plan, federation), workers)
            folder = (plan.run_dir / SURVEY_FOLDER).resolve()
            settings = CoordinatorConfig(run_dir=str(folder), survey=survey_fields(volumes=plan.experiment.image.slices > 0))
            result = run_survey(grid, plan.experiment, settings)
    write_survey(folder, result.model_copy(update={"phantom": federation.phantom, "name": plan.experiment.name}))
    return folder


def _size(federation: Federation) -> str:
    report = federation.report
    return (
        f"{counted(federation.hospitals, 'hospital')}, {counted(report.used, 'image')} of {counted(report.patients, 'patient')}"
    )


def _check_beginning(plan: Plan) -> None:
    """Compares what is asked for with what lies in the run folder, before anything in it changes.

    Raises:
        CheckpointError: it holds a run that is not resumed, or nothing that could be, or a run with other settings.
    """
    folder = RunFolder(plan.run_dir)
    if plan.resume:
        check_resumable(folder, plan.experiment)
    elif folder.holds_run:
        raise CheckpointError(f"{plan.run_dir} already holds a run; go on with --resume or name another folder with --out")


def _start_workers(plan: Plan) -> AbstractContextManager[HospitalWorkers | None]:
    needed = plan.engine == "local" and plan.workers > 1 and not _is_finished(plan)
    return HospitalWorkers(plan.workers, study_codes_of(plan.experiment)) if needed else nullcontext()


def _is_finished(plan: Plan) -> bool:
    return plan.resume and RunFolder(plan.run_dir).has_succeeded


def _simulate(plan: Plan, workers: HospitalWorkers | None, say: Say, progress: Progress) -> RunSummary:
    folder, finished = RunFolder(plan.run_dir), _is_finished(plan)
    _load_libraries(plan, progress)
    from pneumofed.simulation.hospitals.federation import lay_out

    clock = WallClock(folder.read_summary().wall if plan.resume else None)
    with clock.part("data"):
        federation = lay_out(plan.simulation, plan.experiment, plan.run_dir, plan.resume, progress)
    say(_size(federation))
    left_out = federation.report.skipped.get(SkipReason.HELD_OUT, 0)
    for warning, count in [*federation.report.warnings.items(), (SkipReason.HELD_OUT, left_out)]:
        if count:
            say(f"    warning: {warning} ({count})")
    try:
        if finished:
            say(f"the run has finished its {counted(len(folder.read_history()), 'round')}; nothing of it is trained again")
        else:
            clear_ending(folder)
            watch = RunWatch(folder, plan.experiment.rounds, say, progress)
            with clock.part("rounds"):
                _run_apps(plan, federation, watch, workers)
            clock.move("rounds", "evaluation", watch.course.evaluation_sec())
        if plan.baselines:
            with clock.part("baselines"):
                _add(folder, baselines=_baselines(plan, federation, say, progress))
    except BaseException as error:
        _record_end(folder, error)
        if isinstance(error, Exception):
            say(f"{plan.run_dir} keeps what was done; {describe_way_on(folder)}")
        raise
    finally:
        facts = {"phantom": federation.phantom, "source": federation.report.public(), "wall": clock.wall}
        _add(folder, **facts, partition=_partition_table(plan, federation))
        with no_collections():
            from pneumofed.server.report.report import close_with_report

            close_with_report(folder.path)
    return folder.read_summary()


def _load_libraries(plan: Plan, progress: Progress) -> None:
    """Imports what a run begins with: seconds on a slow disk, and nothing to be seen."""
    progress.show(LIBRARIES)
    with no_collections():
        import_module("pneumofed.simulation.hospitals.federation")
        if plan.engine == "local":
            import_module("pneumofed.server.federation.run")
    progress.finish(LIBRARIES)


class WallClock:
    """Seconds of each part of a simulation, over every resume."""

    def __init__(self, before: WallTime | None) -> None:
        self.wall = before or WallTime()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of its block to the part `name` of `WallTime`, also where the block fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, time.perf_counter() - started)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Counts seconds of one part for another.

        Args:
            source: the part that loses them.
            target: the part that gets them.
            seconds: at most what `source` has.
        """
        moved = min(seconds, getattr(self.wall, source))
        self._add(source, -moved)
        self._add(target, moved)

    def _add(self, name: str, seconds: float) -> None:
        self.wall = self.wall.updated(**{name: getattr(self.wall, name) + seconds})


def run_config(plan: Plan, federation: Federation) -> dict[str, str]:
    """Returns the run config of the apps: the experiment, and where the coordinator's and the sites' own files lie.

    Args:
        plan: gives the experiment.
        federation: gives the files.
    """
    return {
        "experiment": plan.experiment.model_dump_json(),
        "coordinator": str(federation.coordinator_file),
        "sites": str(federation.sites_dir),
    }


def environment(resources: Resources) -> dict[str, str]:
    """Returns the variables of the SuperLink and so of Ray, which joins the cluster at RAY_ADDRESS if it is set."""
    source = {"PNEUMOFED_SOURCE": str(Path(__file__).resolve().parent)}
    return {**source, "RAY_ADDRESS": resources.ray_address} if resources.ray_address else source


def _run_apps(plan: Plan, federation: Federation, watch: RunWatch, workers: HospitalWorkers | None) -> None:
    with watch.moving():
        try:
            if plan.engine == "local":
                _run_locally(plan, federation, watch, workers)
            else:
                _run_in_flower(plan, federation, watch)
        finally:
            shutil.rmtree(federation.model_dir, ignore_errors=True)


def _run_in_flower(plan: Plan, federation: Federation, watch: RunWatch) -> None:
    with tempfile.TemporaryDirectory(prefix="pneumofed-app-") as folder:
        app = write_app(Path(folder) / "pneumofed", study_codes_of(plan.experiment))
        log = plan.run_dir / "flower.log"
        with private_superlink(log, environment(plan.resources)) as superlink, log.open("ab") as output:
            try:
                run_app(superlink, app, run_config(plan, federation), plan.resources, output, watch)
            except FlowerError as error:
                raise _reason(RunFolder(plan.run_dir), error, log) from error


def _run_locally(plan: Plan, federation: Federation, watch: RunWatch, workers: HospitalWorkers | None) -> None:
    """The ServerApp in this process, and the ClientApp in the worker processes; without them here too, one hospital after the other."""
    from pneumofed.server.app import experiment_of, read_coordinator
    from pneumofed.server.federation.run import run_federation

    config = run_config(plan, federation)
    nodes = [{"partition-id": number, "num-partitions": federation.hospitals} for number in range(federation.hospitals)]
    with workers or nullcontext(), _quiet_flower():
        grid = _local_grid(nodes, config, workers, watch)
        run_federation(grid, experiment_of(config), read_coordinator(config))
    watch()


def _local_grid(
    nodes: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    workers: HospitalWorkers | None,
    on_send: Callable[[], None] = lambda: None,
) -> LocalGrid:
    """The ClientApp is imported where it answers: in the workers, or here where there are none."""
    if workers is not None:
        return LocalGrid(None, nodes, config, on_send, workers)
    from pneumofed.client.app import app as client_app

    return LocalGrid(client_app, nodes, config, on_send)


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Flower logs each aggregation to standard error, a line that says less than ours."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def _baselines(plan: Plan, federation: Federation, say: Say, progress: Progress) -> BaselineTable:
    from pneumofed.simulation.baselines import run_baselines

    say(f"baselines: all images in one place, and each of {federation.hospitals} hospitals alone")
    started = time.perf_counter()
    files = federation.site_files, federation.coordinator_file
    table = run_baselines(plan.run_dir.resolve(), plan.experiment, *files, say, progress, plan.workers)
    say(f"baselines took {time.perf_counter() - started:.0f} s")
    return table


def _partition_table(plan: Plan, federation: Federation) -> PartitionRecord:
    """How the patients were dealt, in counts: a row a hospital, and the skew of labels in bits."""
    from pneumofed.simulation.hospitals.partition import label_skew, partition_rows

    rows = partition_rows(federation.manifests)
    hospitals = tuple(DealtHospital(name=federation.names[row.hospital], **asdict(row)) for row in rows)
    kind, alpha = plan.simulation.partition, plan.simulation.alpha
    return PartitionRecord(kind=kind, alpha=alpha, label_skew_bits=label_skew(rows), hospitals=hospitals)


def _record_end(folder: RunFolder, error: BaseException) -> None:
    """Writes how the run ended where the apps could not: they were killed, or never started. What has succeeded stays so."""
    summary = folder.read_summary()
    if summary.status in (None, RunState.SUBMITTED, RunState.RUNNING):
        stopped = isinstance(error, KeyboardInterrupt)
        sentence = f"stopped by the user; {describe_way_on(folder)}" if stopped else str(error)
        summary = summary.updated(status=RunState.STOPPED.value if stopped else RunState.FAILED.value, error=sentence)
        folder.write_summary(with_course(summary, folder.read_history()))


def _add(folder: RunFolder, **values: Any) -> None:
    folder.write_summary(folder.read_summary().updated(**values))


def _reason(folder: RunFolder, error: FlowerError, log: Path) -> PneumofedError:
    """The apps' own sentence where they left one; Flower knows only that the run failed."""
    sentence = folder.read_summary().error
    return PneumofedError(f"{sentence}; the log is {log}") if sentence else FlowerError(f"{error}; the log is {log}")
