"""Where a run is tracked: `mlflow:ADDRESS`, `mlflow`, `tensorboard:FOLDER` or `tensorboard`, and what the run folder keeps of it.

`tracking.json` in a run folder holds the targets and the mark by which the tracked run is found again, so that a resumed run goes on as the
same one. A name or a password in an address is taken out of it when it is read: no file and no message holds it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit, urlunsplit

from pneumofed.common.errors import CheckpointError, ConfigError, PneumofedError
from pneumofed.common.files import StateFile, write_file
from pneumofed.common.ops.processes import LOOPBACK_HOSTS
from pneumofed.server.runs.records import Record, format_record, parse_record

TRACKING_FILE = "tracking.json"
EXPECTED = "expected mlflow:ADDRESS, mlflow (the address in MLFLOW_TRACKING_URI), tensorboard, or tensorboard:FOLDER"
USER, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
"""Variables of MLflow's own client that say who asks."""


class TrackingError(PneumofedError):
    """A target took nothing; the text is the end of a sentence that begins with its name, and says what to do."""


@dataclass(frozen=True)
class TrackingTarget:
    """One place to track a run at.

    Attributes:
        kind: `mlflow` or `tensorboard`.
        place: address of the MLflow server, without who asks; or the folder, absolute; empty: `tensorboard` in the run folder.
        user, password: of the address, if it named them; shown and stored nowhere.
    """

    kind: Literal["mlflow", "tensorboard"]
    place: str = ""
    user: str = field(default="", repr=False, compare=False)
    password: str = field(default="", repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.kind}:{self.place}" if self.place else self.kind

    def credentials(self) -> dict[str, str]:
        """Returns the variables for a process that is to track at this target in the place of this one; empty without a password."""
        return {USER: self.user, PASSWORD: self.password} if self.user else {}


@dataclass(frozen=True)
class Tracking:
    """What is asked for of one run.

    Attributes:
        targets: where; those that the run folder names already are used too.
        name: what the tracked run is called; empty: as the run folder.
        group: mark and name of the sweep that the run belongs to; None of a run by itself.
        held_out: whether results on held-out sets go there. A sweep keeps them closed until it has chosen.
        app: SHA-256 of the app bundle that the run begins with; empty where the run's own summary is to say it.
    """

    targets: tuple[TrackingTarget, ...] = ()
    name: str = ""
    group: tuple[str, str] | None = None
    held_out: bool = True
    app: str = ""


class TrackedRun(Record):
    """What `tracking.json` holds."""

    run: str
    """A drawn mark, by which the run is found at every target."""
    name: str
    targets: tuple[str, ...] = ()
    """Without anything that says who asks."""
    group: tuple[str, str] | None = None
    held_out: bool = True
    app: str = ""
    """SHA-256 of the app bundle that the run began with, where it was known then."""


def read_targets(texts: Iterable[str] | None) -> tuple[TrackingTarget, ...]:
    """Reads targets as the command line has them; of equal ones the first counts.

    Raises:
        ConfigError: one is none, or what it needs is not installed. The text never quotes an address.
    """
    return tuple(dict.fromkeys(read_target(text) for text in texts or ()))


def read_target(text: str) -> TrackingTarget:
    """Reads one target.

    Raises:
        ConfigError: as `read_targets`.
    """
    kind, _, place = text.partition(":")
    if kind == "tensorboard":
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("--track tensorboard: it is not installed; pip install 'pneumofed[tracking]'")
        return TrackingTarget("tensorboard", str(Path(place).expanduser().absolute()) if place else "")
    if kind == "mlflow":
        address = place or os.environ.get("MLFLOW_TRACKING_URI", "")
        if not address:
            raise ConfigError("--track mlflow: no address, and MLFLOW_TRACKING_URI is not set; e.g. mlflow:http://127.0.0.1:5000")
        return _read_address(address)
    raise ConfigError(f"--track: unknown target; {EXPECTED}")


def _read_address(address: str) -> TrackingTarget:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ConfigError("--track mlflow: the address cannot be read; e.g. https://mlflow.example.org") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ConfigError(
            "--track mlflow: expected an address with http:// or https://; for a store without a server start one: "
            "`mlflow server --backend-store-uri sqlite:///mlflow.db`, then mlflow:http://127.0.0.1:5000"
        )
    if parts.query or parts.fragment:
        raise ConfigError("--track mlflow: an address has neither ? nor #; who asks stands in MLFLOW_TRACKING_TOKEN")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    shown = f"[{host}]" if ":" in host else host
    place = urlunsplit((parts.scheme, f"{shown}:{port}" if port else shown, parts.path.rstrip("/"), "", ""))
    target = TrackingTarget("mlflow", place, user, password)
    if (
        parts.scheme == "http"
        and host not in (*LOOPBACK_HOSTS, "::1")
        and (user or os.environ.get(USER) or os.environ.get(TOKEN))
    ):
        raise ConfigError("--track mlflow: a password or token goes to another machine over https:// only")
    return target


def tracking_file(folder: Path) -> Path:
    """Names the file of a run folder that says where it is tracked."""
    return folder / TRACKING_FILE


def read_tracked(folder: Path) -> TrackedRun | None:
    """Reads where the run is tracked; None where it is not.

    Raises:
        CheckpointError: the file is damaged.
    """
    remedy = "remove it to track the run anew, as another one"
    path = tracking_file(folder)
    file: StateFile[Any] = StateFile(path, "where the run is tracked", json.loads, None, remedy, CheckpointError)
    found = file.read()
    return None if found is None else parse_record(TrackedRun, found, str(path))


def register(folder: Path, tracking: Tracking) -> TrackedRun | None:
    """Writes the targets that are new into the run folder, and returns the whole; None where the run is tracked nowhere.

    Args:
        folder: of the run; made if it is missing.
        tracking: what is asked for.

    Raises:
        CheckpointError: the file is damaged.
        OSError: it cannot be written.
    """
    before = read_tracked(folder)
    if before is None and not tracking.targets:
        return None
    texts = [str(target) for target in tracking.targets]
    if before is None:
        made = {"run": secrets.token_hex(16), "name": tracking.name or folder.resolve().name, "targets": tuple(texts)}
        tracked = TrackedRun.model_validate({**made, "group": tracking.group, "held_out": tracking.held_out, "app": tracking.app})
    else:
        tracked = before.updated(targets=tuple(dict.fromkeys([*before.targets, *texts])))
    if tracked != before:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(tracking_file(folder), (json.dumps(format_record(tracked), indent=2) + "\n").encode())
    return tracked


def find_targets(tracked: TrackedRun, given: Iterable[TrackingTarget]) -> list[TrackingTarget]:
    """Finds the targets of a run: those that its folder names, with who asks from those that were given now.

    Args:
        tracked: what the run folder says.
        given: on the command line.

    Raises:
        ConfigError: one cannot be read, or what it needs is not installed.
    """
    named: Mapping[str, TrackingTarget] = {str(target): target for target in given}
    return [named.get(text) or read_target(text) for text in tracked.targets]
