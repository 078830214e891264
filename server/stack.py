"""The coordinator's processes: SuperLink, SuperExec and the door (nginx), started, asked and stopped in one folder.

All state lies in `state/` of the coordinator folder, so that a restart finds the same sites and runs again.

    hospitals --TLS--> door (nginx) --TLS, fleet calls alone--> SuperLink on 127.0.0.1 <--secret-- SuperExec --> ServerApp
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.data.atomic import write_file
from common.errors import ConfigError
from common.keys import certificate_validity
from server.door import render_door
from server.settings import CoordinatorFolder
from server.sites import SiteState, list_sites, register_sites
from server.stack_parts import ProcessState, ask, bring_up, build_parts

CONNECTION = "coordinator"


@dataclass(frozen=True)
class StackState:
    """The coordinator's processes and sites. `serving` only if every process is."""

    processes: tuple[ProcessState, ...]
    sites: tuple[SiteState, ...]

    @property
    def serving(self) -> bool:
        return all(process.serving for process in self.processes)


def start(folder: Path) -> StackState:
    """Starts what does not run yet, registers the sites, and returns the state once all processes answer.

    Raises:
        ConfigError: the folder is no coordinator folder, or a port is taken by somebody else.
        FlowerError: a process does not come up; the text ends with its last words.
    """
    place = _open(folder)
    _check_certificate(place)
    _prepare(place)
    *inner, door = build_parts(place)
    bring_up(inner, place)
    sync_sites(folder)
    bring_up([door], place)  # last: a SuperNode ends for good when its key is not known yet
    return status(folder)


def stop(folder: Path) -> None:
    """Stops the door, then SuperExec with the ServerApp, then the SuperLink. Does nothing where nothing runs."""
    for part in reversed(build_parts(_open(folder))):
        part.daemon.stop(part.stop_signal)


def status(folder: Path) -> StackState:
    """What runs, what answers, and which sites are registered and connected. Starts and changes nothing."""
    place = _open(folder)
    processes = tuple(ask(part) for part in build_parts(place))
    return StackState(processes, list_sites(place, superlink_serves=processes[0].serving))


def sync_sites(folder: Path) -> tuple[SiteState, ...]:
    """Registers the keys in `sites/`, unregisters those that are revoked, changed or gone, and returns the sites.

    Raises:
        ConfigError: a file in `sites/` holds no public key.
        FlowerError: the SuperLink does not answer or refuses a key.
    """
    place = _open(folder)
    register_sites(place)
    _write_door(place)
    build_parts(place)[-1].daemon.send(signal.SIGHUP)  # a running nginx reads configuration and certificate anew
    return list_sites(place, superlink_serves=True)


def submit(folder: Path, run_config: Mapping[str, str]) -> int:
    """Submits a run of the installed app and returns Flower's run id at once.

    Raises:
        FlowerError: the SuperLink does not answer or refuses the run.
    """
    from common.app_bundle import build_bundle
    from server.control import open_control

    with open_control(_open(folder)) as control:
        return control.submit(build_bundle(), run_config)


def run_status(folder: Path, run_id: int) -> str:
    """Flower's status of the run, e.g. `pending`, `running`, `finished:completed`, `finished:failed`, `finished:stopped`.

    Raises:
        FlowerError: the SuperLink does not answer, or knows no such run.
    """
    from server.control import open_control

    with open_control(_open(folder)) as control:
        return control.run_status(run_id)


def run_log(folder: Path, run_id: int) -> str:
    """What the run's ServerApp has said so far, with the trace of what ended it; of those who work at the coordinator alone.

    Raises:
        FlowerError: the SuperLink does not answer, or knows no such run.
    """
    from server.control import open_control

    with open_control(_open(folder)) as control:
        return control.run_log(run_id)


def stop_run(folder: Path, run_id: int) -> None:
    """Stops the run; one that has ended already stays as it is.

    Raises:
        FlowerError: the SuperLink does not answer, or knows no such run.
    """
    from server.control import open_control

    with open_control(_open(folder)) as control:
        control.stop_run(run_id)


def _open(folder: Path) -> CoordinatorFolder:
    place = CoordinatorFolder(folder.resolve())
    for path in (place.settings_file, place.ca, place.certificate, place.key, place.superexec_secret):
        if not path.is_file():
            raise ConfigError(f"{folder} is no coordinator folder: it lacks {path.relative_to(place.path)}; unpack the kit there")
    return place


def _check_certificate(place: CoordinatorFolder) -> None:
    begins, ends = certificate_validity(place.certificate)
    if not begins <= datetime.now(UTC) < ends:
        raise ConfigError(
            f"{place.certificate} is valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d} only, so that every site would refuse it; "
            "check this machine's clock, or run `pneumofed provision` again and take the new coordinator kit"
        )


def _prepare(place: CoordinatorFolder) -> None:
    """Makes the state folder, and Flower's own settings in it, so that `FLWR_HOME=state/flwr flwr ls` works by hand."""
    for path in (place.state, place.state / "nginx", place.flower_home, place.runs):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    address = f"127.0.0.1:{place.settings().loopback.superlink}"
    text = (
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f'[superlink.{CONNECTION}]\naddress = "{address}"\nroot-certificates = {json.dumps(str(place.ca))}\n'
    )
    write_file(place.flower_home / "config.toml", text.encode())


def _write_door(place: CoordinatorFolder) -> None:
    write_file(place.door, render_door(place.settings(), list(place.site_keys())).encode())
