"""The page's interface: who may see what, who may change what, and what it says."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.server.dashboard.access import Access, digest_of, make_token, read_visitors
from pneumofed.server.dashboard.app import Dashboard, create_dashboard
from pneumofed.server.dashboard.serve import RunWatcher
from pneumofed.server.operations.overview import Link, Overview
from pneumofed.server.operations.processes import ProcessState
from tests.server.coordinator_folder import METRICS, FakeFlower, FakeServerApp, open_runs, write_coordinator

AUDITOR = "the auditor's token"


class Stage:
    """A page over one running run, and its visitors."""

    def __init__(self, path: Path) -> None:
        folder = write_coordinator(path, auditors=[{"name": "ethics", "token_sha256": digest_of(AUDITOR)}])
        self.folder, self.flower = folder, FakeFlower()
        self.runs = open_runs(folder, self.flower)
        self.token = make_token(folder)
        self.page = Dashboard(self.runs, Access(lambda: read_visitors(folder)))
        self.app = create_dashboard(self.page, ["testserver"])
        run = self.runs.submit("pneumonia-1", ExperimentConfig(rounds=3))
        self.flower.statuses[1] = "running"
        self.server_app = FakeServerApp(Path(run.folder))
        self.server_app.begin()
        self.server_app.begin_round(1)
        self.runs.reconcile()

    def client(self, token: str | None = None) -> TestClient:
        return TestClient(self.app, headers={"Authorization": f"Bearer {token}"} if token else {})

    def browser(self, token: str) -> tuple[TestClient, str]:
        """A client with a session, and its CSRF token."""
        client = self.client()
        answer = client.post("/api/login", json={"token": token})
        assert answer.status_code == 200
        return client, answer.json()["csrf"]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.runs.registry.close()


READS = ["/api/me", "/api/runs", "/api/runs/pneumonia-1", "/api/sites", "/api/events", "/api/events?run=pneumonia-1"]


@pytest.mark.parametrize("path", READS)
def test_nothing_is_read_without_a_token(stage: Stage, path: str) -> None:
    assert stage.client().get(path).status_code == 401
    assert stage.client("wrong").get(path).status_code == 401
    assert stage.client(digest_of(stage.token)).get(path).status_code == 401  # the file's content is no key
    assert stage.client(stage.token).get(path).status_code == 200
    assert stage.client(AUDITOR).get(path).status_code == 200


def test_health_and_the_empty_page_are_for_anybody(stage: Stage) -> None:
    assert stage.client().get("/health").json() == {"status": "ok"}
    page = stage.client().get("/")
    assert page.status_code == 200
    assert "pneumonia-1" not in page.text


def test_every_answer_has_the_policy_that_keeps_foreign_scripts_out(stage: Stage) -> None:
    for path in ("/", "/assets/app.js", "/api/runs", "/no/such/page", "/health"):
        policy = stage.client().get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy


def test_the_page_loads_nothing_from_elsewhere(stage: Stage) -> None:
    for path in ("/", "/assets/app.js", "/assets/charts.js", "/assets/style.css"):
        text = stage.client().get(path).text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text  # names of sites and reasons come from other parties


def test_a_wrong_token_opens_no_session(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pneumofed.server.dashboard.app.WRONG_TOKEN_SEC", 0.0)
    client = stage.client()
    assert client.post("/api/login", json={"token": "wrong"}).status_code == 401
    assert not client.cookies


def test_the_session_cookie_is_out_of_reach_of_scripts_and_other_pages(stage: Stage) -> None:
    cookie = stage.client().post("/api/login", json={"token": stage.token}).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    secure = TestClient(stage.app, base_url="https://testserver").post("/api/login", json={"token": stage.token})
    assert "secure" in secure.headers["set-cookie"].lower()


def test_a_session_ends_with_its_logout(stage: Stage) -> None:
    client, csrf = stage.browser(stage.token)
    cookie = client.cookies["pneumofed_session"]
    assert client.get("/api/runs").status_code == 200
    assert client.post("/api/logout", headers={"X-CSRF-Token": csrf}).status_code == 204
    client.cookies.set("pneumofed_session", cookie)
    assert client.get("/api/runs").status_code == 401


def test_a_session_ends_with_its_token(stage: Stage) -> None:
    client, _ = stage.browser(AUDITOR)
    write_coordinator(stage.folder.path, auditors=[])
    assert client.get("/api/runs").status_code == 401


def test_a_new_token_voids_the_old_one(stage: Stage) -> None:
    client, _ = stage.browser(stage.token)
    new = make_token(stage.folder)
    assert client.get("/api/runs").status_code == 401
    assert stage.client(stage.token).get("/api/runs").status_code == 401
    assert stage.client(new).get("/api/runs").status_code == 200
    assert (stage.folder.path / "keys" / "page-token.sha256").stat().st_mode & 0o777 == 0o600


def test_an_auditor_can_only_read(stage: Stage) -> None:
    assert stage.client(AUDITOR).post("/api/runs/pneumonia-1/stop").status_code == 403
    client, csrf = stage.browser(AUDITOR)
    assert client.post("/api/runs/pneumonia-1/stop", headers={"X-CSRF-Token": csrf}).status_code == 403
    assert stage.flower.statuses[1] == "running"


@pytest.mark.parametrize("header", [{}, {"X-CSRF-Token": b""}, {"X-CSRF-Token": b"wrong"}, {"X-CSRF-Token": b"\xc3\xa4"}])
def test_a_session_stops_nothing_without_its_csrf_token(stage: Stage, header: dict[str, bytes]) -> None:
    client, _ = stage.browser(stage.token)
    assert client.post("/api/runs/pneumonia-1/stop", headers=header).status_code == 403
    assert stage.flower.statuses[1] == "running"


def test_another_sessions_csrf_token_does_not_count(stage: Stage) -> None:
    client, _ = stage.browser(stage.token)
    _, other = stage.browser(stage.token)
    assert client.post("/api/runs/pneumonia-1/stop", headers={"X-CSRF-Token": other}).status_code == 403


def test_a_foreign_page_cannot_ask_for_a_change(stage: Stage) -> None:
    client, csrf = stage.browser(stage.token)
    headers = {"X-CSRF-Token": csrf, "Sec-Fetch-Site": "cross-site"}
    assert client.post("/api/runs/pneumonia-1/stop", headers=headers).status_code == 403


def test_the_coordinator_stops_a_run(stage: Stage) -> None:
    client, csrf = stage.browser(stage.token)
    answer = client.post("/api/runs/pneumonia-1/stop", headers={"X-CSRF-Token": csrf})
    assert answer.status_code == 200
    assert answer.json()["state"] == "stopped"
    assert "the coordinator on the live page" in answer.json()["reason"]
    assert stage.flower.statuses[1] == "finished:stopped"


def test_a_superlink_that_is_away_is_said_not_hidden(stage: Stage) -> None:
    stage.flower.down = True
    answer = stage.client(stage.token).post("/api/runs/pneumonia-1/stop")
    assert (answer.status_code, answer.json()["detail"]) == (502, "the SuperLink does not answer")


NO_RUNS = ["nope", "..", "%2e%2e", "..%2fstate", "%2e%2e%2fstate%2fregistry.db", "a%00b", "pneumonia-1%0a", "x" * 300]


@pytest.mark.parametrize("name", NO_RUNS)
def test_unknown_runs_and_tricks_with_names_are_404(stage: Stage, name: str) -> None:
    client = stage.client(stage.token)
    assert client.get(f"/api/runs/{name}").status_code == 404
    assert client.post(f"/api/runs/{name}/stop").status_code == 404
    assert name == ".." or client.get(f"/assets/{name}").status_code == 404  # the client itself makes /assets/.. the page
    assert client.get("/api/events", params={"run": "../state"}).status_code == 404


def test_another_host_name_is_refused(stage: Stage) -> None:
    assert stage.client(stage.token).get("/api/runs", headers={"Host": "evil.example"}).status_code == 400


def test_large_bodies_are_refused_unread(stage: Stage) -> None:
    assert stage.client().post("/api/login", content=b"x" * 5000).status_code == 413
    assert stage.client().post("/api/login", content=iter([b"x"] * 10)).status_code == 413


def test_the_interface_describes_itself(stage: Stage) -> None:
    paths = stage.client().get("/api/openapi.json").json()["paths"]
    assert {"/health", "/api/runs", "/api/runs/{name}", "/api/sites", "/api/events"} <= paths.keys()
    assert stage.client().get("/docs").status_code == 404  # it would load scripts from elsewhere


def test_a_run_that_goes_on_shows_its_round_and_its_sites(stage: Stage) -> None:
    client = stage.client(stage.token)
    stage.page.overview = Overview((ProcessState("door", None, False, "died"),), {"north": Link(True)}, datetime.now(UTC))
    detail = client.get("/api/runs/pneumonia-1").json()
    assert (detail["state"], detail["round_now"]["number"], detail["course"]) == ("running", 1, [])
    assert detail["privacy"] == {"epsilon": {}}
    assert detail["results"] == {}
    sites = client.get("/api/sites").json()
    assert [(site["name"], site["state"]) for site in sites["sites"]] == [("north", "training"), ("south", "training")]
    assert sites["processes"] == [{"name": "door", "serving": False, "detail": "died"}]


def test_named_held_out_sets_are_in_the_course_and_the_results(stage: Stage) -> None:
    stage.server_app.finish_round(1, held_out={"adults": METRICS})
    stage.server_app.end("succeeded", validation=METRICS, held_out={"adults": {"auroc": {"value": 0.8, "low": 0.7, "high": 0.9}}})
    stage.runs.reconcile()
    detail = stage.client(AUDITOR).get("/api/runs/pneumonia-1").json()
    assert detail["course"][0]["held_out_auroc"] == {"adults": 0.9}
    assert detail["results"]["adults"]["auroc"]["value"] == 0.8


def test_a_run_that_succeeded_shows_its_measured_numbers_and_no_others(stage: Stage) -> None:
    stage.server_app.finish_round(1)
    test = {"auroc": {"value": 0.9, "low": 0.8, "high": 0.95}, "sensitivity": {"value": None, "low": None, "high": None}}
    stage.server_app.end("succeeded", validation=METRICS, test=test)
    stage.runs.reconcile()
    detail = stage.client(AUDITOR).get("/api/runs/pneumonia-1").json()
    assert detail["state"] == "succeeded"
    assert detail["results"]["test"]["auroc"] == {"value": 0.9, "low": 0.8, "high": 0.95}
    assert detail["results"]["test"]["sensitivity"]["value"] is None
    assert "external" not in detail["results"]
    line = detail["course"][0]
    assert (line["validation_auroc"], line["external_auroc"], line["train_loss"], line["good"]) == (0.9, None, 0.5, 2)
    assert (detail["bytes_down"], detail["bytes_up"]) == (100, 100)
    assert detail["sites"][0]["rounds_answered"] == 1


def test_a_round_that_no_site_judged_leaves_a_gap_in_the_course_and_the_sites_their_last_numbers(stage: Stage) -> None:
    stage.server_app.finish_round(1)
    stage.server_app.finish_round(2, judged=False)
    detail = stage.client(AUDITOR).get("/api/runs/pneumonia-1").json()
    assert [(line["validation_auroc"], line["train_loss"]) for line in detail["course"]] == [(0.9, 0.5), (None, 0.5)]
    assert [(site["auroc"], site["train_loss"], site["round"]) for site in detail["sites"]] == [(0.9, 0.5, 2)] * 2


def test_how_old_the_updates_of_asynchronous_rounds_were_is_shown(stage: Stage) -> None:
    stage.server_app.finish_round(1, staleness={"north": 0, "south": 0})
    stage.server_app.finish_round(2, staleness={"south": 4})
    detail = stage.client(AUDITOR).get("/api/runs/pneumonia-1").json()
    assert [line["staleness"] for line in detail["course"]] == [{"north": 0, "south": 0}, {"south": 4}]
    assert {site["name"]: site["staleness"] for site in detail["sites"]} == {"north": 0, "south": 4}


def test_an_auditor_sees_no_file_names(stage: Stage) -> None:
    stage.server_app.end("failed", error="round 1: /data/DOE JANE/1.dcm cannot be read")
    stage.runs.reconcile()
    for path in ("/api/runs", "/api/runs/pneumonia-1", "/api/events"):
        assert "JANE" not in stage.client(AUDITOR).get(path).text
    assert stage.client(AUDITOR).get("/api/runs").json()[0]["reason"].startswith("round 1: … (the rest names files")
    assert "JANE" in stage.client(stage.token).get("/api/runs").text


def test_events_come_from_where_one_left_off(stage: Stage) -> None:
    client = stage.client(AUDITOR)
    first = client.get("/api/events", params={"run": "pneumonia-1"}).json()
    assert "round 1 began with 2 sites" in [event["text"] for event in first]
    assert client.get("/api/events", params={"run": "pneumonia-1", "after": first[-1]["id"]}).json() == []


def test_the_pages_watch_writes_the_report_of_a_run_that_nobody_waited_for(stage: Stage) -> None:
    stage.server_app.finish_round(1)
    stage.server_app.end("succeeded", validation=METRICS)
    RunWatcher(stage.page).turn()
    assert 'class="badge succeeded"' in (stage.folder.runs / "pneumonia-1" / "report.html").read_text()
