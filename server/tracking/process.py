"""Tracking of a run by another process than the one that runs it: what is there at once, until the run's end, or as the coordinator's.

    send_all(folder, tracking)             what is there now: of a run that is over, or was never tracked
    follow_to_end(folder, tracking)        the same until the run is over
    start_follower(name, folder, ...)      that as a process of its own; `main` is what runs in it

The coordinator's run is followed from beside it since its ServerApp is code that hospitals approve, which speaks to nobody else.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from pneumofed.common.errors import ConfigError, PneumofedError
from pneumofed.common.ops.command_line import note
from pneumofed.common.ops.processes import Daemon
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.tracking.facts import gather_facts
from pneumofed.server.tracking.follow import (
    LOOK_SEC,
    STOPPED_SEC,
    Warn,
    changed_at,
    following,
    last_change,
    open_destination,
    tracking_alone,
)
from pneumofed.server.tracking.targets import (
    TrackedRun,
    Tracking,
    TrackingError,
    TrackingTarget,
    find_targets,
    read_tracked,
    register,
)

QUIET_SEC = 5.0
"""How long nothing has changed in the folder of a run that is over before its end is sent: the report's facts come last."""
SILENT_SEC = 1800.0
"""A run that has not ended and shows no sign of life for so long is no longer followed."""
PATIENCE_SEC = STOPPED_SEC + 3.0
"""Until a process that follows a run and was asked to stop is killed."""


def send_all(folder: RunFolder, tracking: Tracking) -> list[TrackingTarget]:
    """Sends what there is of the run now, and returns the targets.

    Args:
        folder: of the run.
        tracking: where; together with what the folder names.

    Raises:
        ConfigError: there is no target, what one needs is not installed, or another process tracks the run now.
        CheckpointError: a file of the run folder is damaged.
        TrackingError: targets have not taken it; the text names them and says what to do.
    """
    targets, tracked = _asked(folder, tracking)
    facts = gather_facts(folder, tracked)
    if facts is None:
        raise ConfigError(f"{folder.path} is no run folder: it holds no config.yaml")
    problems = []
    with tracking_alone(folder):
        for target in targets:
            try:
                destination = open_destination(target, tracked, folder)
                try:
                    destination.send(facts, facts.state.final)
                finally:
                    destination.close()
            except TrackingError as error:
                problems.append(f"{target} {error}")
    if problems:
        raise TrackingError("; ".join(problems))
    return targets


def _asked(folder: RunFolder, tracking: Tracking) -> tuple[list[TrackingTarget], TrackedRun]:
    if not folder.config.exists() and read_tracked(folder.path) is None:
        raise ConfigError(f"{folder.path} is no run folder: it holds no config.yaml")
    tracked = register(folder.path, tracking)
    if tracked is None:
        raise ConfigError(f"{folder.path} is tracked nowhere; name a target with --to")
    return find_targets(tracked, tracking.targets), tracked


def follow_to_end(folder: RunFolder, tracking: Tracking, warn: Warn = note, every_sec: float = LOOK_SEC) -> bool:
    """Follows the run until it is over, and says whether it was; False of one that fell silent.

    Args:
        folder: of the run, which need not have begun.
        tracking: where; together with what the folder names.
        warn: takes a sentence about a target that fails.
        every_sec: seconds between two looks.

    Raises:
        ConfigError: there is no target, or what one needs is not installed.
    """
    _asked(folder, tracking)
    with following(folder, tracking, warn):
        changed, since = last_change(folder), time.monotonic()
        while True:
            now = time.monotonic()
            if last_change(folder) != changed:
                changed, since = last_change(folder), now
            if _is_over(folder) and now - since >= QUIET_SEC:
                return True
            if now - since > SILENT_SEC and time.time() - changed_at(folder.heartbeat) / 1e9 > SILENT_SEC:
                return False
            time.sleep(every_sec)


def _is_over(folder: RunFolder) -> bool:
    try:
        return folder.read_summary().status in ("succeeded", "failed", "stopped")
    except PneumofedError:
        return False


def follower_daemon(name: str, state: Path) -> Daemon:
    """Names the process that follows the coordinator's run `name`, and where its pid file and log lie.

    Args:
        name: of the run.
        state: the coordinator's `state/`.
    """
    return Daemon(f"track-{name}", state)


def start_follower(name: str, folder: Path, tracking: Tracking, state: Path) -> Daemon | None:
    """Starts the process that follows a run of the coordinator, anew where it runs; None where the run is tracked nowhere.

    Who asks at a target is handed over in the environment, which no list of processes shows.

    Args:
        name: of the run.
        folder: of the run.
        tracking: what is asked for.
        state: the coordinator's `state/`.

    Raises:
        CheckpointError: the run folder's file about tracking is damaged.
        OSError: the process cannot be started.
    """
    if register(folder, tracking) is None:
        return None
    daemon = follower_daemon(name, state)
    daemon.stop(patience_sec=PATIENCE_SEC)  # that of an earlier attempt may be about to end
    environment = dict(os.environ)
    for target in tracking.targets:
        environment |= target.credentials()
    daemon.start([sys.executable, "-m", "pneumofed.server.tracking.process", str(folder)], environment, state)
    return daemon


def stop_followers(state: Path) -> None:
    """Asks every process that follows a run to send its end and to stop; kills those that do not."""
    for path in state.glob("track-*.pid"):
        Daemon(path.stem, state).stop(patience_sec=PATIENCE_SEC)


def main() -> None:
    """Follows the run in the folder that the command line names until it is over, or the process is asked to stop."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = RunFolder(Path(sys.argv[1]))
    try:
        ended = follow_to_end(folder, Tracking(), warn=_log)
        _log(f"{folder.path}: {'the run is over' if ended else 'no sign of life of the run; it is no longer followed'}")
    except PneumofedError as error:
        sys.exit(f"pneumofed: {error}")
    except KeyboardInterrupt:
        _log(f"{folder.path}: stopped; `pneumofed track {folder.path}` sends what is missing")


def _log(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
