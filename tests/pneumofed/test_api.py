"""The Python API as a user types it: images of every kind, a bundle's judgement of them, explanations."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pydicom
import pytest

import pneumofed
from tests.dicom_factory import PATIENT_ID, PATIENT_NAME, dicom_bytes
from tests.model_bundles import make_bundle, phantom_images

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("api") / "bundle")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> pneumofed.ModelBundle:
    return pneumofed.open_bundle(folder, threads=1)


def grey8() -> np.ndarray:
    """A phantom, uint8 [H, W]."""
    found: np.ndarray = np.rint(phantom_images(3)[2][0].pixels * 255).astype(np.uint8)
    return found


def run_python(script: str, *arguments: str) -> str:
    """What a fresh process prints."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()


def test_the_import_costs_nothing_and_every_name_is_there() -> None:
    script = "import time; start = time.perf_counter(); import pneumofed, sys; seconds = time.perf_counter() - start\n"
    script += "print(sorted({'torch', 'flwr', 'matplotlib', 'numpy'} & set(sys.modules)), seconds)"
    seconds = []
    for _ in range(3):
        heavy, text = run_python(script).rsplit(" ", 1)
        assert heavy == "[]"
        seconds.append(float(text))
    assert min(seconds) < 0.1
    for name in pneumofed.__all__:
        assert getattr(pneumofed, name) is not None
    assert set(dir(pneumofed)) == set(pneumofed.__all__)
    with pytest.raises(AttributeError, match="open_bundle"):
        pneumofed.open_bundel  # type: ignore[attr-defined]  # noqa: B018


def test_predicting_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    PIL.Image.fromarray(grey8()).save(tmp_path / "a.png")
    script = "import sys, numpy, pneumofed; bundle = pneumofed.open_bundle(sys.argv[1])\n"
    script += "found = bundle.predict([sys.argv[2], numpy.asarray(pneumofed.read_image(sys.argv[2]).pixels)])\n"
    script += "print(len(found), sorted({'torch', 'flwr', 'matplotlib'} & set(sys.modules)))"
    assert run_python(script, str(folder), str(tmp_path / "a.png")) == "2 []"


def test_opening_a_run_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("rounds: 1\n")
    script = "import sys, pneumofed; run = pneumofed.open_run(sys.argv[1])\n"
    script += "print(run.status, run.history, sorted({'torch', 'flwr', 'matplotlib'} & set(sys.modules)))"
    assert run_python(script, str(tmp_path)) == "unknown [] []"


def test_a_bundle_says_what_it_is(bundle: pneumofed.ModelBundle) -> None:
    assert bundle.classes == ("normal", "pneumonia") and bundle.image_size == 32
    assert 0 < bundle.threshold < 1 and len(bundle.digest) == 64
    assert bundle.card.startswith("# A model for tests") and bundle.manifest.card.phantom
    assert bundle.digest[:12] in repr(bundle)


def test_an_archive_opens_as_its_folder_does(bundle: pneumofed.ModelBundle, folder: Path, tmp_path: Path) -> None:
    from pneumofed.common.model_bundle.bundle import pack

    archive = pneumofed.open_bundle(str(pack(folder, tmp_path / "bundle.zip")))
    assert archive.digest == bundle.digest
    assert archive.predict(grey8()).probability == pytest.approx(bundle.predict(grey8()).probability)


def test_one_image_in_every_form_is_one_judgement(bundle: pneumofed.ModelBundle, tmp_path: Path) -> None:
    grey = grey8()
    PIL.Image.fromarray(grey).save(tmp_path / "a.png")
    PIL.Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "b.png")
    forms: list[Any] = [
        tmp_path / "a.png",
        str(tmp_path / "b.png"),
        grey,
        grey.astype(np.uint16) * 257,
        grey.astype(np.float64) / 255,
        (grey / 255).astype(np.float32)[::1],
        np.repeat(grey[..., None], 3, axis=2),
        np.repeat((grey / np.float32(255))[..., None], 3, axis=2),
        PIL.Image.open(tmp_path / "a.png"),
        PIL.Image.open(tmp_path / "b.png"),
        PIL.Image.fromarray(grey).convert("RGB"),
        PIL.Image.fromarray(grey.astype(np.int32) * 257),
        PIL.Image.fromarray((grey / 255).astype(np.float32)),
        pneumofed.read_image(tmp_path / "a.png"),
    ]
    found = bundle.predict(forms)
    assert {one.status for one in found} == {"judged"}
    for one in found:
        assert one.probability == pytest.approx(found[0].probability, abs=1e-5)
        assert one.finding == found[0].finding and one.reasons == ()
        assert one.probability is not None and one.low is not None and one.high is not None
        assert one.low <= one.probability <= one.high
    single = bundle.predict(forms[0])
    assert isinstance(single, pneumofed.ImageAnswer) and single.probability == pytest.approx(found[0].probability, abs=1e-6)
    assert bundle.predict([]) == []


@pytest.mark.parametrize("syntax", [None, pydicom.uid.JPEGLosslessSV1, pydicom.uid.ExplicitVRBigEndian])
def test_a_data_set_is_judged_as_its_file(bundle: pneumofed.ModelBundle, tmp_path: Path, syntax: Any) -> None:
    stored = (grey8().astype(np.uint16) * 16)[:48]
    file = tmp_path / "a.dcm"
    file.write_bytes(dicom_bytes(stored, PhotometricInterpretation="MONOCHROME2", **({"syntax": syntax} if syntax else {})))
    dataset = pydicom.dcmread(file)
    before = str(dataset)
    of_file, of_dataset = bundle.predict([file, dataset])
    assert of_file.scores == pytest.approx(of_dataset.scores, abs=1e-6)
    assert (of_file.status, of_file.probability) == (of_dataset.status, pytest.approx(of_dataset.probability))
    assert str(dataset) == before


def test_a_data_set_without_its_encoding_is_told_what_is_missing(bundle: pneumofed.ModelBundle) -> None:
    dataset = pydicom.dcmread(BytesIO(dicom_bytes(grey8())))
    bare = pydicom.Dataset({tag: dataset[tag] for tag in dataset.keys()})  # noqa: SIM118 - a data set iterates over its elements
    with pytest.raises(pneumofed.ArgumentError, match="transfer syntax") as caught:
        bundle.predict(bare)
    assert PATIENT_NAME not in str(caught.value) and PATIENT_ID not in str(caught.value)


def test_what_must_not_be_judged_has_no_probability(bundle: pneumofed.ModelBundle, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    colour = np.stack([grey8(), 255 - grey8(), grey8() // 2], axis=2)
    ankle = tmp_path / "ankle.dcm"
    ankle.write_bytes(dicom_bytes(grey8().astype(np.uint16) * 16, BodyPartExamined="ANKLE"))
    (tmp_path / "letter.txt").write_text("Dear Doctor")
    narrow = np.tile(grey8(), (3, 1))
    given: list[Any] = [
        noise,
        colour,
        narrow,
        ankle,
        tmp_path / "letter.txt",
        tmp_path / "missing.png",
        np.zeros((64, 64)),
        noise[:8],
    ]
    found = bundle.predict(given)
    for one in found:
        assert (one.finding, one.probability, one.low, one.high, one.classes) == (None, None, None, None, {})
        assert one.reasons and one.explanation
    assert [one.status for one in found] == ["cannot judge"] * 4 + ["unreadable"] * 4
    assert "colour" in found[1].reasons and "shape" in found[2].reasons and "not_the_chest" in found[3].reasons
    assert [one.reasons for one in found[4:]] == [("unknown_format",), ("missing",), ("constant",), ("too_small",)]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (np.zeros((64, 64), np.int64), "got int64"),
        (np.zeros((64, 64), bool), "got bool"),
        (np.full((64, 64), np.nan, np.float32), "NaN"),
        (np.linspace(0, 255, 4096).reshape(64, 64), r"in \[0, 1\], got 0 to 255"),
        (np.linspace(-1, 1, 4096).reshape(64, 64), "got -1 to 1"),
        (np.linspace(0, 4095, 4096).reshape(64, 64).astype(np.uint16), "12 bits"),
        (np.zeros((0, 64), np.uint8), "empty"),
        (np.zeros(64, np.uint8), "rows and columns"),
        (np.zeros((2, 1, 64, 64), np.uint8), "list of arrays"),
        (np.zeros((5, 64, 64), np.uint8), "list of arrays"),
        (np.zeros((64, 64, 1), np.uint8), "channel axis"),
        (np.zeros((3, 64, 64), np.uint8), "transpose"),
        (np.zeros((64, 64, 4), np.uint8), "transparency"),
        (PIL.Image.new("HSV", (64, 64)), "got HSV"),
        (PIL.Image.fromarray(np.full((64, 64), 70_000, np.int32)), "got int32"),
        ([[0.0, 1.0]], "got list"),
        (None, "got NoneType"),
        (b"\x89PNG", "got bytes"),
    ],
)
def test_what_is_no_image_is_answered_with_what_to_do(bundle: pneumofed.ModelBundle, wrong: Any, told: str) -> None:
    with pytest.raises(pneumofed.ArgumentError, match=told) as caught:
        bundle.predict([grey8(), wrong])
    assert str(caught.value).startswith("images[1]: ") and "expected" in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, pneumofed.PneumofedError)


def test_a_folder_is_answered_with_a_list(bundle: pneumofed.ModelBundle, tmp_path: Path) -> None:
    with pytest.raises(pneumofed.ArgumentError, match="rglob"):
        bundle.predict(tmp_path)


def test_a_bundle_of_a_stranger_is_refused(folder: Path, tmp_path: Path) -> None:
    from pneumofed.common.wire.keys import write_node_key

    with pytest.raises(pneumofed.PneumofedError, match=r"sign"):
        pneumofed.open_bundle(folder, trusted=[write_node_key(tmp_path / "other", "other")])
    with pytest.raises(pneumofed.PneumofedError, match="does not exist"):
        pneumofed.open_bundle("nowhere.zip")


def test_int8_is_close(bundle: pneumofed.ModelBundle, folder: Path) -> None:
    coarse = pneumofed.open_bundle(folder, precision="int8", threads=1)
    assert coarse.predict(grey8()).probability == pytest.approx(bundle.predict(grey8()).probability, abs=0.25)
    with pytest.raises(pneumofed.ArgumentError, match="int4"):
        pneumofed.open_bundle(folder, precision="int4")  # type: ignore[arg-type]


def test_an_explanation_is_what_the_command_gives(bundle: pneumofed.ModelBundle, folder: Path, tmp_path: Path) -> None:
    import json

    from typer.testing import CliRunner

    from pneumofed.cli.main import app

    PIL.Image.fromarray(grey8()).save(tmp_path / "a.png")
    command = ["explain", str(tmp_path / "a.png"), "--bundle", str(folder), "--out", str(tmp_path / "out"), "--json"]
    told = json.loads(CliRunner().invoke(app, command).output)["images"][0]["maps"]["grad-cam"]["text"]
    found = pneumofed.explain(bundle, tmp_path / "a.png")
    assert list(found.lines) == told
    assert found.map.shape == (32, 32) and found.map.dtype == np.float32 and np.isfinite(found.map).all()
    assert found.judgement == bundle.predict(grey8())
    assert (found.trusted is False) == bool(found.warnings) or found.trusted is False
    assert found.save(tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
    assert found._repr_png_() == (tmp_path / "why.png").read_bytes()


def test_an_explanation_takes_the_commands_words(folder: Path) -> None:
    found = pneumofed.explain(folder, grey8(), "occlusion", "normal", check=False)
    assert (found.method, found.target) == ("occlusion", "normal")
    assert found.trusted is None or found.warnings
    assert "Whether the map can be believed was not checked." in found.lines
    with pytest.raises(pneumofed.PneumofedError, match="method: expected one of grad-cam"):
        pneumofed.explain(folder, grey8(), "gradcam")  # type: ignore[arg-type]
    with pytest.raises(pneumofed.PneumofedError, match="target: expected pneumonia or one of normal, pneumonia"):
        pneumofed.explain(folder, grey8(), target="tumour")


def test_an_image_is_read_as_the_product_reads_it(tmp_path: Path) -> None:
    PIL.Image.fromarray(grey8()).save(tmp_path / "a.png")
    image = pneumofed.read_image(str(tmp_path / "a.png"))
    np.testing.assert_array_equal(image.pixels, grey8().astype(np.float32) / np.float32(255))
    assert (image.info.format, image.info.bits) == ("png", 8)
    with pytest.raises(pneumofed.PneumofedError, match="file not found"):
        pneumofed.read_image(tmp_path / "missing.png")
