"""A patient has one name at a site: a manifest with the hospital's own numbers takes up pseudonyms where images come under these."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pneumofed.client.data.feedback import add_feedback
from pneumofed.client.federation.site_data import SPLIT_FILE, SiteData, load_site
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.config.experiment import ExperimentConfig, ImageConfig, TrainingConfig
from pneumofed.common.imaging.dicom_header import load_pseudonyms
from tests.client.site_folder import make_site, manifest_of, run_data
from tests.common.data.conftest import write_image, write_table
from tests.dicom_factory import draw_radiograph, write_dicom

PATIENTS = range(12)
EXPERIMENT = ExperimentConfig(image=ImageConfig(size_px=32), training=TrainingConfig(validation_fraction=0.3))


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    """A manifest written by hand: patients 4700 to 4711, by the hospital's own numbers, with two images each."""
    folder = make_site(tmp_path / "site")
    (folder / "data").mkdir()
    rows = [f"{write_image(tmp_path / f'{n}-{k}.png', 2 * n + k)},{4700 + n},{label_of(n)}" for n in PATIENTS for k in range(2)]
    write_table(folder / "data" / "manifest.csv", "path,patient,label", *rows)
    return SiteFolder.open(folder)


def label_of(number: int) -> str:
    return ("normal", "pneumonia")[number % 2]


def add_table(site: SiteFolder, folder: Path) -> None:
    rows = [f"{write_image(folder / f'more-{n}.png', 100 + n)},{4700 + n},{label_of(n)}" for n in PATIENTS]
    assert (
        run_data(site.path, "add", "table", str(write_table(folder / "more.csv", "path,patient,label", *rows)))[1]["added"] == 12
    )


def add_dicom(site: SiteFolder, folder: Path) -> None:
    (folder / "dicom").mkdir()
    for n in PATIENTS:
        image = draw_radiograph()
        image[n] = 0
        write_dicom(folder / "dicom" / f"{n}.dcm", image, BitsStored=12, PatientID=str(4700 + n), ViewPosition="PA")
    labels = write_table(folder / "labels.csv", "filename,label", *(f"{n}.dcm,{label_of(n)}" for n in PATIENTS))
    assert run_data(site.path, "add", "dicom", str(folder / "dicom"), "--labels", str(labels))[1]["added"] == 12


def add_readings(site: SiteFolder, folder: Path) -> None:
    rows = [f"{write_image(folder / f'read-{n}.png', 200 + n)},{4700 + n},{label_of(n)},PA" for n in PATIENTS]
    assert add_feedback(site, write_table(folder / "export.csv", "path,patient,label,view", *rows)).added == 12


def correct_one_row_each(site: SiteFolder, folder: Path) -> None:
    rows = [f"{folder / f'{n}-0.png'},{4700 + n},{label_of(n + 1)}" for n in PATIENTS]
    report = run_data(site.path, "add", "table", str(write_table(folder / "right.csv", "path,patient,label", *rows)))[1]
    assert (report["added"], report["updated"]) == (0, 12)


def sides_of(data: SiteData, names: dict[str, str]) -> tuple[set[str], set[str]]:
    """Pseudonyms in training and in validation, whatever the manifest says."""
    train, validation = ({names.get(patient, patient) for patient in side.patients} for side in (data.train, data.validation))
    return train, validation


@pytest.mark.parametrize("add", [add_table, add_dicom, add_readings, correct_one_row_each])
@pytest.mark.parametrize("drawn", [True, False])
def test_a_patient_with_a_number_and_a_pseudonym_has_one_name_and_keeps_his_side(
    site: SiteFolder, tmp_path: Path, add: Callable[[SiteFolder, Path], None], drawn: bool
) -> None:
    pseudonyms = load_pseudonyms(site.data)
    names = {str(4700 + n): pseudonyms.patient(str(4700 + n)) for n in PATIENTS}
    before = sides_of(load_site(site.config, EXPERIMENT), names) if drawn else None
    add(site, tmp_path)
    assert set(manifest_of(site.path).patients) == set(names.values())
    train, validation = sides_of(load_site(site.config, EXPERIMENT), names)
    assert validation and not train & validation
    assert before in (None, (train, validation))
    assert "47" not in {patient[:2] for sides in json.loads((site.work / SPLIT_FILE).read_text()).values() for patient in sides}


def test_readings_follow_their_patient(site: SiteFolder, tmp_path: Path) -> None:
    read = f"{tmp_path / '3-0.png'},somebody else,normal,PA"
    add_feedback(site, write_table(tmp_path / "export.csv", "path,patient,label,view", read))
    add_table(site, tmp_path)
    kept = json.loads((site.data / "readings.json").read_text())
    assert [image["patient"] for image in kept.values()] == [load_pseudonyms(site.data).patient("4703")]
    assert manifest_of(site.path).records[6].label == "normal"


def test_who_was_on_both_sides_under_two_names_is_judged_on_no_more(site: SiteFolder, tmp_path: Path) -> None:
    """As a manifest has it that a version wrote which did not unite the names."""
    pseudonym = load_pseudonyms(site.data).patient
    site.work.mkdir()
    drawn = {
        "4700": True,
        pseudonym("4700"): False,
        "4701": False,
        pseudonym("4701"): True,
        "4702": True,
        pseudonym("4702"): True,
    }
    (site.work / SPLIT_FILE).write_text(json.dumps({"1 0.3": drawn}))
    add_table(site, tmp_path)
    found = {pseudonym("4700"): False, pseudonym("4701"): False, pseudonym("4702"): True}
    assert json.loads((site.work / SPLIT_FILE).read_text()) == {"1 0.3": found}


def test_a_work_folder_beside_the_manifest_is_no_obstacle(site: SiteFolder, tmp_path: Path) -> None:
    site.site_file.write_text("name: north\nmanifest: data/manifest.csv\nwork_dir: data\n")
    again = SiteFolder.open(site.path)
    load_site(again.config, EXPERIMENT)
    add_table(again, tmp_path)
    assert not {"4700", "4711"} & set(manifest_of(site.path).patients)


def test_patients_who_come_under_no_pseudonym_keep_their_names(site: SiteFolder, tmp_path: Path) -> None:
    table = write_table(tmp_path / "other.csv", "path,patient,label", f"{write_image(tmp_path / 'o.png', 300)},4799,normal")
    run_data(site.path, "add", "table", str(table))
    assert {str(4700 + n) for n in PATIENTS} < set(manifest_of(site.path).patients)
