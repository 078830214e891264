"""A patient who withdraws is gone from rows and caches, and is not added again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pneumofed.client.archive.import_images import ImageStore, import_images
from pneumofed.client.archive.query import Answer, ArchiveQuery, Instance, Level
from pneumofed.client.data import feedback, manifest_update
from pneumofed.client.data.manifest_update import merge_images, remove_patients
from pneumofed.client.federation.site_data import SPLIT_FILE, load_site
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.config.experiment import ExperimentConfig, ImageConfig
from pneumofed.common.data.manifest import DataReport, ImageRecord, Manifest
from pneumofed.common.errors import SkipReason
from pneumofed.common.files import exclusive
from pneumofed.common.imaging.dicom_header import load_pseudonyms, read_header
from tests.client.site_folder import make_site, manifest_of, run_data
from tests.common.data.conftest import write_image, write_table
from tests.dicom_factory import dicom_bytes, draw_radiograph, write_dicom


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


class FourImages:
    """An archive of four examinations, `A1` to `A4`, each with one image of the patient `GONE`. It dies after `dies_after` of them."""

    def __init__(self, dies_after: int = 4, accession: str = "") -> None:
        self.left, self.accession = dies_after, accession

    def search(self, level: Level, conditions: Mapping[str, str]) -> list[Answer]:
        """Matches never name their accession, so that only the image can confirm it."""
        study = conditions.get("StudyInstanceUID") or f"1.2.{conditions['AccessionNumber'][1:]}"
        series, image = {"SeriesInstanceUID": f"{study}.1", "Modality": "DX"}, {"SOPInstanceUID": f"{study}.1.1"}
        return [{"STUDY": {"StudyInstanceUID": study}, "SERIES": series, "IMAGE": image}[level]]

    def fetch(self, instance: Instance) -> bytes:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        number = instance.study_uid.split(".")[-1]
        uids = {
            "StudyInstanceUID": instance.study_uid,
            "SeriesInstanceUID": instance.series_uid,
            "SOPInstanceUID": instance.sop_uid,
        }
        tags: dict[str, Any] = {
            "PatientID": "GONE",
            "AccessionNumber": self.accession or f"A{number}",
            "ViewPosition": "PA",
            **uids,
        }
        return dicom_bytes(draw_radiograph(), BitsStored=12, **tags)

    def close(self) -> None: ...


def import_from(archive: FourImages, site: SiteFolder) -> None:
    labels = {"accession": {f"A{number}": "normal" for number in range(1, 5)}}
    arrival = import_images(archive, ArchiveQuery(), labels, ImageStore(site.images, load_pseudonyms(site.data)))
    merge_images(site, arrival.manifest, arrival.report)


def copies_of(site: SiteFolder, patient: str) -> int:
    pseudonym = load_pseudonyms(site.data).patient(patient)
    return sum(read_header(file).patient == pseudonym for file in site.images.iterdir() if ".dcm" in file.name)


def import_interrupted(site: SiteFolder) -> int:
    with pytest.raises(KeyboardInterrupt):
        import_from(FourImages(dies_after=3), site)
    whole = next(site.images.glob("*.dcm"))
    (site.images / f".{whole.name}.x7_k2a").write_bytes(
        whole.read_bytes()[:1500]
    )  # as a process leaves it that is killed in a write
    return 4


def import_unconfirmed(site: SiteFolder) -> int:
    import_from(FourImages(accession="another"), site)
    return 4


def set_aside(site: SiteFolder) -> int:
    """The reading room brought a radiograph and a picture, and then its readers came to differ on both."""
    room = write_dicom(site.path / "room.dcm", draw_radiograph(), SOPInstanceUID="1.2.3.4", PatientID="GONE")
    picture = write_image(site.path / "room.png", 77)
    rows = [f"{file},GONE,viral,PA,ann,2026-03-01" for file in (room, picture)]
    differing = [f"{file},GONE,normal,PA,bob,2026-03-02" for file in (room, picture)]
    for count, export in ((2, rows), (0, rows + differing)):
        table = write_table(site.path / "export.csv", "path,patient,label,view,reader,time", *export)
        feedback.add_feedback(site, table)
        assert (
            sum("GONE" not in row.patient and row.path.is_relative_to(site.images) for row in manifest_of(site.path).records)
            == count
        )
    return 2


def feedback_interrupted(site: SiteFolder) -> int:
    picture = write_image(site.path / "room.png", 77)
    table = write_table(site.path / "export.csv", "path,patient,label,view", f"{picture},GONE,viral,PA")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feedback._Merge, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        feedback.add_feedback(site, table)
    return 1


@pytest.mark.parametrize("leave", [import_interrupted, import_unconfirmed, set_aside, feedback_interrupted])
def test_copies_without_a_row_go_too(site: Path, leave: Callable[[SiteFolder], int]) -> None:
    opened = SiteFolder.open(site)
    left = leave(opened)
    listed = [file for file in opened.images.iterdir() if file.suffix not in (".json", ".sum")]
    assert left <= len(listed)
    assert "GONE" not in manifest_of(site).patients and len(manifest_of(site)) == 8
    assert remove_patients(opened, ["GONE"]).files == left
    assert not copies_of(opened, "GONE")
    assert not [file for file in opened.images.iterdir() if file in listed and file.name != "lock"]


def test_copies_are_found_where_no_import_came_to_write_a_manifest(tmp_path: Path) -> None:
    opened = SiteFolder.open(make_site(tmp_path / "fresh"))
    import_interrupted(opened)
    removal = remove_patients(opened, ["GONE"])
    assert (removal.patients, removal.rows, removal.files, removal.not_found) == (1, 0, 4, {})
    assert not opened.manifest.exists()


def test_copies_without_a_row_that_come_after_the_withdrawal_go_with_the_next_addition(site: Path) -> None:
    opened = SiteFolder.open(site)
    remove_patients(opened, ["GONE"])
    import_unconfirmed(opened)
    assert not copies_of(opened, "GONE")


def test_copies_of_others_without_a_row_stay(site: Path) -> None:
    opened = SiteFolder.open(site)
    import_interrupted(opened)
    set_aside(opened)
    before = sorted(opened.images.iterdir())
    assert remove_patients(opened, ["MRN-1"]).files == 0
    assert sorted(opened.images.iterdir()) == before


Ahead = Callable[[Callable[[], object]], None]


@pytest.fixture
def before_the_lock(monkeypatch: pytest.MonkeyPatch) -> Ahead:
    """Takes what another process does between the start of the next command and its turn at the lock of the site's data."""

    def plan(work: Callable[[], object]) -> None:
        pending = [work]

        @contextmanager
        def waited(folder: Path) -> Iterator[None]:
            while pending:
                pending.pop()()
            with exclusive(folder):
                yield

        for module in (manifest_update, feedback):
            monkeypatch.setattr(module, "exclusive", waited)

    return plan


def listed_of(site: SiteFolder) -> set[str]:
    """Patients on the list, none of whom has a row."""
    listed = set((site.data / "withdrawn.txt").read_text().split())
    assert not listed & set(manifest_of(site.path).patients)
    return listed


def test_of_two_removals_that_wait_for_each_other_none_is_lost(site: Path, before_the_lock: Ahead) -> None:
    opened = SiteFolder.open(site)
    before_the_lock(lambda: remove_patients(opened, ["MRN-1"]))
    remove_patients(opened, ["MRN-2"])
    pseudonyms = load_pseudonyms(opened.data)
    assert {pseudonyms.patient("MRN-1"), pseudonyms.patient("MRN-2")} <= listed_of(opened)
    assert len(manifest_of(site)) == 4


def test_an_addition_that_waited_for_a_removal_brings_nobody_back(site: Path, tmp_path: Path, before_the_lock: Ahead) -> None:
    opened = SiteFolder.open(site)
    before_the_lock(lambda: remove_patients(opened, ["MRN-1"]))
    report = run_data(site, "add", "table", str(tmp_path / "t.csv"))[1]
    assert listed_of(opened)
    assert (report["total"], report["skipped"]) == (6, {SkipReason.WITHDRAWN.value: 2})


def test_a_removal_that_waited_for_an_addition_takes_its_rows_out_too(site: Path, tmp_path: Path, before_the_lock: Ahead) -> None:
    more = write_table(tmp_path / "more.csv", "path,patient,label", f"{write_image(tmp_path / 'more.png', 70)},MRN-1,viral")
    before_the_lock(lambda: run_data(site, "add", "table", str(more)))
    assert remove_patients(SiteFolder.open(site), ["MRN-1"]).rows == 3
    assert listed_of(SiteFolder.open(site))


def test_readings_that_waited_for_a_removal_bring_nobody_back(site: Path, tmp_path: Path, before_the_lock: Ahead) -> None:
    opened = SiteFolder.open(site)
    read = f"{write_image(tmp_path / 'new.png', 70)},MRN-1,viral,PA"
    before_the_lock(lambda: remove_patients(opened, ["MRN-1"]))
    told = feedback.add_feedback(opened, write_table(tmp_path / "export.csv", "path,patient,label,view", read))
    assert listed_of(opened)
    assert told.skipped == {SkipReason.WITHDRAWN: 1}


def test_a_run_that_draws_its_split_while_a_removal_waits_keeps_nobody(site: Path, before_the_lock: Ahead) -> None:
    opened, experiment = SiteFolder.open(site), ExperimentConfig(image=ImageConfig(size_px=32))
    gone = load_pseudonyms(opened.data).patient("MRN-1")
    before_the_lock(lambda: load_site(opened.config, experiment))
    remove_patients(opened, ["MRN-1"])
    assert gone not in (opened.work / SPLIT_FILE).read_text()
