"""Clinical values in the room: taken from files, tables, readers and programs, checked, kept with the case, and never said elsewhere."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from httpx import Response

from pneumofed.common.audit.log import read_entries
from pneumofed.common.config.experiment import ClinicalConfig
from pneumofed.common.errors import BundleError
from pneumofed.common.imaging.images import read_image
from pneumofed.common.model_bundle.bundle import Bundle, load_bundle
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.inference.explain.clinical import explain_jointly
from pneumofed.inference.predict.clinical_table import values_of
from pneumofed.inference.reading_room.app import create_room_app
from pneumofed.inference.reading_room.cases import ClinicalRow, open_room_database
from pneumofed.inference.reading_room.clinical import ClinicalValueError, named_values, read_given, rebuild_values
from pneumofed.inference.reading_room.file_judge import FileJudge, SeriesLimits, load_clinical_network
from pneumofed.inference.reading_room.room import Room
from pneumofed.inference.reading_room.serve import model_info
from pneumofed.inference.reading_room.worker import Workers, load_same_model
from tests.inference.reading_room.stage import Stage, phantom_dicom, phantom_png, problem, sign_in, upload
from tests.model_bundles import make_bundle
from tests.tiny import folder_of_process

SCHEMA = ClinicalConfig.model_validate(
    {
        "columns": [
            {"name": "temperature", "unit": "°C", "low": 34, "high": 43},
            {"name": "age", "unit": "years", "low": 0, "high": 120},
            {"name": "smoker", "kind": "binary"},
            {"name": "symptoms", "kind": "codes", "codes": ["cough", "fever"]},
        ]
    }
)
SECRET = 38.6
GIVEN = {"temperature": SECRET, "smoker": True, "symptoms": ["fever"]}


@lru_cache
def clinical_bundle() -> Bundle:
    return load_bundle(make_bundle(folder_of_process() / "bundle", clinical=SCHEMA), None)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path, model=clinical_bundle())
    yield made
    made.room.close()


def judged(file: bytes, values: dict[str, Any], folder: Path) -> Any:
    (folder / "again").write_bytes(file)
    predictor = Predictor(clinical_bundle(), threads=1)
    return predictor.judge([read_image(folder / "again")], None, [values_of(values, SCHEMA)])[0].prediction


def new_case(client: TestClient, file: bytes, given: dict[str, Any] | None = None) -> dict[str, Any]:
    data = {} if given is None else {"clinical": json.dumps(given)}
    [done] = client.post("/api/cases", files=[("files", ("image", file))], data=data).json()["files"]
    assert done["outcome"] == "new", done
    found: dict[str, Any] = client.get(f"/api/cases/{done['case']}").json()
    return found


def give(client: TestClient, case: str, values: dict[str, Any]) -> Response:
    return client.post(f"/api/cases/{case}/clinical", json={"values": values})


def as_dict(case: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    return {one["name"]: (one["value"], one["source"]) for one in case["clinical"]["values"]}


def test_the_graph_of_the_test_bundle_is_its_network() -> None:
    network, predictor = clinical_bundle().load_network(), Predictor(clinical_bundle(), threads=1)
    squares = np.random.default_rng(0).random((3, 1, 32, 32), np.float32)
    values = np.stack([values_of(GIVEN, SCHEMA), values_of({}, SCHEMA), values_of({"temperature": 36.0}, SCHEMA)])
    from pneumofed.common.imaging.augment import normalize

    with torch.no_grad():
        expected = network(normalize(torch.from_numpy(squares), 1), torch.from_numpy(values)).numpy()
    assert predictor.run(squares, values)["logits"] == pytest.approx(expected, abs=1e-4)


def test_values_that_come_with_an_image_that_is_here_already_are_the_cases_and_wrong_ones_are_refused(room: Stage) -> None:
    def again(values: dict[str, Any]) -> dict[str, Any]:
        data = {"clinical": json.dumps(values)}
        [done] = client.post("/api/cases", files=[("files", ("image", phantom_png()))], data=data).json()["files"]
        return dict(done)

    with room.signed_in() as client:
        case = new_case(client, phantom_png())["id"]
        assert again({"temperature": 4100})["outcome"] == "refused"
        assert again({"temperature": 41.0})["outcome"] == "known"
        assert as_dict(client.get(f"/api/cases/{case}").json())["temperature"] == (41.0, "given")
        assert again({"temperature": 36.0})["outcome"] == "known"
        assert as_dict(client.get(f"/api/cases/{case}").json())["temperature"] == (41.0, "given"), (
            "what a reader may have seen stays"
        )


def test_a_case_has_the_threshold_at_which_it_was_judged_last(room: Stage) -> None:
    with room.signed_in() as client:
        case = new_case(client, phantom_png())["id"]
        first = client.get(f"/api/cases/{case}").json()["threshold"]
    point = clinical_bundle().manifest.threshold.model_copy(update={"value": 0.9999, "site": "North"})
    own = clinical_bundle().deciding_at(point)
    workers = Workers([FileJudge(Predictor(own, threads=1), load_clinical_network(own))])
    later = Room(room.room.folder, open_room_database(room.room.folder.database), model_info(own), workers, None)
    with TestClient(create_room_app(later, ["testserver"])) as client:
        sign_in(client)
        for values, threshold in ((None, first), ({"temperature": 35.0}, 0.9999)):
            found = give(client, case, values).json() if values else client.get(f"/api/cases/{case}").json()
            [line] = client.post("/api/worklist", json={}).json()["cases"]
            assert line["threshold"] == found["threshold"] == threshold
            assert (found["verdict"] != "normal") == (found["probability"] >= threshold)
    later.close()


def test_a_worker_that_is_replaced_judges_with_the_bundle_of_the_room_or_not_at_all(tmp_path: Path) -> None:
    made, other = make_bundle(tmp_path / "bundle"), make_bundle(tmp_path / "other", name="other")
    opened = load_bundle(made, None)
    asked = (opened.digest, made, None, "float32", SeriesLimits(), opened.manifest.threshold)
    assert load_same_model(*asked).predictor.bundle.digest == opened.digest
    shutil.rmtree(made)
    shutil.copytree(other, made)
    with pytest.raises(BundleError, match="another bundle than this room was opened with"):
        load_same_model(*asked)


def test_a_reader_gives_values_and_the_case_is_judged_with_them(room: Stage, tmp_path: Path) -> None:
    with room.signed_in() as client:
        before = new_case(client, phantom_png())
        after = give(client, before["id"], GIVEN)
        shown = client.get(f"/api/cases/{before['id']}").json()
    assert before["clinical"] is None
    assert after.status_code == 201
    expected = judged(phantom_png(), GIVEN, tmp_path)
    assert after.json() == shown
    assert (shown["probability"], shown["low"], shown["high"]) == (expected.probability, expected.low, expected.high)
    assert shown["clinical"]["image_only"] == expected.image_only == before["probability"]
    assert shown["probability"] > before["probability"]
    assert as_dict(shown) == {"temperature": (38.6, "given"), "smoker": (True, "given"), "symptoms": (["fever"], "given")}
    assert shown["clinical"]["given_by"] == "reader"


def test_values_that_are_taken_back_leave_the_answer_of_the_image(room: Stage) -> None:
    with room.signed_in() as client:
        before = new_case(client, phantom_png())
        give(client, before["id"], GIVEN)
        after = give(client, before["id"], {"temperature": None}).json()
    assert after["probability"] == before["probability"]
    assert (after["clinical"]["values"], after["clinical"]["image_only"]) == ([], None)
    with room.room.values._session() as session:  # what was said before is kept
        assert [len(row.known) for row in session.query(ClinicalRow).order_by(ClinicalRow.id)] == [3, 0]


def test_a_dicom_header_and_a_table_give_values_and_the_table_wins(room: Stage, tmp_path: Path) -> None:
    file, other = phantom_dicom(PatientAge="063Y"), phantom_dicom(1, PatientAge="063Y")
    with room.signed_in() as client:
        stated = new_case(client, file)
        both = new_case(client, other, {"age": "41", "temperature [°F]": "101.3"})
        kept = give(client, both["id"], {"age": 41, "temperature": 39.0}).json()
    assert as_dict(stated) == {"age": (63.0, "file")}
    assert stated["probability"] == judged(file, {"age": 63}, tmp_path).probability
    assert as_dict(both) == {"age": (41.0, "table"), "temperature": (38.5, "table")}
    assert as_dict(kept) == {"age": (41.0, "table"), "temperature": (39.0, "given")}, "a value that stays keeps its source"


def test_a_model_of_the_image_only_takes_no_values(stage: Stage) -> None:
    with stage.signed_in() as client:
        case = new_case(client, phantom_dicom(PatientAge="063Y"))
        assert case["clinical"] is None
        assert problem(give(client, case["id"], {"age": 63})) == (422, "value_column")
        assert problem(client.get(f"/api/cases/{case['id']}/evidence")) == (404, "no_evidence")
        assert client.get("/api/room").json()["model"]["clinical"] == []


@pytest.mark.parametrize(
    ("name", "value", "word", "said"),
    [
        ("temperature", 101.3, "value_range", "lies outside 34 to 43 °C; is it Fahrenheit?"),
        ("temperature", "high", "value_number", "is a number, and the cell holds text"),
        ("temperature [furlong]", 38.0, "value_unit", "no conversion is known"),
        ("smoker", "sometimes", "value_yes_no", "is yes or no"),
        ("symptoms", ["sneezing"], "value_code", "it takes cough, fever"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_the_sentence_of_predict(
    room: Stage, name: str, value: Any, word: str, said: str
) -> None:
    with room.signed_in() as client:
        case = new_case(client, phantom_png())
        answer = give(client, case["id"], {name: value})
        assert client.get(f"/api/cases/{case['id']}").json() == case
        bad = client.post(
            "/api/cases", files=[("files", ("image", phantom_png(1)))], data={"clinical": json.dumps({name: value})}
        ).json()["files"]
        [same] = bad
    assert problem(answer) == (422, word)
    assert answer.json()["column"] == name.split(" ")[0] == same["column"]
    assert said in answer.json()["detail"]
    assert answer.json()["detail"] == same["detail"]
    assert str(value) not in answer.json()["detail"]
    assert (same["outcome"], same["error"]) == ("refused", word)
    assert not list(room.room.folder.quarantine.iterdir())


def test_a_name_that_is_no_column_is_refused_and_not_repeated(room: Stage) -> None:
    with room.signed_in() as client:
        case = new_case(client, phantom_png())
        answer = give(client, case["id"], {"doe_jane": 1})
    assert problem(answer) == (422, "value_column")
    assert answer.json()["detail"].endswith("it takes temperature, age, smoker, symptoms")
    assert "doe" not in answer.text


def test_what_the_answer_rests_on_is_what_explain_computes_and_is_kept(
    room: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with room.signed_in() as client:
        case = new_case(client, phantom_png())
        assert problem(client.get(f"/api/cases/{case['id']}/evidence")) == (404, "no_evidence")
        give(client, case["id"], GIVEN)
        found = client.get(f"/api/cases/{case['id']}/evidence").json()
        monkeypatch.setattr(room.room.workers, "run", None)
        assert client.get(f"/api/cases/{case['id']}/evidence").json() == found
    network = load_clinical_network(clinical_bundle())
    assert network is not None
    (tmp_path / "again").write_bytes(phantom_png())
    square = torch.from_numpy(Predictor(clinical_bundle()).prepare(read_image(tmp_path / "again")))[None, None]
    expected = explain_jointly(network, square, values_of(GIVEN, SCHEMA), SCHEMA)
    assert found["values"] == pytest.approx(dict(expected.values), abs=1e-5)
    assert found["image"] == pytest.approx(expected.image, abs=1e-5)
    assert found["image"] + sum(found["values"].values()) + found["error"] == pytest.approx(found["score"] - found["empty"])


def test_a_case_of_another_model_keeps_its_answer(room: Stage) -> None:
    with room.signed_in() as client:
        case = new_case(client, phantom_png())
        room.room.model = room.room.model.model_copy(update={"digest": "0" * 64})
        assert problem(give(client, case["id"], GIVEN)) == (409, "other_model")
        assert client.get(f"/api/cases/{case['id']}").json() == case


def test_a_program_gives_values_in_a_form_and_nothing_is_kept(room: Stage, tmp_path: Path) -> None:
    token = {"Authorization": f"Bearer {room.room.users.add_token('ris')}"}
    form: dict[str, Any] = {
        "files": {"files": ("image", phantom_dicom(PatientAge="063Y"))},
        "data": {"clinical": json.dumps(GIVEN)},
    }
    with room.visitor() as client:
        predicted = client.post("/api/predict", headers=token, **form).json()
        explained = client.post("/api/explain", headers=token, **form).json()
        plain = client.post("/api/predict", headers=token, content=phantom_png()).json()
        refused = client.post("/api/predict", headers=token, files=form["files"], data={"clinical": '{"temperature": 99}'})
        twice = client.post("/api/predict", headers=token, files=[("files", ("a", phantom_png()))] * 2)
    expected = judged(phantom_dicom(PatientAge="063Y"), {**GIVEN, "age": 63}, tmp_path)
    assert (predicted["probability"], predicted["clinical"]["image_only"]) == (expected.probability, expected.image_only)
    assert {one["name"]: one["source"] for one in predicted["clinical"]["values"]}["age"] == "file"
    assert explained["judgement"] == predicted
    assert set(explained["evidence"]["values"]) == {"temperature", "age", "smoker", "symptoms"}
    assert plain["clinical"] is None
    assert problem(refused) == (422, "value_range")
    assert problem(twice) == (413, "too_many_files")
    assert room.room.cases.ids() == set()


def test_values_are_in_no_log_and_the_audit_says_that_they_were_given(room: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with room.signed_in() as client:
        case = new_case(client, phantom_png(), {"temperature": SECRET})
        give(client, case["id"], {"temperature": SECRET, "age": 77.125})
        give(client, case["id"], {"temperature": 1e9})
    entries = [entry for entry in read_entries(room.room.folder.audit) if entry.event == "clinical-given"]
    assert [(entry.actor, entry.facts["case"], entry.facts["known"]) for entry in entries] == [
        ("reader", case["id"], 1),
        ("reader", case["id"], 2),
    ]
    assert set(entries[0].facts) == {"case", "known", "model", "verdict"}
    said = room.room.folder.audit.read_text() + caplog.text
    assert str(SECRET) not in said and "77.125" not in said


def test_a_form_with_more_or_fewer_values_than_files_is_refused(room: Stage) -> None:
    files = [("files", ("image", phantom_png(number))) for number in range(2)]
    with room.signed_in() as client:
        for values in ("{}", "[]", "{", '{"age": {}}'):
            assert problem(client.post("/api/cases", files=files, data={"clinical": values})) == (422, "invalid_request")
        assert upload(client, phantom_png())[0]["outcome"] == "new"


def test_values_by_name_are_read_back_as_they_were() -> None:
    forms: list[Mapping[str, Any]] = [{}, GIVEN, {"symptoms": ";", "smoker": "no"}, {"age": "063Y", "temperature": "38,6"}]
    for given in forms:
        values = read_given(given, SCHEMA)
        known = [{"name": name, "value": value, "source": "given"} for name, value in named_values(values, SCHEMA).items()]
        assert rebuild_values(known, SCHEMA) == pytest.approx(values, nan_ok=True)
    assert named_values(read_given({"symptoms": ";"}, SCHEMA), SCHEMA) == {"symptoms": []}
    with pytest.raises(ClinicalValueError, match="keep one"):
        read_given({"temperature": 38, "temperature [°F]": 101}, SCHEMA)
