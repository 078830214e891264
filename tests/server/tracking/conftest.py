"""MLflow servers: the small one of the tests, and the real one where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pneumofed.server.tracking.targets import TrackedRun, read_tracked
from tests.server.tracking.mlflow_servers import (
    FakeMlflow,
    KeptRun,
    fake_runs,
    fake_server,
    mlflow_command,
    real_runs,
    real_server,
)
from tests.tiny import there


@dataclass(frozen=True)
class Mlflow:
    """A server that answers, and what it holds."""

    address: str
    runs: Callable[[], list[KeptRun]]

    def of(self, folder: Path) -> KeptRun:
        """The one run that belongs to the run folder."""
        tracked: TrackedRun = there(read_tracked(folder))
        (found,) = [run for run in self.runs() if run.tags.get("pneumofed.run") == tracked.run]
        return found


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = mlflow_command()
    if command is None:
        pytest.skip("no MLflow server here: `pip install mlflow` in an environment of its own, its command in PNEUMOFED_MLFLOW")
    with real_server(command, tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@pytest.fixture(params=["small", "real"])
def mlflow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mlflow]:
    if request.param == "real":
        for name in ("follow.END_SEC", "mlflow.ANSWER_SEC"):  # its first answers take seconds on a machine that does other things
            monkeypatch.setattr(f"pneumofed.server.tracking.{name}", 120.0)
        address = request.getfixturevalue("real")
        yield Mlflow(address, lambda: real_runs(address))
        return
    server = FakeMlflow()
    with fake_server(server) as address:
        yield Mlflow(address, lambda: fake_runs(server))


@pytest.fixture
def fake() -> Iterator[tuple[FakeMlflow, str]]:
    """The small server itself, for what the real one cannot be made to do."""
    server = FakeMlflow()
    with fake_server(server) as address:
        yield server, address


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN", "URI", "SERVER_CERT_PATH"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
