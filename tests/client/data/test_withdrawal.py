"""A patient who withdraws is gone from rows and caches, and is not added again."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumofed.client.data.manifest_update import merge_images, remove_patients
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.data.manifest import DataReport, ImageRecord, Manifest
from pneumofed.common.errors import SkipReason
from tests.client.site_folder import make_site, manifest_of, run_data
from tests.common.data.conftest import write_image, write_table


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Four patients of the hospital with two images each, decoded once."""
    site = make_site(tmp_path / "site")
    rows = [f"{write_image(tmp_path / f'{n}.png', n)},MRN-{n // 2},{('normal', 'viral')[n % 2]}" for n in range(8)]
    write_table(tmp_path / "t.csv", "path,patient,label", *rows)
    assert run_data(site, "add", "table", str(tmp_path / "t.csv"))[1]["total"] == 8
    assert run_data(site, "check")[1]["used"] == 8
    return site


def remove(site: Path, *patients: str) -> tuple[int, dict[str, int]]:
    (site / "list.txt").write_text("\n".join(patients))
    return run_data(site, "remove", "--patients", str(site / "list.txt"))


def test_a_patient_who_withdraws_is_gone_with_all_rows_and_decoded_images(site: Path) -> None:
    assert any((site / "work" / "cache").rglob("*"))
    code, told = remove(site, "MRN-1", " MRN-3 ", "")
    assert (code, told) == (0, {"patients": 2, "rows": 4, "files": 0, "total": 4, "not_found": {}})
    assert len(set(manifest_of(site).patients)) == 2
    assert not (site / "work" / "cache").exists()
    assert run_data(site, "check")[1]["used"] == 4


def test_a_patient_who_withdrew_is_not_added_again(site: Path, tmp_path: Path) -> None:
    remove(site, "MRN-1")
    report = run_data(site, "add", "table", str(tmp_path / "t.csv"))[1]
    assert (report["found"], report["used"], report["total"]) == (8, 6, 6)
    assert report["skipped"] == {SkipReason.WITHDRAWN.value: 2}
    assert report["classes"] == {"normal": 3, "viral": 3}


def test_no_number_of_a_patient_is_kept(site: Path) -> None:
    remove(site, "MRN-1", "MRN-77")
    assert "MRN" not in (site / "data" / "withdrawn.txt").read_text()
    assert (site / "data" / "withdrawn.txt").stat().st_mode & 0o777 == 0o600


def test_a_patient_can_be_named_as_the_manifest_names_him(site: Path) -> None:
    pseudonym = manifest_of(site).patients[0]
    assert remove(site, pseudonym)[1]["rows"] == 2
    assert remove(site, pseudonym)[1] == {"patients": 0, "rows": 0, "files": 0, "total": 6, "not_found": {"1": ""}}


def test_copies_that_the_site_wrote_are_deleted_and_files_of_others_stay(site: Path, tmp_path: Path) -> None:
    opened = SiteFolder.open(site)
    opened.images.mkdir()
    copy, other = write_image(opened.images / "a.png", 50), write_image(tmp_path / "b.png", 51)
    manifest = Manifest((ImageRecord(copy, "public-1", "normal"), ImageRecord(other, "public-1", "viral")))
    merge_images(opened, manifest, DataReport(2, 2, patients=1))
    assert remove_patients(opened, ["public-1"]).files == 1
    assert not copy.exists() and other.exists()
    copy = write_image(opened.images / "a.png", 50)
    assert merge_images(opened, manifest, DataReport(2, 2, patients=1)).added == 0
    assert not copy.exists()


def test_a_removal_that_was_interrupted_is_completed_by_the_same_command(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "pneumofed.client.data.manifest_update.write_manifest",
            lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")),
        )
        assert remove(site, "MRN-1")[0] == 2
    assert len(manifest_of(site)) == 8
    assert remove(site, "MRN-1")[1]["rows"] == 2


def test_a_list_that_cannot_be_read_is_a_wrong_command(site: Path) -> None:
    code, told = run_data(site, "remove", "--patients", str(site / "nowhere.txt"))
    assert code == 2 and "--patients" in str(told["message"])


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b'"MRN-1"\r\n"MRN-3";\r\n', 4),
        ("\ufeffPatient ID;note\nMRN-1;moved\nMRN-3;\n".encode("utf-16"), 4),
        ("sep=;\r\nPatientID;Name\r\nMRN-1;M\u00fcller\r\n".encode("cp1252"), 2),
        (b"\xef\xbb\xbf  MRN-1 \xc2\xa0\n\n", 2),
    ],
)
def test_lists_of_a_spreadsheet_are_read(site: Path, content: bytes, rows: int) -> None:
    (site / "list.csv").write_bytes(content)
    code, told = run_data(site, "remove", "--patients", str(site / "list.csv"))
    assert (code, told["rows"]) == (0, rows)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"MRN-1;MRN-3\n", b"patient\n"])
def test_a_list_that_names_nobody_is_a_wrong_command(site: Path, content: bytes) -> None:
    (site / "list.csv").write_bytes(content)
    assert run_data(site, "remove", "--patients", str(site / "list.csv"))[0] == 2
    assert len(manifest_of(site)) == 8
