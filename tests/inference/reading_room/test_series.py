"""A CT series in a room whose model judges CT: in by every way, read slice by slice, refused in words, and as private as a radiograph."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from fastapi.testclient import TestClient

from pneumofed.common.audit.log import read_entries
from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.types import LUNG_WINDOW
from pneumofed.common.imaging.volumes import Volume, apply_ct_window, field_of_view, fit_volume, read_volume
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.model_bundle.series import read_series
from pneumofed.inference.explain.volumes import volume_map
from pneumofed.inference.reading_room.file_judge import FileJudge, ImageJob, SeriesLimits
from pneumofed.inference.reading_room.series import map_at, strongest_slice
from pneumofed.inference.reading_room.viewing import ORIGINAL_FILE
from tests.inference.reading_room.series_files import ct_stage, edited, nifti_file, one_of, series_files, volume_bundle, zip_of
from tests.inference.reading_room.stage import ADMIN, Stage, files_below, phantom_dicom, phantom_png, problem, sign_in, upload
from tests.volume_bundles import GRID, IMAGE, drawn_volume, patients, volume_network, write_series

SLICES = GRID.slices


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Stage]:
    made = ct_stage(tmp_path)
    yield made
    made.room.close()


def post(client: TestClient, *files: bytes) -> dict[str, Any]:
    """What came of one request with these files."""
    return one_of(client.post("/api/cases", files=[("files", ("image", file)) for file in files]))


def pixels_of(client: TestClient, case: str, **asked: Any) -> np.ndarray:
    answer = client.get(f"/api/cases/{case}/pixels", params=asked)
    assert answer.status_code == 200, answer.text
    shape = [int(answer.headers[f"X-Image-{side}"]) for side in ("Height", "Width")]
    return np.frombuffer(answer.content, "<u2").reshape(shape)


def hounsfield(values: np.ndarray) -> np.ndarray:
    return values.astype(int) // 16 - 1024


def test_a_series_is_one_case_with_the_answer_of_predict(room: Stage, tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series", patients(80)[0])
    predictor = Predictor(volume_bundle(), threads=1)
    (expected,) = predictor.judge([predictor.read(folder).image])
    with room.signed_in() as client:
        done = post(client, *series_files())
        case = client.get(f"/api/cases/{done['case']}").json()
        worklist = client.post("/api/worklist", json={}).json()
    assert (done["outcome"], done["index"], worklist["total"]) == ("new", 0, 1)
    assert expected.prediction is not None
    assert case["verdict"] == expected.verdict
    assert (case["probability"], case["low"], case["high"]) == (
        expected.prediction.probability, expected.prediction.low, expected.prediction.high,
    )  # fmt: skip
    assert (case["patient"], case["modality"], case["image"]["format"]) == ("P0", "CT", "dicom")
    facts = case["image"]["facts"]
    assert facts["series"]["slices"] == SLICES
    assert facts["series"]["spacing_mm"] == pytest.approx(GRID.spacing_mm[0])
    assert facts["series"]["first_mm"] == pytest.approx(float(GRID.axes()[0].ravel()[0]), abs=0.01)
    assert facts["pixel"] == {"row_mm": GRID.spacing_mm[1], "column_mm": GRID.spacing_mm[2], "kind": "patient"}
    assert {"KVP", "Slice Thickness"} & {one["name"] for one in facts["attributes"]}
    window, values = case["image"]["window"], facts["values"]
    span = values["high"] - values["low"]
    assert values["low"] + window["center"] * span == pytest.approx(LUNG_WINDOW.center)
    assert window["width"] * span == pytest.approx(LUNG_WINDOW.width)


def test_each_slice_has_the_hounsfield_units_of_the_volume_from_feet_to_head(room: Stage) -> None:
    volume = drawn_volume(patients(80)[0])
    with room.signed_in() as client:
        case = post(client, *series_files())["case"]
        for number in (1, 5, SLICES):
            expected = np.clip(volume.hounsfield[number - 1], -1024, 3071)
            np.testing.assert_array_equal(hounsfield(pixels_of(client, case, slice=number)), expected)
        plain = client.get(f"/api/cases/{case}/pixels", params={"slice": 5}, headers={"Accept-Encoding": "identity"})
        assert "Content-Encoding" not in plain.headers
        assert plain.content == pixels_of(client, case, slice=5).tobytes()
        assert pixels_of(client, case, slice=5, max_side=64).shape == (32, 32)
        picture = client.get(f"/api/cases/{case}/image.png", params={"slice": 5}).content
        shown = np.asarray(PIL.Image.open(io.BytesIO(picture)))
        expected = apply_ct_window(volume.hounsfield[4], LUNG_WINDOW)
        assert np.abs(shown.astype(int) - expected).max() <= 1
        for wrong in (SLICES + 1, 90_000):
            for what in ("pixels", "image.png", "map", "map.png"):
                assert problem(client.get(f"/api/cases/{case}/{what}", params={"slice": wrong})) == (404, "no_slice")
        assert problem(client.get(f"/api/cases/{case}/pixels", params={"slice": 0})) == (422, "invalid_request")


def test_every_way_in_gives_the_same_answer(room: Stage, tmp_path: Path) -> None:
    ways: dict[str, tuple[bytes, ...]] = {
        "files": series_files(),
        "zip": (zip_of(series_files(1)[::-1]),),
        "nii.gz": (nifti_file(tmp_path, 2),),
        "nii": (nifti_file(tmp_path, 3, ".nii"),),
        "zip of nii": (zip_of([nifti_file(tmp_path, 4, ".nii")], "v.nii"),),
    }
    predictor = Predictor(volume_bundle(), threads=1)
    with room.signed_in() as client:
        for number, files in enumerate(ways.values()):
            case = client.get(f"/api/cases/{post(client, *files)['case']}").json()
            volume = drawn_volume(patients(80)[number])
            image, _ = read_series(write_series(tmp_path / f"s{number}", patients(80)[number]), IMAGE)
            (expected,) = predictor.judge([image])
            judged = expected.prediction and expected.prediction.probability
            assert case["verdict"] == expected.verdict
            assert case["probability"] == (judged and pytest.approx(judged, abs=1e-6))
            np.testing.assert_array_equal(hounsfield(pixels_of(client, case["id"], slice=3)), volume.hounsfield[2])
            assert case["image"]["facts"]["series"]["first_mm"] == pytest.approx(float(GRID.axes()[0].ravel()[0]), abs=0.01)
            predicted = client.post("/api/predict", files=[("files", ("x", file)) for file in files]).json()
            assert predicted["probability"] == case["probability"]
        alone = client.post("/api/predict", content=ways["nii.gz"][0]).json()
        assert alone["verdict"] in ("pneumonia", "normal", "cannot judge")


def test_several_volumes_in_one_request_are_series_of_their_own(room: Stage, tmp_path: Path) -> None:
    files = [nifti_file(tmp_path, 2), *series_files(), zip_of(series_files(1))]
    with room.signed_in() as client:
        answer = client.post("/api/cases", files=[("files", ("image", file)) for file in files]).json()["files"]
    assert [(one["index"], one["outcome"]) for one in answer] == [(0, "new"), (1, "new"), (SLICES + 1, "new")]


def test_the_same_series_is_one_case_whatever_the_order_or_the_archive(room: Stage) -> None:
    with room.signed_in() as client:
        first = post(client, *series_files())
        for again in (series_files()[::-1], (zip_of(series_files()),), (zip_of(series_files()[::-1], "{}"),)):
            done = post(client, *again)
            assert (done["outcome"], done["case"]) == ("known", first["case"])
        assert client.post("/api/worklist", json={}).json()["total"] == 1
    assert not files_below(room.room.folder.quarantine)
    assert len(list(room.room.folder.store.glob("??/*"))) == 1


def test_the_map_is_grad_cam_in_three_dimensions(room: Stage, tmp_path: Path) -> None:
    """Of `explain`, brought to each slice of the series, in parts of the strongest evidence for or against."""
    import torch

    volume = drawn_volume(patients(80)[0])
    inputs = torch.from_numpy(fit_volume(volume, IMAGE.size_px, IMAGE.slices).astype(np.float32) / 255)[None, None]
    found = volume_map(volume_network(), inputs)
    assert found.values.any()
    with room.signed_in() as client:
        case = post(client, *series_files())["case"]
        detail = client.get(f"/api/cases/{case}").json()
        maps = [client.get(f"/api/cases/{case}/map", params={"slice": number + 1}).json() for number in range(SLICES)]
        shown = client.get(f"/api/cases/{case}/map").json()
        picture = client.get(f"/api/cases/{case}/map.png", params={"slice": detail["image"]["facts"]["series"]["strongest"]})
        explained = client.post("/api/explain", files=[("files", ("x", file)) for file in series_files()]).json()
    assert detail["has_map"]
    (start, length), (top, height), (left, width) = field_of_view(volume)
    assert maps[0]["area"] == pytest.approx({"left": left, "top": top, "width": width, "height": height})
    values = np.array([np.reshape(one["values"], (one["rows"], one["columns"])) for one in maps])
    places = ((np.arange(SLICES) + 0.5) / SLICES - start) / length * IMAGE.slices - 0.5
    inside = [number for number, place in enumerate(places) if 0.0 <= place <= IMAGE.slices - 1]
    grid = found.values[:, 16, 16]  # cells of the small network are the whole slice
    expected = np.interp(places, np.arange(IMAGE.slices), grid)
    ratio = values[inside, 0, 0] / expected[inside]
    assert np.nanmax(ratio) == pytest.approx(np.nanmin(ratio), rel=1e-3)
    weights = values.sum(axis=(1, 2))
    strongest = detail["image"]["facts"]["series"]["strongest"]
    assert strongest == int(np.argmax(weights)) + 1
    assert shown["values"] == maps[(SLICES + 1) // 2 - 1]["values"]
    assert "too_coarse" in detail["map_warnings"]
    assert PIL.Image.open(io.BytesIO(picture.content)).size == (32, 32)
    assert explained["map"]["planes"] == IMAGE.slices
    assert explained["map"]["span"] == pytest.approx([start, length])
    assert max(explained["map"]["values"]) == pytest.approx(1.0) or max(explained["map"]["values"]) < 1


def test_a_map_is_cut_between_its_planes_and_ends_with_them() -> None:
    values = np.zeros((4, 1, 1), np.float32)
    values[1] = 1.0
    span = (0.25, 0.5)
    assert map_at(values, span, 0, 8) == 0  # before the map
    weights = [float(map_at(values, span, place, 8)[0, 0]) for place in range(8)]
    assert weights == [0, 0, 0, 1, 0, 0, 0, 0]
    assert strongest_slice(values, span, 8) == 4
    assert strongest_slice(np.zeros_like(values), span, 8) is None
    assert strongest_slice(None, span, 8) is None
    assert map_at(values, (0.0, 1.0), 1, 3)[0, 0] == pytest.approx(0.5)


REFUSED = {
    "a gap": (lambda files: [*files[:4], *files[6:]], "missing_slices", "2 positions without an image"),
    "tilt": (lambda files: edited(files, GantryDetectorTilt=12.5), "gantry_tilt", "12.5 degrees"),
    "two series": (lambda files: [*files, *series_files(1)], "mixed_series", "2 series"),
    "in time": (lambda files: [*files, *_again(files)], "time_series", f"{2 * SLICES} images at {SLICES} positions"),
    "one slice": (lambda files: files[:1], "no_slices", "1 found"),
    "a radiograph": (lambda _: [phantom_dicom()], "not_ct", "modality DX"),
    "a picture": (lambda _: [phantom_png()], "not_ct", "a PNG picture"),
    "an MR": (lambda files: edited(files, Modality="MR"), "not_ct", "modality MR"),
    "no position": (lambda files: edited(files, ImagePositionPatient=None), "no_geometry", "state no usable position"),
    "no rescale": (lambda files: edited(files, RescaleType="OD"), "not_hounsfield", "no rescale"),
}


def _again(files: list[bytes]) -> list[bytes]:
    return [edited([file], SOPInstanceUID=f"1.2.3.{number}")[0] for number, file in enumerate(files)]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_series_is_refused_with_the_readers_sentence(room: Stage, name: str) -> None:
    change, code, cause = REFUSED[name]
    files = change(list(series_files()))
    with room.signed_in() as client:
        done = post(client, *files)
        zipped = post(client, zip_of(files))
        predicted = client.post("/api/predict", files=[("files", ("x", file)) for file in files])
        total = client.post("/api/worklist", json={}).json()["total"]
    for one in (done, zipped):
        assert (one["outcome"], one["error"], one["case"]) == ("refused", code, None)
        assert cause in one["cause"]
        assert one["detail"].endswith(one["cause"])
    assert problem(predicted) == (422, code)
    assert cause in predicted.json()["detail"]
    assert total == 0
    assert not files_below(room.room.folder.quarantine)


def test_a_4d_nifti_is_refused(room: Stage, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(np.full((16, 16, 8, 3), -900, np.int16), np.eye(4)), tmp_path / "t.nii.gz")
    with room.signed_in() as client:
        done = post(client, (tmp_path / "t.nii.gz").read_bytes())
    assert (done["error"], done["cause"]) == ("time_series", "NIfTI with 3 volumes; give each a file of its own")


def test_a_bad_file_refuses_the_series_that_would_have_a_gap_without_it(room: Stage, tmp_path: Path) -> None:
    files = [*series_files()[:5], b"", *series_files()[6:]]
    with room.signed_in() as client:
        both = client.post("/api/cases", files=[("files", ("image", file)) for file in [*files, nifti_file(tmp_path, 2)]])
    first, second = both.json()["files"]
    assert (first["index"], first["outcome"], first["error"]) == (5, "refused", "empty")
    assert (second["index"], second["outcome"]) == (SLICES, "new")


def test_a_room_of_radiographs_says_that_a_series_is_none(stage: Stage, tmp_path: Path) -> None:
    with stage.signed_in() as client:
        done = upload(
            client,
            series_files()[0],
            nifti_file(tmp_path),
            nifti_file(tmp_path, 0, ".nii"),
            zip_of(series_files()),
            phantom_png(),
        )
        assert problem(client.post("/api/predict", content=series_files()[0])) == (422, "ct_image")
        assert problem(client.post("/api/predict", content=nifti_file(tmp_path))) == (422, "ct_image")
        known = client.get(f"/api/cases/{done[-1]['case']}").json()
        assert problem(client.get(f"/api/cases/{known['id']}/pixels", params={"slice": 1})) == (404, "no_slice")
        assert client.get("/api/room").json()["model"]["slices"] == 0
    assert [one["error"] for one in done] == ["ct_image", "ct_image", "ct_image", "archive_file", None]
    assert "judges radiographs" in done[0]["detail"]
    assert known["image"]["facts"]["series"] is None


def test_a_multi_frame_ct_is_known_as_one_in_a_room_of_radiographs(stage: Stage) -> None:
    with stage.signed_in() as client:
        [done] = upload(client, phantom_dicom(NumberOfFrames=3, Modality="CT"))
    assert done["error"] == "ct_image"


def test_limits_of_a_series(tmp_path: Path) -> None:
    stage = ct_stage(tmp_path, upload={"slices": 10, "request_mb": 1})
    with stage.signed_in() as client:
        limits = client.get("/api/room").json()["limits"]
        assert (limits["files"], limits["file_bytes"]) == (10, 2**20)
        many = client.post("/api/cases", files=[("files", ("image", file)) for file in series_files()])
        assert problem(many) == (413, "too_many_files")
    stage.room.close()


def bomb(claim: int | None = None) -> bytes:
    """A zip of a file of 50 MiB of zeros, which may claim another size."""
    data = zip_of([bytes(50 * 2**20)], "../../outside.dcm")
    if claim is None:
        return data
    real = (50 * 2**20).to_bytes(4, "little")
    return data.replace(real, claim.to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (bomb, SkipReason.TOO_LARGE),
        (lambda: bomb(1000), SkipReason.CORRUPT),
        (lambda: zip_of([b"x"] * 20), SkipReason.TOO_LARGE),
        (lambda: zip_of([]), SkipReason.NO_SLICES),
        (lambda: zip_of([zip_of([b"x"])], "in.zip"), SkipReason.CORRUPT),
        (lambda: zip_of(series_files())[:-300], SkipReason.CORRUPT),
    ],
    ids=["bomb", "lying bomb", "many files", "nothing", "zip in zip", "cut off"],
)
def test_archives_that_would_fill_the_disk_or_hide_others_are_refused(
    tmp_path: Path, archive: Callable[[], bytes], reason: SkipReason
) -> None:
    folder, uploaded = tmp_path / "job", archive()
    folder.mkdir()
    (folder / ORIGINAL_FILE).write_bytes(uploaded)
    judge = FileJudge(Predictor(volume_bundle(), threads=1), limits=SeriesLimits(files=10, unpacked_bytes=20 * 2**20))
    found = judge(ImageJob(folder, keep=True))
    assert isinstance(found, ImageError)
    assert found.reason is reason
    assert sum(path.stat().st_size for path in files_below(folder)) <= 21 * 2**20 + len(uploaded)
    assert {path.relative_to(tmp_path).parts[0] for path in files_below(tmp_path)} <= {"job"}


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    data = bytearray(zip_of(series_files()[:1]))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    (tmp_path / ORIGINAL_FILE).write_bytes(bytes(data))
    found = FileJudge(Predictor(volume_bundle(), threads=1))(ImageJob(tmp_path, keep=True))
    assert isinstance(found, ImageError)
    assert found.reason is SkipReason.CORRUPT


def test_names_in_an_archive_place_no_file_and_are_not_kept(room: Stage) -> None:
    before = files_below(room.room.folder.path.parent)
    with room.signed_in() as client:
        done = post(client, zip_of(series_files(), "../../../DOE^JANE/{}.dcm"))
    assert done["outcome"] == "new"
    added = files_below(room.room.folder.path.parent) - before
    assert all(room.room.folder.path in path.parents for path in added)
    assert not [path for path in added if "DOE" in str(path)]


def test_a_volume_beyond_the_memory_of_a_worker_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    write_series(tmp_path / ORIGINAL_FILE, patients(80)[0])
    judge = FileJudge(Predictor(volume_bundle(), threads=1), limits=SeriesLimits(voxel_bytes=1000))
    found = judge(ImageJob(tmp_path, keep=True))
    assert isinstance(found, ImageError)
    assert (found.reason, "voxels" in found.detail) == (SkipReason.TOO_LARGE, True)


def test_what_cannot_be_judged_has_slices_and_no_number(room: Stage) -> None:
    files = edited(series_files(), BodyPartExamined="HEAD")
    with room.signed_in() as client:
        case = client.get(f"/api/cases/{post(client, *files)['case']}").json()
        assert (case["verdict"], case["reasons"], case["probability"]) == ("cannot judge", ["not_the_chest"], None)
        assert (case["has_map"], case["image"]["facts"]["series"]["strongest"]) == (False, None)
        np.testing.assert_array_equal(pixels_of(client, case["id"]), pixels_of(client, case["id"], slice=(SLICES + 1) // 2))
        assert problem(client.get(f"/api/cases/{case['id']}/map")) == (404, "no_map")


def test_findings_labels_audit_and_deletion_are_those_of_radiographs(room: Stage) -> None:
    with room.signed_in() as client:
        done = post(client, *edited(series_files(), PatientName="Doe^Jane", PatientID="4711"))
        assert done["patient_name"] == "Doe Jane"
        case = done["case"]
        assert client.post(f"/api/cases/{case}/findings", json={"label": "viral", "note": "ground glass"}).status_code == 201
        client.get(f"/api/cases/{case}")
        sign_in(client, ADMIN)
        [row] = csv.DictReader(io.StringIO(client.get("/api/labels.csv").text))
        assert Path(row["path"]).is_dir()
        assert read_volume(row["path"]).hounsfield.shape == GRID.shape
        assert (row["label"], row["case"]) == ("viral", case)
        assert row["patient"] not in ("", "4711")
        folder = room.room.store.path(case)
        assert {path.stat().st_mode & 0o077 for path in room.room.folder.path.rglob("*")} == {0}
        others = [path for path in files_below(room.room.folder.path) if path.parent.name != ORIGINAL_FILE]
        assert not [path for path in others if b"Doe" in path.read_bytes()]
        found = room.room.cases.find(case)
        assert found is not None
        assert found.bytes == sum(path.stat().st_size for path in files_below(folder))
        assert client.delete(f"/api/cases/{case}").status_code == 204
    assert not folder.exists()
    events = [entry.event for entry in read_entries(room.room.folder.audit)]
    assert [event for event in events if event.startswith(("case", "finding", "labels"))] == [
        "case-added", "finding", "case-opened", "labels-exported", "case-removed",
    ]  # fmt: skip


def test_what_was_set_aside_is_said(room: Stage) -> None:
    with room.signed_in() as client:
        files = [*series_files(), b"DICOMDIR of a disk"]
        case = client.get(f"/api/cases/{post(client, *files)['case']}").json()
    assert case["image"]["facts"]["series"]["notes"] == ["files without an image: 1 set aside"]


def test_slices_are_for_readers_only(room: Stage) -> None:
    with room.signed_in() as client:
        case = post(client, *series_files())["case"]
    with room.visitor() as stranger:
        token = room.room.users.add_token("ris")
        for what in ("pixels", "image.png", "map", "map.png"):
            asked: dict[str, Any] = {"url": f"/api/cases/{case}/{what}", "params": {"slice": 2}}
            assert stranger.get(**asked).status_code == 401
            assert stranger.get(**asked, headers={"Authorization": f"Bearer {token}"}).status_code == 401


def test_the_map_of_a_tall_series_covers_what_the_model_saw_of_it() -> None:
    """Belly below a thorax, twice as high as the cube: the cube lies where the lungs are, and there the map."""
    chest = drawn_volume(patients(80)[0])
    tall = Volume(np.concatenate([np.full_like(chest.hounsfield, 40), chest.hounsfield]), chest.spacing_mm, ())
    (start, length), _, (left, width) = field_of_view(tall)
    height = 2 * SLICES * GRID.spacing_mm[0]
    assert length * height == pytest.approx(400.0)
    assert width * 32 * GRID.spacing_mm[2] == pytest.approx(400.0)
    assert left + width / 2 == pytest.approx(0.5)
    inside = fit_volume(tall, 32, 8).mean(axis=(1, 2))  # of the grid, whose planes are of the same length each
    planes = [(start + (place + 0.5) / 8 * length) * 2 * SLICES for place in range(8)]
    lungs = apply_ct_window(tall.hounsfield, LUNG_WINDOW).mean(axis=(1, 2))
    shown = [lungs[int(plane)] for plane in planes if 0 <= plane < 2 * SLICES]
    assert np.corrcoef(shown, inside[: len(shown)])[0, 1] > 0.9


def test_a_damaged_store_is_an_error_and_no_picture(room: Stage) -> None:
    with room.signed_in() as client:
        case = post(client, *series_files())["case"]
        with (room.room.store.path(case) / "slices.bin").open("r+b") as file:
            file.truncate(1000)
        assert problem(client.get(f"/api/cases/{case}/pixels", params={"slice": 9})) == (500, "internal")


def test_zip_module_is_what_counts_sizes() -> None:
    """`bomb` really claims a small size, else its test would say nothing."""
    [member] = zipfile.ZipFile(io.BytesIO(bomb(1000))).infolist()
    assert member.file_size == 1000
