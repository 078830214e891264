"""Hostile uploads: whatever comes, nothing crashes, nothing is written outside the room, and the room goes on."""

from __future__ import annotations

import io
import resource
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.inference.reading_room.file_judge import ImageJob
from pneumofed.inference.reading_room.viewing import ORIGINAL_FILE
from pneumofed.inference.reading_room.worker import Worker
from tests.hostile import mutate
from tests.inference.reading_room.stage import Stage, files_below, phantom_dicom, phantom_png, problem, upload
from tests.inference.reading_room.treacherous import load_treacherous

MIB = 2**20


def png_of(width: int, height: int) -> bytes:
    """A PNG that claims a size, with few bytes of data."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    chunks = [len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../outside.png", b"\0" * 50 * MIB)
    return buffer.getvalue()


def deflated_bomb() -> bytes:
    """A deflated DICOM data set (PS3.5, A.5) of a gigabyte of zeros."""
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    whole = phantom_dicom(syntax=DeflatedExplicitVRLittleEndian)
    meta_end = 132 + 12 + int.from_bytes(whole[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    megabyte = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)  # after which the packer remembers nothing
    return whole[:meta_end] + megabyte * 1024 + packer.flush()


@pytest.mark.parametrize(
    ("file", "error"),
    [
        (png_of(60_000, 60_000), "too_large"),
        (png_of(2**31 - 1, 1), "too_large"),
        (png_of(100, 100), "corrupt"),
        (zip_bomb(), "archive_file"),
        (b"\x1f\x8b\x08" + bytes(100), "archive_file"),
        (phantom_dicom(Rows=65_535, Columns=65_535), "too_large"),
        (phantom_dicom()[:700], "corrupt"),
        (b"MZ" + bytes(200), "unknown_format"),
        (b"<svg onload=alert(1)>", "unknown_format"),
    ],
    ids=["png-huge", "png-wide", "png-short", "zip", "gzip", "dicom-huge", "dicom-short", "program", "svg"],
)
def test_bombs_are_refused_by_what_they_claim(stage: Stage, file: bytes, error: str) -> None:
    before = files_below(stage.room.folder.path.parent)
    with stage.signed_in() as client:
        [done] = upload(client, file)
        assert (done["outcome"], done["error"]) == ("refused", error)
        assert problem(client.post("/api/predict", content=file)) == (422, error)
        assert upload(client, phantom_png())[0]["outcome"] == "new"
    new = files_below(stage.room.folder.path.parent) - before
    assert all(path.is_relative_to(stage.room.folder.path) for path in new)
    assert not files_below(stage.room.folder.quarantine)


@pytest.mark.slow
def test_a_deflated_bomb_is_refused_in_little_memory(stage: Stage) -> None:
    bomb = deflated_bomb()
    assert len(bomb) < 2 * MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with stage.signed_in() as client:
        [done] = upload(client, bomb)
    assert done["outcome"] == "refused"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1536 * 1024  # KiB; twice 512 MiB and some


@pytest.mark.parametrize("name", ["../../evil.png", "/etc/evil.png", "..\\evil.png", "a\0b.png", "x" * 3000, "DOE^JANE 4711.dcm"])
def test_a_files_name_is_thrown_away(stage: Stage, name: str) -> None:
    with stage.signed_in() as client:
        [done] = upload(client, phantom_png(), name=name)
    assert done["outcome"] == "new"
    outside = files_below(stage.room.folder.path.parent) - files_below(stage.room.folder.path)
    assert not outside
    names = {path.name for path in files_below(stage.room.folder.store)}
    assert names <= {ORIGINAL_FILE, "pixels.gz", "map.npy", "facts.json", "measures.npz"}
    assert name.encode() not in stage.room.folder.database.read_bytes()


def test_paths_in_tags_lead_nowhere(stage: Stage) -> None:
    path = "../../../../tmp/evil"
    tags: dict[str, Any] = {
        "PatientID": path,
        "AccessionNumber": "/etc/passwd",
        "StudyID": path,
        "SOPInstanceUID": "1.2.3",
        "PatientName": path,
    }
    with stage.signed_in() as client:
        [done] = upload(client, phantom_dicom(**tags))
        case = client.get(f"/api/cases/{done['case']}").json()
    assert case["patient"] == path
    assert not files_below(stage.room.folder.path.parent) - files_below(stage.room.folder.path)


@pytest.mark.parametrize("path", ["../app.py", "..%2fapp.py", "%2e%2e/room.db", "", ".", "index.html%00.js", "x/../../app.py"])
def test_the_pages_files_are_all_that_is_served(stage: Stage, path: str) -> None:
    with stage.visitor() as client:
        assert client.get(f"/static/{path}").status_code == 404


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b""),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=files\r\n\r\nno end"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="other"\r\n\r\nx\r\n--b--\r\n'),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"X: " + b"y" * 10_000 + b"\r\n\r\nx\r\n--b--\r\n"),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"X: y\r\n" * 100 + b"\r\nx\r\n--b--\r\n"),
        ("multipart/form-data; boundary=" + "b" * 5000, b"x"),
        ("application/json", b"{}"),
        ("", b"files=x"),
    ],
)
def test_broken_forms_are_refused_and_leave_nothing(stage: Stage, kind: str, body: bytes) -> None:
    with stage.signed_in() as client:
        answer = client.post("/api/cases", content=body, headers={"Content-Type": kind})
    assert problem(answer) == (422, "invalid_request")
    assert not files_below(stage.room.folder.quarantine)


def test_limits_of_uploads(tmp_path: Path) -> None:
    stage = Stage(tmp_path, upload={"file_mb": 1, "files": 2, "request_mb": 3})
    with stage.signed_in() as client:
        large, good = bytes(MIB + 1), phantom_png()
        assert [file["error"] for file in upload(client, large, good)] == ["file_too_large", None]
        many = client.post("/api/cases", files=[("files", ("x", good))] * 3)
        assert problem(many) == (413, "too_many_files")
        most = client.post("/api/cases", files=[("files", ("x", bytes(2 * MIB)))] * 2)
        assert problem(most) == (413, "request_too_large")
        assert problem(client.post("/api/predict", content=large)) == (413, "file_too_large")
    assert not files_below(stage.room.folder.quarantine)
    assert len(stage.room.cases.ids()) == 1


def test_mutated_uploads_are_judged_or_refused(stage: Stage) -> None:
    outcomes = upload_mutated(stage, 50, seed=0)
    assert sum(outcomes.values()) == 50
    assert len(outcomes) >= 3


def upload_mutated(stage: Stage, count: int, seed: int) -> Counter[str]:
    """Uploads `count` damaged files, five a request, and counts what came of them. Nothing may lie outside the room afterwards."""
    generator = np.random.default_rng(seed)
    originals = [phantom_png(), phantom_dicom(), phantom_dicom(WindowCenter="1500", WindowWidth="1000")]
    outcomes: Counter[str] = Counter()
    outside = files_below(stage.room.folder.path.parent) - files_below(stage.room.folder.path)
    with stage.signed_in() as client:
        for _ in range(count // 5):
            files = [mutate(originals[generator.integers(len(originals))], generator) for _ in range(5)]
            outcomes.update(file["error"] or file["outcome"] for file in upload(client, *files))
        assert client.get("/api/health").json()["ready"]
    assert files_below(stage.room.folder.path.parent) - files_below(stage.room.folder.path) == outside
    assert not files_below(stage.room.folder.quarantine)
    return outcomes


@pytest.mark.slow
def test_two_thousand_mutated_uploads(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    outcomes = upload_mutated(stage, 2000, seed=1)
    assert sum(outcomes.values()) == 2000
    stage.room.close()


def test_a_worker_that_a_file_kills_or_holds_is_replaced(tmp_path: Path) -> None:
    worker = Worker(load_treacherous, memory_mb=512, limit_sec=1.0)

    def told(word: str) -> SkipReason:
        (tmp_path / ORIGINAL_FILE).write_text(f"{word} now")
        outcome = worker(ImageJob(tmp_path, keep=False))
        assert isinstance(outcome, ImageError)
        return outcome.reason

    try:
        assert told("go") == SkipReason.CONSTANT
        assert told("die") == SkipReason.CORRUPT
        assert told("eat") == SkipReason.TOO_LARGE
        assert told("raise") == SkipReason.UNREADABLE
        assert told("hang") == SkipReason.CORRUPT
        assert told("go") == SkipReason.CONSTANT
    finally:
        worker.close()
