"""`pneumofed site data add`: nothing twice, new labels, several sources, several processes at once."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pneumofed.client.cli.data import app
from pneumofed.client.data.manifest_update import merge_images
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.data.manifest import DataReport, ImageRecord, Manifest
from pneumofed.common.errors import ConfigError, SkipReason
from tests.client.site_folder import make_site, manifest_of, run_data
from tests.common.data.conftest import write_image, write_table
from tests.dicom_factory import draw_radiograph, write_dicom


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return make_site(tmp_path / "site")


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    for number in range(4):
        write_image(tmp_path / "kaggle" / "train" / "NORMAL" / f"IM-{number:04d}-0001.jpeg", number)
        write_image(tmp_path / "kaggle" / "train" / "PNEUMONIA" / f"person{number}_virus_1.jpeg", 10 + number)
    return tmp_path / "kaggle"


def _dicoms(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        tags = {"AccessionNumber": f"ACC-{number}", "PatientID": f"MRN-{number // 2}", "SOPInstanceUID": f"1.2.{number}"}
        write_dicom(folder / f"{number}.dcm", draw_radiograph(), BitsStored=12, StudyInstanceUID="1.2", **tags)
    (folder / "letter.txt").write_text("no image")
    return folder


def test_the_same_images_are_never_added_twice(site: Path, kaggle: Path) -> None:
    first = run_data(site, "add", "kaggle", str(kaggle))
    assert first[0] == 0
    assert (first[1]["added"], first[1]["total"], first[1]["classes"]) == (8, 8, {"normal": 4, "viral": 4})
    rows = (site / "data" / "manifest.csv").read_bytes()
    (kaggle.parent / "link").symlink_to(kaggle)
    for folder in (kaggle, kaggle.parent / "link"):
        again = run_data(site, "add", "kaggle", str(folder))[1]
        assert (again["added"], again["unchanged"], again["total"]) == (0, 8, 8)
    shutil.rmtree(site / "work", ignore_errors=True)
    run_data(site, "add", "kaggle", str(kaggle))
    assert (site / "data" / "manifest.csv").read_bytes() == rows
    assert (site / "data" / "manifest.csv").stat().st_mode & 0o777 == 0o600


def test_a_new_label_takes_the_place_of_the_old(site: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    for number in range(2):
        write_image(tmp_path / f"{number}.png", number)
    write_table(table, "path,patient,label", "0.png,a,normal", "1.png,b,normal")
    run_data(site, "add", "table", str(table))
    write_table(table, "path,patient,label", "0.png,a,viral", "1.png,b,normal")
    report = run_data(site, "add", "table", str(table))[1]
    assert (report["added"], report["updated"], report["unchanged"]) == (0, 1, 1)
    assert manifest_of(site).labels == ("viral", "normal")


def test_sources_share_one_manifest_and_one_name_for_each_patient(site: Path, kaggle: Path, tmp_path: Path) -> None:
    folder = _dicoms(tmp_path / "dicom")
    labels = write_table(tmp_path / "labels.csv", "AccessionNumber,label", "ACC-0,normal", "ACC-1,viral")
    table = write_table(tmp_path / "t.csv", "file,subject,diagnosis", f"{write_image(tmp_path / 'x.png', 1)},MRN-0,lobar")
    run_data(site, "add", "kaggle", str(kaggle))
    report = run_data(site, "add", "dicom", str(folder), "--labels", str(labels))[1]
    assert (report["found"], report["used"], report["total"]) == (4, 2, 10)
    assert report["skipped"] == {SkipReason.NO_LABEL.value: 1, SkipReason.UNKNOWN_FORMAT.value: 1}
    assert run_data(site, "add", "table", str(table), "--label", "lobar=bacterial")[1]["total"] == 11
    patients = manifest_of(site).patients
    assert len(set(patients[8:])) == 1  # the folder's MRN-0 twice, the table's once
    assert "MRN" not in (site / "data" / "manifest.csv").read_text()
    assert (
        run_data(site, "check")[1]["used"] == 10
    )  # two of the DICOM files have the same pixels but not the same bytes; one PNG is a copy


def test_processes_that_add_at_the_same_time_lose_nothing(site: Path, tmp_path: Path) -> None:
    opened = SiteFolder.open(site)

    def add(number: int) -> None:
        merge_images(opened, Manifest((ImageRecord(tmp_path / f"{number}.png", "p", "normal"),)), DataReport())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(12)))
    assert len(manifest_of(site)) == 12


def test_nothing_usable_has_its_own_exit_code(site: Path, tmp_path: Path) -> None:
    labels = write_table(tmp_path / "labels.csv", "AccessionNumber,label", "ACC-77,normal")
    code, report = run_data(site, "add", "dicom", str(_dicoms(tmp_path / "dicom")), "--labels", str(labels))
    assert (code, report["used"], report["skipped"][SkipReason.NO_LABEL.value]) == (1, 0, 3)
    assert run_data(site, "check")[0] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["add", "kaggle", "nowhere"],
        ["add", "table", "nowhere.csv"],
        ["add", "table", "t.csv", "--column", "path"],
        ["add", "dicom", "nowhere", "--labels", "t.csv"],
        ["add", "dicomweb", "ftp://pacs", "--labels", "t.csv"],
        ["add", "dimse", "pacs", "--called-ae-title", "X", "--labels", "t.csv"],
        ["add", "dicomweb", "https://pacs", "--labels", "t.csv", "--ca", "nowhere.pem"],
        ["check"],
    ],
)
def test_wrong_commands_and_configurations_have_their_own_exit_code(site: Path, arguments: list[str]) -> None:
    code, report = run_data(site, *arguments)
    assert code == 2
    assert report["message"]


def test_a_folder_that_is_no_site_is_refused(tmp_path: Path, kaggle: Path) -> None:
    assert run_data(tmp_path, "add", "kaggle", str(kaggle))[0] == 2
    with pytest.raises(ConfigError, match="pneumofed site init"):
        SiteFolder.open(tmp_path)


def test_a_damaged_manifest_is_left_as_it_is(site: Path, kaggle: Path) -> None:
    (site / "data").mkdir()
    (site / "data" / "manifest.csv").write_text("something,else\n1,2\n")
    assert run_data(site, "add", "kaggle", str(kaggle))[0] == 2
    assert (site / "data" / "manifest.csv").read_text() == "something,else\n1,2\n"


def test_check_counts_what_training_cannot_use(site: Path, kaggle: Path) -> None:
    (kaggle / "train" / "NORMAL" / "IM-0000-0001.jpeg").write_bytes(b"\xff\xd8\xff broken")
    (kaggle / "train" / "NORMAL" / "IM-0001-0001.jpeg").write_bytes(b"")
    (kaggle / "train" / "NORMAL" / "unnamed.jpeg").write_bytes((kaggle / "train" / "NORMAL" / "IM-0002-0001.jpeg").read_bytes())
    run_data(site, "add", "kaggle", str(kaggle))
    code, report = run_data(site, "check")
    assert (code, report["found"], report["used"], report["classes"]) == (0, 9, 6, {"normal": 2, "pneumonia": 4})
    assert report["skipped"] == {reason.value: 1 for reason in (SkipReason.CORRUPT, SkipReason.EMPTY, SkipReason.DUPLICATE)}
    assert report["warnings"]


def test_the_report_in_words_names_every_count_and_no_file(site: Path, kaggle: Path) -> None:
    (kaggle / "train" / "NORMAL" / "IM-0000-0001.jpeg").write_bytes(b"\xff\xd8\xff broken")
    added = CliRunner().invoke(app, ["add", "kaggle", str(kaggle), "--site", str(site)])
    checked = CliRunner().invoke(app, ["check", "--site", str(site)])
    assert "8 images found, 8 used" in added.stdout
    assert "8 added, 0 updated, 0 unchanged; 8 images in all" in added.stdout
    assert f"skipped: {SkipReason.CORRUPT.value}: 1" in checked.stdout
    assert "IM-0" not in added.stdout + checked.stdout


def test_a_sites_own_words_are_mapped_and_an_unknown_one_is_named_at_the_site_only(site: Path, tmp_path: Path) -> None:
    words = ("TB", "tb", "normal", *("Koch",) * 5, "DOE^JANE")
    for number in range(len(words)):
        write_image(tmp_path / f"{number}.png", number)
    table = write_table(tmp_path / "t.csv", "path,patient,label", *(f"{k}.png,{k},{word}" for k, word in enumerate(words)))
    (site / "site.yaml").write_text((site / "site.yaml").read_text() + "label_words:\n  TB: tuberculosis\n")
    answer = CliRunner().invoke(app, ["add", "table", str(table), "--site", str(site)])
    assert answer.exit_code == 0
    assert "6 rows with a label that no word is known for left out: 'Koch' (5), 1 other word" in " ".join(answer.stderr.split())
    assert "--label 'Koch=LABEL'" in " ".join(answer.stderr.split()) and "JANE" not in answer.output
    listed = (site / "data" / "unknown_labels.csv").read_text()
    assert listed.splitlines() == ["row,word", *(f"{row},Koch" for row in range(5, 10)), "10,"]
    code, report = run_data(site, "add", "table", str(table), "--label", "koch=tuberculosis", "--label", "doe^jane=normal")
    assert (code, report["classes"], report["skipped"]) == (0, {"normal": 2, "tuberculosis": 7}, {})
    assert not (site / "data" / "unknown_labels.csv").exists()
    assert set(manifest_of(site).labels) == {"normal", "tuberculosis"}
    checked = run_data(site, "check", "--task", "normal,pneumonia,tuberculosis", "--size", "32")[1]
    assert checked["classes"] == {"normal": 2, "pneumonia": 0, "tuberculosis": 7}
    assert run_data(site, "check", "--task", "normal,Tb")[0] == 2
