"""Phantoms: read by the real sets' readers, pure in the seed, marked everywhere, and no giveaway to a trivial statistic."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.data.manifest import read_manifest
from pneumofed.common.data.sources.dicom import read_dicom_folder
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.data.sources.table import read_csv
from pneumofed.common.errors import ConfigError
from pneumofed.common.imaging.images import read_image
from pneumofed.simulation.phantoms.anatomy import CHILD_RANGES, Map, draw_anatomy, draw_chest
from pneumofed.simulation.phantoms.image import PHANTOM_FILE, bacterial, burn_in, draw_phantom, is_phantom, viral
from pneumofed.simulation.phantoms.phantom import write_phantoms

NAMES = re.compile(r"NORMAL/IM-\d{4}-0001(-\d{4})?\.jpeg|PNEUMONIA/person\d+_(bacteria|virus)_\d+\.jpeg")


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "set"
    write_phantoms(folder, patients=16, seed=3, size_px=96)
    return folder


@pytest.fixture(scope="module")
def dicoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawings of `phantoms`, as DICOM files."""
    folder = tmp_path_factory.mktemp("dicoms") / "set"
    write_phantoms(folder, patients=16, seed=3, size_px=96, kind="dicom")
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_kaggle_reader_finds_the_patients_and_labels_that_were_drawn(phantoms: Path) -> None:
    drawn = write_phantoms(phantoms, patients=16, seed=3, size_px=96)
    found, report = read_kaggle(phantoms)
    assert {(r.path, r.patient, r.label) for r in found.records} == {(r.path, r.patient, r.label) for r in drawn.records}
    assert report.patients == 16 and not report.skipped
    assert {record.manufacturer for record in drawn.records} == {"phantom"}


def test_files_are_named_as_in_the_kaggle_set_with_one_to_three_images_a_patient(phantoms: Path) -> None:
    for split in ("train", "test"):
        manifest, _ = read_kaggle(phantoms, (split,))
        assert all(NAMES.fullmatch(str(record.path.relative_to(phantoms / split))) for record in manifest.records)
        assert set(Counter(manifest.patients).values()) <= {1, 2, 3}
        assert set(manifest.labels) == {"normal", "bacterial", "viral"}


def test_the_external_set_reads_as_adults_of_other_scanners(phantoms: Path) -> None:
    manifest, report = read_csv(phantoms / "external" / "labels.csv")
    assert set(manifest.labels) == {"normal", "pneumonia"} and not report.skipped
    assert all(
        (record.age_years or 0) >= 18 and record.view in ("PA", "AP") and record.sex in ("F", "M") for record in manifest.records
    )
    assert all((record.manufacturer or "").startswith("phantom, virtual scanner") for record in manifest.records)
    assert all(read_image(record.path).info.format == "png" for record in manifest.records)


def test_the_same_arguments_give_the_same_bytes_and_another_seed_other_pictures(phantoms: Path, tmp_path: Path) -> None:
    write_phantoms(tmp_path / "again", patients=16, seed=3, size_px=96)
    assert digests(tmp_path / "again") == digests(phantoms)
    write_phantoms(tmp_path / "other", patients=3, seed=4, size_px=96)
    assert not set(digests(tmp_path / "other").values()) & set(digests(phantoms).values())


def test_every_picture_carries_the_word_and_every_folder_the_file(phantoms: Path) -> None:
    word = burn_in(np.zeros((72, 96), dtype=np.float32))
    rows, columns = np.nonzero(word)
    height, width = 72 - rows.min(), columns.max() + 1
    for file in [*phantoms.rglob("*.jpeg"), *phantoms.rglob("*.png")]:
        corner = read_image(file).pixels[-height:, :width]
        assert np.corrcoef(corner.ravel(), word[-height:, :width].ravel())[0, 1] > 0.95
        assert is_phantom(file.parent)
    assert "never" in (phantoms / PHANTOM_FILE).read_text(encoding="utf-8")
    assert not is_phantom(phantoms.parent)


def test_a_set_that_is_there_is_not_drawn_again_and_an_interrupted_one_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    drawn = write_phantoms(folder, patients=3, seed=0, size_px=64)
    before, first = digests(folder), drawn.records[0].path
    stamp = first.stat().st_mtime_ns
    assert write_phantoms(folder, patients=3, seed=0, size_px=64) == drawn and first.stat().st_mtime_ns == stamp
    (folder / "manifest.csv").unlink()
    first.unlink()
    assert write_phantoms(folder, patients=3, seed=0, size_px=64) == drawn and digests(folder) == before


def test_the_dicom_reader_finds_the_patients_and_labels_that_were_drawn(dicoms: Path) -> None:
    drawn = write_phantoms(dicoms, patients=16, seed=3, size_px=96, kind="dicom")
    found, report = read_dicom_folder(dicoms / "dicom" / "train", dicoms / "labels.csv")
    assert set(found.records) == set(drawn.records) and len(found) == len(drawn)
    assert report.patients == 16 and not report.skipped
    assert {record.manufacturer for record in found.records} == {"phantom"}
    whole, report = read_dicom_folder(dicoms / "dicom", dicoms / "labels.csv")
    assert report.patients == 16 + 4 + 4 and not report.skipped
    adults = [record for record in whole.records if record.path.parent.name == "external"]
    assert {record.label for record in adults} == {"normal", "pneumonia"}
    assert all((r.age_years or 0) >= 18 and (r.manufacturer or "").startswith("phantom, virtual scanner") for r in adults)


def test_the_dicom_files_show_the_drawings_of_the_jpeg_files(phantoms: Path, dicoms: Path) -> None:
    pairs = zip(read_manifest(phantoms / "manifest.csv").records, read_manifest(dicoms / "manifest.csv").records, strict=True)
    kinds = set()
    for jpeg, dicom in pairs:
        image = read_image(dicom.path)
        kinds.add(image.info.photometric)
        difference = np.abs(image.pixels - read_image(jpeg.path).pixels)
        assert jpeg.label == dicom.label and difference.max() < 0.15 and difference.mean() < 0.01
    assert kinds == {"MONOCHROME1", "MONOCHROME2"}


def test_dicom_files_say_nothing_by_their_names_and_that_they_are_drawn_by_their_tags(dicoms: Path) -> None:
    files = list(dicoms.rglob("*.dcm"))
    assert all(re.fullmatch(r"2\.25\.\d{30,39}", file.stem) and file.stat().st_mode & 0o777 == 0o600 for file in files)
    for file in files:
        dataset = dcmread(file, stop_before_pixels=True)
        assert dataset.SOPInstanceUID == file.stem and dataset.Modality == "DX" and "drawn" in dataset.DerivationDescription
        assert (
            dataset.Manufacturer.startswith("phantom") and "phantom" not in f"{dataset.PatientName} {dataset.PatientID}".lower()
        )
        assert is_phantom(file.parent)


def test_dicom_files_are_pure_and_no_two_sets_share_an_identity(dicoms: Path, tmp_path: Path) -> None:
    write_phantoms(tmp_path / "again", patients=16, seed=3, size_px=96, kind="dicom")
    assert digests(tmp_path / "again") == digests(dicoms)
    write_phantoms(tmp_path / "larger", patients=16, seed=3, size_px=112, kind="dicom")
    assert not {f.name for f in dicoms.rglob("*.dcm")} & {f.name for f in (tmp_path / "larger").rglob("*.dcm")}


def test_the_command_draws_either_kind_and_jpeg_unless_asked(tmp_path: Path) -> None:
    for kind, arguments in (("jpeg", []), ("dcm", ["--format", "dicom"])):
        command = ["phantom", str(tmp_path / kind), "--patients", "3", "--size", "64", *arguments]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert {file.suffix for file in (tmp_path / kind).rglob("*.*")} >= {f".{kind}", ".csv"}
    assert not list((tmp_path / "jpeg").rglob("*.dcm")) and not list((tmp_path / "dcm").rglob("*.jpeg"))


def test_one_folder_holds_one_kind_of_files(phantoms: Path, dicoms: Path) -> None:
    for folder, kind in ((phantoms, "dicom"), (dicoms, "jpeg")):
        before = digests(folder)
        with pytest.raises(ConfigError, match="other phantoms"):
            write_phantoms(folder, patients=16, seed=3, size_px=96, kind=kind)  # type: ignore[arg-type]
        assert digests(folder) == before


def test_phantoms_never_go_among_other_files(phantoms: Path, tmp_path: Path) -> None:
    (tmp_path / "IM-0001-0001.jpeg").touch()
    for folder, words in ((tmp_path, "no phantoms"), (phantoms, "seed 3"), (phantoms / "train", "larger set")):
        before = digests(folder)
        with pytest.raises(ConfigError, match=words):
            write_phantoms(folder, patients=3, seed=99)
        assert digests(folder) == before


@pytest.mark.parametrize(
    ("patients", "size_px", "words"), [(2, 96, "at least 3"), (3, 32, "64 to 1024"), (3, 5000, "64 to 1024")]
)
def test_arguments_out_of_range_are_refused_before_anything_is_written(
    tmp_path: Path, patients: int, size_px: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        write_phantoms(tmp_path / "set", patients, 0, size_px)
    assert not (tmp_path / "set").exists()


def test_neither_mean_nor_spread_of_the_pixels_tells_the_classes_apart() -> None:
    labels = np.tile(["normal", "normal", "bacterial", "viral"], 60)
    pictures = []
    for i, label in enumerate(labels):
        rng = np.random.default_rng(i)
        pictures.append(draw_phantom(draw_anatomy(CHILD_RANGES, rng), label, 64, rng))
    for statistic in (np.mean, np.std):
        auroc = roc_auc_score(labels != "normal", [float(statistic(picture)) for picture in pictures])
        assert 0.25 < auroc < 0.75


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), label=st.sampled_from(["normal", "bacterial", "viral"]), size_px=st.integers(64, 160))
def test_a_picture_is_float32_in_the_unit_range_with_the_longer_side_asked_for(seed: int, label: str, size_px: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = draw_phantom(draw_anatomy(CHILD_RANGES, rng), label, size_px, rng)
    assert pixels.dtype == np.float32 and max(pixels.shape) == size_px
    assert 0.0 <= pixels.min() < 0.1 and 0.8 < pixels.max() <= 1.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_bacteria_cloud_one_lung_viruses_both_and_more_so_when_severe(seed: int) -> None:
    y, x = np.meshgrid(np.linspace(-1, 1, 64, dtype=np.float32), np.linspace(-1, 1, 64, dtype=np.float32), indexing="ij")
    chest = draw_chest(x, y, draw_anatomy(CHILD_RANGES, np.random.default_rng(seed)), np.random.default_rng(seed))

    def loss(draw: Callable[..., Map], severity: float) -> tuple[float, float]:
        opacity = draw(chest, severity, np.random.default_rng(seed))
        assert opacity.min() >= 0.0 and opacity.max() <= 1.0
        lost = opacity * chest.air
        return float(lost[chest.side < 0].sum()), float(lost[chest.side > 0].sum())

    assert min(loss(bacterial, 1.0)) == 0.0 < max(loss(bacterial, 1.0))
    assert min(loss(viral, 1.0)) > 0.0
    for draw in (bacterial, viral):
        assert sum(loss(draw, 0.3)) < sum(loss(draw, 0.6)) < sum(loss(draw, 1.0))
