"""The way of an image through the room: uploaded, listed, opened, judged by a reader, exported."""

from __future__ import annotations

import csv
import io
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.audit.log import read_entries
from pneumofed.common.audit.verify import verify_log
from pneumofed.common.imaging.images import read_image
from pneumofed.common.imaging.types import Window
from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.inference.reading_room.cases import NO_NUMBER, Case, Cases, agrees, open_room_database
from pneumofed.inference.reading_room.file_judge import FileJudge
from pneumofed.inference.reading_room.room import delete_old_cases
from pneumofed.inference.reading_room.schema import NextQuery, WorklistQuery
from pneumofed.inference.reading_room.serve import model_info, reader_labels
from tests.dicom_factory import PATIENT_ID
from tests.inference.reading_room.stage import (
    ADMIN,
    READER,
    Stage,
    files_below,
    inline_reader,
    phantom_dicom,
    phantom_png,
    problem,
    upload,
)
from tests.model_bundles import judged_on, make_bundle


def test_a_file_becomes_a_case_with_the_predictors_judgement(stage: Stage, tmp_path: Path) -> None:
    with stage.signed_in() as client:
        [done] = upload(client, phantom_png())
        case = client.get(f"/api/cases/{done['case']}").json()
    (tmp_path / "again.png").write_bytes(phantom_png())
    expected = inline_reader().predictor.judge([read_image(tmp_path / "again.png")])[0]
    assert done["outcome"] == "new"
    assert case["verdict"] == expected.verdict
    found = expected.prediction
    assert found is not None
    assert (case["probability"], case["low"], case["high"]) == (found.probability, found.low, found.high)
    assert case["classes"] == dict(found.classes)
    assert (case["model"], case["model_digest"]) == (expected.model, expected.model_digest)
    assert case["threshold"] == stage.room.model.threshold
    assert (case["status"], case["findings"], case["previous"]) == ("open", [], [])


def test_what_cannot_be_judged_has_no_numbers_anywhere(stage: Stage) -> None:
    lateral = phantom_dicom(3, ViewPosition="LL")
    with stage.signed_in() as client:
        [done] = upload(client, lateral)
        case = client.get(f"/api/cases/{done['case']}").json()
        line = client.post("/api/worklist", json={}).json()["cases"][0]
        predicted = client.post("/api/predict", content=lateral).json()
        explained = client.post("/api/explain", content=lateral).json()
        picture = client.get(f"/api/cases/{done['case']}/map.png")
    for told in (case, line, predicted, explained["judgement"]):
        assert told["verdict"] == "cannot judge"
        assert (told["probability"], told["low"], told["high"]) == (None, None, None)
        assert not told.get("classes")
    assert explained["map"] is None
    assert not case["has_map"]
    row = stage.room.cases.find(done["case"])
    assert row is not None
    assert (row.probability, row.low, row.high, row.classes) == (NO_NUMBER, NO_NUMBER, NO_NUMBER, {})
    assert problem(picture) == (404, "no_map")


def test_a_dicom_tells_the_reader_what_he_needs_and_nothing_lies_open_to_others(stage: Stage) -> None:
    tags: dict[str, Any] = {
        "StudyDate": "20260131",
        "ViewPosition": "PA",
        "PatientSex": "F",
        "PatientAge": "063Y",
        "AccessionNumber": "A7",
    }
    with stage.signed_in() as client:
        [done] = upload(client, phantom_dicom(**tags))
        case = client.get(f"/api/cases/{done['case']}").json()
    known = [case[key] for key in ("patient", "accession", "study_date", "view", "sex", "age_years", "modality")]
    assert known == [PATIENT_ID, "A7", "2026-01-31", "PA", "F", 63.0, "DX"]
    modes = {path.stat().st_mode & 0o077 for path in stage.room.folder.path.rglob("*")}
    assert modes == {0}


def test_a_case_says_whether_the_model_was_judged_for_such_a_patient(tmp_path: Path) -> None:
    bundle = load_bundle(make_bundle(tmp_path / "bundle", population=judged_on(age="adult", view="PA")), None)
    stage = Stage(tmp_path, FileJudge(Predictor(bundle, threads=1)))
    with stage.signed_in() as client:
        done = upload(
            client, phantom_dicom(PatientAge="005Y", ViewPosition="PA"), phantom_dicom(1, PatientAge="", ViewPosition="PA")
        )
        child, unknown = (client.get(f"/api/cases/{file['case']}").json()["population"] for file in done)
        line = client.post("/api/worklist", json={}).json()["cases"][-1]
        predicted = client.post("/api/predict", content=phantom_dicom(2, PatientAge="040Y", ViewPosition="PA")).json()
    stage.room.close()
    assert (child["status"], child["age_group"], child["outside"], child["judged"]["age"]) == (
        "not_judged",
        "child",
        ["age"],
        ["adult"],
    )
    assert line["population"] == child
    assert (unknown["status"], unknown["age_group"]) == ("age_unknown", None)
    assert predicted["population"]["status"] == "judged"


def test_bad_files_are_refused_one_by_one_and_leave_nothing(stage: Stage) -> None:
    with stage.signed_in() as client:
        done = upload(client, b"", b"hello", b"PK\x03\x04 a zip", phantom_png(), phantom_dicom(NumberOfFrames=3))
        total = client.post("/api/worklist", json={}).json()["total"]
    assert [file["error"] for file in done] == ["empty", "unknown_format", "archive_file", None, "multi_frame"]
    assert [file["outcome"] for file in done] == ["refused", "refused", "refused", "new", "refused"]
    assert all(file["detail"] for file in done if file["error"])
    assert total == 1
    assert not files_below(stage.room.folder.quarantine)


def test_the_same_file_is_one_case(stage: Stage) -> None:
    with stage.signed_in() as client:
        first, second = upload(client, phantom_png(), phantom_png())
        [third] = upload(client, phantom_png(), name="another name")
    assert (first["outcome"], second["outcome"], third["outcome"]) == ("new", "known", "known")
    assert first["case"] == second["case"] == third["case"]
    assert len(list(stage.room.folder.store.glob("??/*"))) == 1


def test_findings_are_kept_for_ever_and_the_latest_counts(stage: Stage) -> None:
    with stage.signed_in() as client:
        [done] = upload(client, phantom_png())
        for label in ("normal", "unsure", "viral"):
            answer = client.post(f"/api/cases/{done['case']}/findings", json={"label": label, "note": f" {label}! "})
            assert answer.status_code == 201
        case = client.get(f"/api/cases/{done['case']}").json()
    assert [(found["label"], found["by"], found["note"]) for found in case["findings"]] == [
        ("normal", READER, "normal!"),
        ("unsure", READER, "unsure!"),
        ("viral", READER, "viral!"),
    ]
    assert (case["finding"], case["finding_by"], case["status"]) == ("viral", READER, "read")
    agreement = {"pneumonia": [False, None, True], "normal": [True, None, False], "cannot judge": [None] * 3}
    assert [found["agrees"] for found in case["findings"]] == agreement[case["verdict"]]


def test_other_images_of_the_patient_are_shown_newest_first(stage: Stage) -> None:
    with stage.signed_in() as client:
        dates = ("20250101", "20260101", "20240101")
        done = upload(
            client, *(phantom_dicom(n, StudyDate=day) for n, day in enumerate(dates)), phantom_dicom(4, PatientID="another")
        )
        case = client.get(f"/api/cases/{done[2]['case']}").json()
        stranger = client.get(f"/api/cases/{done[3]['case']}").json()
    assert [other["study_date"] for other in case["previous"]] == ["2026-01-01", "2025-01-01"]
    assert stranger["previous"] == []


def test_images_without_a_patients_number_are_nobodys_previous_ones(stage: Stage) -> None:
    with stage.signed_in() as client:
        done = upload(client, phantom_png(0), phantom_png(1))
        assert client.get(f"/api/cases/{done[0]['case']}").json()["previous"] == []


def test_the_window_of_the_file_shows_what_read_image_shows(stage: Stage, tmp_path: Path) -> None:
    for photometric in ("MONOCHROME2", "MONOCHROME1"):
        file = phantom_dicom(WindowCenter="1500", WindowWidth="1000", PhotometricInterpretation=photometric)
        (tmp_path / "file").write_bytes(file)
        expected = np.rint(read_image(tmp_path / "file").pixels * 255)
        with stage.signed_in() as client:
            [done] = upload(client, file)
            shown = client.get(f"/api/cases/{done['case']}/image.png")
            pixels = client.get(f"/api/cases/{done['case']}/pixels")
        image = np.asarray(PIL.Image.open(io.BytesIO(shown.content)), np.int64)
        assert np.abs(image - expected).max() <= 1
        raw = np.frombuffer(pixels.content, "<u2").reshape(int(pixels.headers["x-image-height"]), -1)
        assert (raw.min(), raw.max()) == (0, 65535)  # the values beyond the window are there
        assert len(np.unique(raw)) > len(np.unique(expected))


def test_pixels_come_packed_and_plain_and_small(stage: Stage) -> None:
    with stage.signed_in() as client:
        [done] = upload(client, phantom_png())
        address = f"/api/cases/{done['case']}/pixels"
        packed = client.get(address, headers={"accept-encoding": "gzip"})
        plain = client.get(address, headers={"accept-encoding": "identity"})
        small = client.get(address, params={"max_side": 64})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == plain.content
    assert len(small.content) == 2 * int(small.headers["x-image-width"]) * int(small.headers["x-image-height"])


def test_the_map_covers_the_image_and_no_bars(stage: Stage) -> None:
    with stage.signed_in() as client:
        [done] = upload(client, phantom_dicom())
        case = client.get(f"/api/cases/{done['case']}").json()
        found = client.get(f"/api/cases/{done['case']}/map").json()
        picture = PIL.Image.open(io.BytesIO(client.get(f"/api/cases/{done['case']}/map.png").content))
    assert len(found["values"]) == found["rows"] * found["columns"]
    assert 0 <= min(found["values"]) <= max(found["values"]) <= 1
    assert picture.mode == "RGBA"
    assert picture.size == (case["image"]["width"], case["image"]["height"])


def test_labels_carry_pseudonyms_and_the_latest_word_of_each_reader(stage: Stage) -> None:
    with stage.signed_in(ADMIN) as client:
        done = upload(client, phantom_dicom(0), phantom_dicom(1), phantom_png(2), phantom_png(3))
        for file, label in zip(done, ("bacterial", "normal", "pneumonia", "unsure"), strict=True):
            client.post(f"/api/cases/{file['case']}/findings", json={"label": "viral"})
            client.post(f"/api/cases/{file['case']}/findings", json={"label": label})
        answer = client.get("/api/labels.csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["label"] for row in rows] == ["bacterial", "normal", "pneumonia", "unsure"]
    assert {row["reader"] for row in rows} == {ADMIN}
    patients = [row["patient"] for row in rows]
    assert patients[0] == patients[1] != ""
    assert patients[2:] == ["", ""]
    assert PATIENT_ID not in answer.text
    assert [read_image(Path(row["path"])).info.format for row in rows] == ["dicom", "dicom", "png", "png"]


def test_only_an_admin_deletes_and_then_all_of_the_case_is_gone(stage: Stage) -> None:
    with stage.signed_in() as client:
        [done] = upload(client, phantom_dicom())
        client.post(f"/api/cases/{done['case']}/findings", json={"label": "normal"})
        assert problem(client.delete(f"/api/cases/{done['case']}")) == (403, "forbidden")
        assert problem(client.get("/api/labels.csv")) == (403, "forbidden")
    with stage.signed_in(ADMIN) as client:
        assert client.delete(f"/api/cases/{done['case']}").status_code == 204
        assert problem(client.get(f"/api/cases/{done['case']}")) == (404, "not_found")
        assert problem(client.delete(f"/api/cases/{done['case']}")) == (404, "not_found")
    assert not files_below(stage.room.folder.store)


def test_the_audit_log_tells_who_did_what_and_names_no_patient(stage: Stage) -> None:
    with stage.signed_in() as client:
        [done] = upload(client, phantom_dicom(), name=f"{PATIENT_ID}.dcm")
        client.get(f"/api/cases/{done['case']}")
        client.post(f"/api/cases/{done['case']}/findings", json={"label": "normal", "note": "secret"})
        client.post("/api/logout")
    entries = read_entries(stage.room.folder.audit)
    told = [(entry.actor, entry.event, entry.facts.get("case")) for entry in entries]
    case = done["case"]
    events = [("login", None), ("case-added", case), ("case-opened", case), ("finding", case), ("logout", None)]
    assert told == [(READER, event, fact) for event, fact in events]
    assert verify_log(stage.room.folder.audit).intact
    text = stage.room.folder.audit.read_text()
    assert PATIENT_ID not in text
    assert "secret" not in text


def test_old_cases_and_what_crashes_left_go(stage: Stage) -> None:
    with stage.signed_in() as client:
        upload(client, phantom_png(0), phantom_png(1))
    left = stage.room.folder.quarantine / "left"
    left.mkdir()
    os.utime(left, (0, 0))
    recorded: list[str] = []
    kept = delete_old_cases(stage.room.cases, stage.room.store, 1, recorded.append)
    assert (kept.cases, kept.left_behind, recorded) == (0, 1, [])
    before = stage.room.cases.ids()
    done = delete_old_cases(stage.room.cases, stage.room.store, 1, recorded.append, datetime.now(UTC) + timedelta(days=2))
    assert (done.cases, stage.room.cases.ids(), set(recorded)) == (2, set(), before)
    assert not files_below(stage.room.folder.store)


def test_no_old_case_goes_before_the_audit_log_says_so_whatever_fails(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    with stage.signed_in() as client:
        upload(client, phantom_png(0), phantom_png(1))
    before, recorded = stage.room.cases.ids(), list[str]()

    def fail(identifier: str) -> None:
        raise OSError(5, "I/O error")

    monkeypatch.setattr(stage.room.store, "remove", fail)
    with pytest.raises(OSError, match="I/O error"):
        delete_old_cases(stage.room.cases, stage.room.store, 1, recorded.append, datetime.now(UTC) + timedelta(days=2))
    assert len(before - stage.room.cases.ids()) == 1 and before - stage.room.cases.ids() <= set(recorded)


def test_a_full_store_takes_no_more(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    with stage.signed_in() as client:
        monkeypatch.setattr(stage.room.cases, "bytes", lambda: 10**15)
        answer = client.post("/api/cases", files=[("files", ("x", phantom_png()))])
    assert problem(answer) == (507, "disk_full")


UNJUDGED = 0.45
"""What the network says of images that cannot be judged in these tests."""


def row(number: int, probability: float, finding: str | None) -> Case:
    facts = {"patient": f"P{number % 3}_%", "accession": "", "format": "png", "height": 1, "width": 1, "bits": 8}
    numbers = {"window_center": 0.5, "window_width": 1.0, "low": 0.0, "high": 1.0, "threshold": 0.5, "probability": probability}
    lists = {"classes": {}, "reasons": [], "map_area": [], "model": "m", "model_digest": "d", "has_map": False}
    keys = {
        "id": f"{number:032x}",
        "sha256": f"{number:064x}",
        "bytes": 1,
        "arrived": datetime(2026, 1, 1 + number % 5, 12, tzinfo=UTC),
    }
    verdict = "cannot judge" if probability == UNJUDGED else "pneumonia" if probability >= 0.5 else "normal"
    return Case(number=number, verdict=verdict, finding=finding, **facts, **numbers, **lists, **keys)


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(open_room_database(tmp_path_factory.mktemp("walk") / "room.db"))


PROBABILITY = st.sampled_from([0.1, 0.4, 0.5, 0.9, UNJUDGED])
ROWS = st.lists(st.tuples(PROBABILITY, st.sampled_from([None, "normal", "viral"])), max_size=12)


@settings(deadline=None, max_examples=20)
@given(
    rows=ROWS,
    status=st.sampled_from([None, "open", "read"]),
    sort=st.sampled_from(["arrival", "probability"]),
    descending=st.booleans(),
)
def test_next_walks_through_the_worklist_in_its_order_and_back(
    walked: Cases,
    rows: list[tuple[float, str | None]],
    status: str | None,
    sort: str,
    descending: bool,
) -> None:
    cases = walked
    for identifier in cases.ids():
        cases.remove(identifier)
    for number, (probability, finding) in enumerate(rows, 1):
        cases.add(row(number, probability, finding))
    query = WorklistQuery.model_validate({"status": status, "sort": sort, "descending": descending})
    total, unread, listed = cases.list(query)
    kept = [
        (-1.0 if probability == UNJUDGED else probability, number)
        for number, (probability, finding) in enumerate(rows, 1)
        if status is None or (status == "open") == (finding is None)
    ]
    kept.sort(key=lambda item: item if sort == "probability" else item[1:], reverse=descending)
    order = [f"{number:032x}" for _, number in kept]
    assert [case.id for case in listed] == order
    assert (total, unread) == (len(order), sum(case.finding is None for case in listed))
    for backwards in (False, True):
        seen: list[str] = []
        while (found := cases.next(NextQuery(after=seen[-1] if seen else None, query=query, backwards=backwards)))[0]:
            assert found[1] == len(order) - len(seen) - 1
            seen.append(str(found[0]))
        assert seen == (order[::-1] if backwards else order)


def test_the_worklist_is_searched_without_wildcards_and_by_day(tmp_path: Path) -> None:
    cases = Cases(open_room_database(tmp_path / "room.db"))
    for number in range(1, 7):
        cases.add(row(number, 0.1 * number, "normal" if number == 3 else None))

    def found(**values: object) -> list[int]:
        return sorted(int(case.id, 16) for case in cases.list(WorklistQuery.model_validate(values))[2])

    assert found(text="P1") == [1, 4]
    assert found(text="_%") == [1, 2, 3, 4, 5, 6]
    assert found(text="%") == [1, 2, 3, 4, 5, 6]
    assert found(text="P%") == []
    assert found(text="0" * 31 + "6") == [6]
    assert found(verdict=["pneumonia"]) == [5, 6]
    assert found(finding=["normal"]) == [3]
    assert found(arrived_from="2026-01-02", arrived_to="2026-01-03") == [1, 2, 6]
    assert found(arrived_from="9999-12-31") == []
    assert found(arrived_to="0001-01-01") == []


def test_case_reads_after_a_finding_go_on_from_its_place(stage: Stage) -> None:
    with stage.signed_in() as client:
        done = [file["case"] for file in upload(client, *(phantom_png(n) for n in range(3)))]
        query = {"status": "open", "descending": False}
        client.post(f"/api/cases/{done[1]}/findings", json={"label": "normal"})
        answer = client.post("/api/next", json={"after": done[1], "query": query}).json()
    assert answer == {"case": done[2], "remaining": 0}


def test_a_window_of_a_lookup_table_file_is_the_whole_range(tmp_path: Path) -> None:
    from pneumofed.inference.reading_room.viewing import whole_range

    (tmp_path / "x.png").write_bytes(phantom_png())
    image = read_image(tmp_path / "x.png")
    pixels, window, ends = whole_range(tmp_path / "x.png", image)
    assert (window, ends) == (Window(0.5, 1.0), None)
    assert np.array_equal(pixels, np.rint(image.pixels * 65535))


def test_of_own_classes_only_the_likeliest_agrees() -> None:
    said = {label: agrees("finding", label, "tuberculosis") for label in ("tuberculosis", "pneumonia", "normal", "unsure")}
    assert said == {"tuberculosis": True, "pneumonia": False, "normal": False, "unsure": None}
    assert agrees("normal", "tuberculosis") is False
    assert agrees("normal", "normal") is True


def test_readers_choose_among_the_models_classes(tmp_path: Path) -> None:
    assert reader_labels(("normal", "pneumonia", "tuberculosis")) == ["normal", "pneumonia", "tuberculosis", "unsure"]
    assert reader_labels(("normal", "pneumonia")) == ["normal", "pneumonia", "bacterial", "viral", "unsure"]
    own = load_bundle(make_bundle(tmp_path / "own", classes=("normal", "tuberculosis")), None)
    stage = Stage(tmp_path, FileJudge(Predictor(own, threads=1)))
    stage.room.model = model_info(own)
    with stage.signed_in() as client:
        case = upload(client, phantom_dicom(1))[0]["case"]
        found = client.get(f"/api/cases/{case}").json()
        assert found["verdict"] in ("finding", "normal")
        assert (found["positive"], found["likeliest"]) == ("finding", "tuberculosis" if found["verdict"] == "finding" else None)
        for label, status in (("viral", 422), ("banana", 422), ("Tuberculosis", 422), ("tuberculosis", 201)):
            assert client.post(f"/api/cases/{case}/findings", json={"label": label}).status_code == status
        listed = client.post("/api/worklist", json={"finding": ["tuberculosis"]}).json()
        assert [line["id"] for line in listed["cases"]] == [case]
