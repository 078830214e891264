"""The site's SuperNode as a service: started behind the code gate, asked for its status, and stopped. It keeps all in the work folder."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pneumofed.client.site.code_gate_resident import asking_command
from pneumofed.client.site.folder import COORDINATOR_VARIABLE, SiteFolder
from pneumofed.common.audit.log import ANSWER_EVENT, REFUSAL_EVENT, SITE_STARTED, SITE_STOPPED, read_entries
from pneumofed.common.audit.verify import verify_log
from pneumofed.common.config.parties import ConnectionConfig
from pneumofed.common.errors import AuditError, ConfigError, FlowerError
from pneumofed.common.files import StateFile, to_json
from pneumofed.common.folder_lock import owned
from pneumofed.common.ops.lifeline import lead_command
from pneumofed.common.ops.processes import Daemon, flower_environment, free_port, is_serving, without_proxy_on_loopback

START_SEC, SETTLE_SEC = 60.0, 20.0
"""How long to wait for the health service, and then for the coordinator's answer: one that cannot be reached gives none, and the site
tries on."""
LEASE_SEC, RETRY_SEC = 210.0, 10.0
"""How long a start is tried again, and after which pause: the coordinator takes a site for lost 150 s after its last heartbeat (twice
`client.site.supernode.HEARTBEAT_INTERVAL_SEC`)."""
TASK_POLL_VARIABLE, TASK_POLL_SEC = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "0.05"
"""How long Flower's SuperExec pauses before it asks the SuperNode beside it again, which lets it wait for work
(`client.site.supernode.TaskBell`), in seconds; its own choice is 1."""
TAKEN_IN = "SuperNode ID: "
"""What Flower's SuperNode says when it was taken in."""
STILL_CONNECTED = "Failed to activate SuperNode"
"""What Flower's SuperNode says when it is refused because the coordinator counts its last connection as alive."""


@dataclass(frozen=True)
class Status:
    """How a site is. `died` means that it was started and neither runs nor was stopped."""

    site: str
    coordinator: str
    process: Literal["running", "stopped", "died"]
    pid: int | None
    serving: bool
    last_answer: dict[str, Any] | None
    """Work, run, round and time of the last reply that left the site."""
    audit_lines: int
    audit_head: str | None
    audit_problem: str | None
    refusals_today: dict[str, int]
    """By rule, since midnight UTC."""


def start_service(folder: SiteFolder, report: Callable[[str], None] = lambda _: None) -> int:
    """Starts the SuperNode as a process of its own and waits until its health service answers.

    After a crash the coordinator counts the site's lost connection as alive for a while and refuses a second one; then this waits
    and tries again.

    Args:
        folder: the site's.
        report: called with a sentence when a step is done or has to be waited for.

    Returns:
        The number of the SuperNode's process.

    Raises:
        ConfigError: it runs already or is being started, or the site folder is not complete.
        FlowerError: it ended at once; the text has its last words.
    """
    with _starting(folder):
        return _start(folder, report)


def _starting(folder: SiteFolder) -> AbstractContextManager[None]:
    """Between the look whether a SuperNode runs and the record of the new one nobody else may start one."""
    folder.work.mkdir(mode=0o700, parents=True, exist_ok=True)
    return owned(folder.work, "start", "pneumofed site start", "wait for it; `pneumofed site status` shows the site")


def _start(folder: SiteFolder, report: Callable[[str], None]) -> int:
    deadline = time.monotonic() + LEASE_SEC
    while True:
        daemon, pid = _start_once(folder, report)
        if daemon.pid() is not None:
            return pid
        if STILL_CONNECTED not in daemon.last_words(20) or time.monotonic() > deadline:
            raise FlowerError(f"the SuperNode ended at once: {daemon.last_words()}. `pneumofed site preflight` may show why")
        report("the coordinator has not noticed yet that the last connection was lost; trying again in a moment")
        time.sleep(RETRY_SEC)


def _start_once(folder: SiteFolder, report: Callable[[str], None]) -> tuple[Daemon, int]:
    """Starts the SuperNode and gives the coordinator the time to refuse it."""
    daemon, command, environment = _prepare(folder)
    said_before = daemon.times_said(TAKEN_IN)
    pid = daemon.start(command, environment, folder.work)
    folder.audit.record(SITE_STARTED, coordinator=folder.connection.coordinator)
    health, deadline = _health_file(folder).read(), time.monotonic() + START_SEC
    while daemon.pid() is not None and not is_serving(health) and time.monotonic() < deadline:
        time.sleep(0.2)
    report("the SuperNode is up; waiting for the coordinator's answer")
    refused_by = time.monotonic() + SETTLE_SEC
    while daemon.pid() is not None and daemon.times_said(TAKEN_IN) <= said_before and time.monotonic() < refused_by:
        time.sleep(0.2)
    return daemon, pid


def run_in_foreground(folder: SiteFolder) -> None:
    """Becomes the SuperNode; whoever started this process watches it. Does not return.

    Raises:
        ConfigError: as `start_service`.
    """
    with _starting(folder):  # until the pid file names this process, which the exec leaves as it is
        daemon, command, environment = _prepare(folder)
        daemon.record(os.getpid())
        folder.audit.record(SITE_STARTED, coordinator=folder.connection.coordinator)
        os.chdir(folder.work)
        command = lead_command(command)
        os.execvpe(command[0], command, environment)


def stop_service(folder: SiteFolder, patience_sec: float = 15.0) -> bool:
    """Stops the SuperNode and its children.

    Args:
        folder: the site's.
        patience_sec: how long the processes have to end by themselves before they are killed.

    Returns:
        False if it did not run.
    """
    daemon = _daemon(folder)
    ran = daemon.pid() is not None
    if daemon.was_started():
        daemon.stop(patience_sec=patience_sec)
        folder.audit.record(SITE_STOPPED, ran=ran)
    return ran


def read_status(folder: SiteFolder, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> Status:
    """Reads the site's state: its process, its last answer, its audit log.

    Args:
        folder: the site's.
        now: returns the time in UTC, whose day the refusals are counted of.

    Raises:
        AuditError: the audit log cannot be read.
    """
    daemon = _daemon(folder)
    pid = daemon.pid()
    entries = read_entries(folder.audit.path)
    lines, head, problem = _audit_state(folder)
    answers = [entry for entry in entries if entry.event == ANSWER_EVENT]
    last = {**answers[-1].facts, "time": answers[-1].time} if answers else None
    today = [e for e in entries if e.event == REFUSAL_EVENT and e.time.startswith(now().strftime("%Y-%m-%d"))]
    rules = [str(entry.facts.get("rule")) for entry in today]
    return Status(
        site=folder.config.name,
        coordinator=folder.connection.coordinator,
        process="running" if pid else "died" if daemon.was_started() else "stopped",
        pid=pid,
        serving=pid is not None and is_serving(_health_file(folder).read()),
        last_answer={key: last[key] for key in ("work", "run", "round", "time")} if last else None,
        audit_lines=lines,
        audit_head=head,
        audit_problem=problem,
        refusals_today={rule: rules.count(rule) for rule in sorted(set(rules))},
    )


def running_process(folder: SiteFolder) -> int | None:
    """Returns the number of the running SuperNode's process, or None."""
    return _daemon(folder).pid()


def supernode_command(folder: SiteFolder, port: int, health: str) -> list[str]:
    """Builds the command line of the SuperNode: Flower's, through `client.site.supernode`.

    Args:
        folder: the site's.
        port: free, on loopback, for the SuperNode's own services.
        health: HOST:PORT of its health service.

    Raises:
        ConfigError: the site folder's path holds quotes or backslashes.
    """
    connection = folder.connection
    return [
        *_program(connection),
        "--gate", str(_gate(folder)),
        "--root-certificates", connection.ca,
        "--superlink", connection.coordinator,
        "--auth-supernode-private-key", connection.key,
        "--host", "127.0.0.1",
        "--port", str(port),
        "--health-server-address", health,
        "--node-config", f'site-config="{_plain(folder.site_file)}"',
    ]  # fmt: skip


def _prepare(folder: SiteFolder) -> tuple[Daemon, list[str], dict[str, str]]:
    """What is to be started: the commands that the gate replaces are in place, and nothing of it runs yet."""
    daemon = _daemon(folder)
    if (pid := daemon.pid()) is not None:
        raise ConfigError(f"the site {folder.config.name} runs already (process {pid}); stop it with `pneumofed site stop`")
    _check_complete(folder)
    folder.work.mkdir(mode=0o700, parents=True, exist_ok=True)
    health = f"127.0.0.1:{free_port()}"
    _health_file(folder).write(health)
    return daemon, supernode_command(folder, free_port(), health), _environment(folder)


def _environment(folder: SiteFolder) -> dict[str, str]:
    from pneumofed.client.site.code_gate import write_commands  # needs Flower

    gate = write_commands(_gate(folder), folder.site_file, asking_command(_gate(folder)))
    environment = flower_environment(folder.work / "flower", first_on_path=gate, serving=True)
    return {
        **environment,
        **without_proxy_on_loopback(environment),
        COORDINATOR_VARIABLE: folder.connection.coordinator,
        TASK_POLL_VARIABLE: TASK_POLL_SEC,
    }


def _gate(folder: SiteFolder) -> Path:
    """Where the commands are that Flower starts in place of its own."""
    return folder.work / "gate"


def _check_complete(folder: SiteFolder) -> None:
    connection = folder.connection
    names = {"ca": connection.ca, "key": connection.key}
    names |= {key: value for key in ("client_certificate", "client_key") if (value := getattr(connection, key))}
    missing = [f"{key} ({Path(path).name})" for key, path in names.items() if not Path(path).is_file()]
    if missing:
        raise ConfigError(
            f"connection.yaml names files that are not there: {', '.join(missing)}; `pneumofed site preflight` shows more"
        )
    _ = folder.policy  # a policy that cannot be read would refuse everything


def _program(connection: ConnectionConfig) -> list[str]:
    program = [sys.executable, "-P", "-m", "pneumofed.client.site.supernode"]
    if connection.client_certificate is None:
        return program
    return [*program, "--client-certificate", connection.client_certificate, "--client-key", str(connection.client_key)]


def _plain(path: Path) -> str:
    """The path as Flower's command line takes it."""
    if re.search(r'["\\\n]', str(path)):
        raise ConfigError(f"{path}: the site folder's path must not hold quotes or backslashes")
    return str(path)


def _daemon(folder: SiteFolder) -> Daemon:
    return Daemon("supernode", folder.work)


def _health_file(folder: SiteFolder) -> StateFile[str]:
    return StateFile(
        folder.work / "supernode.json",
        kind="the address of the SuperNode's health service",
        parse=lambda content: str(json.loads(content)["health"]),
        missing="127.0.0.1:1",  # where nobody answers
        remedy="the SuperNode counts as not serving until it is started again",
        dump=lambda address: to_json({"health": address}),
    )


def _audit_state(folder: SiteFolder) -> tuple[int, str | None, str | None]:
    if not folder.audit.path.exists():
        return 0, None, None
    try:
        report = verify_log(folder.audit.path)
    except AuditError as error:
        return 0, None, str(error)
    return report.lines, report.head, None if report.intact else report.sentence()
