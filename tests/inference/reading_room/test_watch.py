"""What the room tells beside a judgement: to the monitor of drift, and about the place of the map."""

from __future__ import annotations

import logging
from typing import Any, get_args

import numpy as np
import pytest

from pneumofed.inference.explain.focus import Focus, Misplaced, quick_focus
from pneumofed.inference.monitor.monitor import Monitor
from pneumofed.inference.reading_room import file_judge, schema
from tests.dicom_factory import PATIENT_ID
from tests.inference.reading_room.stage import ADMIN, READER, Stage, bundle, phantom_dicom, phantom_png, upload
from tests.model_bundles import phantom_images


def monitor_of(stage: Stage) -> Monitor:
    return Monitor.open(stage.room.folder.path / "monitor", bundle())


def say(stage: Stage, case: str, label: str, user: str = READER) -> None:
    with stage.signed_in(user) as client:
        assert client.post(f"/api/cases/{case}/findings", json={"label": label}).status_code == 201


def test_each_new_case_is_in_the_monitor_once_as_the_page_shows_it(stage: Stage) -> None:
    with stage.signed_in() as client:
        files = [phantom_png(0), phantom_png(0), phantom_dicom(1), phantom_dicom(2), phantom_dicom(3, ViewPosition="LL")]
        done = upload(client, *files, b"no image")
        shown = [client.get(f"/api/cases/{case}").json() for case in dict.fromkeys(file["case"] for file in done if file["case"])]
    found = monitor_of(stage).check().found
    assert found.refused.tolist() == [case["verdict"] == "cannot judge" for case in shown]
    judged = [case["probability"] for case in shown if case["verdict"] != "cannot judge"]
    assert found.probabilities[~found.refused].tolist() == judged
    assert found.units[1] == found.units[2] == found.units[3] != found.units[0]
    assert PATIENT_ID.encode() not in (stage.room.folder.path / "monitor" / "judged.sqlite").read_bytes()


def test_what_a_reader_decides_reaches_the_monitor_and_unsure_does_not(stage: Stage) -> None:
    with stage.signed_in() as client:
        cases = [
            (file["case"], client.get(f"/api/cases/{file['case']}").json())
            for file in upload(client, *map(phantom_png, range(3)))
        ]
    other = {"pneumonia": "normal", "normal": "bacterial"}
    labels = ["unsure", *(other[detail["verdict"]] for _, detail in cases[1:])]
    for (case, _), label in zip(cases, labels, strict=True):
        say(stage, case, label)
    say(stage, cases[1][0], cases[1][1]["verdict"], ADMIN)  # the first reading of an image counts
    found = monitor_of(stage).check().found
    assert found.corrected.tolist() == [False, True, True]
    assert (found.read_order >= 0).tolist() == [False, True, True]


def test_a_monitor_that_fails_is_logged_by_kind_and_stops_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise OSError(28, "no space", f"/{PATIENT_ID}")

    with stage.signed_in() as client:
        [first] = upload(client, phantom_png(0))
        monkeypatch.setattr(Monitor, "record", fail)
        monkeypatch.setattr(Monitor, "record_reading", fail)
        with caplog.at_level(logging.ERROR):
            [second] = upload(client, phantom_dicom(1))
            answer = client.post(f"/api/cases/{first['case']}/findings", json={"label": "normal"})
    assert (second["outcome"], answer.status_code) == ("new", 201)
    assert "OSError" in caplog.text
    assert PATIENT_ID not in caplog.text
    assert b"pneumofed_monitor_failures_total 2.0" in stage.room.metrics.text()


def test_a_room_without_a_monitor_writes_none(tmp_path: Any) -> None:
    stage = Stage(tmp_path, monitor=None)
    with stage.signed_in() as client:
        upload(client, phantom_png(0))
    stage.room.close()
    assert not (stage.room.folder.path / "monitor").exists()


def test_the_interface_has_a_word_for_each_warning() -> None:
    assert {warning.name.lower() for warning in Misplaced} == set(get_args(schema.MapWarning))


def test_a_map_beside_the_lungs_and_one_on_them_are_told_apart() -> None:
    pixels = phantom_images(1)[0][0].pixels
    corner, middle = np.zeros((8, 8), np.float32), np.zeros((8, 8), np.float32)
    corner[0, 0] = middle[4, 2] = 1.0
    assert Misplaced.OUTSIDE in quick_focus(pixels, corner, "pad").warnings
    assert Misplaced.OUTSIDE not in quick_focus(pixels, middle, "pad").warnings
    assert quick_focus(pixels, -middle, "pad").warnings[0] is Misplaced.EMPTY


def test_size_and_margins_of_the_picture_do_not_change_where_the_map_lies() -> None:
    pixels = phantom_images(1)[0][0].pixels
    map_ = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    large = np.kron(pixels, np.ones((5, 5), np.float32))
    assert quick_focus(large, map_, "pad").outside == pytest.approx(quick_focus(pixels, map_, "pad").outside, abs=0.05)


def test_case_map_and_explain_say_where_the_map_lies_and_predict_does_not_ask(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def misplaced(*_: Any) -> Focus:
        asked.append("focus")
        return Focus(0.9, 0.5, 0.0, 0.0, (Misplaced.OUTSIDE, Misplaced.MARKS))

    monkeypatch.setattr(file_judge, "quick_focus", misplaced)
    token = {"Authorization": f"Bearer {stage.room.users.add_token('ris')}"}
    with stage.signed_in() as client:
        [done] = upload(client, phantom_png(0))
        case = client.get(f"/api/cases/{done['case']}").json()
        map_ = client.get(f"/api/cases/{done['case']}/map").json()
    with stage.visitor() as program:
        explained = program.post("/api/explain", content=phantom_png(0), headers=token).json()
        before = len(asked)
        assert program.post("/api/predict", content=phantom_png(0), headers=token).status_code == 200
    assert case["map_warnings"] == map_["warnings"] == explained["map"]["warnings"] == ["outside", "marks"]
    assert len(asked) == before == 2
