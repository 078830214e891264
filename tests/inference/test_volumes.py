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
from typer.testing import CliRunner

import pneumofed
from pneumofed.common.config.experiment import ModelConfig
from pneumofed.common.data.cache import load_digests
from pneumofed.common.data.dataset import load_dataset
from pneumofed.common.data.manifest import ImageRecord, Manifest
from pneumofed.common.errors import ArgumentError, ConfigError, EmptySiteError, SkipReason
from pneumofed.common.imaging.volumes import Volume
from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.model_bundle.image_statistics import as_pictures, pixel_statistics
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.model_bundle.series import find_series
from pneumofed.common.models.build import build_model
from pneumofed.inference.cli.predict import explain_command, predict_command
from pneumofed.inference.explain.cam import LogOdds, target_layer
from pneumofed.inference.explain.volumes import volume_map
from pneumofed.server.export.graph import run_torch
from pneumofed.server.export.graph_checks import ExportImages
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
    refused = CliRunner().invoke(app, ["predict", str(archive), "--bundle", str(bundle), "--sr", str(archive / "sr")])
    assert isinstance(refused.exception, ConfigError)
    assert "CT volumes" in str(refused.exception)


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
        if values.any():
            assert values[told["slices"]].sum() >= values.sum() * len(told["slices"]) / IMAGE.slices
        assert (tmp_path / f"{entry['number']}-grad-cam.png").stat().st_size > 10_000
    refused = CliRunner().invoke(app, [*arguments, "--method", "lime"])
    assert "CT volume" in str(refused.exception)
    refused = CliRunner().invoke(app, [*arguments, "--detail", "larger-input"])
    assert "CT volume" in str(refused.exception)


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
