"""The life of a run at the coordinator: submitted, watched, stopped, resumed, and closed with its true status whatever died.

runs = Runs(folder, registry, flower)
runs.submit("pneumonia-1", experiment)     registry -> run folder -> SuperLink
runs.reconcile()                           compares the registry with Flower, the run folder and the heartbeat; closes what is over
runs.write_reports()                       the reports of runs that are over
follow(runs, "pneumonia-1", console)       shows the run in the terminal until it has ended (`pneumofed server run --wait`)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig, central_manifests
from pneumofed.common.config.reader import experiment_from_json, format_yaml
from pneumofed.common.errors import ConfigError, FlowerError
from pneumofed.common.ops.study_code import StudyCode, study_codes_of
from pneumofed.common.wire.messages import COORDINATOR_KEY, EXPERIMENT_KEY
from pneumofed.server.operations.overview import round_now, site_states
from pneumofed.server.operations.settings import CoordinatorFolder
from pneumofed.server.runs.events import EVENTS_FILE, Kind, read_activity
from pneumofed.server.runs.folder import RunFolder, with_course, write_text
from pneumofed.server.runs.records import CENTRAL_SETS, RoundRecord, RunState
from pneumofed.server.runs.registry import Registry, check_run_name
from pneumofed.server.runs.resume import clear_ending
from pneumofed.server.runs.status import (
    ASKED_SILENT_SEC,
    SILENT_SEC,
    RunStatus,
    build_event,
    derive_status,
    describe_resume,
    read_evidence,
    read_history,
    read_summary,
    time_of,
)
from pneumofed.server.runs.tables import RunRow

STOP_WAIT_SEC = 20.0
"""How long a stopped run may take to end."""
REFRESH_SEC = 1.0
"""Of the run that is shown in the terminal."""
STATE_COLOURS = {
    "training": "cyan", "evaluating": "cyan", "connected": "green", "late": "yellow", "left out": "yellow", "refused": "red",
    "lost": "red", "failed": "red", "submitted": "cyan", "running": "cyan", "succeeded": "green", "stopped": "yellow",
}  # fmt: skip


class Flower(Protocol):
    """What is needed of `server.operations.processes`."""

    def submit(self, folder: Path, run_config: Mapping[str, str]) -> int:
        """Submits a run of the installed app and returns Flower's number of it.

        Args:
            folder: the coordinator folder.
            run_config: what the ServerApp reads from its run config.
        """
        ...

    def run_status(self, folder: Path, run_id: int) -> str:
        """Asks for Flower's status of a run.

        Args:
            folder: the coordinator folder.
            run_id: Flower's number.
        """
        ...

    def stop_run(self, folder: Path, run_id: int) -> None:
        """Stops a run; one that has ended stays as it is.

        Args:
            folder: the coordinator folder.
            run_id: Flower's number.
        """
        ...


class Runs:
    """The runs of one coordinator folder."""

    def __init__(
        self, folder: CoordinatorFolder, registry: Registry, flower: Flower, hash_app: Callable[[], str] | None = None
    ) -> None:
        self.folder, self.registry, self._flower = folder, registry, flower
        self._hash_app = hash_app or hash_installed_app
        self._reports_failed: dict[str, int] = {}  # run -> when its summary was written, so that no report is tried for ever

    def submit(self, name: str, experiment: ExperimentConfig) -> RunRow:
        """Lays a new run out in `runs/NAME` and hands it to Flower.

        Args:
            name: of the run and its folder.
            experiment: what is run.

        Raises:
            ConfigError: the name is none or taken, or the coordinator's settings are wrong.
            FlowerError: Flower does not take it; the registry then says `failed` and why.
            ConfigError: the name is not allowed or is taken, or the coordinator's settings are wrong.
        """
        check_run_name(name)
        path = self.folder.runs.resolve() / name
        if RunFolder(path).holds_run:
            raise ConfigError(f"{path} holds a run already; choose another name")
        settings = self._settings(path, resume=False)
        run = self.registry.add_run(name, experiment.model_dump_json(), path)
        self._hand_over(run, settings)
        return self.registry.run(name)

    def resume(self, name: str) -> RunRow:
        """Hands the run to Flower again: it goes on after its last completed round, or from the beginning if there was none.

        Raises:
            ConfigError: no such run, it goes on still, or it succeeded.
            FlowerError: Flower does not take it.
        """
        self.reconcile(ASKED_SILENT_SEC)
        before = self.registry.run(name)
        folder = RunFolder(Path(before.folder))
        if folder.no_resume.exists():
            raise ConfigError(
                f"{name} was restored from a backup, whose account lacks rounds that were released with noise since; begin a new run"
            )
        settings = self._settings(folder.path, resume=folder.last_checkpoint.exists())
        if before.state in (RunState.FAILED, RunState.STOPPED):  # before it is open again: the page reconciles at any time
            self._stop_earlier_attempt(before)
            clear_ending(folder)
        run = self.registry.resume(name)
        self._hand_over(run, settings)
        return self.registry.run(name)

    def stop(self, name: str, who: str = "the coordinator") -> RunRow:
        """Stops the run; one that has ended already stays as it is.

        Args:
            name: of the run.
            who: who stops it, for the reason that the registry keeps.

        Raises:
            ConfigError: no such run.
            FlowerError: the SuperLink does not answer, so that nothing was stopped.
        """
        self.reconcile()
        run = self.registry.run(name)
        if RunState(run.state).final:
            return run
        if run.flower_run_id:
            self._flower.stop_run(self.folder.path, int(run.flower_run_id))
            self._wait_for_end(run)
        evidence = read_evidence(run, self._flower_status(run), SILENT_SEC)
        status = derive_status(evidence)
        if status.state != RunState.SUCCEEDED:
            way = describe_resume(name, evidence.checkpoint, evidence.history)
            status = RunStatus(RunState.STOPPED, f"stopped by {who} after {len(evidence.history)} completed rounds; {way}")
        self._close(run, status)
        return self.registry.run(name)

    def reconcile(self, patience_sec: float = SILENT_SEC) -> None:
        """Brings the registry to what is true now. Doing it twice is the same as once."""
        for run in self.registry.open_runs():
            evidence = read_evidence(run, self._flower_status(run), patience_sec)
            self._take_events(run, evidence.events)
            status = derive_status(evidence)
            if status.state.final:
                if not (evidence.flower or "finished").startswith("finished"):
                    self._stop_earlier_attempt(run)
                self._close(run, status)
            elif status.state == RunState.RUNNING:
                self.registry.move(run.name, RunState.RUNNING)

    def write_reports(self, runs: Sequence[RunRow] | None = None) -> None:
        """Writes the report of each run of `runs` (default: all) that ended without one or after it was written.

        The app writes none, and whoever closed the run may have died before it did; so everybody who looks at runs calls this.
        """
        for run in self.registry.runs() if runs is None else runs:
            folder = RunFolder(Path(run.folder))
            if RunState(run.state).final and folder.report_is_due:
                self._write_report(run.name, folder)

    def _write_report(self, name: str, folder: RunFolder) -> None:
        from pneumofed.server.report.report import close_with_report  # its figures cost a second, and most looks need none

        ended = folder.summary.stat().st_mtime_ns
        if self._reports_failed.get(name) != ended and not close_with_report(folder.path):
            self._reports_failed[name] = ended

    def _hand_over(self, run: RunRow, settings: CoordinatorConfig) -> None:
        path = Path(run.folder)
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = path / "coordinator.yaml"
        write_text(file, format_yaml(settings.model_dump()))
        experiment, folder = read_experiment(run), RunFolder(path)
        try:
            folder.remember_study_code(experiment)  # of a run that is resumed
            folder.keep_study_code(experiment)
            identifier = self._flower.submit(self.folder.path, {EXPERIMENT_KEY: run.experiment, COORDINATOR_KEY: str(file)})
        except (FlowerError, ConfigError) as error:
            why = f"Flower did not take the run: {error}" if isinstance(error, FlowerError) else str(error)
            self.registry.move(run.name, RunState.FAILED, why)
            raise
        codes = study_codes_of(experiment)
        self.registry.accepted(run.name, str(identifier), hash_installed_app(codes) if codes else self._hash_app())

    def _settings(self, path: Path, resume: bool) -> CoordinatorConfig:
        """Builds the settings of the ServerApp; paths are absolute, since it runs elsewhere."""
        own = self.folder.settings()
        manifests = {name: str((self.folder.path / value).resolve()) for name, value in central_manifests(own).items()}
        for name, value in manifests.items():
            if not Path(value).is_file():
                key = f"{name}_manifest" if name in CENTRAL_SETS else f"held_out.{name}"
                raise ConfigError(f"{self.folder.settings_file}: {key}: there is no file {value}")
        absolute = {f"{name}_manifest": manifests.pop(name) for name in CENTRAL_SETS if name in manifests}
        cache = str((self.folder.path / own.cache_dir).resolve())
        audit = str(self.folder.state.resolve() / "audit.jsonl")
        if self.folder.key_roster.is_file():
            absolute["key_roster"] = str(self.folder.key_roster.resolve())
        return CoordinatorConfig(
            run_dir=str(path),
            cache_dir=cache,
            audit_log=audit,
            resume=resume,
            device=own.device,
            threads=own.threads,
            held_out=manifests,
            reference_sets=own.reference_sets,
            survey=None,
            slow=None,
            **absolute,
        )

    def _flower_status(self, run: RunRow) -> str | None:
        if not run.flower_run_id:
            return "unknown"
        try:
            return self._flower.run_status(self.folder.path, int(run.flower_run_id))
        except FlowerError:
            return None

    def _take_events(self, run: RunRow, events: Sequence[Mapping[str, Any]]) -> None:
        lines = [build_event(run.name, event) for event in events]
        if not self.registry.take_events(run.name, lines):
            return
        seen = {str(e["site"]): e for e in events if e["kind"] in (Kind.JOINED, Kind.ANSWERED) and e.get("site")}
        for site, event in seen.items():
            self.registry.see_site(site, time_of(event))

    def _close(self, run: RunRow, status: RunStatus) -> None:
        """Writes the end where the run could not, so that its folder says the same as the registry."""
        self._take_events(run, read_activity(Path(run.folder) / EVENTS_FILE))
        if not self.registry.move(run.name, status.state, status.reason):
            return
        folder = RunFolder(Path(run.folder))
        summary = read_summary(folder)
        if folder.path.exists() and summary.status != status.state:
            summary = with_course(summary, read_history(folder))
            folder.write_summary(summary.updated(status=status.state.value, error=status.reason))

    def _stop_earlier_attempt(self, run: RunRow) -> None:
        """Stops an earlier attempt, which must not go on beside the new one; where Flower knows nothing of it, it cannot."""
        if not run.flower_run_id:
            return
        try:
            self._flower.stop_run(self.folder.path, int(run.flower_run_id))
            self._wait_for_end(run)
        except FlowerError as error:
            self.registry.note("note", f"the earlier attempt could not be stopped: {error}", run=run.name)

    def _wait_for_end(self, run: RunRow) -> None:
        deadline = time.monotonic() + STOP_WAIT_SEC
        while time.monotonic() < deadline and not (self._flower_status(run) or "finished").startswith("finished"):
            time.sleep(0.5)


def hash_installed_app(codes: Sequence[StudyCode] = ()) -> str:
    """Computes the SHA-256 of the bundle of the code that is installed here, with a study's own, which a hospital approves."""
    from pneumofed.common.ops.app_bundle import build_bundle, hash_bundle

    return hash_bundle(build_bundle(codes))


def read_experiment(run: RunRow) -> ExperimentConfig:
    """Reads the experiment that the run was submitted with."""
    return experiment_from_json(run.experiment)


def follow(runs: Runs, name: str, console: Console, every_sec: float = REFRESH_SEC) -> RunRow:
    """Waits for the run to end and returns it; a terminal shows it live, elsewhere each new line of its log is printed.

    Args:
        runs: of the coordinator folder.
        name: of the run.
        console: where it is shown.
        every_sec: seconds between two looks.
    """
    run = runs.registry.run(name)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while not RunState(run.state).final:
                run = _look(runs, name)
                live.update(draw_run(run), refresh=True)
                time.sleep(every_sec)
        console.print(draw_run(run))
        return run
    last = 0
    while True:
        run = _look(runs, name)
        for event in runs.registry.events(name, after=last, limit=1000):
            last = event.id
            if event.run == name:
                console.print(f"{event.time:%H:%M:%S}  {event.text}", markup=False)
        if RunState(run.state).final:
            return run
        time.sleep(every_sec)


def draw_run(run: RunRow) -> RenderableType:
    """Draws the run as it is now: state, rounds, sites."""
    folder = RunFolder(Path(run.folder))
    history, events = read_history(folder), read_activity(folder.path / EVENTS_FILE)
    rounds = read_experiment(run).rounds
    head = Text.assemble(
        (run.name, "bold"), "  ", (run.state, STATE_COLOURS.get(run.state, "")), f"  {len(history)} of {rounds} rounds"
    )
    current = None if RunState(run.state).final else round_now(events)
    if current:
        head.append(f"  round {current.number}" + (f" until {current.deadline:%H:%M:%S} UTC" if current.deadline else ""))
    parts: list[RenderableType] = [head, ProgressBar(total=rounds, completed=len(history), width=48)]
    if run.reason:
        parts.append(Text(run.reason, style=STATE_COLOURS.get(run.state, "")))
    if history:
        parts.append(_rounds(history[-6:]))
    if current:
        parts.append(_sites(events))
    return Group(*parts)


def _look(runs: Runs, name: str) -> RunRow:
    runs.reconcile()
    return runs.registry.run(name)


def _rounds(history: list[RoundRecord]) -> Table:
    others = list(dict.fromkeys(name for line in history for name in line.held_out))
    sets = ["validation", *CENTRAL_SETS, *others]
    table = Table("round", "sites", *sets, "s", box=None, padding=(0, 2, 0, 0))
    for line in history:
        areas = [_number(found.auroc if (found := line.measured.get(name)) else None) for name in sets]
        seconds = "–" if line.seconds.total is None else f"{line.seconds.total:.1f}"
        table.add_row(str(line.round), f"{len(line.trained)}/{len(line.drawn)}", *areas, seconds)
    return table


def _sites(events: list[dict[str, Any]]) -> Table:
    table = Table("site", "now", "", box=None, padding=(0, 2, 0, 0))
    states: Mapping[str, Any] = site_states({}, events, datetime.now(UTC))
    for name, now in states.items():
        table.add_row(Text(name), Text(now.state, style=STATE_COLOURS.get(now.state, "")), Text(now.detail))
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
