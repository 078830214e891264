"""Archives that fail: what can be delivered arrives, nothing is lost or remembered wrongly, and runs converge."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pneumofed.client.archive import import_images
from pneumofed.client.archive.dicomweb import DicomWebArchive, WebAddress
from pneumofed.client.archive.query import RequestError, RetryPolicy
from pneumofed.client.archive.refusals import STOP_AFTER
from pneumofed.common.errors import ArchiveError, SkipReason
from pneumofed.common.imaging import dicom_pixels
from tests.client.site_folder import make_site, manifest_of, run_data
from tests.faulty_archives import (
    BOUNDARY,
    LEVELS,
    DimseFaults,
    Fault,
    Reply,
    WebArchive,
    deliver,
    make_image,
    multipart,
    run_dimse,
    run_web,
)

COUNT, BAD = 4, 1


def _some(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Parameters of which all but `quick` are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


LOGIN = b"\xef\xbb\xbf<!DOCTYPE html><html><body>Please sign in, Mr Mustermann</body></html>"
ERROR = b'{"error": "backend unavailable", "status": 500}'


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pneumofed.client.archive.query.time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def web() -> Iterator[WebArchive]:
    with run_web({number: make_image(number) for number in range(COUNT)}) as archive:
        yield archive


@pytest.fixture(scope="module")
def running() -> Iterator[DimseFaults]:
    with run_dimse({number: make_image(number) for number in range(COUNT)}) as archive:
        yield archive


@pytest.fixture
def dimse(running: DimseFaults) -> DimseFaults:
    running.get_faults.clear()
    running.find_faults.clear()
    running.fetched.clear()
    return running


def _labels(folder: Path, count: int = COUNT) -> Path:
    table = folder / "labels.csv"
    table.write_text("\n".join(["AccessionNumber,label", *(f"ACC-{number},normal" for number in range(count))]) + "\n")
    return table


def _add(site: Path, archive: WebArchive | DimseFaults, *options: str, way: str = "get") -> tuple[int, dict[str, Any]]:
    fetched = sum(archive.fetched.values())
    labels = _labels(site.parent, len(archive.images))
    if isinstance(archive, WebArchive):
        where = ["dicomweb", archive.url]
    else:
        where = ["dimse", f"127.0.0.1:{archive.port}", "--called-ae-title", "ARCHIVE", "--retrieve", way]
        where += ["--listen", f"127.0.0.1:{archive.move_port}"]
    code, report = run_data(site, "add", *where, "--labels", str(labels), "--attempts", "2", "--timeout", "5", *options)
    report["fetched"] = sum(archive.fetched.values()) - fetched
    return code, report


def _refused(site: Path) -> dict[str, Any]:
    return json.loads((site / "data" / "images" / "refused.json").read_bytes())


def _check_recovery(site: Path, archive: WebArchive | DimseFaults, repair: Any, **options: Any) -> None:
    """One examination fails, twice in a row; the others arrive; after the repair it does too, and further runs change nothing."""
    for _ in range(2):
        code, report = _add(site, archive, **options)
        assert (code, report["found"], report["used"]) == (0, COUNT, COUNT - 1)
        assert report["skipped"] == {SkipReason.NOT_DELIVERED.value: 1}
        assert not report["warnings"]
        assert _refused(site) == {}
    repair()
    code, report = _add(site, archive, **options)
    assert (code, report["used"], report["added"], report["unchanged"], report["skipped"]) == (0, COUNT, 1, COUNT - 1, {})
    rows = (site / "data" / "manifest.csv").read_bytes()
    for _ in range(3):
        code, report = _add(site, archive, **options)
        assert (code, report["used"], report["unchanged"], report["fetched"]) == (0, COUNT, COUNT, 0)
        assert (site / "data" / "manifest.csv").read_bytes() == rows
    assert json.loads((site / "data" / "images" / "failed.json").read_bytes()) == []


def _status(status: int) -> Fault:
    return lambda good, accept: Reply(status, b"no", "text/plain")


BAD_FETCHES: dict[str, Fault] = {
    "login page": lambda image, accept: Reply(body=LOGIN, media_type="text/html; charset=utf-8"),
    "login page called DICOM": lambda image, accept: deliver(image, body=LOGIN),
    "accepted, not ready": _status(202),
    "JSON error": lambda image, accept: Reply(body=ERROR, media_type="application/json"),
    "JSON error in a part": lambda image, accept: deliver(ERROR),
    "nothing": lambda image, accept: Reply(),
    "no content": lambda image, accept: Reply(204),
    "empty multipart": lambda image, accept: deliver(image, body=b"--" + BOUNDARY + b"--\r\n"),
    "empty part": lambda image, accept: deliver(b""),
    "cut multipart": lambda image, accept: deliver(image, body=multipart(image, close=False)[:-5000]),
    "cut within its head": lambda image, accept: deliver(image, body=multipart(image)[:20]),
    "cut connection": lambda image, accept: deliver(image, declared=10**6),
    "another image": lambda image, accept: deliver(make_image(BAD, SOPInstanceUID="1.2.3.4")),
    **{f"HTTP {status}": _status(status) for status in (400, 403, 404, 406, 409, 410, 415, 429, 500, 501, 503)},
}


@pytest.mark.parametrize("fault", _some(BAD_FETCHES, ("login page", "cut multipart", "HTTP 500")))
def test_a_failed_retrieval_costs_one_image_until_it_passes(tmp_path: Path, web: WebArchive, fault: str) -> None:
    web.fetch_faults[BAD] = BAD_FETCHES[fault]
    _check_recovery(make_site(tmp_path / "site"), web, web.fetch_faults.clear)


def _only(accepted: str) -> Fault:
    return lambda image, accept: deliver(image) if accept == accepted else Reply(406)


def _only_bare(image: bytes, accept: str) -> Reply:
    return Reply(body=image, media_type="application/dicom") if accept == "application/dicom" else Reply(415)


ODD_FETCHES: dict[str, Fault] = {
    "LF": lambda image, accept: deliver(image, body=multipart(image, b"\n")),
    "preamble": lambda image, accept: deliver(image, body=multipart(image, before=b"This is a message.\r\n")),
    "preamble, LF": lambda image, accept: deliver(image, body=multipart(image, b"\n", before=b"This is\na message.\n")),
    "blank line first": lambda image, accept: deliver(image, body=multipart(image, before=b"\r\n")),
    "no boundary": lambda image, accept: deliver(image, media_type='multipart/related; type="application/dicom"'),
    "bare": lambda image, accept: Reply(body=image, media_type="application/dicom"),
    "bare, called multipart": lambda image, accept: deliver(image, body=image),
    "unknown type": lambda image, accept: Reply(body=image),
    "not closed, but of the declared length": lambda image, accept: deliver(
        image,
        body=b"--" + BOUNDARY + b"\r\nContent-Type: application/dicom\r\nContent-Length: %d\r\n\r\n" % len(image) + image,
    ),
    "partial content": lambda image, accept: deliver(image, status=206),
    "no file preamble": lambda image, accept: deliver(image[132:]),
    "only decompressed": _only('multipart/related; type="application/dicom"'),
    "only anything": _only("*/*"),
    "only bare": _only_bare,
}


@pytest.mark.parametrize("fault", ODD_FETCHES)
def test_an_image_in_an_odd_answer_arrives(tmp_path: Path, web: WebArchive, fault: str) -> None:
    web.fetch_faults = dict.fromkeys(range(COUNT), ODD_FETCHES[fault])
    code, report = _add(make_site(tmp_path / "site"), web)
    assert (code, report["used"], report["skipped"]) == (0, COUNT, {})


def test_a_boundary_within_the_image_does_not_cut_it() -> None:
    image = make_image(0) + b"\r\n--" + BOUNDARY + b"\r\n"
    head = b"--" + BOUNDARY + b"\r\nContent-Length: %d\r\n\r\n" % len(image)
    with run_web({0: image}) as web:
        web.fetch_faults[0] = lambda image, accept: deliver(image, body=head + image + b"\r\n--" + BOUNDARY + b"--")
        archive = DicomWebArchive(WebAddress(web.url), RetryPolicy(5, 1))
        instance = import_images.Instance("1.2.826.99.0", "1.2.826.99.0.1", "1.2.826.99.0.1.1", "")
        assert archive.fetch(instance) == image
        archive.close()


BAD_SEARCHES: dict[str, Fault] = {
    "login page": lambda matches, accept: Reply(body=LOGIN, media_type="text/html"),
    "JSON error": lambda matches, accept: Reply(body=ERROR, media_type="application/json"),
    "accepted": _status(202),
    "no UID": lambda matches, accept: Reply(body=b'[{"00080060": {"vr": "CS", "Value": ["DX"]}}]'),
    **{f"HTTP {status}": _status(status) for status in (400, 403, 409, 413, 415, 500, 503)},
}


@pytest.mark.parametrize("level", _some(LEVELS, ("SERIES",)))
@pytest.mark.parametrize("fault", _some(BAD_SEARCHES, ("login page", "no UID")))
def test_a_failed_search_costs_one_examination_until_it_passes(tmp_path: Path, web: WebArchive, level: str, fault: str) -> None:
    if (level, fault) == ("STUDY", "no UID"):
        pytest.skip("has a test of its own: the UID may be known from the search")
    web.search_faults[level, BAD] = BAD_SEARCHES[fault]
    _check_recovery(make_site(tmp_path / "site"), web, web.search_faults.clear)


def test_matches_with_a_byte_order_mark_or_in_other_encodings_are_read(tmp_path: Path, web: WebArchive) -> None:
    encodings: list[Fault] = [
        lambda body, accept: Reply(body=b"\xef\xbb\xbf" + body),
        lambda body, accept: Reply(body=body.decode().encode("utf-16")),
    ]
    for number, encoding in enumerate(encodings):
        web.search_faults = {(level, None): encoding for level in LEVELS}
        assert _add(make_site(tmp_path / str(number)), web)[1]["used"] == COUNT


@pytest.mark.parametrize("status", [204, 400, 404, 416])
def test_pages_end_where_the_archive_says_so(tmp_path: Path, web: WebArchive, status: int) -> None:
    web.page, web.behind_the_end = 1, Reply(status)
    table = _labels(tmp_path)
    options = ["--labels", str(table), "--from", "1990-01-01", "--attempts", "1"]
    table.write_text("SOPInstanceUID,label\n" + "".join(f"1.2.826.99.{number}.1.1,viral\n" for number in range(COUNT)))
    code, report = run_data(make_site(tmp_path / "site"), "add", "dicomweb", web.url, *options, "--modality", "DX")
    assert (code, report["used"]) == (0, COUNT)


def test_a_page_that_is_missing_is_not_the_end(web: WebArchive) -> None:
    web.page, web.behind_the_end = 2, Reply(400)
    web.search_faults["STUDY", None] = lambda body, accept: Reply(body=body, headers={"Warning": "299 archive: more results"})
    archive = DicomWebArchive(WebAddress(web.url), RetryPolicy(5, 1))
    with pytest.raises(RequestError, match="HTTP 400"):
        archive.search("STUDY", {})
    archive.close()


def test_404_to_a_search_means_no_match_where_there_is_a_service(tmp_path: Path, web: WebArchive) -> None:
    web.no_match = Reply(404)
    site = make_site(tmp_path / "site")
    (tmp_path / "labels.csv").write_text("AccessionNumber,label\nACC-77,normal\nACC-1,normal\n")
    code, report = run_data(site, "add", "dicomweb", web.url, "--labels", str(tmp_path / "labels.csv"), "--attempts", "1")
    assert (code, report["found"], report["used"], list(report["warnings"].values())) == (0, 1, 1, [1])
    web.images.clear()
    archive = DicomWebArchive(WebAddress(web.url), RetryPolicy(5, 1))
    with pytest.raises(ArchiveError, match="no DICOMweb service at this address"):
        archive.search("STUDY", {"AccessionNumber": "ACC-1"})
    archive.close()


def test_a_web_page_is_called_one_and_not_quoted(tmp_path: Path, web: WebArchive) -> None:
    web.search_faults["STUDY", None] = BAD_SEARCHES["login page"]
    code, report = _add(make_site(tmp_path / "site"), web)
    assert code == 3
    assert "a web page (HTML)" in report["stopped"]
    assert "login page" in report["stopped"]
    assert "cannot be reached" not in report["stopped"]
    assert "Mustermann" not in json.dumps(report)


def _without(tag: str) -> Fault:
    def fault(body: bytes, accept: str) -> Reply:
        return Reply(
            body=json.dumps([{key: value for key, value in match.items() if key != tag} for match in json.loads(body)]).encode()
        )

    return fault


def test_an_answer_that_does_not_repeat_what_was_searched_for_is_of_it(tmp_path: Path, web: WebArchive) -> None:
    web.search_faults["STUDY", None] = _without("00080050")
    assert _add(make_site(tmp_path / "a"), web)[1]["used"] == COUNT
    web.search_faults["STUDY", None] = _without("0020000D")
    table = tmp_path / "studies.csv"
    table.write_text("StudyInstanceUID,label\n1.2.826.99.1,viral\n")
    assert run_data(make_site(tmp_path / "b"), "add", "dicomweb", web.url, "--labels", str(table))[1]["used"] == 1


def test_an_image_of_another_examination_gets_no_label_of_the_search(tmp_path: Path, web: WebArchive) -> None:
    """An archive that ignores the accession number in a search answers with examinations that nobody labelled."""
    web.search_faults["STUDY", None] = _without("00080050")
    web.images[BAD] = make_image(BAD, AccessionNumber="ACC-99")
    every = web._search("STUDY", None, {}, "")
    web.search_faults["STUDY", None] = lambda body, accept: Reply(body=every.body)
    site = make_site(tmp_path / "site")
    (tmp_path / "labels.csv").write_text("AccessionNumber,label\nACC-0,viral\n")
    for _ in range(2):
        report = run_data(site, "add", "dicomweb", web.url, "--labels", str(tmp_path / "labels.csv"))[1]
        assert (report["used"], report["skipped"]) == (1, {SkipReason.NO_LABEL.value: COUNT - 1})


@pytest.mark.slow
def test_several_examinations_in_a_row_stop_the_import_and_the_next_gets_past_them(tmp_path: Path) -> None:
    count, bad = STOP_AFTER + 6, STOP_AFTER + 2
    with run_web({number: make_image(number) for number in range(count)}) as web:
        web.fetch_faults = dict.fromkeys(range(1, bad + 1), _status(500))
        site = make_site(tmp_path / "site")
        code, report = _add(site, web)
        assert (code, report["used"]) == (3, 1)
        assert f"{STOP_AFTER} examinations in a row failed" in report["stopped"]
        code, report = _add(site, web)
        assert (code, report["used"], report["added"]) == (0, count - bad, count - bad - 1)
        code, report = _add(site, web)
        assert (code, report["used"], report["skipped"]) == (0, count - bad, {SkipReason.NOT_DELIVERED.value: bad})
        web.fetch_faults.clear()
        assert _add(site, web)[1]["used"] == count
        assert _add(site, web)[1]["fetched"] == 0


def test_an_account_that_is_refused_stops_at_once(tmp_path: Path, web: WebArchive) -> None:
    web.fetch_faults[0] = _status(401)
    code, report = _add(make_site(tmp_path / "site"), web)
    assert (code, report["used"], report["fetched"]) == (3, 0, 1)
    assert "refuses this account" in report["stopped"]


def _cut(length: int) -> Fault:
    return lambda image, accept: deliver(image[:-length])


def test_a_damaged_image_is_remembered_when_the_same_bytes_came_twice(tmp_path: Path, web: WebArchive) -> None:
    site = make_site(tmp_path / "site")
    fetches = []
    for cut in (900, 500, 500, 500, 500):
        web.fetch_faults[BAD] = _cut(cut)
        report = _add(site, web)[1]
        assert report["skipped"] == {SkipReason.CORRUPT.value: 1}
        fetches.append(report["fetched"])
    assert fetches == [COUNT, 1, 1, 0, 0]
    web.fetch_faults.clear()
    assert _add(site, web)[1]["fetched"] == 0
    assert run_data(site, "retry") == (0, {"archive": {SkipReason.CORRUPT.value: 1}, "decoded": 0})
    assert _add(site, web)[1]["used"] == COUNT
    assert run_data(site, "retry") == (0, {"archive": {}, "decoded": 0})


def test_what_is_remembered_names_the_bytes_the_reason_and_the_decoders(
    tmp_path: Path, web: WebArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.images[BAD] = make_image(BAD, BurnedInAnnotation="YES")
    site = make_site(tmp_path / "site")
    assert [_add(site, web)[1]["fetched"] for _ in range(3)] == [COUNT, 0, 0]
    (entry,) = _refused(site).values()
    assert entry["reason"] == "BURNT_IN"
    assert len(entry["sha256"]) == 64
    assert "pydicom" in entry["decoder"]
    monkeypatch.setattr("pneumofed.client.archive.refusals.decoder_version", lambda: "another")
    assert [_add(site, web)[1]["fetched"] for _ in range(2)] == [1, 0]
    (site / "data" / "images" / ".refused.json.sum").unlink()
    name = next(iter(_refused(site)))
    (site / "data" / "images" / "refused.json").write_text(json.dumps({name: "CORRUPT"}))  # as earlier versions wrote it
    assert [_add(site, web)[1]["fetched"] for _ in range(2)] == [1, 0]


def _no_memory(*arguments: Any) -> Any:
    raise MemoryError


@pytest.mark.parametrize(
    ("place", "name", "value", "reason"),
    [
        (import_images, "deidentify", _no_memory, SkipReason.OUT_OF_MEMORY),
        (import_images, "read_view", _no_memory, SkipReason.OUT_OF_MEMORY),
        (dicom_pixels, "_PLUGIN", "absent", SkipReason.NO_DECODER),
    ],
)
def test_faults_of_the_machine_are_not_remembered(
    tmp_path: Path, web: WebArchive, place: Any, name: str, value: Any, reason: SkipReason
) -> None:
    web.images = {number: make_image(number, "1.2.840.10008.1.2.4.70") for number in range(COUNT)}
    site = make_site(tmp_path / "site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, value)
        for _ in range(2):
            assert _add(site, web)[1]["skipped"] == {reason.value: COUNT}
    assert _add(site, web)[1]["used"] == COUNT


def test_a_copy_that_was_damaged_on_the_disk_is_fetched_again(tmp_path: Path, web: WebArchive) -> None:
    site = make_site(tmp_path / "site")
    _add(site, web)
    path = manifest_of(site).records[0].path
    whole = path.read_bytes()
    path.write_bytes(b"")
    report = _add(site, web)[1]
    assert (report["used"], report["fetched"]) == (COUNT, 1)
    assert path.read_bytes() == whole


GET_FAULTS: dict[str, int | str] = {
    **{f"{status:04X}": status for status in (0xA701, 0xA702, 0xA900, 0xC000, 0x0122, 0x0124)},
    "abort": "abort",
    "syntax": "syntax",
    "another image": "another image",
}


@pytest.mark.parametrize("fault", _some(GET_FAULTS, ("syntax",)))
def test_a_failed_c_get_costs_one_image_until_it_passes(tmp_path: Path, dimse: DimseFaults, fault: str) -> None:
    dimse.get_faults[BAD] = GET_FAULTS[fault]
    _check_recovery(make_site(tmp_path / "site"), dimse, dimse.get_faults.clear)


@pytest.mark.parametrize("fault", _some(("A702", "A900", "abort"), ("A900",)))
def test_a_failed_c_move_costs_one_image_until_it_passes(tmp_path: Path, dimse: DimseFaults, fault: str) -> None:
    dimse.get_faults[BAD] = GET_FAULTS[fault]
    _check_recovery(make_site(tmp_path / "site"), dimse, dimse.get_faults.clear, way="move")


@pytest.mark.parametrize("level", _some(LEVELS, ("STUDY",)))
@pytest.mark.parametrize("fault", _some(("A700", "A900", "C001", "FE00", "abort"), ("A900",)))
def test_a_failed_c_find_costs_one_examination_until_it_passes(
    tmp_path: Path, dimse: DimseFaults, level: str, fault: str
) -> None:
    dimse.find_faults[level, BAD] = fault if fault == "abort" else int(fault, 16)
    _check_recovery(make_site(tmp_path / "site"), dimse, dimse.find_faults.clear)


UIDS = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}


@pytest.mark.parametrize("level", _some(LEVELS, ("SERIES",)))
def test_an_answer_without_its_uid_costs_one_examination(tmp_path: Path, dimse: DimseFaults, level: str) -> None:
    dimse.find_faults[level, BAD] = UIDS[level]
    _check_recovery(make_site(tmp_path / "site"), dimse, dimse.find_faults.clear)


def test_c_find_need_not_repeat_the_accession_number(tmp_path: Path, dimse: DimseFaults) -> None:
    dimse.find_faults = {("STUDY", number): "AccessionNumber" for number in range(COUNT)}
    assert _add(make_site(tmp_path / "site"), dimse)[1]["used"] == COUNT
