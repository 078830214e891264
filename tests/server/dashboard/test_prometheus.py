"""What Prometheus reads of the coordinator: the page's numbers under the page's rule, and the name of no site."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.server.dashboard.access import Access, digest_of, make_token, read_visitors
from pneumofed.server.dashboard.app import Dashboard, create_dashboard
from pneumofed.server.operations.overview import Link, Overview
from pneumofed.server.operations.processes import ProcessState
from pneumofed.server.runs.records import RunState
from tests.server.coordinator_folder import FakeFlower, FakeServerApp, open_runs, write_coordinator

AUDITOR = "the auditor's token"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Stage:
    """A page over one run in its second round, with a third site that is known and was never there."""

    def __init__(self, path: Path) -> None:
        folder = write_coordinator(path, auditors=[{"name": "ethics", "token_sha256": digest_of(AUDITOR)}])
        self.runs, self.token = open_runs(folder, FakeFlower()), make_token(folder)
        self.runs.registry.sync_sites({name: name[0] * 8 for name in ("north", "south", "west")})
        self.page = Dashboard(self.runs, Access(lambda: read_visitors(folder)))
        self.client = TestClient(create_dashboard(self.page, ["testserver"]))
        run = self.runs.submit("pneumonia-1", ExperimentConfig(rounds=3))
        self.app = FakeServerApp(Path(run.folder))
        self.app.begin()
        self.app.begin_round(1)
        self.app.finish_round(1, failures={"south": "the site was late"}, left_out={})
        self.app.begin_round(2)
        self.app.activity.note("refused", round=2, site="south", task="train", reason="PolicyError: quiet hours")
        links = {"north": Link(True), "south": Link(True), "west": Link(False, "not connected yet")}
        processes = (ProcessState("superlink", 1, True, "serving"), ProcessState("door", None, False, "died"))
        self.page.overview = Overview(processes, links, datetime(2026, 1, 31, tzinfo=UTC))

    def text(self, token: str | None = None) -> str:
        answer = self.client.get("/metrics", headers={"Authorization": f"Bearer {token or self.token}"})
        assert answer.status_code == 200
        return answer.text

    def samples(self) -> Samples:
        found = {}
        for family in text_string_to_metric_families(self.text()):
            for sample in family.samples:
                found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        return found


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.runs.registry.close()


def of_run(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted({"run": "pneumonia-1", **labels}.items()))]


def test_the_numbers_are_those_of_the_run_folder_and_of_the_pages_last_look(stage: Stage) -> None:
    found = stage.samples()
    assert of_run(found, "pneumofed_run_round") == 2
    assert of_run(found, "pneumofed_run_rounds_completed") == 1
    assert of_run(found, "pneumofed_run_rounds_planned") == 3
    assert of_run(found, "pneumofed_run_answers_total", task="train") == 2
    kinds = {kind: of_run(found, "pneumofed_run_failures_total", kind=kind) for kind in ("late", "refused", "lost", "failed")}
    assert kinds == {"late": 0, "refused": 1, "lost": 0, "failed": 0}
    assert of_run(found, "pneumofed_run_round_seconds") == 2.0
    assert of_run(found, "pneumofed_run_bytes_total", direction="up") == 100
    assert of_run(found, "pneumofed_run_metric", set="test", metric="auroc") == 0.9
    assert found["pneumofed_runs", (("state", "submitted"),)] == 1
    states = {labels[0][1]: value for (name, labels), value in found.items() if name == "pneumofed_sites"}
    assert states == {"training": 1, "refused": 1, "never connected": 1}
    assert found["pneumofed_sites_connected", ()] == 2
    assert found["pneumofed_process_serving", (("process", "door"),)] == 0


def test_no_site_is_named_and_no_sentence_of_one_stands_there(stage: Stage) -> None:
    text = stage.text()
    assert "pneumofed_run_failures_total" in text
    assert not [word for word in ("north", "south", "west", "quiet hours", "PolicyError", "runs/") if word in text]


def test_who_may_not_read_the_page_may_not_read_the_metrics(stage: Stage) -> None:
    assert stage.client.get("/metrics").status_code == 401
    assert stage.client.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert stage.text(AUDITOR) == stage.text(stage.token)


def test_after_years_single_runs_are_the_open_ones_and_the_newest(stage: Stage) -> None:
    for number in range(2, 6):
        run = stage.runs.submit(f"pneumonia-{number}", ExperimentConfig(rounds=1))
        stage.runs.registry.move(run.name, RunState.FAILED, "it was stopped by a test")
    text = stage.text()
    assert 'run="pneumonia-1"' in text and not [n for n in (2, 3, 4, 5) if f'run="pneumonia-{n}"' in text]
    stage.runs.registry.move("pneumonia-1", RunState.FAILED, "it was stopped by a test")
    text = stage.text()
    assert 'run="pneumonia-5"' in text and 'run="pneumonia-1"' not in text
    assert stage.samples()["pneumofed_runs", (("state", "failed"),)] == 5


def test_a_coordinator_without_runs_and_before_the_first_look_answers_too(tmp_path: Path) -> None:
    folder = write_coordinator(tmp_path)
    runs = open_runs(folder, FakeFlower())
    token = make_token(folder)
    client = TestClient(create_dashboard(Dashboard(runs, Access(lambda: read_visitors(folder))), ["testserver"]))
    answer = client.get("/metrics", headers={"Authorization": f"Bearer {token}"})
    runs.registry.close()
    assert answer.status_code == 200 and 'pneumofed_runs{state="running"} 0.0' in answer.text
    assert answer.headers["content-type"].startswith("text/plain")
