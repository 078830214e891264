"""The grid of a model, and NIfTI files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pneumofed.common.errors import ConfigError, ImageError, SkipReason
from pneumofed.common.imaging.types import LUNG_WINDOW, Window
from pneumofed.common.imaging.volumes import (
    FIELD_OF_VIEW_MM,
    Volume,
    apply_ct_window,
    fit_volume,
    nifti_affine,
    read_volume,
    turn_back,
)

nibabel = pytest.importorskip("nibabel")


def solid(
    spacing: tuple[float, float, float],
    extent: tuple[float, float, float] = (300.0, 320.0, 320.0),
    radius: float = 90.0,
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Volume:
    """A sphere of lung tissue (-600 HU) in air, with an edge of 6 mm."""
    shape = tuple(round(length / step) for length, step in zip(extent, spacing, strict=True))
    axes = (
        (np.arange(count) + 0.5 - count / 2) * step - middle for count, step, middle in zip(shape, spacing, centre, strict=True)
    )
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    inside = np.clip((radius - np.sqrt(z**2 + y**2 + x**2)) / 6.0 + 0.5, 0.0, 1.0)
    return Volume(np.rint(-1000.0 + 400.0 * inside).astype(np.int16), spacing, ())


def test_the_first_slice_has_its_place_along_the_body_whatever_the_axes_of_the_file(tmp_path: Path) -> None:
    """One volume, written with its axes in other orders and directions; its slices keep their z."""
    values = np.random.default_rng(1).integers(-1000, 900, (22, 20, 18)).astype(np.int16)
    affine = np.array([[2.0, 0, 0, -11], [0, 3.0, 0, -15], [0, 0, 5.0, -123.5], [0, 0, 0, 1]])
    plain = nibabel.Nifti1Image(values, affine)
    for codes in ("RAS", "LPI", "SLP", "AIR"):
        wanted = nibabel.orientations.axcodes2ornt(codes)
        turned = plain.as_reoriented(nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(affine), wanted))
        nibabel.save(turned, tmp_path / f"{codes}.nii")
        assert read_volume(tmp_path / f"{codes}.nii").first_mm == pytest.approx(-123.5)


def measure(grid: NDArray[np.uint8]) -> list[tuple[float, float]]:
    """Centre and standard deviation along each axis in mm, of what is brighter than air."""
    weight = np.maximum(grid.astype(float) - 60.0, 0.0)  # -1000 HU is 59.5
    result = []
    for axis in range(3):
        profile = weight.sum(axis=tuple(other for other in range(3) if other != axis))
        step = FIELD_OF_VIEW_MM / len(profile)
        place = (np.arange(len(profile)) + 0.5) * step - FIELD_OF_VIEW_MM / 2
        mean = float((profile * place).sum() / profile.sum())
        result.append((mean, float(np.sqrt((profile * (place - mean) ** 2).sum() / profile.sum()))))
    return result


@settings(max_examples=6, deadline=None)
@given(
    spacing=st.tuples(st.floats(1.5, 8.0), st.floats(1.5, 4.0), st.floats(1.5, 4.0)),
    size=st.sampled_from([(32, 24), (64, 40)]),
    centre=st.tuples(*[st.floats(-40.0, 40.0)] * 3),
)
def test_a_sphere_stays_a_sphere_of_its_size_and_place(
    spacing: tuple[float, float, float], size: tuple[int, int], centre: tuple[float, float, float]
) -> None:
    grid = fit_volume(solid(spacing, radius=80.0, centre=centre), *size)
    assert grid.shape == (size[1], size[0], size[0])
    for (mean, deviation), middle in zip(measure(grid), centre, strict=True):
        assert mean == pytest.approx(middle, abs=1.5)
        assert deviation == pytest.approx(80.0 / 5**0.5, rel=0.08)  # of a ball


def test_thick_and_thin_slices_of_one_phantom_give_nearly_the_same_grid() -> None:
    thin, thick = (fit_volume(solid((step, 1.4, 1.4)), 48, 32).astype(int) for step in (1.0, 5.0))
    assert abs(thin - thick).max() <= 4
    assert abs(thin - thick).mean() < 0.2
    assert thin.max() - thin.min() > 60


@settings(max_examples=10, deadline=None)
@given(value=st.integers(-1024, 3071), size=st.integers(8, 40), slices=st.integers(4, 40))
def test_a_constant_volume_that_fills_the_field_is_constant_and_has_the_windows_grey(value: int, size: int, slices: int) -> None:
    grid = fit_volume(Volume(np.full((50, 60, 60), value, np.int16), (10.0, 10.0, 10.0), ()), size, slices)
    expected = np.rint(255 * np.clip((value + 1350) / 1500, 0, 1))
    assert abs(grid.astype(int) - expected).max() <= 1


def test_what_is_not_there_is_air_and_what_lies_outside_is_cut() -> None:
    air = int(apply_ct_window(np.array(-1024), LUNG_WINDOW))
    small = fit_volume(Volume(np.full((20, 20, 20), 100, np.int16), (5.0, 5.0, 5.0), ()), 40, 40)
    assert small[20, 20, 20] == apply_ct_window(np.array(100), LUNG_WINDOW)
    assert (small[:13] == air).all()
    assert (small[:, :, 27:] == air).all()
    wide = np.full((40, 100, 100), -1000, np.int16)
    wide[:, :, :7] = 1000  # of the 50 mm that are cut at either side a voxel's half reaches 10 back
    assert len(np.unique(fit_volume(Volume(wide, (5.0, 5.0, 5.0), ()), 20, 20)[8:12])) == 1


def test_fine_stripes_become_their_mean_and_no_pattern() -> None:
    stripes = np.full((100, 200, 200), -1000, np.int16)
    stripes[:, :, ::2] = -200
    middle = fit_volume(Volume(stripes, (2.0, 1.0, 1.0), ()), 32, 32)[16, 12:20, 12:20]
    assert abs(middle.astype(int) - int(apply_ct_window(np.array(-600), LUNG_WINDOW))).max() <= 1


@pytest.mark.parametrize("at_the_head", [False, True])
def test_of_a_volume_higher_than_the_field_the_lungs_stay(at_the_head: bool) -> None:
    body = np.full((180, 40, 40), 40, np.int16)
    lung = slice(110, 170) if at_the_head else slice(10, 70)
    body[lung, 8:32, 8:32] = -850
    grid = fit_volume(Volume(body, (5.0, 8.0, 8.0), ()), 32, 40)
    dark = (grid[:, 16, 16] < 128).sum() * FIELD_OF_VIEW_MM / 40
    assert dark == pytest.approx(300.0, abs=15.0)


def test_the_grid_is_the_same_twice_and_sizes_below_one_are_refused() -> None:
    volume = solid((5.0, 3.0, 3.0))
    np.testing.assert_array_equal(fit_volume(volume, 32, 16), fit_volume(volume, 32, 16))
    for size, slices in ((0, 8), (8, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            fit_volume(volume, size, slices)


def test_a_window_has_its_ends_at_half_its_width() -> None:
    values = np.array([-2000, -1350, -600, 150, 3000])
    assert apply_ct_window(values, LUNG_WINDOW).tolist() == [0, 0, 128, 255, 255]
    assert apply_ct_window(np.array([-125, 50, 225]), Window(50, 350)).tolist() == [0, 128, 255]


def body(seed: int = 0) -> NDArray[np.int16]:
    """Along z, y and x, as `Volume` has it."""
    return np.random.default_rng(seed).integers(-1000, 1000, (18, 20, 22)).astype(np.int16)


def save_nifti(path: Path, values: NDArray[Any], affine: NDArray[Any] | None = None, unit: str = "mm") -> Path:
    """`values` along columns, rows and slices; without `affine` these run to the left, the back and the head, as in DICOM."""
    affine = np.diag([-2.0, -3.0, 5.0, 1.0]) if affine is None else affine
    image = nibabel.Nifti1Image(values, affine if affine.size else None)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, path)
    return path


def refusal(path: Path, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_volume(path, **options)
    assert str(path.parent) not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ["one.nii", "one.nii.gz"])
def test_a_nifti_file_has_the_axes_of_a_dicom_series(tmp_path: Path, name: str) -> None:
    read = read_volume(save_nifti(tmp_path / name, body().transpose(2, 1, 0)))
    np.testing.assert_array_equal(read.hounsfield, body())
    assert read.spacing_mm == pytest.approx((5.0, 3.0, 2.0))
    assert read.notes == ()


@settings(max_examples=12, deadline=None)
@given(order=st.permutations(range(3)), signs=st.tuples(*[st.sampled_from((1, -1))] * 3))
def test_nifti_axes_in_any_order_and_direction_are_turned(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], signs: tuple[int, int, int]
) -> None:
    """The oracle is nibabel's own reorientation of the file that needs none."""
    upright = nibabel.Nifti1Image(body().transpose(2, 1, 0), np.diag([-2.0, -3.0, 5.0, 1.0]))
    turned = upright.as_reoriented(np.array(list(zip(order, signs, strict=True)), float))
    path = tmp_path_factory.mktemp("nifti") / "turned.nii"
    nibabel.save(turned, path)
    read = read_volume(path)
    np.testing.assert_array_equal(read.hounsfield, body())
    assert read.spacing_mm == pytest.approx((5.0, 3.0, 2.0))
    assert read.affine is not None
    np.testing.assert_array_equal(turn_back(read.hounsfield, read.affine, nifti_affine(turned)), np.asarray(turned.dataobj))
    plain = read_volume(save_nifti(path.with_name("upright.nii"), body().transpose(2, 1, 0)))
    assert plain.affine is not None
    np.testing.assert_allclose(read.affine, plain.affine, atol=1e-9)
    np.testing.assert_allclose(plain.affine, [[0, 0, 2, 0], [0, 3, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1]], atol=1e-9)


def test_scaled_values_and_floating_point_are_rounded_and_missing_ones_are_air(tmp_path: Path) -> None:
    values = body().astype(np.float32) + 0.25
    values[0, 0, 0] = np.nan
    read = read_volume(save_nifti(tmp_path / "float.nii", values.transpose(2, 1, 0))).hounsfield
    assert read[0, 0, 0] == -1024
    np.testing.assert_array_equal(read.ravel()[1:], body().ravel()[1:])
    scaled = save_nifti(tmp_path / "scaled.nii", (body() + 1024).astype(np.uint16).transpose(2, 1, 0))
    with scaled.open("r+b") as file:  # scl_slope and scl_inter, which nibabel writes by its own choice
        file.seek(112)
        file.write(np.array([1, -1024], "<f4").tobytes())
    np.testing.assert_array_equal(read_volume(tmp_path / "scaled.nii").hounsfield, body())


@pytest.mark.parametrize(("unit", "scale", "notes"), [("meter", 1e-3, 0), ("micron", 1e3, 0), ("unknown", 1.0, 1)])
def test_lengths_are_in_the_unit_that_the_file_states(tmp_path: Path, unit: str, scale: float, notes: int) -> None:
    affine = np.diag([-2.0 * scale, -3.0 * scale, 5.0 * scale, 1.0])
    read = read_volume(save_nifti(tmp_path / "one.nii", body().transpose(2, 1, 0), affine, unit))
    assert read.spacing_mm == pytest.approx((5.0, 3.0, 2.0), rel=1e-5)
    assert len(read.notes) == notes


NOWHERE = np.empty(0)
SHEARED = np.array([[2.0, 0, 0, 0], [0, 2.0, 0.5, 0], [0, 0, 2.0, 0], [0, 0, 0, 1.0]])


@pytest.mark.parametrize(
    ("values", "options", "reason", "words"),
    [
        (np.zeros((20, 20, 20, 3), np.int16), {}, SkipReason.TIME_SERIES, "3 volumes"),
        (body().transpose(2, 1, 0)[:, :, :1], {}, SkipReason.NO_SLICES, "one picture"),
        ((body().transpose(2, 1, 0) % 256).astype(np.uint8), {}, SkipReason.NOT_HOUNSFIELD, "values from 0 to 255"),
        (abs(body().transpose(2, 1, 0)), {}, SkipReason.NOT_HOUNSFIELD, "air is near -1000"),
        (body().transpose(2, 1, 0).astype(np.complex64), {}, SkipReason.NOT_HOUNSFIELD, "complex"),
        (body().transpose(2, 1, 0), {"affine": SHEARED}, SkipReason.GANTRY_TILT, "right angles"),
        (body().transpose(2, 1, 0), {"affine": np.diag([200.0, 200.0, 200.0, 1.0])}, SkipReason.NO_GEOMETRY, "0.05 to 100.0 mm"),
        (body().transpose(2, 1, 0), {"affine": NOWHERE}, SkipReason.NO_GEOMETRY, "without orientation"),
        (np.full((20, 20, 20), -900, np.int16), {}, SkipReason.CONSTANT, ""),
    ],
)
def test_a_nifti_file_that_is_no_ct_volume_is_refused(
    tmp_path: Path, values: NDArray[Any], options: dict[str, Any], reason: SkipReason, words: str
) -> None:
    error = refusal(save_nifti(tmp_path / "one.nii", values, **options))
    assert error.reason is reason
    assert words in error.detail


def test_a_nifti_file_beyond_the_limit_is_refused_by_its_header(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "one.nii", body().transpose(2, 1, 0))
    path.write_bytes(path.read_bytes()[:400])  # the voxels are gone
    assert refusal(path, max_bytes=2 * body().size - 1).reason is SkipReason.TOO_LARGE
    assert refusal(path).reason in (SkipReason.CORRUPT, SkipReason.UNREADABLE)


def test_without_nibabel_a_nifti_file_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_nifti(tmp_path / "one.nii", body().transpose(2, 1, 0))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    error = refusal(path)
    assert error.reason is SkipReason.NO_NIBABEL
    assert "pip install 'pneumofed[ct]'" in error.detail
    assert refusal(tmp_path / "absent").reason is SkipReason.MISSING
