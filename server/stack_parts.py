"""The three processes of the coordinator: how each is started, asked and stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import ConfigError, FlowerError
from common.flower_commands import flower_environment, flower_tool
from common.health import is_serving
from common.processes import Daemon, check_port_free, without_proxy_on_loopback
from server.door import answers, door_command
from server.settings import CoordinatorFolder

START_SEC = 60.0


@dataclass(frozen=True)
class ProcessState:
    """One process: whether it runs, whether it answers, and what there is to say about it."""

    name: str
    """`superlink`, `superexec` or `door`."""
    pid: int | None
    serving: bool
    detail: str
    """`serving`, or in a sentence what is wrong."""


@dataclass(frozen=True)
class Part:
    """One process of the stack: how it is started, asked and stopped."""

    daemon: Daemon
    command: list[str]
    port: tuple[str, int, str]
    answers: Callable[[], bool]
    stop_signal: signal.Signals = signal.SIGTERM


def build_parts(place: CoordinatorFolder) -> list[Part]:
    """SuperLink, SuperExec and door, in the order in which they start."""
    return [_superlink(place), _superexec(place), _door(place)]


def _superlink(place: CoordinatorFolder) -> Part:
    ports = place.settings().loopback
    health = f"127.0.0.1:{ports.superlink_health}"
    command = [
        flower_tool("flower-superlink"), "--host", "127.0.0.1", "--port", str(ports.superlink),
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
    return Part(Daemon("superexec", place.state), command, port, lambda: is_serving(health))


def _door(place: CoordinatorFolder) -> Part:
    port = place.settings().port
    daemon, address = Daemon("door", place.state), ("0.0.0.0", port, "the door")
    return Part(daemon, door_command(place), address, lambda: answers(place.ca, port), signal.SIGQUIT)


def bring_up(parts: Sequence[Part], place: CoordinatorFolder) -> None:
    """Starts those of `parts` that do not run, and returns once all answer.

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
    environment = flower_environment(place.flower_home)
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
    """How the process is now."""
    name, pid = part.daemon.name, part.daemon.pid()
    if pid is None:
        died = part.daemon.was_started()
        detail = f"died; its log ends with: {part.daemon.last_words(1)}" if died else "not started"
        return ProcessState(name, None, False, detail)
    serving = part.answers()
    return ProcessState(name, pid, serving, "serving" if serving else "runs but does not answer")
