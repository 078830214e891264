"""`pneumofed explain`: files in, pictures and numbers out, with no name of a file in a picture's name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.model_bundle.predictor import model_input
from tests.model_bundles import PREPROCESSING, make_bundle, phantom_images


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("explained") / "bundle")


def draw_images(folder: Path) -> Path:
    folder.mkdir()
    for (image, _), name in zip(phantom_images(2), ("DOE^JANE.png", "b.png"), strict=True):
        PIL.Image.fromarray(np.rint(image.pixels * 255).astype(np.uint8)).save(folder / name)
    (folder / "letter.txt").write_text("no image")
    return folder


@pytest.mark.usefixtures("drawn")
def test_images_are_explained_and_what_is_no_image_is_counted(bundle: Path, tmp_path: Path) -> None:
    images, out = draw_images(tmp_path / "images"), tmp_path / "out"
    given = [
        "explain",
        str(images),
        "--bundle",
        str(bundle),
        "--out",
        str(out),
        "--method",
        "grad-cam",
        "--method",
        "integrated-gradients",
    ]
    result = CliRunner().invoke(app, [*given, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["skipped"] == {"not a DICOM, JPEG, PNG, TIFF, BMP or WebP file": 1}
    assert set(told["sanity"]) == {"grad-cam", "integrated-gradients"}
    names = {f"{number}{end}.png" for number in ("0001", "0002") for end in ("", "-grad-cam", "-integrated-gradients")}
    assert {file.name for file in out.iterdir()} == names | {"explanations.json"}
    for image in told["images"]:
        for found in image["maps"].values():
            assert found["text"][-1].startswith("The model was trained on drawn images")
            assert 0 <= found["focus"]["outside_area"] <= 1
    assert PIL.Image.open(out / "0001-grad-cam.png").size[0] > 500


def test_an_image_that_cannot_be_judged_has_no_probability(bundle: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    PIL.Image.fromarray(noise).save(tmp_path / "noise.png")
    given = [
        "explain",
        str(tmp_path / "noise.png"),
        "--bundle",
        str(bundle),
        "--out",
        str(tmp_path / "out"),
        "--no-check",
        "--json",
    ]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    (told,) = json.loads(result.output)["images"]
    assert (told["number"], told["verdict"], told["probability"]) == ("0001", "cannot judge", None)


def test_nothing_readable_is_a_failure_that_says_why(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("no image")
    result = CliRunner().invoke(
        app, ["explain", str(tmp_path / "letter.txt"), "--bundle", str(bundle), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 1 and "not a DICOM, JPEG, PNG, TIFF, BMP or WebP file (1)" in str(result.exception)


def test_an_unknown_target_names_the_classes(bundle: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", "x", "--bundle", str(bundle), "--out", str(tmp_path), "--target", "tumour"])
    assert "normal, pneumonia" in str(result.exception)


def test_the_quick_map_of_a_judgement_is_grad_cam(bundle: Path) -> None:
    import torch

    from pneumofed.common.model_bundle.bundle import load_bundle
    from pneumofed.common.model_bundle.predictor import Predictor
    from pneumofed.inference.explain.attribution import compute_attribution
    from pneumofed.inference.explain.focus import quick_map

    opened, image = load_bundle(bundle, None), phantom_images(2)[0][0]
    judged = Predictor(opened, threads=1).judge([image])[0].prediction
    inputs = torch.from_numpy(model_input(image.pixels, PREPROCESSING))[None, None]
    slow = compute_attribution(opened.load_network(), inputs, "grad-cam")
    assert judged and judged.activation_map is not None
    quick = quick_map(judged.activation_map, judged.score, PREPROCESSING.size_px)
    np.testing.assert_allclose(quick.values, slow.values * judged.activation_map.size, atol=1e-3)
    assert quick.score == pytest.approx(slow.score, abs=1e-3) and quick.cell_px == slow.cell_px


def test_a_user_who_stops_it_is_told_what_there_is(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pneumofed.inference.explain.files._explain_file", interrupt)
    given = ["explain", str(draw_images(tmp_path / "in")), "--bundle", str(bundle), "--out", str(tmp_path / "out"), "--no-check"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 130
    assert "pictures of 0 images are in" in result.stderr
    assert "resume" not in result.stderr


def test_the_detail_of_a_map_is_in_the_numbers_and_the_text(bundle: Path, tmp_path: Path) -> None:
    images = draw_images(tmp_path / "images")
    for detail in ("finer-layer", "several-sizes"):
        out = tmp_path / detail
        given = ["explain", str(images), "--bundle", str(bundle), "--out", str(out), "--no-check", "--detail", detail, "--json"]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["images"][0]["maps"]["grad-cam"]
        assert found["detail"] == detail and any("earlier layer" in line or "four sizes" in line for line in found["text"])


def test_predict_counts_one_file_as_one(bundle: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "missing.png"), "--bundle", str(bundle)])
    assert "1 file: 0 pneumonia" in result.stdout
