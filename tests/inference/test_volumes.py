"""A bundle of CT volumes: its graph, its answers for series, what it refuses, and its maps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from captum.attr import LayerGradCam
from pydicom import dcmread
from typer.testing import CliRunner

import pneumofed
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.data.cache import load_digests
from pneumofed.common.data.dataset import load_dataset
from pneumofed.common.data.manifest import ImageRecord, Manifest
from pneumofed.common.errors import ArgumentError, ConfigError, EmptySiteError, SkipReason
from pneumofed.common.imaging.volumes import Volume, fit_volume, read_volume
from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.model_bundle.image_statistics import as_pictures, pixel_statistics
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.model_bundle.series import find_series
from pneumofed.common.models.build import build_model
from pneumofed.inference.cli.predict import explain_command, predict_command
from pneumofed.inference.explain.cam import LogOdds, target_layer, volume_map
from pneumofed.inference.explain.pictures import choose_slices, place_on_slices, strongest_slices
from pneumofed.inference.predict.dicom_objects import MapScale, make_parametric_map, make_report, read_source_headers
from pneumofed.server.export.graph import run_torch
from pneumofed.server.export.graph_checks import ExportImages
from tests.common.imaging.test_ct_series import ct_slice, enhanced_ct, item
from tests.inference.predict.pictures import write_phantom
from tests.model_bundles import phantom_images
from tests.volume_bundles import IMAGE, drawn_inputs, drawn_volume, make_volume_bundle, patients, volume_network, write_series

app = typer.Typer()
app.command("predict")(predict_command)
app.command("explain")(explain_command)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_volume_bundle(tmp_path_factory.mktemp("ct") / "bundle")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients with a series each, and a radiograph in a folder of its own."""
    folder = tmp_path_factory.mktemp("archive")
    for patient in patients(80)[:2]:
        write_series(folder / f"patient{patient.number}" / "study" / "series", patient)
    (folder / "x").mkdir()
    write_phantom(folder / "x" / "radiograph.dcm", 0)
    return folder


def floats(count: int) -> np.ndarray:
    return (drawn_inputs(80)[:count].astype(np.float32) / np.float32(255.0))[:, None]


def test_the_graph_of_volumes_is_the_network_and_its_map_adds_up_to_the_logit(bundle: Path) -> None:
    predictor, network = Predictor(load_bundle(bundle, None), threads=1), volume_network()
    inputs = floats(3)
    found = predictor.run(inputs)
    logits, features, activations, cam = run_torch(network, 1, inputs)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4)
    np.testing.assert_allclose(found["features"], features, atol=1e-4)
    assert found["cam"].shape == cam.shape == (3, 8, 1, 1)
    assert activations.shape == (3, 512, 8, 1, 1)
    bias = dict(network.named_parameters())["head.bias"].detach().numpy()
    np.testing.assert_allclose(found["cam"].mean(axis=(1, 2, 3)) + bias[1] - bias[0], logits[:, 1] - logits[:, 0], atol=1e-4)


def test_a_series_is_judged_as_its_volume_is(bundle: Path, archive: Path) -> None:
    model = pneumofed.open_bundle(bundle, threads=1)
    assert model.takes_volumes
    series = list(find_series([archive / "patient1", archive / "patient2"]))
    assert [path.name for path in series] == ["series", "series"]
    answers = model.predict(series)
    for answer, patient in zip(answers, patients(80)[:2], strict=True):
        assert answer.status == "judged"
        assert answer.probability == model.predict(drawn_volume(patient)).probability
    assert answers[0].probability == model.predict(str(series[0])).probability
    assert answers[0].population is not None


def test_what_is_no_ct_or_no_chest_as_the_reference_cannot_be_judged(bundle: Path, archive: Path, tmp_path: Path) -> None:
    model = pneumofed.open_bundle(bundle, threads=1)
    radiograph = model.predict(archive / "x" / "radiograph.dcm")
    assert (radiograph.status, radiograph.reasons, radiograph.probability) == ("cannot judge", ("not_ct",), None)
    volume = drawn_volume(patients(80)[0])
    turned = replace(volume, hounsfield=np.ascontiguousarray(volume.hounsfield[::-1]))
    noise = np.random.default_rng(0).integers(-1000, 1000, volume.hounsfield.shape).astype(np.int16)
    for strange in (turned, Volume(noise, volume.spacing_mm, ())):
        assert model.predict(strange).status == "cannot judge"
    assert model.predict(tmp_path / "nothing").status == "unreadable"
    with pytest.raises(ArgumentError, match="judges CT volumes"):
        model.predict(np.zeros((64, 64), np.float32))


def test_the_predictor_refuses_an_array_of_the_other_kind(bundle: Path) -> None:
    predictor = Predictor(load_bundle(bundle, None), threads=1)
    with pytest.raises(ValueError, match="expected a CT volume"):
        predictor.judge([phantom_images(1)[0][0]])


def test_predict_counts_series_and_not_files(bundle: Path, archive: Path) -> None:
    found = CliRunner().invoke(app, ["predict", str(archive), "--bundle", str(bundle), "--json", "--threads", "1"])
    told = json.loads(found.stdout)
    assert [Path(row["file"]).name for row in told["images"]] == ["series", "series", "x"]
    assert [row["status"] for row in told["images"]] == ["judged", "judged", "cannot_judge"]
    assert told["images"][0]["study"]
    assert told["images"][0]["population"]["age_group"]


@pytest.fixture(scope="module")
def rows(bundle: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `predict --sr --overlay` says of the two series and the radiograph."""
    out = tmp_path_factory.mktemp("objects")
    given = ["predict", str(archive), "--bundle", str(bundle), "--json", "--threads", "1"]
    result = CliRunner().invoke(app, [*given, "--sr", str(out / "sr"), "--overlay", str(out / "overlay")])
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)["images"]
    return found


def headers(series: Path) -> list[Any]:
    return [dcmread(file, stop_before_pixels=True) for file in sorted(series.iterdir())]


def items(content: Any) -> list[Any]:
    return [content, *(item for child in content.get("ContentSequence", []) for item in items(child))]


def test_the_report_of_a_series_names_each_of_its_slices(rows: list[dict[str, Any]], archive: Path) -> None:
    for row in rows[:2]:
        slices, report = headers(Path(row["file"])), dcmread(row["report"])
        uids = {one.SOPInstanceUID for one in slices}
        assert (report.StudyInstanceUID, report.PatientID) == (slices[0].StudyInstanceUID, slices[0].PatientID)
        (series,) = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        assert series.SeriesInstanceUID == slices[0].SeriesInstanceUID != report.SeriesInstanceUID
        assert {one.ReferencedSOPInstanceUID for one in series.ReferencedSOPSequence} == uids
        named = [one for one in items(report) if one.ValueType == "IMAGE"]
        assert {one.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for one in named} == uids
        codes = {one.ConceptCodeSequence[0].CodeMeaning for one in items(report) if one.ValueType == "CODE"}
        assert {"CT of chest", "Pneumonia"} <= codes and "Plain X-ray of chest" not in codes
        (chance,) = [one for one in items(report) if one.ConceptNameCodeSequence[0].CodeMeaning == "Probability"]
        assert float(chance.MeasuredValueSequence[0].NumericValue) == pytest.approx(100 * row["probability"], abs=1e-3)
    assert (rows[2]["report"], rows[2]["overlay"]) == ("", "")  # a radiograph: nothing was judged


def test_the_capture_of_a_series_shows_slices_and_names_them(rows: list[dict[str, Any]]) -> None:
    for row in rows[:2]:
        slices, capture = headers(Path(row["file"])), dcmread(row["overlay"])
        shown = {one.ReferencedSOPInstanceUID for one in capture.SourceImageSequence}
        assert 3 <= len(shown) <= 9 and shown < {one.SOPInstanceUID for one in slices}
        assert (capture.SOPClassUID.name, capture.PatientID) == ("Secondary Capture Image Storage", slices[0].PatientID)
        picture = capture.pixel_array
        assert picture.shape[1] == 3 * 340
        assert np.ptp(picture[:340].astype(int), axis=2).max() > 20  # warm


def test_a_series_that_cannot_be_judged_is_reported_without_numbers(bundle: Path, tmp_path: Path) -> None:
    """Turned upside down, by its positions."""
    for file in write_series(tmp_path / "series", patients(80)[0]).iterdir():
        dataset = dcmread(file)
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, -z]
        dataset.save_as(file)
    given = [
        "predict",
        str(tmp_path / "series"),
        "--bundle",
        str(bundle),
        "--json",
        "--threads",
        "1",
        "--sr",
        str(tmp_path / "sr"),
    ]
    (row,) = json.loads(CliRunner().invoke(app, given).stdout)["images"]
    assert row["status"] == "cannot_judge"
    report = dcmread(row["report"])
    assert not [one for one in items(report) if one.ValueType == "NUM"]
    assert any("cannot be judged" in one.get("TextValue", "") for one in items(report))


@pytest.mark.usefixtures("drawn")
def test_explain_writes_the_map_and_its_strongest_slices(bundle: Path, archive: Path, tmp_path: Path) -> None:
    arguments = ["explain", str(archive), "--bundle", str(bundle), "--out", str(tmp_path), "--json"]
    found = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert found["skipped"] == {SkipReason.NOT_CT.value: 1}
    assert found["sanity"]["grad-cam"]["pairs"] + found["sanity"]["grad-cam"]["constant"] == 6
    assert len(found["images"]) == 2
    for entry in found["images"]:
        told = entry["maps"]["grad-cam"]
        values = np.load(tmp_path / f"{entry['number']}-grad-cam.npy")
        assert values.shape == IMAGE.shape
        assert values.dtype == np.float32
        assert values.min() >= 0
        assert told["slices"] == sorted(told["slices"])
        assert (tmp_path / told["original"]).is_file() and "note" not in told
        assert [17 - (place + 1) for place in told["shown"]] == told["images"]  # numbered from the head downward
        if values.any():
            assert values[told["slices"]].sum() >= values.sum() * len(told["slices"]) / IMAGE.slices
        assert (tmp_path / f"{entry['number']}-grad-cam.png").stat().st_size > 10_000
    refused = CliRunner().invoke(app, [*arguments, "--method", "lime"])
    assert "CT volume" in str(refused.exception)
    refused = CliRunner().invoke(app, [*arguments, "--detail", "larger-input"])
    assert "CT volume" in str(refused.exception)


def test_the_parametric_map_lies_on_the_planes_of_the_slices(bundle: Path, archive: Path, tmp_path: Path) -> None:
    series = archive / "patient1" / "study" / "series"
    found = pneumofed.explain(bundle, series, check=False)
    over, slices = found.on_slices(), {one.SOPInstanceUID: one for one in headers(series)}
    made, step = dcmread(found.save(tmp_path / "map.dcm")), float(found.map.max()) / 255
    first = next(iter(slices.values()))
    assert made.SOPClassUID.name == "Parametric Map Storage"
    assert (made.StudyInstanceUID, made.PatientID, made.FrameOfReferenceUID) == (
        first.StudyInstanceUID, first.PatientID, first.FrameOfReferenceUID
    )  # fmt: skip
    assert len(made.PerFrameFunctionalGroupsSequence) == len(slices) == len(over)
    (mapping,) = made.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    for frame, pixels in zip(made.PerFrameFunctionalGroupsSequence, made.pixel_array, strict=True):
        (derived,) = frame.DerivationImageSequence[0].SourceImageSequence
        own = slices.pop(derived.ReferencedSOPInstanceUID)
        np.testing.assert_allclose(frame.PlanePositionSequence[0].ImagePositionPatient, own.ImagePositionPatient)
        np.testing.assert_allclose(pixels * mapping.RealWorldValueSlope, over[16 - own.InstanceNumber], atol=0.51 * step)
    assert not slices


@pytest.mark.parametrize("kind", ["multi-frame", "coronal"])
def test_objects_of_other_series_name_their_images_and_lie_where_these_do(bundle: Path, tmp_path: Path, kind: str) -> None:
    """Each voxel of the map is where the affine of the volume says, by the frame's own position and orientation."""
    study = {"StudyInstanceUID": "2.25.7", "SeriesInstanceUID": "2.25.8"}
    pixels = np.random.default_rng(3).integers(-1000, 1000, (12, 40, 48)).astype(np.int16)
    path = tmp_path / "series"
    path.mkdir()
    if kind == "multi-frame":
        whole = enhanced_ct(pixels)
        whole.update(item(**study))
        whole.save_as(path / "one.dcm", enforce_file_format=True)
    else:
        for place, plane in enumerate(pixels):
            tags = {"ImagePositionPatient": [-8.0, 3.0 * place, 50.0], "ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}
            ct_slice(plane, place, **study, **tags).save_as(path / f"{place}.dcm", enforce_file_format=True)
    predictor, volume = Predictor(load_bundle(bundle, None), threads=1), read_volume(path)
    assert volume.affine is not None
    stored = (np.arange(pixels.size) % 251).astype(np.uint8).reshape(volume.hounsfield.shape)
    made = make_parametric_map(path, stored, volume.affine, MapScale(0.1, "Grad-CAM"), predictor)
    orientation = np.reshape(made.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3))
    down, across = made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    frames, back = made.PerFrameFunctionalGroupsSequence, np.linalg.inv(volume.affine)
    assert made.pixel_array.shape == (12, 40, 48) and len(frames) == 12
    named = set()
    for frame, found in zip(frames, made.pixel_array, strict=True):
        corner = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in ((0, 0), (7, 31), (39, 47)):
            place = corner + float(across) * column * orientation[0] + float(down) * row * orientation[1]
            assert found[row, column] == stored[tuple(np.rint(back @ [*place, 1])[:3].astype(int))]
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        named.add((source.ReferencedSOPInstanceUID, source.get("ReferencedFrameNumber")))
    assert len(named) == 12
    (judgement,) = predictor.judge([predictor.read(path).image])
    report = make_report(read_source_headers(path), judgement, predictor)
    references = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert {one.ReferencedSOPInstanceUID for one in references} == {uid for uid, _ in named}


def test_a_nifti_files_map_has_its_axes(bundle: Path, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = drawn_volume(patients(80)[0])
    dz, dy, dx = volume.spacing_mm
    upright = nibabel.Nifti1Image(volume.hounsfield.transpose(2, 1, 0), np.diag([-dx, -dy, dz, 1.0]))
    turned = upright.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))  # slices are the last axis no more
    nibabel.save(turned, tmp_path / "volume.nii.gz")
    given = ["explain", str(tmp_path / "volume.nii.gz"), "--bundle", str(bundle), "--out", str(tmp_path), "--no-check", "--json"]
    (entry,) = json.loads(CliRunner().invoke(app, given).stdout)["images"]
    told = entry["maps"]["grad-cam"]
    assert (told["original"], told["images"]) == ("0001-grad-cam.nii.gz", [])
    written = nibabel.load(tmp_path / told["original"])
    assert written.shape == turned.shape
    np.testing.assert_allclose(written.affine, turned.affine)
    found = pneumofed.explain(bundle, volume, check=False)
    again = (
        written.as_reoriented(nibabel.orientations.io_orientation(written.affine)).get_fdata().transpose(2, 1, 0)[:, ::-1, ::-1]
    )
    np.testing.assert_allclose(again, found.on_slices(), atol=0.51 * float(found.map.max()) / 255)
    with pytest.raises(ConfigError, match="no place in space"):
        found.save(tmp_path / "map.nii.gz")
    with pytest.raises(ConfigError, match="belongs to a DICOM series"):
        pneumofed.explain(bundle, tmp_path / "volume.nii.gz", check=False).save(tmp_path / "map.dcm")


@pytest.mark.slow
def test_python_explains_a_series_as_the_command_does(bundle: Path, archive: Path, tmp_path: Path) -> None:
    series, model = archive / "patient2" / "study" / "series", pneumofed.open_bundle(bundle, threads=1)
    given = ["explain", str(series), "--bundle", str(bundle), "--out", str(tmp_path), "--json", "--all"]
    (entry,) = json.loads(CliRunner().invoke(app, given).stdout)["images"]
    assert set(entry["maps"]) == {"grad-cam", "grad-cam++"}
    found = pneumofed.explain(model, series, "grad-cam++")
    assert (found.method, found.target, found.judgement.status) == ("grad-cam++", "pneumonia", "judged")
    assert list(found.lines) == entry["maps"]["grad-cam++"]["text"]
    assert entry["population"]["sentence"] in found.lines[0]
    np.testing.assert_array_equal(found.map, np.load(tmp_path / "0001-grad-cam++.npy"))
    assert found.save(tmp_path / "why.png").read_bytes() == (tmp_path / "0001-grad-cam++.png").read_bytes()
    with pytest.raises(ConfigError, match="method lime"):
        pneumofed.explain(model, series, "lime", check=False)
    with pytest.raises(ArgumentError, match="judges CT volumes"):
        pneumofed.explain(model, np.zeros((64, 64), np.float32))
    noise = np.random.default_rng(0).integers(-1000, 1000, (16, 32, 32)).astype(np.int16)
    with pytest.raises(ArgumentError, match="cannot judge it"):
        pneumofed.explain(model, Volume(noise, (20.0, 10.0, 10.0), ()))


@pytest.mark.slow
def test_clinical_values_stand_beside_a_volume(archive: Path, tmp_path: Path) -> None:
    bundle, network = make_volume_bundle(tmp_path / "bundle", clinical=True), volume_network(clinical=True)
    predictor, inputs = Predictor(load_bundle(bundle, None), threads=1), floats(2)
    table = np.array([[39.5, 1.0], [39.5, np.nan]], np.float32)
    found = predictor.run(inputs, table)
    for name, expected in zip(("logits", "features", "activations", "cam"), run_torch(network, 1, inputs, table), strict=True):
        np.testing.assert_allclose(found[name], expected, atol=1e-3, err_msg=name)
    same = predictor.run(inputs, table[[0, 0]])  # what a map does not add up to is of the values only
    rest = same["logits"][:, 1] - same["logits"][:, 0] - same["cam"].mean(axis=(1, 2, 3))
    assert rest[0] == pytest.approx(rest[1], abs=1e-3)

    model, series = pneumofed.open_bundle(bundle, threads=1), archive / "patient1" / "study" / "series"
    values = {"temperature": 39.5, "cough": True}
    plain, beside = model.predict(series), model.predict(series, values)
    assert plain.probability is not None and beside.probability is not None
    assert beside.image_only == pytest.approx(plain.probability, abs=1e-6)
    assert abs(beside.probability - plain.probability) > 1e-3
    why = pneumofed.explain(model, series, target="normal", check=False, clinical=values)
    assert why.evidence is not None and why.evidence.image_only == pytest.approx(plain.probability, abs=1e-6)
    assert set(why.evidence.values) == {"temperature", "cough"}
    assert abs(why.evidence.error) < 0.05 * max(1.0, abs(why.evidence.score - why.evidence.empty))
    assert why.lines[0].startswith("The answer rests on") and "temperature 39.5 °C" in why.lines[0]
    without = pneumofed.explain(model, series, target="normal", check=False)
    assert without.evidence is None and why.map.any() and not np.allclose(without.map, why.map)

    (tmp_path / "values.csv").write_text(f"file,temperature,cough\n{series},39.5,yes\n")
    given = [str(series), "--bundle", str(bundle), "--json", "--clinical", str(tmp_path / "values.csv")]
    (row,) = json.loads(CliRunner().invoke(app, ["predict", *given, "--threads", "1"]).stdout)["images"]
    assert row["probability"] == pytest.approx(beside.probability, abs=1e-6) and set(row["clinical"]) == {"temperature", "cough"}
    explained = CliRunner().invoke(app, ["explain", *given, "--out", str(tmp_path / "out"), "--no-check", "--target", "normal"])
    (entry,) = json.loads(explained.stdout)["images"]
    assert entry["clinical"]["values"] == pytest.approx(dict(why.evidence.values), abs=1e-4)
    assert entry["maps"]["grad-cam"]["text"] == list(why.lines)


def test_a_map_lies_where_the_grid_was_taken_from() -> None:
    """A block of tissue, through the grid and back; what the grid does not show has no weight."""
    hounsfield = np.full((60, 90, 80), -1000, np.int16)
    hounsfield[36:44, 20:32, 50:58] = 100
    volume = Volume(hounsfield, (5.0, 6.0, 7.0), ())
    grid = fit_volume(volume, 64, 32).astype(np.float32)
    placed = place_on_slices(grid, volume, range(60))
    assert placed.shape == hounsfield.shape
    assert placed[37:43, 22:30, 51:57].min() > 0.5 * 255
    assert max(placed[:30].max(), placed[:, 45:].max(), placed[:, :, :40].max()) < 0.3 * 255  # air
    z, y, x = ((np.arange(length) + 0.5) * step for length, step in zip(hounsfield.shape, volume.spacing_mm, strict=True))
    outside = (abs(y[:, None] - 270) > 200) | (abs(x[None, :] - 280) > 200)
    assert (place_on_slices(np.ones((2, 3, 4), np.float32), volume, [0, 59])[:, outside] == 0).all()
    inside = place_on_slices(np.ones((2, 3, 4), np.float32), volume, [0, 59])[:, ~outside]
    np.testing.assert_allclose(inside, 1.0)
    ramp = place_on_slices(np.arange(8, dtype=np.float32)[:, None, None], volume, range(60))[:, 45, 40]
    np.testing.assert_allclose(ramp, np.clip((z - 150 + 200) / 50 - 0.5, 0, 7), atol=1e-5)


def test_the_slices_to_show_have_most_of_the_weight() -> None:
    values = np.zeros((4, 2, 2), np.float32)
    values[1], values[3] = 2.0, 1.0
    assert strongest_slices(values, 4, 1) == [1]
    assert strongest_slices(values, 4) == [1, 3]
    assert strongest_slices(np.ones((1, 2, 2), np.float32), 9, 3) == [3, 4, 5]  # of equal ones the middle
    volume = Volume(np.zeros((100, 8, 8), np.int16), (4.0, 50.0, 50.0), ())
    assert choose_slices(values, 4, volume) == [37, 87]
    assert choose_slices(-values, 4, volume, 4) == [12, 37, 62, 87]
    short = Volume(
        np.zeros((50, 8, 8), np.int16), (4.0, 50.0, 50.0), ()
    )  # the first and the last quarter of the cube lie outside
    assert choose_slices(values, 4, short, 1) == [12]
    beyond = np.zeros((4, 2, 2), np.float32)
    beyond[[0, 3]] = 1.0  # weight that the network has in the air beyond the volume
    beyond[2] = 0.1
    assert choose_slices(beyond, 4, short, 2) == [37]


@pytest.mark.parametrize("name", ["resnet18_slices", "densenet121_3d"])
def test_grad_cam_in_three_dimensions_is_captums(name: Any) -> None:
    network = volume_network() if name == "resnet18_slices" else build_model(ModelConfig(name=name, norm="group"), "binary", 1)
    volume = torch.rand(1, 1, 32, 64, 64, generator=torch.Generator().manual_seed(2))
    found = volume_map(network, volume)
    score = LogOdds(network, "pneumonia")
    expected = LayerGradCam(score, target_layer(network)).attribute(volume, relu_attributions=True)
    assert found.cells == tuple(expected.shape[2:])
    fine = torch.nn.functional.interpolate(expected, volume.shape[2:], mode="trilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(found.values, fine.detach().numpy(), atol=1e-6)
    assert found.score == pytest.approx(float(score(volume)), abs=1e-5)
    finer = volume_map(network, volume, detail="finer-layer")
    assert finer.cells[1] == 2 * found.cells[1]
    assert volume_map(network, volume, method="grad-cam++").values.shape == (32, 64, 64)


def test_a_volume_is_seen_from_the_front_with_the_head_up() -> None:
    volumes = np.zeros((1, 8, 32, 32), np.uint8)
    volumes[0, 7, :, 3] = 255  # a line from front to back in the topmost slice, on the patient's right
    volumes[0, 0, :16, 20] = 255
    expected = np.zeros((1, 8, 32), np.float32)
    expected[0, 0, 3], expected[0, 7, 20] = 1.0, 0.5
    np.testing.assert_array_equal(as_pictures(volumes), expected)
    np.testing.assert_allclose(as_pictures((volumes / 255).astype(np.float32)), expected)
    assert pixel_statistics(as_pictures(volumes)).shape == pixel_statistics(np.zeros((1, 32, 32), np.float32)).shape


def test_what_an_export_takes_of_volumes() -> None:
    part = ExportImages("test", drawn_inputs(80), None, {})
    index = np.arange(3)
    assert part.inputs(index).shape == (3, 1, 8, 32, 32)
    assert part.pictures(index).shape == (3, 8, 32)
    assert [len(rows) for rows in part.batches(index)] == [1, 1, 1]


def record(path: Path, number: int) -> ImageRecord:
    return ImageRecord(path, f"p{number}", "pneumonia" if number % 2 else "normal")


def test_series_become_rows_of_a_data_set_and_are_read_once(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [*find_series([archive])]
    manifest = Manifest(tuple(record(path, number) for number, path in enumerate(paths)))
    data = load_dataset(manifest, "binary", IMAGE, tmp_path)
    assert data.pixels.shape == (2, 8, 32, 32)
    np.testing.assert_array_equal(data.pixels, drawn_inputs(80)[:2])
    assert data.report.skipped == {SkipReason.NOT_CT: 1}
    monkeypatch.setattr("pneumofed.common.imaging.volumes.read_volume", None)  # a second look decodes nothing
    np.testing.assert_array_equal(load_dataset(manifest, "binary", IMAGE, tmp_path).pixels, data.pixels)


def test_a_radiograph_run_takes_no_series(archive: Path, tmp_path: Path) -> None:
    series = next(find_series([archive]))
    with pytest.raises(EmptySiteError, match=SkipReason.UNREADABLE.value):
        load_dataset(Manifest((record(series, 1),)), "binary", IMAGE.model_copy(update={"slices": 0}), tmp_path)


def test_the_digest_of_a_series_is_of_its_content_whatever_its_files_are_called(tmp_path: Path) -> None:
    one, two = (write_series(tmp_path / name, patients(80)[0]) for name in ("one", "two"))
    for file in sorted(two.iterdir()):
        file.rename(two / f"z{file.name}")
    first, second = load_digests([one, two], tmp_path / "cache", 1, series=True)
    assert first == second
    (two / "z000.dcm").write_bytes((two / "z000.dcm").read_bytes() + b"\0")
    assert load_digests([two], tmp_path / "cache", 1, series=True) != [first]
    assert load_digests([one], tmp_path / "cache", 1) == [SkipReason.UNREADABLE]
