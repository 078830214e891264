"""The reading room's labels in a site's manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pneumofed.client.privacy.entries import DataUnits
from pneumofed.client.privacy.ledger import Ledger
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.data.cache import load_digests
from pneumofed.common.data.manifest import ImageRecord, Manifest, write_manifest
from pneumofed.common.errors import SkipReason
from tests.client.site_folder import make_site, manifest_of, run_data
from tests.common.data.conftest import write_image, write_table
from tests.dicom_factory import PATIENT_ID, draw_radiograph, write_dicom
from tests.volume_bundles import patients, write_series

HEADER = "path,patient,label,view,sex,age,manufacturer,reader,time,case"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Three patients of the hospital with one image each: 0 normal, 1 viral, 2 normal."""
    site = make_site(tmp_path / "site")
    rows = [f"{write_image(tmp_path / f'{n}.png', n)},MRN-{n},{('normal', 'viral')[n % 2]}" for n in range(3)]
    write_table(tmp_path / "t.csv", "path,patient,label", *rows)
    assert run_data(site, "add", "table", str(tmp_path / "t.csv"))[1]["total"] == 3
    return site


def reading(path: Path, label: str, reader: str = "ann", time: str = "2026-03-01T10:00:00+00:00", patient: str = "MRN-7") -> str:
    return f"{path},{patient},{label},PA,F,63,,{reader},{time},c1"


def feed(site: Path, *rows: str) -> dict[str, Any]:
    code, told = run_data(site, "feedback", str(write_table(site.parent / "export.csv", HEADER, *rows)))
    assert code == 0
    return told


def labels_of(site: Path) -> list[str]:
    return list(manifest_of(site).labels)


def digests_of(manifest: Manifest, cache: Path) -> list[str]:
    return [str(digest) for digest in load_digests([record.path for record in manifest.records], cache, workers=1)]


def seen_again(tmp_path: Path, number: int) -> Path:
    """The same bytes as image `number` of the manifest, under another name in the reading room."""
    (tmp_path / "room").mkdir(exist_ok=True)
    return Path(shutil.copy(tmp_path / f"{number}.png", tmp_path / "room" / f"upload-{number}.png"))


def test_a_correction_changes_the_label_and_keeps_the_patient_and_the_row(site: Path, tmp_path: Path) -> None:
    before = manifest_of(site).records
    told = feed(site, reading(seen_again(tmp_path, 0), "bacterial", patient="somebody else"))
    after = manifest_of(site).records
    assert (told["corrected"], told["added"], told["total"], told["read"]) == (1, 0, 3, 1)
    assert [row.label for row in after] == ["bacterial", "viral", "normal"]
    assert [(row.path, row.patient) for row in after] == [(row.path, row.patient) for row in before]
    kept = json.loads((site / "data" / "readings.json").read_text())
    assert [(image["original"], image["readings"][0]["label"]) for image in kept.values()] == [("normal", "bacterial")]


def test_a_new_case_is_copied_once_under_a_pseudonym_and_reading_the_export_again_changes_nothing(
    site: Path, tmp_path: Path
) -> None:
    new = write_image(tmp_path / "room" / "Doe^Jane.png", 99)
    again = Path(shutil.copy(new, tmp_path / "room" / "the same.png"))
    rows = reading(new, "pneumonia"), reading(again, "pneumonia", reader="bob")
    assert feed(site, *rows)["added"] == 1
    row = manifest_of(site).records[-1]
    assert row.path.is_relative_to(site / "data" / "images")
    assert "Doe" not in row.path.name
    assert row.patient.startswith("P") and "MRN" not in row.patient
    table = (site / "data" / "manifest.csv").read_bytes()
    assert (feed(site, *rows)["added"], (site / "data" / "manifest.csv").read_bytes()) == (0, table)


def test_where_two_readers_differ_nothing_changes_and_the_image_is_counted(site: Path, tmp_path: Path) -> None:
    known, new = seen_again(tmp_path, 1), write_image(tmp_path / "new.png", 50)
    told = feed(
        site, *(reading(path, label, reader) for path in (known, new) for label, reader in (("normal", "a"), ("viral", "b")))
    )
    assert told["skipped"] == {SkipReason.DISAGREED.value: 2}
    assert labels_of(site) == ["normal", "viral", "normal"]


def test_the_latest_word_of_a_reader_counts_in_whatever_order_it_stands(site: Path, tmp_path: Path) -> None:
    path = seen_again(tmp_path, 0)
    later, earlier = "2026-03-02T08:30:00+01:00", "2026-03-02T08:00:00+00:00"  # 07:30 and 08:00 in UTC
    feed(site, reading(path, "bacterial", time=earlier), reading(path, "viral", time=later))
    assert labels_of(site)[0] == "bacterial"


def test_a_reader_who_contradicts_later_undoes_what_the_first_one_did(site: Path, tmp_path: Path) -> None:
    known, new = seen_again(tmp_path, 0), write_image(tmp_path / "new.png", 50)
    feed(site, reading(known, "viral"), reading(new, "viral"))
    assert labels_of(site) == ["viral", "viral", "normal", "viral"]
    told = feed(site, reading(known, "normal", "bob"), reading(new, "normal", "bob"))
    assert (told["set_aside"], told["corrected"]) == (1, 1)
    assert labels_of(site) == ["normal", "viral", "normal"]
    assert feed(site, reading(known, "viral", "bob", "2027-01-01"), reading(new, "viral", "bob", "2027-01-01"))["added"] == 1
    assert labels_of(site) == ["viral", "viral", "normal", "viral"]


def test_an_unsure_reader_gives_no_label(site: Path, tmp_path: Path) -> None:
    told = feed(site, reading(seen_again(tmp_path, 0), "unsure"), reading(seen_again(tmp_path, 2), "lung cancer"))
    assert set(told["skipped"]) == {SkipReason.UNCERTAIN_LABEL.value, SkipReason.UNKNOWN_LABEL.value}
    assert labels_of(site) == ["normal", "viral", "normal"]


def test_the_readers_labels_outlive_a_table_that_is_added_anew(site: Path, tmp_path: Path) -> None:
    feed(site, reading(seen_again(tmp_path, 0), "viral"))
    run_data(site, "add", "table", str(tmp_path / "t.csv"))
    assert labels_of(site) == ["viral", "viral", "normal"]


def test_a_patient_who_has_withdrawn_stays_out_and_no_reading_of_him_is_kept(site: Path, tmp_path: Path) -> None:
    new = write_image(tmp_path / "new.png", 50)
    feed(site, reading(seen_again(tmp_path, 0), "viral"), reading(new, "viral", patient="MRN-8"))
    (site / "gone.txt").write_text("MRN-0\nMRN-8\n")
    run_data(site, "remove", "--patients", str(site / "gone.txt"))
    assert json.loads((site / "data" / "readings.json").read_text()) == {}
    assert not list((site / "data" / "images").iterdir())
    told = feed(site, reading(seen_again(tmp_path, 0), "viral", patient="MRN-0"), reading(new, "viral", patient="MRN-8"))
    assert (told["skipped"], told["total"]) == ({SkipReason.WITHDRAWN.value: 2}, 2)


def test_a_dicom_case_is_deidentified_and_the_same_instance_in_other_bytes_is_the_same_image(site: Path, tmp_path: Path) -> None:
    first = write_dicom(tmp_path / "a.dcm", draw_radiograph(), SOPInstanceUID="1.2.3.4")
    second = write_dicom(tmp_path / "b.dcm", draw_radiograph(), SOPInstanceUID="1.2.3.4", StudyDescription="sent again")
    assert feed(site, reading(first, "viral", patient=""))["added"] == 1
    told = feed(site, reading(second, "normal", "bob", patient=""))
    assert (told["added"], told["skipped"]) == (0, {SkipReason.DISAGREED.value: 1})
    stored = next((site / "data" / "images").glob("*.dcm"))
    assert PATIENT_ID.encode() not in stored.read_bytes()


def test_a_ct_series_of_the_manifest_gets_its_label_and_a_new_one_is_not_copied(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site")
    known, new = (write_series(tmp_path / name, patient) for name, patient in zip(("known", "new"), patients(80), strict=False))
    SiteFolder.open(site).data.mkdir(exist_ok=True)
    write_manifest(Manifest((ImageRecord(known, "P1", "normal"),)), SiteFolder.open(site).manifest)
    copy = shutil.copytree(known, tmp_path / "room" / "original")
    for file in copy.iterdir():
        file.rename(copy / f"0{file.name}")  # as the room names them
    told = feed(site, reading(copy, "viral", patient="P1"), reading(new, "viral", patient="P2"))
    assert labels_of(site) == ["viral"]
    assert (told["corrected"], told["added"]) == (1, 0)
    assert told["skipped"] == {SkipReason.NOT_COPIED.value: 1}
    assert not list(SiteFolder.open(site).images.glob("*.dcm"))


def test_a_bad_row_is_counted_and_the_others_are_taken(site: Path, tmp_path: Path) -> None:
    damaged = write_table(tmp_path / "damaged.png", "no image")
    rows = [reading(tmp_path / "nowhere.png", "viral"), reading(damaged, "viral"), reading(seen_again(tmp_path, 0), "viral")]
    told = feed(site, *rows, reading(write_image(tmp_path / "nobody.png", 51), "viral", patient=""))
    assert (told["found"], told["corrected"]) == (4, 1)
    assert set(told["skipped"]) >= {SkipReason.MISSING.value, SkipReason.NO_PATIENT.value}


def test_a_time_that_is_none_is_an_error_that_names_the_row_and_not_the_patient(site: Path, tmp_path: Path) -> None:
    table = write_table(tmp_path / "e.csv", HEADER, reading(seen_again(tmp_path, 0), "viral", time="Jane yesterday"))
    code, told = run_data(site, "feedback", str(table))
    assert code == 2
    assert "row 2" in told["message"] and "Jane" not in told["message"]


def test_added_and_relabelled_images_keep_the_site_s_privacy_budget(site: Path, tmp_path: Path) -> None:
    """What joins later shares images with what was there: one lineage, one budget, and no fresh one."""
    from pneumofed.common.config.parties import SitePolicy
    from tests.client.privacy.test_ledger import entry

    ledger, cache = Ledger(tmp_path / "ledger.db"), tmp_path / "cache"

    def units() -> DataUnits:
        manifest = manifest_of(site)
        return DataUnits(digests_of(manifest, cache), manifest.patients)

    alone = ledger.spend(entry(), units(), SitePolicy()).lineage
    feed(site, reading(seen_again(tmp_path, 0), "viral"), reading(write_image(tmp_path / "new.png", 50), "viral"))
    assert ledger.spend(entry(2), units(), SitePolicy()).lineage > alone
    assert [(lineage.images, len(lineage.entries)) for lineage in ledger.lineages()] == [(4, 2)]


def test_the_site_folder_opens_after_feedback_without_a_manifest(tmp_path: Path) -> None:
    site = make_site(tmp_path / "fresh")
    assert feed(site, reading(write_image(tmp_path / "new.png", 3), "normal"))["total"] == 1
    assert SiteFolder.open(site).manifest.exists()
