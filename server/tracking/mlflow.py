"""A run at an MLflow server, over its REST interface (https://mlflow.org/docs/latest/rest-api.html, version 2.0 of it) by httpx.

MLflow's own client is not needed: it brings sixteen packages and tries a dead server again for minutes. Here each call has its limit of
time, is made once, follows no redirect, and nothing but what is written here goes out.

`MlflowRun.send` brings the server to what the facts say. The server itself says which rounds it has, so that a resumed run, a second
process or an answer that was lost double no step.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from pneumofed.common.ops.processes import LOOPBACK_HOSTS
from pneumofed.server.runs.records import RunState
from pneumofed.server.tracking.facts import MARKER, TrackedFacts
from pneumofed.server.tracking.targets import PASSWORD, TOKEN, USER, TrackedRun, TrackingError, TrackingTarget

MARK_TAG, GROUP_TAG = "pneumofed.run", "pneumofed.sweep"
CONNECT_SEC, ANSWER_SEC = 5.0, 10.0
BATCH_METRICS, BATCH_OTHERS = 1000, 100
"""What one `runs/log-batch` takes: metrics; params, tags."""
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
STATES = {RunState.SUCCEEDED: "FINISHED", RunState.FAILED: "FAILED", RunState.STOPPED: "KILLED"}
ASKS_WHO = f"set {USER} and {PASSWORD}, or {TOKEN}"


class MlflowRun:
    """One run at one server.

    Args:
        target: the server.
        tracked: the run's mark and name.
    """

    def __init__(self, target: TrackingTarget, tracked: TrackedRun) -> None:
        self._tracked, self._server = tracked, _Server(target)
        self._run_id = ""
        self._rounds = 0
        self._final: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self._tags: dict[str, str] = {}
        self._status = ""

    def send(self, facts: TrackedFacts, over: bool) -> None:
        """Sends what the server does not have.

        Args:
            facts: of the run now.
            over: whether the run has ended, so that its results and its end are sent too.

        Raises:
            TrackingError: the server does not take it.
        """
        if not self._run_id:
            self._open(facts)
        for line in facts.rounds:
            if line.round > self._rounds:
                # Of a round that was cut off between two calls the server has a part.
                new = {name: value for name, value in line.numbers.items() if self._steps.get(name, 0) < line.round}
                self._log(new, line.round, line.time_ms)
                self._rounds = line.round
        if over:
            new = {name: value for name, value in facts.final.items() if self._final.get(name) != value}
            self._log(new, facts.last_round, facts.ended_ms)
            self._final |= new
        self._send_tags(facts)
        self._send_status(facts, over)

    def close(self) -> None:
        """Closes the connections."""
        self._server.close()

    def _open(self, facts: TrackedFacts) -> None:
        """Finds the run by its mark, or creates it."""
        experiment, tracked = self._experiment(facts.study), self._tracked
        found = self._find(experiment, tracked.run)
        if found is None:
            tags = {MARK_TAG: tracked.run}
            if tracked.group:
                tags |= {GROUP_TAG: tracked.group[1], "mlflow.parentRunId": self._group(experiment, tracked.group, facts)}
            found = self._create(experiment, tracked.name, facts.started_ms, tags)
        data = found.get("data") or {}
        metrics = {one["key"]: one for one in data.get("metrics") or ()}
        self._rounds = int(metrics[MARKER]["step"]) if MARKER in metrics else 0
        self._final = {name: float(one["value"]) for name, one in metrics.items()}
        self._steps = {name: int(one["step"]) for name, one in metrics.items()}
        self._tags = {one["key"]: one["value"] for one in data.get("tags") or ()}
        self._status = str(found["info"].get("status"))
        self._send_params(facts, {one["key"] for one in data.get("params") or ()}, str(found["info"]["run_id"]))
        self._run_id = str(found["info"]["run_id"])

    def _experiment(self, name: str) -> str:
        found = self._server.call("GET", "experiments/get-by-name", {"experiment_name": name}, missing="RESOURCE_DOES_NOT_EXIST")
        if found is None:
            found = self._server.call("POST", "experiments/create", {"name": name}, missing="RESOURCE_ALREADY_EXISTS")
            if found is not None:
                return str(found["experiment_id"])
            found = self._server.call("GET", "experiments/get-by-name", {"experiment_name": name})  # another run was faster
        experiment = (found or {}).get("experiment") or {}
        if experiment.get("lifecycle_stage") == "deleted":
            raise TrackingError(f"has deleted the experiment {name}: restore it there (`mlflow experiments restore`)")
        return str(experiment["experiment_id"])

    def _find(self, experiment: str, mark: str) -> dict[str, Any] | None:
        asked = {"experiment_ids": [experiment], "filter": f"tags.`{MARK_TAG}` = '{mark}'", "max_results": 1}
        runs = (self._server.call("POST", "runs/search", asked) or {}).get("runs") or [None]
        return dict(runs[0]) if runs[0] else None

    def _create(self, experiment: str, name: str, started_ms: int, tags: Mapping[str, str]) -> dict[str, Any]:
        asked = {"experiment_id": experiment, "run_name": name, "start_time": started_ms, "tags": _pairs(tags)}
        return dict((self._server.call("POST", "runs/create", asked) or {})["run"])

    def _group(self, experiment: str, group: tuple[str, str], facts: TrackedFacts) -> str:
        """The run above those of a sweep, which MLflow shows under it."""
        mark, name = group
        found = self._find(experiment, mark) or self._create(
            experiment, name, facts.started_ms, {MARK_TAG: mark, "pneumofed.kind": "sweep"}
        )
        return str(found["info"]["run_id"])

    def _send_params(self, facts: TrackedFacts, there: set[str], run_id: str) -> None:
        missing = {key: value[:LONGEST_PARAM] for key, value in facts.params.items() if key not in there}
        for some in _chunks(_pairs(missing), BATCH_OTHERS):
            self._server.call("POST", "runs/log-batch", {"run_id": run_id, "params": some})

    def _log(self, numbers: Mapping[str, float], step: int, time_ms: int) -> None:
        """All of them under one step; the last call, with `MARKER`, comes after all others."""
        points = [{"key": key, "value": value, "timestamp": time_ms, "step": step} for key, value in numbers.items()]
        for some in _chunks(points, BATCH_METRICS):
            self._server.call("POST", "runs/log-batch", {"run_id": self._run_id, "metrics": some})

    def _send_tags(self, facts: TrackedFacts) -> None:
        wanted = {**facts.tags, **({"mlflow.note.content": facts.note} if facts.note else {}), "mlflow.source.name": "pneumofed"}
        new = {key: value[:LONGEST_TAG] for key, value in wanted.items() if self._tags.get(key) != value[:LONGEST_TAG]}
        for some in _chunks(_pairs(new), BATCH_OTHERS):
            self._server.call("POST", "runs/log-batch", {"run_id": self._run_id, "tags": some})
        self._tags |= new

    def _send_status(self, facts: TrackedFacts, over: bool) -> None:
        status = STATES.get(facts.state, "FAILED") if over else "RUNNING"
        if status != self._status:
            end = {"end_time": facts.ended_ms} if over else {}
            self._server.call("POST", "runs/update", {"run_id": self._run_id, "status": status, **end})
            self._status = status


class _Server:
    """Calls of the REST interface. What an answer says beside its code is not repeated: it may hold anything."""

    def __init__(self, target: TrackingTarget) -> None:
        self._address = target.place
        local = urlsplit(target.place).hostname in (*LOOPBACK_HOSTS, "::1")
        user, password = target.user or os.environ.get(USER, ""), target.password or os.environ.get(PASSWORD, "")
        token = "" if user else os.environ.get(TOKEN, "")
        self._client = httpx.Client(
            auth=(user, password) if user else None,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(ANSWER_SEC, connect=CONNECT_SEC),
            verify=_trust(),
            trust_env=not local,  # a web proxy must not be asked for this machine
        )

    def call(self, method: str, name: str, values: Mapping[str, Any], missing: str = "") -> dict[str, Any] | None:
        """Makes one call and returns its answer; None where the server answers with the error code `missing`.

        Args:
            method: GET or POST.
            name: after `/api/2.0/mlflow/`.
            values: query or JSON body.
            missing: an error code of MLflow that is no failure.

        Raises:
            TrackingError: it does not answer in time, or refuses.
        """
        given: dict[str, Any] = {"params": dict(values)} if method == "GET" else {"json": dict(values)}
        try:
            answer = self._client.request(method, f"{self._address}/api/2.0/mlflow/{name}", **given)
            content = answer.json() if answer.content else {}
        except httpx.HTTPError as error:
            raise TrackingError(f"does not answer ({type(error).__name__}): start the server or check the address") from None
        except ValueError:
            raise TrackingError(f"gives no JSON (status {answer.status_code}): is this an MLflow server?") from None
        if answer.is_success and isinstance(content, dict):
            return content
        code = str(content.get("error_code", "")) if isinstance(content, dict) else ""
        if missing and code == missing:
            return None
        raise TrackingError(_refusal(answer.status_code, code if re.fullmatch(r"[A-Z_]{1,60}", code) else ""))

    def close(self) -> None:
        self._client.close()


def _refusal(status: int, code: str) -> str:
    said = f"{status} {code}".strip()
    if status == 401:
        return f"asks who this is ({said}): {ASKS_WHO}"
    if status == 403:
        return f"refuses ({said}): give this user the right to write there, or name another with {USER}"
    return f"refuses ({said}): its log says why"


def _trust() -> ssl.SSLContext | bool:
    """What server certificates are checked against: the file that MLflow's own variable names, else the usual authorities."""
    file = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH", "")
    if not file:
        return True
    try:
        return ssl.create_default_context(cafile=file)
    except OSError:  # also ssl.SSLError
        raise TrackingError("cannot be reached: MLFLOW_TRACKING_SERVER_CERT_PATH is no file with certificates") from None


def _pairs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in values.items()]


def _chunks(points: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(points), size):
        yield list(points[start : start + size])
