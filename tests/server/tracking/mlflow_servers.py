"""MLflow servers for tests: a small one that keeps what it is told and refuses what the real one refuses, and the real one."""

from __future__ import annotations

import base64
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from pneumofed.common.ops.processes import free_port
from tests.serving import serving

PLACE = "api/2.0/mlflow/"
MARK_FILTER = re.compile(r"tags\.`([\w.]+)` = '([0-9a-f]+)'")
METRIC_NAME = re.compile(r"^[/\w.\- :]{1,250}$")


@dataclass
class FakeMlflow:
    """What the calls of the product need of an MLflow server. Points are kept as they come: one that is sent twice is there twice.

    Attributes:
        status: with which everything is refused; 0: nothing is.
        hangs: answers wait for this event.
        calls: names of the calls, in their order.
        authorizations: the header of each call.
    """

    status: int = 0
    hangs: threading.Event | None = None
    calls: list[str] = field(default_factory=list)
    authorizations: set[str] = field(default_factory=set)
    bodies: list[str] = field(default_factory=list)
    lose_answer_of: str = ""
    experiments: dict[str, str] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.api_route(f"/{PLACE}{{name:path}}", methods=["GET", "POST"])
        async def call(name: str, request: Request) -> JSONResponse:
            body = (await request.body()).decode()
            values = dict(request.query_params) if request.method == "GET" else await request.json()
            return await _in_thread(self._answer, name, values, request.headers.get("authorization", ""), body)

        return app

    def _answer(self, name: str, values: dict[str, Any], authorization: str, body: str) -> JSONResponse:
        self.calls.append(name)
        self.authorizations.add(authorization)
        self.bodies.append(body)
        if self.hangs is not None:
            self.hangs.wait(60.0)
        if self.status:
            return JSONResponse({"error_code": "INTERNAL_ERROR", "message": f"secret of the server {authorization}"}, self.status)
        try:
            answer = JSONResponse(getattr(self, "_" + re.sub(r"\W", "_", name))(values))
        except _RefusalError as refusal:
            return JSONResponse({"error_code": refusal.code, "message": "no"}, 400)
        if self.lose_answer_of == name:
            self.lose_answer_of = ""
            return JSONResponse({"error_code": "TEMPORARILY_UNAVAILABLE"}, 503)
        return answer

    def _experiments_get_by_name(self, values: dict[str, Any]) -> dict[str, Any]:
        name = values["experiment_name"]
        if name not in self.experiments:
            raise _RefusalError("RESOURCE_DOES_NOT_EXIST")
        return {"experiment": {"experiment_id": self.experiments[name], "name": name, "lifecycle_stage": "active"}}

    def _experiments_create(self, values: dict[str, Any]) -> dict[str, Any]:
        if values["name"] in self.experiments:
            raise _RefusalError("RESOURCE_ALREADY_EXISTS")
        self.experiments[values["name"]] = str(len(self.experiments) + 1)
        return {"experiment_id": self.experiments[values["name"]]}

    def _runs_create(self, values: dict[str, Any]) -> dict[str, Any]:
        identifier = f"run{len(self.runs)}"
        info = {"run_id": identifier, "status": "RUNNING", "run_name": values["run_name"], **values}
        tags = {one["key"]: one["value"] for one in values["tags"]}
        self.runs[identifier] = {"info": info, "tags": tags, "params": {}, "points": []}
        return {"run": self._shown(identifier)}

    def _runs_search(self, values: dict[str, Any]) -> dict[str, Any]:
        found = MARK_FILTER.fullmatch(values["filter"])
        assert found is not None
        own = [name for name, run in self.runs.items() if run["info"]["experiment_id"] in values["experiment_ids"]]
        matching = [name for name in own if self.runs[name]["tags"].get(found[1]) == found[2]]
        return {"runs": [self._shown(name) for name in matching[: values["max_results"]]]}

    def _runs_log_batch(self, values: dict[str, Any]) -> dict[str, Any]:
        metrics, params, tags = (values.get(key, []) for key in ("metrics", "params", "tags"))
        run = self.runs[values["run_id"]]
        if len(metrics) > 1000 or len(params) > 100 or len(tags) > 100:
            raise _RefusalError("INVALID_PARAMETER_VALUE")
        if not all(METRIC_NAME.match(one["key"]) and isinstance(one["value"], float) for one in metrics):
            raise _RefusalError("INVALID_PARAMETER_VALUE")
        if any(run["params"].get(one["key"], one["value"]) != one["value"] for one in params):
            raise _RefusalError("INVALID_PARAMETER_VALUE")
        run["points"] += metrics
        run["params"] |= {one["key"]: one["value"] for one in params}
        run["tags"] |= {one["key"]: one["value"] for one in tags}
        return {}

    def _runs_update(self, values: dict[str, Any]) -> dict[str, Any]:
        self.runs[values["run_id"]]["info"] |= values
        return {}

    def _shown(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        latest = {one["key"]: one for one in sorted(run["points"], key=lambda one: one["step"])}
        pairs = {kind: [{"key": key, "value": value} for key, value in run[kind].items()] for kind in ("tags", "params")}
        return {"info": run["info"], "data": {"metrics": list(latest.values()), **pairs}}


class _RefusalError(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


async def _in_thread(work: Any, *values: Any) -> JSONResponse:
    from starlette.concurrency import run_in_threadpool

    answer: JSONResponse = await run_in_threadpool(work, *values)
    return answer


@dataclass(frozen=True)
class KeptRun:
    """What a server holds of a run."""

    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: frozenset[str]
    read: Callable[[str], list[tuple[int, float]]]
    """Steps and values of a metric, in the order of the steps."""


def fake_runs(server: FakeMlflow) -> list[KeptRun]:
    def kept(run: dict[str, Any]) -> KeptRun:
        def read(name: str) -> list[tuple[int, float]]:
            return sorted((one["step"], one["value"]) for one in run["points"] if one["key"] == name)

        names = frozenset(one["key"] for one in run["points"])
        return KeptRun(run["info"]["run_name"], run["info"]["status"], run["tags"], run["params"], names, read)

    return [kept(run) for run in server.runs.values()]


def real_runs(address: str) -> list[KeptRun]:
    """Asked for over the server's REST interface, as anybody may."""

    def call(method: str, name: str, **more: Any) -> dict[str, Any]:
        answer = httpx.request(method, f"{address}/{PLACE}{name}", timeout=60.0, trust_env=False, **more)
        return dict(answer.raise_for_status().json())

    def kept(run: dict[str, Any]) -> KeptRun:
        def read(name: str) -> list[tuple[int, float]]:
            query = {"run_id": run["info"]["run_id"], "metric_key": name}
            points = call("GET", "metrics/get-history", params=query)["metrics"]
            return sorted((point["step"], point["value"]) for point in points)

        tags, params = ({one["key"]: one["value"] for one in run["data"].get(kind, [])} for kind in ("tags", "params"))
        names = frozenset(one["key"] for one in run["data"].get("metrics", []))
        return KeptRun(run["info"]["run_name"], run["info"]["status"], tags, params, names, read)

    experiments = call("POST", "experiments/search", json={"max_results": 100})["experiments"]
    asked = {"experiment_ids": [one["experiment_id"] for one in experiments]}
    return [kept(run) for run in call("POST", "runs/search", json=asked).get("runs", [])]


@contextmanager
def fake_server(server: FakeMlflow) -> Iterator[str]:
    with serving(server.app()) as address:
        yield address.rstrip("/")
        if server.hangs is not None:
            server.hangs.set()


def mlflow_command() -> str | None:
    """The real server's command: as PNEUMOFED_MLFLOW names it, beside this Python, or on the PATH."""
    beside = str(Path(sys.executable).parent)
    return os.environ.get("PNEUMOFED_MLFLOW") or shutil.which("mlflow", path=beside) or shutil.which("mlflow")


@contextmanager
def real_server(command: str, folder: Path) -> Iterator[str]:
    """Address of a real MLflow server with its database in `folder`."""
    port = free_port()
    options = ["--backend-store-uri", "sqlite:///mlflow.db", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    switches = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "PYTHONPATH": ""}
    with (folder / "mlflow.log").open("wb") as log:
        process = subprocess.Popen(
            [command, "server", *options],
            cwd=folder,
            stdout=log,
            stderr=log,
            env={**os.environ, **switches},
            start_new_session=True,
        )
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while not _answers(address):
                assert process.poll() is None and time.monotonic() < deadline, (folder / "mlflow.log").read_text()[-2000:]
                time.sleep(0.2)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too; asked in order it takes half a minute
            process.wait(timeout=30)


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=2.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
