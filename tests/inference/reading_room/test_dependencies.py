"""Who may do what: sessions, tokens, roles, wrong passwords, foreign pages."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from pneumofed.common.audit.log import read_entries
from pneumofed.common.ops.web import CSRF_HEADER
from pneumofed.inference.reading_room.app import MAX_BODY_BYTES
from pneumofed.inference.reading_room.routes import COOKIE
from pneumofed.inference.reading_room.users import FREE_TRIES, LONGEST_LOCK_SEC, BackOff
from tests.dicom_factory import PATIENT_ID
from tests.inference.reading_room.stage import (
    ADMIN,
    PASSWORD,
    READER,
    Stage,
    phantom_dicom,
    phantom_png,
    problem,
    sign_in,
    upload,
)

OPEN = {"/", "/static/{name}", "/api/login", "/api/health"}
CASE = "0" * 32


def requests_of(stage: Stage) -> list[tuple[str, str]]:
    """(method, address) of every route that is not for anybody."""
    found: list[tuple[str, str]] = []
    for path, item in stage.app.openapi()["paths"].items():
        found += [(method.upper(), path.replace("{case}", CASE)) for method in item if path not in OPEN]
    return found


def test_nothing_but_the_empty_page_and_health_is_for_anybody(stage: Stage) -> None:
    routes = [route.path for route in stage.app.routes if isinstance(route, APIRoute)]
    asked = requests_of(stage)
    assert len(asked) >= 16
    with stage.visitor() as client:
        for method, path in asked:
            assert problem(client.request(method, path, json={})) == (401, "not_signed_in"), (method, path)
            forged = client.request(method, path, json={}, headers={"Authorization": "Bearer wrong", "Cookie": f"{COOKIE}=wrong"})
            assert problem(forged) == (401, "not_signed_in"), (method, path)
        assert client.get("/api/health").json() == {"live": True, "ready": True}
    assert set(routes) <= OPEN | {"/api/openapi.json"} | set(stage.app.openapi()["paths"])


def test_every_change_needs_the_sessions_own_csrf_token(stage: Stage) -> None:
    with stage.signed_in() as client, stage.visitor() as other:
        sign_in(other, ADMIN)
        for method, path in requests_of(stage):
            if method == "GET":
                continue
            for token in ("", "x", other.headers[CSRF_HEADER]):
                assert problem(client.request(method, path, json={}, headers={CSRF_HEADER: token})) == (403, "no_csrf"), path
        assert client.get("/api/me").json()["user"] == READER


def test_a_foreign_page_can_ask_for_no_change_and_no_login(stage: Stage) -> None:
    with stage.signed_in() as client:
        for site in ("cross-site", "same-site"):
            answer = client.post("/api/worklist", json={}, headers={"Sec-Fetch-Site": site})
            assert problem(answer) == (403, "foreign_page")
            login = client.post("/api/login", json={"user": READER, "password": PASSWORD}, headers={"Sec-Fetch-Site": site})
            assert problem(login) == (403, "foreign_page")
        assert client.get("/", headers={"host": "attacker.example"}).status_code == 400


def test_the_cookie_is_out_of_reach_of_scripts_and_other_pages(stage: Stage) -> None:
    with stage.visitor() as client:
        answer = client.post("/api/login", json={"user": READER, "password": PASSWORD})
    cookie = answer.headers["set-cookie"].lower()
    assert all(word in cookie for word in ("httponly", "samesite=strict", "path=/"))
    assert PASSWORD not in answer.text


def test_a_session_ends_by_logout_by_removal_and_by_a_new_password(stage: Stage) -> None:
    with stage.signed_in() as client:
        assert client.post("/api/logout").status_code == 204
        assert problem(client.get("/api/me")) == (401, "not_signed_in")
    with stage.signed_in() as first, stage.visitor() as second:
        sign_in(second)
        new = {"old": PASSWORD, "new": "another long phrase"}
        assert problem(first.post("/api/password", json={**new, "new": "short"})) == (422, "weak_password")
        assert problem(first.post("/api/password", json={**new, "old": "wrong"})) == (401, "wrong_login")
        assert first.post("/api/password", json=new).status_code == 204
        assert first.get("/api/me").status_code == 200
        assert second.get("/api/me").status_code == 401
        sign_in(second, password=new["new"])
        stage.room.users.remove(READER)
        assert first.get("/api/me").status_code == second.get("/api/me").status_code == 401


def test_wrong_passwords_make_known_and_unknown_names_wait_alike(stage: Stage) -> None:
    with stage.visitor() as client:
        for user in (READER, "nobody"):
            wrong = {"user": user, "password": "wrong"}
            answers = [problem(client.post("/api/login", json=wrong)) for _ in range(FREE_TRIES + 1)]
            assert answers == [(401, "wrong_login")] * FREE_TRIES + [(429, "locked")]
        locked = client.post("/api/login", json={"user": READER, "password": PASSWORD})
        assert problem(locked) == (429, "locked")  # the right one, too
        assert int(locked.headers["retry-after"]) >= 1
        sign_in(client, ADMIN)  # others do not wait
    events = [(entry.actor, entry.event) for entry in read_entries(stage.room.folder.audit)]
    assert events.count(("", "login-refused")) == 2 * FREE_TRIES


def test_the_wait_doubles_up_to_its_limit_and_a_right_password_ends_it() -> None:
    now = 0.0
    back_off = BackOff(lambda: now)
    waits = []
    for _ in range(FREE_TRIES + 12):
        back_off.wrong("a")
        waits.append(back_off.wait_sec("a"))
    assert waits[:FREE_TRIES] == [0.0] * (FREE_TRIES - 1) + [1.0]
    assert waits[FREE_TRIES : FREE_TRIES + 3] == [2.0, 4.0, 8.0]
    assert max(waits) == waits[-1] == LONGEST_LOCK_SEC
    now = LONGEST_LOCK_SEC
    assert back_off.wait_sec("a") == 0
    back_off.right("a")
    back_off.wrong("a")
    assert back_off.wait_sec("a") == 0


def test_a_programs_token_judges_and_measures_and_nothing_else(stage: Stage) -> None:
    token = stage.room.users.add_token("ris")
    with stage.visitor() as client:
        client.headers["Authorization"] = f"Bearer {token}"
        assert client.post("/api/predict", content=phantom_png()).status_code == 200
        assert client.post("/api/explain", content=phantom_png()).json()["map"]["rows"] > 0
        assert "pneumofed_verdicts_total" in client.get("/metrics").text
        assert client.get("/api/me").status_code == client.post("/api/worklist", json={}).status_code == 401
        stage.room.users.remove_token("ris")
        assert problem(client.post("/api/predict", content=phantom_png())) == (401, "not_signed_in")
    assert stage.room.cases.ids() == set()
    judged = [entry.actor for entry in read_entries(stage.room.folder.audit) if entry.event == "image-judged"]
    assert judged == ["token:ris"] * 2


def test_a_prediction_is_the_cases_judgement(stage: Stage) -> None:
    with stage.signed_in() as client:
        [done] = upload(client, phantom_dicom())
        case = client.get(f"/api/cases/{done['case']}").json()
        judgement = client.post("/api/predict", content=phantom_dicom()).json()
        explanation = client.post("/api/explain", content=phantom_dicom()).json()
        assert explanation["map"] == client.get(f"/api/cases/{done['case']}/map").json()
    assert judgement == explanation["judgement"] == {key: case[key] for key in judgement}


def test_every_answer_carries_the_headers(stage: Stage) -> None:
    with stage.signed_in() as client:
        answers = [client.get(path) for path in ("/", "/api/me", "/api/nothing", "/static/..%2fapp.py")]
        answers += [client.post("/api/next", json={"x": 1}), client.request("TRACE", "/api/me")]
    for answer in answers:
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert {answer.headers["cache-control"] for answer in answers[1:]} == {"no-store"}
    assert [answer.status_code for answer in answers[1:]] == [200, 404, 404, 422, 405]


def test_bodies_have_limits(stage: Stage) -> None:
    with stage.signed_in() as client:
        long = client.post("/api/worklist", content=b" " * (MAX_BODY_BYTES + 1))
        assert problem(long) == (413, "request_too_large")
        assert problem(client.post("/api/worklist", content=iter([b"{}"]))) == (413, "request_too_large")


def test_an_unforeseen_error_tells_nothing_of_the_patient(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError(f"patient {PATIENT_ID}")

    monkeypatch.setattr(stage.room.cases, "list", fail)
    with stage.signed_in() as client:
        answer = client.post("/api/worklist", json={"text": PATIENT_ID})
    assert problem(answer) == (500, "internal")
    assert PATIENT_ID not in answer.text + caplog.text
    assert "RuntimeError" in caplog.text


def test_refusals_do_not_repeat_the_request(stage: Stage) -> None:
    with stage.signed_in() as client:
        for body in ({"text": PATIENT_ID * 10}, {PATIENT_ID: 1}, {"limit": PATIENT_ID}, PATIENT_ID):
            answer = client.post("/api/worklist", json=body)
            assert problem(answer) == (422, "invalid_request")
            assert PATIENT_ID not in answer.text


def test_measures_name_no_case(stage: Stage) -> None:
    with stage.signed_in() as client:
        [done] = upload(client, phantom_dicom())
        client.get(f"/api/cases/{done['case']}")
        client.get("/static/whatever")
        client.get("/a-patients-name")
        text = client.get("/metrics").text
    assert done["case"] not in text
    assert "a-patients-name" not in text
    assert 'route="/api/cases/{case}"' in text
    assert 'pneumofed_requests_total{method="POST",route="/api/cases",status="200"} 1.0' in text


def test_the_folder_and_the_database_are_the_owners_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert stat.S_IMODE(stage.room.folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(stage.room.folder.database.stat().st_mode) == 0o600
    assert PASSWORD.encode() not in stage.room.folder.database.read_bytes()


def test_signed_in_twice_is_two_sessions(stage: Stage) -> None:
    with stage.signed_in() as first, stage.signed_in() as second:
        assert isinstance(second, TestClient)
        assert first.headers[CSRF_HEADER] != second.headers[CSRF_HEADER]
        first.post("/api/logout")
        assert second.get("/api/me").status_code == 200
