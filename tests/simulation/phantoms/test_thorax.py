"""Phantoms of CT volumes: anatomy in Hounsfield units, the radiograph as their projection, and the files of a set."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from pydicom.uid import CTImageStorage
from typer.testing import CliRunner

from pneumofed.cli.main import app
from pneumofed.common.data.manifest import Manifest
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.errors import ConfigError
from pneumofed.common.imaging.images import read_image
from pneumofed.common.imaging.volumes import read_volume
from pneumofed.simulation.hospitals.sources import read_source
from pneumofed.simulation.phantoms.ct_sets import write_ct_phantoms
from pneumofed.simulation.phantoms.thorax import BONE, MU_WATER_PER_MM, Thorax, VoxelGrid, draw_thorax, project

SMALL = VoxelGrid(32, 48, 48)


def draw(label: str, seed: int = 0, grid: VoxelGrid = SMALL) -> Thorax:
    return draw_thorax(label, grid, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("phantoms")
    return folder, write_ct_phantoms(folder, 4, 3, size_px=32, slices=16)


@pytest.mark.parametrize("seed", range(3))
def test_tissues_have_their_densities_and_places(seed: int) -> None:
    thorax = draw("normal", seed)
    units, lung = thorax.hounsfield, thorax.lung
    assert units.min() >= -1000.0 and units.max() <= 1.3 * BONE
    assert -880 < np.median(units[lung > 0.9]) < -780
    litres = lung.sum() * np.prod(SMALL.spacing_mm) / 1e6
    assert 1.5 < litres < 7.0
    front, back = units[16, :24], units[16, 24:]
    assert back[:, 22:26].max() > 250 > 0 > np.median(front)  # the spine lies at the back, in the middle
    heart = np.linalg.norm(np.mgrid[:32, :48, :48] - np.array([9, 19, 27])[:, None, None, None], axis=0) < 2
    assert 30 < units[heart].mean() < 60  # before the middle, to the patient's left


@pytest.mark.parametrize(("label", "low", "high"), [("bacterial", -200, 60), ("viral", -750, -250)])
def test_a_pneumonia_is_in_the_lungs_and_has_its_density(label: str, low: float, high: float) -> None:
    densest = []
    for seed in range(6):
        sick, well = draw(label, seed), draw("normal", seed)
        assert (sick.opacity <= sick.lung + 1e-6).all() and sick.opacity.max() > 0.2
        assert abs(sick.hounsfield - well.hounsfield)[sick.lung < 1e-3].max() < 1.0
        densest.append(sick.hounsfield[(sick.lung > 0.95) & (sick.opacity > 0.8 * sick.opacity.max())].mean())
    assert low < np.median(densest) < high
    assert not draw("normal").opacity.any()


def test_bacterial_is_in_one_lung_and_viral_in_both() -> None:
    for seed in range(5):
        shares = {
            label: [half.sum() for half in np.split(draw(label, seed).opacity, 2, axis=2)] for label in ("bacterial", "viral")
        }
        assert min(shares["bacterial"]) < 0.02 * max(shares["bacterial"])
        assert min(shares["viral"]) > 0.1 * max(shares["viral"])


def test_the_same_patient_is_drawn_on_every_grid() -> None:
    coarse, fine = draw("viral", 1), draw("viral", 1, VoxelGrid(64, 96, 96))
    halved = fine.hounsfield.reshape(32, 2, 48, 2, 48, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(halved.ravel(), coarse.hounsfield.ravel())[0, 1] > 0.99
    assert abs(halved - coarse.hounsfield).mean() < 25


def test_the_projection_is_the_law_of_beer_and_lambert() -> None:
    water = np.full(SMALL.shape, -1000.0, np.float32)
    water[:, 10:30] = 0.0
    zeros = np.zeros(SMALL.shape, np.float32)
    depth = 20 * SMALL.spacing_mm[1]
    np.testing.assert_allclose(project(Thorax(water, zeros, zeros, SMALL)), MU_WATER_PER_MM * depth, rtol=1e-5)
    one, two = draw("normal", 1).hounsfield, draw("normal", 2).hounsfield
    joined = (one + two) / 2 * 2 + 1000.0  # attenuations add
    shadow = [project(Thorax(units, zeros, zeros, SMALL)) for units in (one, two, joined)]
    np.testing.assert_allclose(shadow[0] + shadow[1], shadow[2], rtol=1e-4, atol=1e-4)


def test_a_consolidation_of_the_volume_is_an_opacity_of_the_projection_at_its_place() -> None:
    sick, well = draw("bacterial", 2), draw("normal", 2)
    difference = project(sick) - project(well)
    shadow = sick.opacity.sum(axis=1)[::-1]
    assert np.corrcoef(difference.ravel(), shadow.ravel())[0, 1] > 0.95
    assert difference.max() > 0.3


def test_a_set_is_read_by_the_readers_of_real_ones(drawn: tuple[Path, Manifest]) -> None:
    folder, manifest = drawn
    found, report = read_kaggle(folder)
    assert sorted(found.patients) == sorted(manifest.patients)
    assert {record.path: record.label for record in found.records} == {r.path: r.label for r in manifest.records}
    assert report.used == report.found == 4 and not report.public()["warnings"]
    external = read_source(folder / "external")
    assert external.phantom and len(external.manifest) == 3
    read = read_volume(manifest.records[0].path)
    assert (read.hounsfield.shape, read.notes) == ((16, 32, 32), ())
    assert read.spacing_mm == pytest.approx((20.0, 11.25, 11.25))
    assert read_volume(external.manifest.records[0].path).hounsfield.shape[0] == 8


def test_each_volume_has_the_radiograph_of_its_patient(drawn: tuple[Path, Manifest]) -> None:
    folder, manifest = drawn
    pictures, _ = read_kaggle(folder / "radiographs")
    assert sorted(pictures.patients) == sorted(manifest.patients)
    shown = [read_image(picture.path).pixels for picture in sorted(pictures.records, key=lambda one: one.patient)]
    assert {picture.shape for picture in shown} == {(128, 144)}
    shadows = [_shadow(record.path) for record in sorted(manifest.records, key=lambda one: one.patient)]
    small = [np.asarray(Image.fromarray(picture).resize((32, 16), Image.Resampling.BOX)) for picture in shown]
    one, two = (np.stack(maps)[:, :13] for maps in (small, shadows))  # above the burnt-in word
    one, two = (maps - maps.mean(axis=0) for maps in (one, two))  # what tells a patient from the others
    alike = np.corrcoef(np.concatenate([one, two]).reshape(8, -1))[:4, 4:]
    assert alike.argmax(axis=1).tolist() == [0, 1, 2, 3]
    assert alike.diagonal().min() > 0.5


def _shadow(path: Path) -> np.ndarray:
    """The projection of a volume that was read from its files, without the noise of its scanner's air."""
    units = read_volume(path).hounsfield.astype(np.float32)
    units[units < -950] = -1000.0
    nothing = np.zeros_like(units)
    return project(Thorax(units, nothing, nothing, VoxelGrid(*units.shape)))


def test_the_files_of_a_series_are_valid_ct_images(drawn: tuple[Path, Manifest]) -> None:
    slices = [dcmread(file) for file in sorted(drawn[1].records[0].path.iterdir())]
    first = slices[0]
    assert first.SOPClassUID == CTImageStorage == first.file_meta.MediaStorageSOPClassUID
    assert len({one.SOPInstanceUID for one in slices}) == len(slices) == 16
    assert len({(one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID) for one in slices}) == 1
    assert [float(one.ImagePositionPatient[2]) for one in slices] == pytest.approx([150.0 - 20.0 * k for k in range(16)])
    assert (first.Modality, first.RescaleType, first.BitsStored) == ("CT", "HU", 12)
    assert "phantom" in first.Manufacturer and first.PatientName.family_name == "DRAWN"


def test_nifti_files_hold_the_same_volumes(drawn: tuple[Path, Manifest], tmp_path: Path) -> None:
    pytest.importorskip("nibabel")
    manifest = write_ct_phantoms(tmp_path, 4, 3, size_px=32, slices=16, kind="nifti")
    for record, other in zip(drawn[1].records, manifest.records, strict=True):
        one, two = read_volume(record.path), read_volume(other.path)
        np.testing.assert_array_equal(one.hounsfield, two.hounsfield)
        assert one.spacing_mm == pytest.approx(two.spacing_mm)
    assert read_kaggle(tmp_path)[0].patients == read_kaggle(drawn[0])[0].patients


def _hash(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".dcm", ".png", ".csv"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_set_is_pure_in_its_arguments_and_not_drawn_twice(drawn: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, manifest = drawn
    write_ct_phantoms(tmp_path, 4, 3, size_px=32, slices=16)
    assert _hash(tmp_path) == _hash(folder)
    (folder / "test" / "NORMAL").touch()
    assert write_ct_phantoms(folder, 4, 3, size_px=32, slices=16).patients == manifest.patients
    with pytest.raises(ConfigError, match="holds other phantoms"):
        write_ct_phantoms(folder, 4, 4, size_px=32, slices=16)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slices", "16"], "--slices is of CT volumes"),
        (["--ct", "dicom", "--format", "jpeg"], "leave one out"),
        (["--ct", "dicom", "--size", "600"], "expected 32 to 512"),
    ],
)
def test_the_command_refuses_what_does_not_go_together(tmp_path: Path, options: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["phantom", str(tmp_path / "new"), *options])
    assert isinstance(result.exception, ConfigError) and words in str(result.exception)
    assert not (tmp_path / "new").exists()
