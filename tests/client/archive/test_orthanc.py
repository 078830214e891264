"""The archive's ways in against a real Orthanc server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless

from pneumofed.client.archive.dicomweb import DicomWebArchive, WebAddress
from pneumofed.client.archive.dimse import DimseAddress, DimseArchive
from pneumofed.client.archive.query import Archive, ArchiveQuery, Instance, RetryPolicy, list_instances
from pneumofed.client.archive.receiver import parse_file
from pneumofed.common.errors import ArchiveError, ConfigError, ImageError, SkipReason
from pneumofed.common.ops.processes import free_port
from tests.client.site_folder import make_site, manifest_of, run_data
from tests.dicom_factory import dicom_bytes, draw_radiograph
from tests.orthanc import AE_TITLE, Orthanc, run_orthanc

PATIENCE = RetryPolicy(timeout_sec=10, attempts=2, first_wait_sec=0.05)
SYNTAXES = (ExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless)
PATIENTS = ("MRN-1001", "MRN-1001", "MRN-1002", "MRN-1003", "MRN-1004", "MRN-1005")
WAYS = ("dicomweb", "get", "move")


def _image(number: int, **tags: Any) -> bytes:
    values = {
        "PatientID": PATIENTS[number],
        "PatientName": f"Archived^Person{number}",
        "AccessionNumber": f"ACC-{number}",
        "StudyInstanceUID": f"1.2.826.99.{number}",
        "SeriesInstanceUID": f"1.2.826.99.{number}.1",
        "SOPInstanceUID": f"1.2.826.99.{number}.1.1",
        "StudyDate": f"2024010{number + 1}",
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "PatientAge": "093Y",
        **tags,
    }
    return dicom_bytes(draw_radiograph() + np.uint16(number), syntax=SYNTAXES[number % 3], BitsStored=13, **values)


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """Six examinations: 0 and 1 of one patient, 3 with writing burnt in, 4 a hand, 5 a CT."""
    with run_orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        for number, tags in enumerate(
            ({}, {}, {}, {"BurnedInAnnotation": "YES"}, {"BodyPartExamined": "HAND"}, {"Modality": "CT"})
        ):
            server.upload(_image(number, **tags))
        yield server


def _open(server: Orthanc, way: str) -> Archive:
    if way == "dicomweb":
        return DicomWebArchive(WebAddress(server.dicomweb), PATIENCE)
    return DimseArchive(_address(server, retrieve=way), PATIENCE)


def _address(server: Orthanc, **changes: Any) -> DimseAddress:
    values = {"called_ae_title": AE_TITLE, "listen_host": "127.0.0.1", "listen_port": server.move_port, **changes}
    return DimseAddress("127.0.0.1", server.dicom_port, **values)


def _way_options(server: Orthanc, way: str) -> list[str]:
    if way == "dicomweb":
        return ["dicomweb", server.dicomweb]
    return ["dimse", server.dimse, "--called-ae-title", AE_TITLE, "--retrieve", way, "--listen", f"127.0.0.1:{server.move_port}"]


@pytest.fixture(params=WAYS)
def archive(request: pytest.FixtureRequest, orthanc: Orthanc) -> Iterator[Archive]:
    opened = _open(orthanc, request.param)
    yield opened
    opened.close()


def _numbers(archive: Archive, query: ArchiveQuery) -> list[int]:
    return sorted(int(instance.study_uid.rpartition(".")[2]) for instance in list_instances(archive, query))


def test_queries_find_what_they_describe(archive: Archive) -> None:
    assert _numbers(archive, ArchiveQuery()) == [0, 1, 2, 3, 4]
    assert _numbers(archive, ArchiveQuery(modalities=("CT",))) == [5]
    assert _numbers(
        archive, ArchiveQuery.model_validate({"first_date": "2024-01-02", "last_date": "2024-01-03"}, strict=False)
    ) == [1, 2]
    assert _numbers(archive, ArchiveQuery(body_part="hand")) == [4]
    assert _numbers(archive, ArchiveQuery(accessions=("ACC-2", "ACC-77"))) == [2]
    assert _numbers(archive, ArchiveQuery(studies=("1.2.826.99.1",), accessions=("ACC-1", "ACC-0"))) == [0, 1]
    assert _numbers(archive, ArchiveQuery(accessions=("ACC-*", "?CC-1"))) == []


def test_an_image_comes_as_it_is_stored(archive: Archive) -> None:
    for instance in list_instances(archive, ArchiveQuery(accessions=("ACC-0", "ACC-1", "ACC-2"))):
        number = int(instance.accession[-1])
        image = parse_file(archive.fetch(instance))
        assert image.PatientID == PATIENTS[number]
        assert image.file_meta.TransferSyntaxUID == SYNTAXES[number]


def test_an_image_that_the_archive_lacks_is_not_delivered(archive: Archive) -> None:
    with pytest.raises(ImageError) as caught:
        archive.fetch(Instance("1.2.826.99.0", "1.2.826.99.0.1", "1.2.826.99.0.1.404", ""))
    assert caught.value.reason is SkipReason.NOT_DELIVERED


@pytest.mark.parametrize("way", WAYS)
def test_labelled_images_arrive_without_identity(tmp_path: Path, orthanc: Orthanc, way: str) -> None:
    site = make_site(tmp_path / "site")
    labels = _labels(tmp_path)
    code, report = run_data(site, "add", *_way_options(orthanc, way), "--labels", str(labels))
    assert code == 0
    assert (report["found"], report["used"], report["patients"]) == (5, 3, 2)
    assert report["skipped"] == {SkipReason.BURNT_IN.value: 1, SkipReason.UNKNOWN_LABEL.value: 1}
    assert sum(report["warnings"].values()) == 2  # ACC-404 and the CT
    records = manifest_of(site).records
    assert [record.label for record in records] == ["normal", "normal", "viral"]
    assert [(record.view, record.age_years) for record in records] == [("PA", 90.0)] * 3
    assert len({record.patient for record in records}) == 2
    for record in records:
        assert record.path.stat().st_mode & 0o777 == 0o600
        assert record.path.parent.stat().st_mode & 0o777 == 0o700
    everything = b"".join(file.read_bytes() for file in site.rglob("*") if file.is_file())
    for identifier in (b"MRN-100", b"Archived", b"Person", b"ACC-", b"1.2.826.99", b"202401"):
        assert identifier not in everything
    assert run_data(site, "check")[1]["used"] == 3


def _labels(folder: Path) -> Path:
    table = folder / "labels.csv"
    rows = ["ACC-0,normal", "ACC-1,normal", "ACC-2,viral", "ACC-3,normal", "ACC-4,banana", "ACC-5,normal", "ACC-404,normal"]
    table.write_text("\n".join(["AccessionNumber,label", *rows]) + "\n")
    return table


def test_all_ways_bring_the_same_files(tmp_path: Path, orthanc: Orthanc) -> None:
    files = []
    for way in WAYS:
        site = make_site(tmp_path / way)
        (site / "data").mkdir(mode=0o700)
        (site / "data" / "pseudonym.key").write_text("5a" * 32)
        (site / "data" / "pseudonym.key").chmod(0o600)
        run_data(site, "add", *_way_options(orthanc, way), "--labels", str(_labels(tmp_path)))
        files.append({file.name: file.read_bytes() for file in (site / "data" / "images").glob("*.dcm")})
    assert len(files[0]) == 3
    assert files[0] == files[1] == files[2]


def test_what_has_arrived_is_not_fetched_again(tmp_path: Path, orthanc: Orthanc, monkeypatch: pytest.MonkeyPatch) -> None:
    site, options = make_site(tmp_path / "site"), [*_way_options(orthanc, "dicomweb"), "--labels", str(_labels(tmp_path))]
    run_data(site, "add", *options)
    rows = (site / "data" / "manifest.csv").read_bytes()
    fetched: list[str] = []
    fetch = DicomWebArchive.fetch

    def count(self: DicomWebArchive, instance: Instance) -> Any:
        fetched.append(instance.sop_uid)
        return fetch(self, instance)

    monkeypatch.setattr(DicomWebArchive, "fetch", count)
    code, report = run_data(site, "add", *options)
    assert (code, report["added"], report["unchanged"], report["total"], fetched) == (0, 0, 3, 3, [])
    assert (site / "data" / "manifest.csv").read_bytes() == rows
    next(iter((site / "data" / "images").glob("*.dcm"))).unlink()
    assert run_data(site, "add", *options)[1]["total"] == 3
    assert len(fetched) == 1
    assert run_data(site, "add", *options, "--keep-burnt-in")[1]["added"] == 1
    assert len(fetched) == 2


def test_labels_may_name_studies_or_images(tmp_path: Path, orthanc: Orthanc) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("StudyInstanceUID,label\n1.2.826.99.1,viral\n")
    assert run_data(make_site(tmp_path / "a"), "add", *_way_options(orthanc, "dicomweb"), "--labels", str(table))[1]["used"] == 1
    table.write_text("SOPInstanceUID,label\n1.2.826.99.1.1.1,viral\n")
    options = [*_way_options(orthanc, "dicomweb"), "--labels", str(table)]
    assert run_data(make_site(tmp_path / "b"), "add", *options)[0] == 2
    report = run_data(make_site(tmp_path / "c"), "add", *options, "--from", "2024-01-01", "--to", "2024-01-03")[1]
    assert (report["used"], report["skipped"]) == (1, {SkipReason.NO_LABEL.value: 2})


def test_a_limit_takes_the_first_images_alone(tmp_path: Path, orthanc: Orthanc) -> None:
    options = [*_way_options(orthanc, "get"), "--labels", str(_labels(tmp_path)), "--limit", "2"]
    assert run_data(make_site(tmp_path / "site"), "add", *options)[1]["found"] == 2


def test_a_wrong_ae_title_is_said(tmp_path: Path, orthanc: Orthanc) -> None:
    options = ["dimse", orthanc.dimse, "--called-ae-title", "NOBODY", "--labels", str(_labels(tmp_path))]
    code, report = run_data(make_site(tmp_path / "site"), "add", *options)
    assert code == 3
    assert "goes by another AE title" in report["stopped"]


def test_a_site_that_the_archive_does_not_know_is_told_its_ae_title(orthanc: Orthanc) -> None:
    with pytest.raises(ArchiveError, match="knows the AE title STRANGER"):
        DimseArchive(_address(orthanc, ae_title="STRANGER"), PATIENCE).search("STUDY", {"StudyDate": "20240101-"})


def test_an_archive_that_knows_no_way_back_is_explained(orthanc: Orthanc) -> None:
    archive = DimseArchive(_address(orthanc, retrieve="move", listen_port=free_port()), PATIENCE)
    try:
        instance = next(list_instances(archive, ArchiveQuery()))
        with pytest.raises((ArchiveError, ImageError)):
            archive.fetch(instance)
    finally:
        archive.close()


def test_an_archive_that_is_not_there_has_its_own_exit_code(tmp_path: Path) -> None:
    port, labels = free_port(), str(_labels(tmp_path))
    site = make_site(tmp_path / "site")
    web = run_data(site, "add", "dicomweb", f"http://127.0.0.1:{port}/dicom-web", "--labels", labels, "--attempts", "1")
    classic = run_data(site, "add", "dimse", f"127.0.0.1:{port}", "--called-ae-title", "X", "--labels", labels, "--attempts", "1")
    for code, report in (web, classic):
        assert code == 3
        assert "cannot be reached" in report["stopped"]


def test_a_wrong_path_and_a_port_of_another_protocol_are_said(orthanc: Orthanc) -> None:
    with pytest.raises(ArchiveError, match="no DICOMweb service at this address"):
        DicomWebArchive(WebAddress(f"http://127.0.0.1:{orthanc.http_port}/nothing"), PATIENCE).search("STUDY", {})
    with pytest.raises(ArchiveError, match="check that the port speaks DICOM"):
        DimseArchive(DimseAddress("127.0.0.1", orthanc.http_port, AE_TITLE), PATIENCE).search("STUDY", {})
    with pytest.raises(ArchiveError, match="port speaks no TLS"):
        DicomWebArchive(WebAddress(orthanc.dicomweb.replace("http:", "https:")), PATIENCE).search("STUDY", {})


def test_accounts_are_checked_and_passwords_never_shown(tmp_path: Path) -> None:
    with run_orthanc(tmp_path, user=("site", "s3cret")) as server:
        server.upload(_image(0))
        good = WebAddress(server.dicomweb, user="site", password="s3cret")
        assert "s3cret" not in repr(good)
        assert _numbers(DicomWebArchive(good, PATIENCE), ArchiveQuery()) == [0]
        for address in (WebAddress(server.dicomweb), WebAddress(server.dicomweb, user="site", password="wrong")):
            with pytest.raises(ArchiveError, match="refuses this account"):
                DicomWebArchive(address, PATIENCE).search("STUDY", {})


def test_an_import_that_is_cut_keeps_what_came_and_goes_on(tmp_path: Path) -> None:
    with run_orthanc(tmp_path) as server:
        for number in range(3):
            server.upload(_image(number))
        site = make_site(tmp_path / "site")
        options = [*_way_options(server, "get"), "--labels", str(_labels(tmp_path)), "--attempts", "1", "--timeout", "5"]
        fetch = DimseArchive.fetch

        def fetch_one_then_die(self: DimseArchive, instance: Instance) -> Any:
            if instance.accession != "ACC-0":
                server.process.kill()
                server.process.wait(10)
            return fetch(self, instance)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DimseArchive, "fetch", fetch_one_then_die)
            code, report = run_data(site, "add", *options)
        assert code == 3
        assert (report["used"], report["total"]) == (1, 1)
        assert not list((site / "data" / "images").glob(".*.dcm.*"))
    with run_orthanc(tmp_path) as server:
        options[1] = server.dimse
        code, report = run_data(site, "add", *options)
        assert (code, report["added"], report["unchanged"]) == (0, 2, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: WebAddress("pacs.example/dicom-web"),
        lambda: WebAddress("https://me:secret@pacs.example/dicom-web"),
        lambda: WebAddress("http://pacs.example/dicom-web", user="me", password="secret"),
        lambda: DimseAddress("pacs", 104, "MUCH TOO LONG A TITLE"),
        lambda: DimseAddress("pacs", 0, "PACS"),
    ],
)
def test_addresses_that_cannot_be_are_refused_without_their_secret(make: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert "secret" not in str(caught.value)
