"""From the reading room into the site's manifest: uploaded, corrected by readers, taken over, and kept when the room forgets."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pneumofed.cli.site import readers_export
from pneumofed.client.data.readings import read_export
from pneumofed.common.audit.log import read_entries
from pneumofed.common.errors import SkipReason
from pneumofed.common.imaging.images import read_image
from pneumofed.inference.reading_room.labels import write_labels
from pneumofed.inference.reading_room.room import delete_old_cases
from tests.client.site_folder import make_site, manifest_of, run_data
from tests.dicom_factory import PATIENT_ID
from tests.inference.reading_room.conftest import _cheap_passwords, _quick_focus  # noqa: F401 - fixtures
from tests.inference.reading_room.stage import ADMIN, READER, Stage, files_below, phantom_dicom, phantom_png, upload

SAID = {ADMIN: ("bacterial", "normal", "viral", "pneumonia", "unsure"), READER: ("bacterial", "normal", "normal", None, None)}
"""Of five images: agreed, agreed, disputed, one reader alone (a picture without a patient), unsure."""


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path, site=str(make_site(tmp_path / "site")))
    yield made
    made.room.close()


def read_cases(stage: Stage) -> list[str]:
    """Uploads five phantoms, of which two readers say `SAID`; ids of the cases."""
    with stage.signed_in() as client:
        dicoms = [
            phantom_dicom(n, PatientID=f"{PATIENT_ID}{n}", SOPInstanceUID=f"1.2.3.{n}", ViewPosition="PA") for n in (0, 1, 2)
        ]
        last = phantom_dicom(4, PatientID="another", SOPInstanceUID="1.2.3.9", ViewPosition="PA")
        cases = [str(file["case"]) for file in upload(client, *dicoms, phantom_png(3), last)]
        client.post(f"/api/cases/{cases[0]}/findings", json={"label": "normal"})  # corrected by himself below
    for user, labels in SAID.items():
        with stage.signed_in(user) as client:
            for case, label in zip(cases, labels, strict=True):
                if label:
                    assert client.post(f"/api/cases/{case}/findings", json={"label": label}).status_code == 201
    return cases


def test_what_the_room_exports_is_what_feedback_reads(stage: Stage, tmp_path: Path) -> None:
    cases = read_cases(stage)
    assert write_labels(stage.room.folder, stage.room.cases, tmp_path / "labels.csv") == 8
    rows = read_export(tmp_path / "labels.csv")
    told = {(row.reading.case, row.reading.reader): row.reading.label for row in rows}
    assert told == {
        (case, user): label for user, labels in SAID.items() for case, label in zip(cases, labels, strict=True) if label
    }
    assert all(row.reading.time and row.path.is_file() for row in rows)
    assert [bool(row.patient) for row in rows if row.reading.case == cases[3]] == [False]
    assert PATIENT_ID not in (tmp_path / "labels.csv").read_text()


def test_readers_labels_reach_the_manifest_and_stay_when_the_room_forgets(stage: Stage, tmp_path: Path) -> None:
    read_cases(stage)
    site = tmp_path / "site"
    code, told = run_data(site, "feedback", str(stage.room.folder.path))
    assert code == 0
    assert (told["found"], told["added"]) == (5, 2)
    assert told["skipped"] == {
        SkipReason.DISAGREED.value: 1,
        SkipReason.NO_PATIENT.value: 1,
        SkipReason.UNCERTAIN_LABEL.value: 1,
    }
    assert manifest_of(site).labels == ("bacterial", "normal")
    delete_old_cases(stage.room.cases, stage.room.store, 1, lambda _: None, datetime.now(UTC) + timedelta(days=2))
    assert not files_below(stage.room.folder.store)
    assert [read_image(record.path).info.format for record in manifest_of(site).records] == ["dicom", "dicom"]
    assert run_data(site, "feedback", str(stage.room.folder.path))[1]["total"] == 2


def test_the_export_file_and_the_folder_say_the_same(stage: Stage, tmp_path: Path) -> None:
    read_cases(stage)
    write_labels(stage.room.folder, stage.room.cases, tmp_path / "labels.csv")
    rows = read_export(tmp_path / "labels.csv")
    with readers_export(stage.room.folder.path) as table:
        assert rows == read_export(table)
    assert not files_below(stage.room.folder.quarantine)
    assert read_entries(stage.room.folder.audit)[-1].event == "labels-exported"


def test_both_audit_logs_keep_it_without_a_patient(stage: Stage, tmp_path: Path) -> None:
    read_cases(stage)
    run_data(tmp_path / "site", "feedback", str(stage.room.folder.path))
    log = tmp_path / "site" / "work" / "audit.jsonl"
    [entry] = read_entries(log)
    assert (entry.event, entry.facts["added"], entry.facts["total"]) == ("labels-taken", 2, 2)
    assert PATIENT_ID not in log.read_text()
