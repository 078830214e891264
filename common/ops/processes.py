"""Processes that outlive the command that started them, and Flower's own commands as child processes.

`Daemon` starts, finds and stops one long-lived process by its pid file, which is not fooled by a number that the system gave to another
program; what the process starts ends with it (`common/ops/lifeline.py`). `flower_tool` and `flower_environment` are where Flower's
commands are and what they need; `is_serving` asks the standard gRPC health service (grpc.health.v1), which Flower's long-lived processes
offer on loopback.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pneumofed.common.errors import ConfigError, FlowerError
from pneumofed.common.files import write_file
from pneumofed.common.ops.lifeline import VARIABLE, daemon_marks, lead_command

LOOPBACK_HOSTS = ("127.0.0.1", "localhost")
"""Names of this machine on its loopback interface."""
MAX_LOG_BYTES = 20_000_000
"""A log that is larger at a start makes room for a new one; the one before is kept."""
COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")
"""Escape sequences with which Flower colours its log."""

FLOWER_SWITCHES = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else every run installs our dependencies anew, and fails offline
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Variables of every Flower process, whatever its caller has set."""
ALLOCATOR_SETTINGS = {
    # glibc gives large blocks back to the system after each step and faults them in again: 8 to 13 % of a ResNet18 step on a CPU.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_TOP_PAD_": str(2**26),
    "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for huge pages
}
"""Variables for the memory allocator of a process that trains, which a caller's own environment wins over."""
SERVING_ALLOCATOR = {
    # Of a process of many threads, each of which would keep all that the largest messages took: 1.9 GB for messages of 45 MB.
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**27),
}
"""The same of one that hands messages on for weeks."""
GARBAGE_SEC = 5.0
"""How often such a process looks for garbage."""


@dataclass(frozen=True)
class Daemon:
    """One long-lived process, known by the files `NAME.pid` and `NAME.log` in `state`."""

    name: str
    state: Path

    @property
    def log(self) -> Path:
        """The file that the process's output goes to."""
        return self.state / f"{self.name}.log"

    @property
    def _pid_file(self) -> Path:
        return self.state / f"{self.name}.pid"

    def pid(self) -> int | None:
        """Reads the process's number while it lives; None where it ended, was never started, or its number belongs to another now."""
        pid, started = self._recorded()
        return pid if pid is not None and started_at(pid) == started else None

    def was_started(self) -> bool:
        """Checks for a pid file: with no living process it means that the process died or the machine restarted."""
        return self._pid_file.exists()

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> int:
        """Starts a command as the leader of a session of its own, with its output in the log. Its children end with it.

        Args:
            command: program and arguments; the program as a path, or found on the PATH of `environment`.
            environment: all variables of the process; nothing is inherited.
            folder: its working folder.

        Returns:
            The process's number.

        Raises:
            OSError: the command cannot be started, or the log or the pid file cannot be written; no process is left then.
        """
        if shutil.which(command[0], path=environment.get("PATH")) is None:
            raise FileNotFoundError(f"{command[0]} is not installed")
        variables = {**environment, VARIABLE: daemon_marks(environment.get(VARIABLE, ""))}
        if self.log.is_file() and self.log.stat().st_size > MAX_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            process = subprocess.Popen(
                lead_command(command), env=variables, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, umask=0o077,
            )  # fmt: skip
        try:
            self.record(process.pid)
        except OSError:
            _signal_group(process.pid, signal.SIGKILL)  # nobody could find it again
            raise
        return process.pid

    def record(self, pid: int) -> None:
        """Writes the pid file for the process `pid`, e.g. this one before it becomes another program."""
        write_file(self._pid_file, json.dumps({"pid": pid, "started": started_at(pid)}).encode())

    def send(self, sign: signal.Signals) -> None:
        """Sends `sign` to the process only, not to its children, if it lives."""
        if (pid := self.pid()) is not None:
            os.kill(pid, sign)

    def stop(self, sign: signal.Signals = signal.SIGTERM, patience_sec: float = 15.0) -> None:
        """Asks the process and its children to stop, kills them after `patience_sec`, and removes the pid file.

        Children that outlived the process are killed too.

        Args:
            sign: what it is asked with.
            patience_sec: seconds until it is killed.
        """
        if (pid := self.pid()) is not None:
            _signal_group(pid, sign)
            _wait_until(lambda: started_at(pid) is None, patience_sec)
        recorded, started = self._recorded()
        if recorded is not None and started_at(recorded) in (started, None):  # else the number is another program's by now
            _signal_group(recorded, signal.SIGKILL)  # the process itself, or children that outlived it
            _wait_until(lambda: started_at(recorded) is None and not _group_members(recorded), 5.0)
        self._pid_file.unlink(missing_ok=True)

    def times_said(self, words: str) -> int:
        """Counts how often `words` stand in the log, which a start goes on with."""
        return self.log.read_bytes().count(words.encode()) if self.log.exists() else 0

    def last_words(self, lines: int = 3) -> str:
        """Reads the end of the log in one line, `lines` lines of it at most."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "it said nothing"
        plain = COLOUR_CODES.sub("", text)
        return " ".join(line.strip() for line in plain.strip().splitlines()[-lines:]) or "it said nothing"

    def _recorded(self) -> tuple[int | None, str]:
        try:
            known = json.loads(self._pid_file.read_text(encoding="utf-8"))
            return int(known["pid"]), str(known["started"])
        except (OSError, ValueError, KeyError, TypeError):
            return None, ""


def started_at(pid: int) -> str | None:
    """Reads a mark of the process that later ones with the same number do not have: boot and start time. None if it does not live.

    Field 22 of /proc/PID/stat (proc(5)) is the start in clock ticks since boot; a zombie (state Z) counts as dead.
    """
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    if after_name[0] in "ZX":
        _reap(pid)
        return None
    return f"{boot} {after_name[19]}"


def descendants(root: int) -> set[int]:
    """Finds the numbers of all living processes below `root`. Field 4 of /proc/PID/stat (proc(5)) is the parent."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
    found: set[int] = set()
    more = {root}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - found
        found |= more
    return found


def free_ports(count: int) -> list[int]:
    """Finds ports on loopback that nobody listens on now, each of them once in the life of this process.

    The system gives a port of its own range (ip(7), `ip_local_port_range`) to whoever connects next, so that one of them could be taken
    before the program that it was found for listens; these lie below that range, drawn at random, as other processes look for some too.

    Args:
        count: how many, all different.

    Raises:
        ConfigError: so many are not free.
    """
    lowest, highest = 15_000, _first_port_of_the_system() - 1
    candidates = [port for port in range(lowest, highest + 1) if port not in _found_ports]
    random.SystemRandom().shuffle(candidates)
    found = list(itertools.islice(filter(_is_free, candidates), count))
    if len(found) < count:
        raise ConfigError(f"no {count} free ports on 127.0.0.1 between {lowest} and {highest}")
    _found_ports.update(found)
    return found


def free_port() -> int:
    """Finds one port as `free_ports` does."""
    return free_ports(1)[0]


_found_ports: set[int] = set()


def _first_port_of_the_system() -> int:
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        lowest = 0  # not Linux; the range of RFC 6335 starts at 49152
    return lowest if lowest > 16_000 else 32_768


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def check_port_free(host: str, port: int, what: str) -> None:
    """Refuses a port that cannot be listened on.

    Args:
        host: address of the interface.
        port: 1 to 65535.
        what: what the port is for; the error says it.

    Raises:
        ConfigError: another program listens there, or this user may not.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise ConfigError(
                f"port {port} ({what}) is below 1024 and needs rights that this user lacks; take a higher one"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"port {port} ({what}) is taken by another program ({error.strerror}): `ss -ltnp 'sport = :{port}'` names it; "
                "stop that, or change the port in coordinator.yaml"
            ) from error


def without_proxy_on_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """Builds `NO_PROXY` for `environment` with the loopback interface in it: a hospital's web proxy must not be asked for 127.0.0.1."""
    known = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    hosts = [host for host in known.split(",") if host] + [host for host in LOOPBACK_HOSTS if host not in known]
    return {"NO_PROXY": ",".join(hosts), "no_proxy": ",".join(hosts)}


def flower_tool(name: str) -> str:
    """Finds the command `name` of this Python's own environment.

    Raises:
        FlowerError: Flower is not installed beside this Python.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise FlowerError(f"{name} is not installed beside {sys.executable}; install with pip install 'flwr[simulation]'")
    return str(path)


def flower_environment(home: Path, first_on_path: Path | None = None, *, serving: bool = False) -> dict[str, str]:
    """Builds the environment of a Flower process: this process's own, with the switches that Flower needs.

    Args:
        home: where Flower keeps its state (FLWR_HOME).
        first_on_path: a folder that PATH begins with. This Python's commands follow: Flower starts its helpers by their names.
        serving: whether the process hands messages on and trains nothing itself (`serve_long`).
    """
    own = [str(first_on_path)] if first_on_path else []
    path = os.pathsep.join([*own, str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    allocator = SERVING_ALLOCATOR if serving else ALLOCATOR_SETTINGS
    return {**allocator, **os.environ, **FLOWER_SWITCHES, "FLWR_HOME": str(home), "PATH": path}


def serve_long(every_sec: float = GARBAGE_SEC) -> None:
    """Readies this process to hand messages on for weeks; what it starts gets `ALLOCATOR_SETTINGS`.

    Python looks for garbage by the number of objects: a few of them that refer to one another and hold 15 MB each, as Flower's requests
    do, are not looked at for hours. So a thread looks every few seconds, not counting what is there from the start.

    Args:
        every_sec: pause between two looks.
    """
    for name, value in SERVING_ALLOCATOR.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    for name, value in ALLOCATOR_SETTINGS.items():
        os.environ.setdefault(name, value)
    threading.Thread(target=_collect_garbage, args=(every_sec,), name="garbage", daemon=True).start()


def _collect_garbage(every_sec: float) -> None:
    time.sleep(every_sec)
    gc.collect()
    gc.freeze()
    while True:
        time.sleep(every_sec)
        gc.collect()


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Asks the process and its children (it leads a session of its own) to stop, and kills them after ten seconds.

    Children that lead sessions of their own, as those of Ray do, are found before their parents end and would lose them.
    """
    family = {pid: started_at(pid) for pid in descendants(process.pid)}
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=patience)
            break
        except ProcessLookupError:
            process.wait()
            break
        except subprocess.TimeoutExpired:
            continue
    for pid, started in family.items():
        if started_at(pid) == started:  # else the number is another program's by now
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_serving(address: str, timeout_sec: float = 2.0) -> bool:
    """Asks a health service whether it is serving.

    Args:
        address: HOST:PORT, without TLS.
        timeout_sec: how long to wait for the answer.

    Returns:
        Whether it answered SERVING in time.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_sec)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _reap(pid: int) -> None:
    """Takes note of the end of a child of our own, which would stay a zombie."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except OSError:
        return


def _signal_group(pid: int, sign: signal.Signals) -> None:
    """Signals the process and its children, if it leads a group of its own; only the process where it runs in another's, e.g. a service's.

    A leader that is dead may leave children in its group, whose number the system gives to nobody else as long as they live.
    """
    try:
        leads = os.getpgid(pid) == pid
    except ProcessLookupError:
        leads = True
    try:
        if leads:
            os.killpg(pid, sign)
        else:
            os.kill(pid, sign)
    except ProcessLookupError:
        return


def _group_members(group: int) -> list[int]:
    """Finds the processes of the group that live. Fields 3 and 5 of /proc/PID/stat (proc(5)) are state and group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
