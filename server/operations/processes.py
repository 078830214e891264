"""The coordinator's processes: SuperLink, SuperExec and the gateway (nginx), started, asked and stopped in one folder.

    hospitals --TLS--> gateway (nginx) --TLS, only fleet calls--> SuperLink on 127.0.0.1 <--secret-- SuperExec --> ServerApp

`start_processes`, `process_status` and `stop_processes` work on all three; `submit`, `run_status`, `run_log` and `stop_run` ask the
SuperLink about runs. `build_parts` says how each process is started, asked and stopped. All state lies in `state/` of the coordinator
folder, so that a restart finds the same sites and runs again.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pneumofed.common.errors import ConfigError, FlowerError
from pneumofed.common.files import write_file
from pneumofed.common.ops.processes import (
    Daemon,
    check_port_free,
    flower_environment,
    flower_tool,
    is_serving,
    without_proxy_on_loopback,
)
from pneumofed.common.wire.keys import certificate_validity, public_pem, read_public_key
from pneumofed.server.operations.gateway import (
    SiteStatus,
    gateway_answers,
    gateway_command,
    list_sites,
    register_sites,
    render_gateway,
)
from pneumofed.server.operations.settings import CoordinatorFolder

START_SEC = 60.0
FLOWER_CONNECTION = "coordinator"


@dataclass(frozen=True)
class ProcessState:
    """One process: whether it runs, whether it answers, and what there is to say about it."""

    name: str
    """`superlink`, `superexec` or `door`: the gateway, by the name that commands and files in `state/` show."""
    pid: int | None
    serving: bool
    detail: str
    """`serving`, or in a sentence what is wrong."""


@dataclass(frozen=True)
class CoordinatorState:
    """The coordinator's processes and sites. `serving` only if every process is."""

    processes: tuple[ProcessState, ...]
    sites: tuple[SiteStatus, ...]

    @property
    def serving(self) -> bool:
        return all(process.serving for process in self.processes)


def start_processes(folder: Path) -> CoordinatorState:
    """Starts what does not run yet, registers the sites, and returns the state once all processes answer.

    Raises:
        ConfigError: the folder is no coordinator folder, or a port is taken by somebody else.
        FlowerError: a process does not come up; the text ends with its last words.
    """
    place = _open(folder)
    _check_certificate(place)
    _prepare(place)
    *inner, gateway = build_parts(place)
    bring_up(inner, place)
    sync_sites(folder)
    bring_up([gateway], place)  # last: a SuperNode ends for good when its key is not known yet
    return process_status(folder)


def stop_processes(folder: Path) -> None:
    """Stops the gateway, then SuperExec with the ServerApp, then the SuperLink. Does nothing where nothing runs."""
    for part in reversed(build_parts(_open(folder))):
        part.daemon.stop(part.stop_signal)


def process_status(folder: Path) -> CoordinatorState:
    """Reports what runs, what answers, and which sites are registered and connected. Starts and changes nothing."""
    place = _open(folder)
    processes = tuple(ask(part) for part in build_parts(place))
    return CoordinatorState(processes, list_sites(place, superlink_serves=processes[0].serving))


def sync_sites(folder: Path) -> tuple[SiteStatus, ...]:
    """Registers the keys in `sites/`, unregisters those that are revoked, changed or gone, and returns the sites.

    Raises:
        ConfigError: a file in `sites/` holds no public key.
        FlowerError: the SuperLink does not answer or refuses a key.
    """
    place = _open(folder)
    register_sites(place)
    _write_gateway_config(place)
    build_parts(place)[-1].daemon.send(signal.SIGHUP)  # a running nginx reads configuration and certificate anew
    return list_sites(place, superlink_serves=True)


def submit(folder: Path, run_config: Mapping[str, str]) -> int:
    """Submits a run of the installed app, with the study's own network and loss in it, and returns Flower's run id at once.

    Args:
        folder: the coordinator folder.
        run_config: what the ServerApp reads from its run config.

    Raises:
        FlowerError: the SuperLink does not answer or refuses the run.
        ConfigError: this process does not know the study's own code.
    """
    from pneumofed.common.config.reader import experiment_from_json
    from pneumofed.common.ops.app_bundle import build_bundle
    from pneumofed.common.ops.study_code import study_codes_of
    from pneumofed.common.wire.messages import EXPERIMENT_KEY
    from pneumofed.server.operations.control import open_control

    text = run_config.get(EXPERIMENT_KEY)  # empty: the ServerApp will say what it misses
    codes = study_codes_of(experiment_from_json(text)) if text else []
    with open_control(_open(folder)) as control:
        return control.submit(build_bundle(codes), run_config)


def run_status(folder: Path, run_id: int) -> str:
    """Asks for Flower's status of the run, e.g. `pending`, `running`, `finished:completed`, `finished:failed`,
    `finished:stopped`.

    Args:
        folder: the coordinator folder.
        run_id: from `submit`.

    Raises:
        FlowerError: the SuperLink does not answer, or knows no such run.
    """
    from pneumofed.server.operations.control import open_control

    with open_control(_open(folder)) as control:
        return control.run_status(run_id)


def run_log(folder: Path, run_id: int) -> str:
    """Reads what the run's ServerApp has logged so far, with the trace of what ended it; only for those who work at the
    coordinator.

    Args:
        folder: the coordinator folder.
        run_id: from `submit`.

    Raises:
        FlowerError: the SuperLink does not answer, or knows no such run.
    """
    from pneumofed.server.operations.control import open_control

    with open_control(_open(folder)) as control:
        return control.run_log(run_id)


def stop_run(folder: Path, run_id: int) -> None:
    """Stops the run; one that has ended already stays as it is.

    Args:
        folder: the coordinator folder.
        run_id: from `submit`.

    Raises:
        FlowerError: the SuperLink does not answer, or knows no such run.
    """
    from pneumofed.server.operations.control import open_control

    with open_control(_open(folder)) as control:
        control.stop_run(run_id)


@dataclass(frozen=True)
class Part:
    """One of the coordinator's processes: how it is started, asked and stopped."""

    daemon: Daemon
    command: list[str]
    port: tuple[str, int, str]
    answers: Callable[[], bool]
    stop_signal: signal.Signals = signal.SIGTERM
    computes: bool = False
    """Whether it, or what it starts, computes with models; the others only hand messages on."""


def build_parts(place: CoordinatorFolder) -> list[Part]:
    """Builds SuperLink, SuperExec and gateway, in the order in which they start."""
    return [_superlink(place), _superexec(place), _gateway(place)]


def _superlink(place: CoordinatorFolder) -> Part:
    ports = place.settings().loopback
    health = f"127.0.0.1:{ports.superlink_health}"
    command = [
        sys.executable, "-P", "-m", "pneumofed.server.operations.superlink", "--host", "127.0.0.1", "--port", str(ports.superlink),
        "--ssl-ca-certfile", str(place.ca), "--ssl-certfile", str(place.certificate), "--ssl-keyfile", str(place.key),
        "--enable-supernode-auth", "--isolation", "process", "--superexec-auth-secret-file", str(place.superexec_secret),
        "--database", str(place.state / "superlink.db"), "--health-server-address", health,
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    return Part(
        Daemon("superlink", place.state), command, ("127.0.0.1", ports.superlink, "SuperLink"), lambda: is_serving(health)
    )


def _superexec(place: CoordinatorFolder) -> Part:
    ports = place.settings().loopback
    health = f"127.0.0.1:{ports.superexec_health}"
    command = [
        flower_tool("flower-superexec"), "--runtime-api-address", f"127.0.0.1:{ports.superlink}",
        "--root-certificates", str(place.ca), "--superexec-auth-secret-file", str(place.superexec_secret),
        "--health-server-address", health,
    ]  # fmt: skip
    port = ("127.0.0.1", ports.superexec_health, "SuperExec's health service")
    return Part(Daemon("superexec", place.state), command, port, lambda: is_serving(health), computes=True)


def _gateway(place: CoordinatorFolder) -> Part:
    port = place.settings().port
    daemon, address = Daemon("door", place.state), ("0.0.0.0", port, "the gateway")
    return Part(daemon, gateway_command(place), address, lambda: gateway_answers(place.ca, port), signal.SIGQUIT)


def bring_up(parts: Sequence[Part], place: CoordinatorFolder) -> None:
    """Starts those of `parts` that do not run, and returns once all answer.

    Args:
        parts: in the order in which they start.
        place: the coordinator folder.

    Raises:
        ConfigError: a port is taken, or nginx is not installed.
        FlowerError: one does not come up; the text ends with its last words.
    """
    for part in parts:
        if part.daemon.pid() is None:
            _start_part(part, place)
    for part in parts:
        _wait_until_up(part)


def _start_part(part: Part, place: CoordinatorFolder) -> None:
    part.daemon.stop()  # of one that was killed, children may live on and hold its port
    check_port_free(*part.port)
    environment = flower_environment(place.flower_home, serving=not part.computes)
    environment |= without_proxy_on_loopback(environment)
    try:
        part.daemon.start(part.command, environment, place.state)
    except FileNotFoundError:
        raise ConfigError(f"{part.command[0]} is not installed; on Debian and Ubuntu: apt install nginx") from None


def _wait_until_up(part: Part) -> None:
    deadline = time.monotonic() + START_SEC
    while time.monotonic() < deadline and part.daemon.pid() is not None:
        if part.answers():
            return
        time.sleep(0.1)
    raise FlowerError(f"{part.daemon.name} did not come up; {part.daemon.log} ends with: {part.daemon.last_words()}")


def ask(part: Part) -> ProcessState:
    """Asks how the process is now."""
    name, pid = part.daemon.name, part.daemon.pid()
    if pid is None:
        died = part.daemon.was_started()
        detail = f"died; its log ends with: {part.daemon.last_words(1)}" if died else "not started"
        return ProcessState(name, None, False, detail)
    serving = part.answers()
    return ProcessState(name, pid, serving, "serving" if serving else "runs but does not answer")


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
        f'[superlink]\ndefault = "{FLOWER_CONNECTION}"\n\n'
        f'[superlink.{FLOWER_CONNECTION}]\naddress = "{address}"\nroot-certificates = {json.dumps(str(place.ca))}\n'
    )
    write_file(place.flower_home / "config.toml", text.encode())


def _write_gateway_config(place: CoordinatorFolder) -> None:
    keys = {name: public_pem(read_public_key(path)) for name, path in place.site_keys().items()}
    write_file(place.gateway_config, render_gateway(place.settings(), keys).encode())
