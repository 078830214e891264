"""Scanners: each property does what it says, and an archive is rendered once, whole and without losing a row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import dcmread

from pneumofed.common.data.manifest import ImageRecord, Manifest, read_manifest
from pneumofed.common.imaging.images import read_image
from pneumofed.simulation.hospitals.archive import render_archive
from pneumofed.simulation.phantoms.image import burn_in, is_phantom, mark_folder
from pneumofed.simulation.phantoms.scanners import VirtualScanner, apply, draw_scanner

NEUTRAL = VirtualScanner("neutral")


def show(pixels: np.ndarray, seed: int = 0, **properties: Any) -> np.ndarray:
    return apply(pixels.astype(np.float32), replace(NEUTRAL, **properties), np.random.default_rng(seed))


def disc(side: int = 96) -> np.ndarray:
    row, column = np.mgrid[:side, :side] - (side - 1) / 2
    return np.where(np.hypot(row, column) < side / 4, 0.8, 0.2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), height=st.integers(16, 70), width=st.integers(16, 70))
def test_a_neutral_scanner_only_rounds_to_its_grey_levels(seed: int, height: int, width: int) -> None:
    pixels = np.random.default_rng(seed).random((height, width), dtype=np.float32)
    assert np.abs(show(pixels) - pixels).max() <= 0.5 / 255 + 1e-6


@settings(max_examples=30, deadline=None)
@given(index=st.integers(0, 1000), seed=st.integers(0, 2**62), height=st.integers(16, 70), width=st.integers(16, 70))
def test_any_scanner_keeps_shape_and_range_and_is_pure(index: int, seed: int, height: int, width: int) -> None:
    pixels = np.random.default_rng(0).random((height, width), dtype=np.float32)
    before, scanner = pixels.copy(), draw_scanner(index, seed)
    shown = apply(pixels, scanner, np.random.default_rng(1))
    assert shown.shape == pixels.shape and shown.dtype == np.float32
    assert shown.min() >= 0.0 and shown.max() <= 1.0
    assert scanner == draw_scanner(index, seed) != draw_scanner(index + 1, seed)
    assert np.array_equal(shown, apply(pixels, scanner, np.random.default_rng(1))) and np.array_equal(pixels, before)


def test_gamma_follows_its_power_and_brightness_adds() -> None:
    flat = np.full((32, 32), 0.5)
    assert show(flat, gamma=1.5).mean() == pytest.approx(0.5**1.5, abs=0.5 / 255)
    assert show(flat, brightness=0.05).mean() == pytest.approx(0.55, abs=0.5 / 255)


def test_contrast_has_the_slope_that_it_says_about_middle_grey_and_keeps_the_order_of_greys() -> None:
    ramp = np.tile(np.linspace(0.0, 1.0, 201), (16, 1))
    for contrast in (-0.8, 0.9):
        shown = show(ramp, contrast=contrast, bits=16)[8]
        assert (shown[110] - shown[90]) / 0.1 == pytest.approx(1.0 + contrast / 2, rel=0.02)
        assert np.all(np.diff(shown) >= 0.0)


@pytest.mark.parametrize("level", [0.2, 0.5, 0.8])
def test_noise_has_mean_zero_and_grows_with_the_root_of_brightness(level: float) -> None:
    noise = show(np.full((200, 200), level), noise=0.05, bits=16) - level
    assert noise.std() == pytest.approx(0.05 * np.sqrt(level), rel=0.03)
    assert abs(noise.mean()) < 0.001


def test_grey_levels_are_as_many_as_the_bits_allow() -> None:
    ramp = np.tile(np.linspace(0.0, 1.0, 500), (16, 1))
    assert len(np.unique(show(ramp, bits=4))) == 16


def test_blur_softens_edges_sharpening_steepens_them_and_neither_changes_the_mean() -> None:
    def steepness(pixels: np.ndarray) -> float:
        return float(np.abs(np.diff(pixels, axis=1)).max())

    plain, blurred, sharp = show(disc()), show(disc(), blur=0.02), show(disc(), sharpening=0.5)
    assert steepness(blurred) < 0.6 * steepness(plain) < 0.7 * steepness(sharp)
    assert blurred.mean() == pytest.approx(plain.mean(), abs=0.005) == pytest.approx(sharp.mean(), abs=0.005)


def test_zoom_magnifies_areas_by_its_square_about_the_centre() -> None:
    areas = [(show(disc(), zoom=zoom) > 0.5).sum() for zoom in (0.9, 1.0, 1.2)]
    assert areas[0] / areas[1] == pytest.approx(0.81, rel=0.05) and areas[2] / areas[1] == pytest.approx(1.44, rel=0.05)
    shown = show(disc(), zoom=1.2)
    assert np.allclose(shown, shown[::-1, ::-1], atol=1 / 255)


def test_vignetting_darkens_corners_and_collimation_blackens_the_border_alone() -> None:
    flat = np.full((100, 100), 0.8)
    vignetted = show(flat, vignetting=0.3)
    assert vignetted[50, 50] == pytest.approx(0.8, abs=0.005) and vignetted[0, 0] == pytest.approx(0.8 * 0.7, abs=0.02)
    collimated = show(flat, collimation=0.05)
    assert collimated[:4].max() == 0.0 and np.array_equal(collimated[7:-7, 7:-7], show(flat)[7:-7, 7:-7])


def test_about_one_scanner_in_three_stores_white_as_low_values() -> None:
    assert 0.25 < np.mean([draw_scanner(i, 0).monochrome1 for i in range(300)]) < 0.42


@pytest.fixture
def archive(tmp_path: Path) -> Manifest:
    """Two readable images, a broken one and a missing one."""
    folder = tmp_path / "source"
    folder.mkdir()
    for k, shape in enumerate([(48, 64), (700, 350)]):
        pixels = np.random.default_rng(k).integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"person{k}_virus_{k}.png")
    (folder / "broken.jpeg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    names = ("person0_virus_0.png", "broken.jpeg", "missing.png", "person1_virus_1.png")
    return Manifest(tuple(ImageRecord(folder / name, f"p{i}", "viral", sex="F") for i, name in enumerate(names)))


SCANNER = replace(draw_scanner(1, 0), longest_side_px=256)


def test_an_archive_keeps_every_row_and_leaves_bad_files_to_the_data_report(archive: Manifest, tmp_path: Path) -> None:
    rendered = render_archive(archive, SCANNER, tmp_path / "hospital", 7)
    for row in (1, 2):
        assert rendered.records[row] == archive.records[row]
    for row, shape in ((0, (48, 64)), (3, (256, 128))):
        record = rendered.records[row]
        assert replace(record, path=archive.records[row].path, manufacturer=None) == archive.records[row]
        assert record.manufacturer == SCANNER.name
        assert record.path.is_relative_to(tmp_path / "hospital") and read_image(record.path).pixels.shape == shape
        assert "person" not in record.path.name
    assert read_manifest(tmp_path / "hospital" / "manifest.csv") == rendered
    assert not is_phantom(tmp_path / "hospital")


def test_work_that_is_done_is_not_done_again(archive: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def watched(path: Path) -> Any:
        read.append(path)
        return read_image(path)

    monkeypatch.setattr("pneumofed.simulation.hospitals.archive.read_image", watched)
    first = render_archive(archive, SCANNER, tmp_path / "hospital", 7)
    assert len(read) == 3
    read.clear()
    assert render_archive(archive, SCANNER, tmp_path / "hospital", 7) == first and not read
    first.records[3].path.unlink()
    assert render_archive(archive, SCANNER, tmp_path / "hospital", 7) == first
    assert archive.records[3].path in read and archive.records[0].path not in read


def test_pictures_depend_on_the_files_the_scanner_and_the_seed_but_not_on_place_or_order(
    archive: Manifest, tmp_path: Path
) -> None:
    def pictures(manifest: Manifest, scanner: VirtualScanner, seed: int, folder: str) -> set[bytes]:
        rendered = render_archive(manifest, scanner, tmp_path / folder, seed)
        return {record.path.read_bytes() for record in rendered.records if record.path.parent.name == "images"}

    first = pictures(archive, SCANNER, 7, "a")
    assert len(first) == 2
    assert pictures(Manifest(archive.records[::-1]), SCANNER, 7, "b") == first
    assert not pictures(archive, SCANNER, 8, "a") & first
    assert not pictures(archive, draw_scanner(2, 0), 7, "a") & first
    assert pictures(archive, SCANNER, 7, "a") == first


def test_a_changed_image_is_rendered_anew(archive: Manifest, tmp_path: Path) -> None:
    before = render_archive(archive, SCANNER, tmp_path / "hospital", 7)
    Image.fromarray(np.random.default_rng(9).integers(0, 255, (40, 40), dtype=np.uint8)).save(archive.records[0].path)
    after = render_archive(archive, SCANNER, tmp_path / "hospital", 7)
    assert after.records[0].path != before.records[0].path and after.records[3] == before.records[3]


def test_phantoms_stay_marked(archive: Manifest, tmp_path: Path) -> None:
    mark_folder(tmp_path / "source")
    record = render_archive(archive, SCANNER, tmp_path / "hospital", 7).records[0]
    assert is_phantom(record.path.parent) and record.manufacturer == f"phantom, {SCANNER.name}"
    pixels = read_image(record.path).pixels
    assert np.allclose(pixels, burn_in(pixels), atol=1 / 255)


@pytest.mark.parametrize("is_drawn", [False, True])
def test_a_scanner_that_stores_white_as_low_values_shows_the_same(archive: Manifest, tmp_path: Path, is_drawn: bool) -> None:
    if is_drawn:
        mark_folder(tmp_path / "source")
    shown, stored = {}, {}
    for kind in (False, True):
        rendered = render_archive(archive, replace(SCANNER, monochrome1=kind), tmp_path / str(kind), 7)
        path = rendered.records[0].path
        shown[kind], stored[kind] = read_image(path), dcmread(path).pixel_array
        assert shown[kind].info.inverted == kind and shown[kind].info.photometric == f"MONOCHROME{1 if kind else 2}"
    assert np.abs(shown[True].pixels - shown[False].pixels).max() < 1e-6
    assert np.array_equal(stored[True], 4095 - stored[False])


def test_the_files_of_real_images_name_nobody_and_copies_stay_copies(archive: Manifest, tmp_path: Path) -> None:
    copy = replace(archive.records[0], path=tmp_path / "source" / "copy.png", patient="another", sex="M", view="PA")
    copy.path.write_bytes(archive.records[0].path.read_bytes())
    rendered = render_archive(Manifest((archive.records[0], copy)), SCANNER, tmp_path / "hospital", 7)
    first, second = (record.path.read_bytes() for record in rendered.records)
    assert first == second
    dataset = dcmread(rendered.records[1].path)
    assert not dataset.PatientName and not dataset.PatientID and not dataset.PatientSex and not dataset.ViewPosition
    assert dataset.Manufacturer == SCANNER.name and "drawn" not in dataset.DerivationDescription
    assert dataset.BurnedInAnnotation == "YES" and dataset.LossyImageCompression == "00"


def test_a_picture_from_a_lossy_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.jpeg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64), dtype=np.uint8)).save(path)
    rendered = render_archive(Manifest((ImageRecord(path, "p", "normal"),)), SCANNER, tmp_path / "hospital", 7)
    dataset = dcmread(rendered.records[0].path)
    assert dataset.LossyImageCompression == "01"
    assert float(dataset.LossyImageCompressionRatio) == pytest.approx(48 * 64 / path.stat().st_size, abs=0.001)


def test_the_files_of_phantoms_hold_what_their_rows_say_and_never_mix_two_patients(archive: Manifest, tmp_path: Path) -> None:
    mark_folder(tmp_path / "source")
    rows = [
        replace(archive.records[0], patient=patient, view="AP", age_years=3.0) for patient in ("train/a", "train/b", "train/b")
    ]
    rendered = render_archive(Manifest(tuple(rows)), SCANNER, tmp_path / "hospital", 7)
    one, other, again = (dcmread(record.path) for record in rendered.records)
    assert one.PatientID != other.PatientID == again.PatientID and rendered.records[1].path == rendered.records[2].path
    assert (one.PatientSex, one.ViewPosition, one.PatientAge) == ("F", "AP", "003Y")
    assert one.Manufacturer == f"phantom, {SCANNER.name}" == rendered.records[0].manufacturer
    assert "train" not in str(one.PatientName) + one.PatientID
