"""The coordinator's processes: SuperLink, SuperExec and the door (nginx), started, asked and stopped in one folder.

All state lies in `state/` of the coordinator folder, so that a restart finds the same sites and runs again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


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
class SiteState:
    """One site as the coordinator sees it now."""

    name: str
    node_id: int | None
    """Flower's number for it; None where it is not registered."""
    connected: bool
    detail: str
    """`connected`, `registered, never connected`, `disconnected since ...`, `revoked`, `not registered`."""


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
    raise NotImplementedError


def stop(folder: Path) -> None:
    """Stops the door, then SuperExec with the ServerApp, then the SuperLink. Does nothing where nothing runs."""
    raise NotImplementedError


def status(folder: Path) -> StackState:
    """What runs, what answers, and which sites are registered and connected. Starts and changes nothing."""
    raise NotImplementedError


def sync_sites(folder: Path) -> tuple[SiteState, ...]:
    """Registers the keys in `sites/`, unregisters those that are revoked, changed or gone, and returns the sites.

    Raises:
        FlowerError: the SuperLink does not answer or refuses a key.
    """
    raise NotImplementedError


def submit(folder: Path, run_config: Mapping[str, str]) -> int:
    """Submits a run of the installed app and returns Flower's run id at once.

    Raises:
        FlowerError: the SuperLink does not answer or refuses the run.
    """
    raise NotImplementedError


def run_status(folder: Path, run_id: int) -> str:
    """Flower's status of the run, e.g. `pending`, `running`, `finished:completed`, `finished:failed`, `finished:stopped`.

    Raises:
        FlowerError: the SuperLink does not answer, or knows no such run.
    """
    raise NotImplementedError


def stop_run(folder: Path, run_id: int) -> None:
    """Stops the run; one that has ended already stays as it is.

    Raises:
        FlowerError: the SuperLink does not answer, or knows no such run.
    """
    raise NotImplementedError
