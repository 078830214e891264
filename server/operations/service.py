"""The coordinator as one thing: the processes of `server.operations.processes`, the live page and the runs, started, described
and stopped together.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.parties import CoordinatorConfig
from pneumofed.common.config.reader import build_config, format_yaml
from pneumofed.common.errors import FlowerError, PneumofedError
from pneumofed.common.wire.messages import COORDINATOR_KEY, EXPERIMENT_KEY
from pneumofed.common.wire.survey import survey_fields
from pneumofed.server.dashboard.access import make_token, token_file
from pneumofed.server.dashboard.serve import page_address, page_answers, page_daemon, start_page
from pneumofed.server.federation.survey import SURVEY_FILE, check_survey, read_survey
from pneumofed.server.operations import processes
from pneumofed.server.operations.overview import observe_federation
from pneumofed.server.operations.settings import CoordinatorFolder
from pneumofed.server.runs.folder import RunFolder, write_text
from pneumofed.server.runs.registry import check_run_name, open_registry
from pneumofed.server.runs.runs import Runs
from pneumofed.server.runs.status import read_history
from pneumofed.server.runs.tables import RunRow
from pneumofed.server.tracking.process import stop_followers

logger = logging.getLogger(__name__)

CHECK_SEC = 10.0
SURVEY_POLL_SEC = 1.0
Say = Callable[[str], None]


def open_runs(place: CoordinatorFolder) -> Runs:
    """Opens the runs of this folder, over the real Flower."""
    return Runs(place, open_registry(place), processes)


def start_all(place: CoordinatorFolder, new_token: bool = False) -> tuple[str, str | None]:
    """Starts what does not run, and returns the page's address and its token if a new one was made.

    Args:
        place: the coordinator folder.
        new_token: makes a new token for the page even where there is one; the old one is then void.

    Raises:
        ConfigError: the folder is no coordinator folder, or a port is taken.
        FlowerError: a process does not come up.
    """
    processes.start_processes(place.path)
    token = make_token(place) if new_token or not token_file(place).exists() else None
    return start_page(place), token


def ask_survey(place: CoordinatorFolder, name: str, experiment: ExperimentConfig, asked: Sequence[str] | None) -> Path:
    """Surveys the sites and waits for their answers; a survey that has some is not asked again.

    Args:
        place: the coordinator folder, whose processes run.
        name: of the survey, and of its folder below `surveys/`.
        experiment: of the planned run.
        asked: fields; all where there are none.

    Returns:
        The survey's folder.

    Raises:
        ConfigError: no such name or field, or the experiment hides single sites.
        FlowerError: the SuperLink does not answer, or the survey ended without an answer.
    """
    check_run_name(name)
    folder = (place.path / "surveys" / name).resolve()
    if (folder / SURVEY_FILE).is_file() and read_survey(folder).answers:
        return folder
    audit = str(place.state.resolve() / "audit.jsonl")
    values = {
        "run_dir": str(folder),
        "audit_log": audit,
        "survey": list(asked or survey_fields(volumes=experiment.image.slices > 0)),
    }
    settings = build_config(CoordinatorConfig, values, "survey")
    check_survey(experiment, settings.survey or ())
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = folder / "coordinator.yaml"
    write_text(file, format_yaml(settings.model_dump()))
    run = processes.submit(place.path, {EXPERIMENT_KEY: experiment.model_dump_json(), COORDINATOR_KEY: str(file)})
    while not (status := processes.run_status(place.path, run)).startswith("finished"):
        time.sleep(SURVEY_POLL_SEC)
    if not (folder / SURVEY_FILE).is_file():
        raise FlowerError(
            f"the survey ended without an answer (Flower: {status}); the log of the coordinator's processes has the reason"
        )
    return folder


def stop_all(place: CoordinatorFolder, say: Say) -> None:
    """Stops the runs, so that their state is true, then the page and the processes.

    Args:
        place: the coordinator folder.
        say: takes a sentence about each run.
    """
    runs = open_runs(place)
    try:
        runs.reconcile()
        for run in runs.registry.open_runs():
            try:
                say(f"{run.name}: {runs.stop(run.name).reason}")
            except FlowerError as error:
                say(f"{run.name} could not be stopped in order ({error}); it ends with its process")
        page_daemon(place).stop()
        processes.stop_processes(place.path)
        runs.reconcile()
        runs.write_reports()
        stop_followers(place.state)  # last, when the runs' ends are written
    finally:
        runs.registry.close()


def stay(place: CoordinatorFolder, say: Say) -> None:
    """Watches the processes and starts again what died, until SIGTERM or Ctrl-C; then stops everything.

    Args:
        place: the coordinator folder.
        say: takes a sentence about what died, and about each run at the end.

    Raises:
        PneumofedError: a process died and cannot be started again.
    """
    end = threading.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: end.set())
    try:
        while not end.wait(CHECK_SEC):
            dead = [process for process in processes.process_status(place.path).processes if process.pid is None]
            if page_daemon(place).pid() is None:
                dead.append(page_state(place))
            if dead:
                say("; ".join(f"{process.name} {process.detail}" for process in dead))
                start_all(place)
    except PneumofedError:
        stop_all(place, say)
        raise
    stop_all(place, say)


def page_state(place: CoordinatorFolder) -> processes.ProcessState:
    """Describes the live page as one of the processes."""
    daemon = page_daemon(place)
    pid = daemon.pid()
    if pid is None:
        detail = f"died; its log ends with: {daemon.last_words(1)}" if daemon.was_started() else "not started"
        return processes.ProcessState("page", None, False, detail)
    serving = page_answers(place)
    return processes.ProcessState("page", pid, serving, "serving" if serving else "runs but does not answer")


def describe_all(place: CoordinatorFolder, runs: Runs, chosen: Sequence[RunRow]) -> dict[str, Any]:
    """Describes processes, sites and runs in plain values for JSON.

    Args:
        place: the coordinator folder.
        runs: of this folder.
        chosen: the runs that are described.
    """
    overview = observe_federation(place, runs.registry)
    processes = [*overview.processes, page_state(place)]
    return {
        "processes": [{"name": p.name, "pid": p.pid, "serving": p.serving, "detail": p.detail} for p in processes],
        "sites": [
            {
                "name": site.name,
                "state": site.state,
                "connected": overview.links[site.name].connected if site.name in overview.links else None,
                "detail": overview.links[site.name].detail if site.name in overview.links else "",
                "fingerprint": site.fingerprint,
                "last_seen": site.last_seen.isoformat() if site.last_seen else None,
            }
            for site in runs.registry.sites()
        ],
        "runs": [_describe_run(run) for run in chosen],
        "page": page_address(place),
    }


def _describe_run(run: RunRow) -> dict[str, Any]:
    return {
        "name": run.name,
        "state": run.state,
        "reason": run.reason,
        "rounds_completed": len(read_history(RunFolder(Path(run.folder)))),
        "flower_run_id": run.flower_run_id,
        "app_hash": run.app_hash,
        "submitted": run.submitted.isoformat(),
        "started": run.started.isoformat() if run.started else None,
        "ended": run.ended.isoformat() if run.ended else None,
        "folder": run.folder,
    }
