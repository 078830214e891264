"""CT series in DICOM: what is read, in which order and units, and what is refused in which words."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import data as pydicom_data
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_rescale
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging import dicom_pixels
from pneumofed.common.imaging.volumes import make_affine, read_volume, turn_back

SHAPE = (6, 18, 20)
STEP, ROW, COLUMN = 2.5, 0.7, 0.8
SERIES, FRAME = generate_uid(), generate_uid()
REAL = Path(pydicom_data.__file__).parent / "test_files" / "dicomdirtests"
"""Two CT examinations that pydicom brings, cut to 16 x 16 voxels."""
Edit = Callable[[int, Dataset], None]


def volume(seed: int = 0) -> NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-1000, 1500, SHAPE).astype(np.int16)


def ct_slice(pixels: NDArray[np.int16], place: int, **tags: Any) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, generate_uid()
    dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID, dataset.Modality = SERIES, FRAME, "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber = place + 1
    dataset.ImagePositionPatient = [-8.0, -6.0, round(-100 + STEP * place, 3)]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing, dataset.SliceThickness = [ROW, COLUMN], STEP
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    dataset.add_new("PixelData", "OW", (pixels.astype(np.int32) + 1024).astype("<u2").tobytes())
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def test_the_first_slice_has_its_place_along_the_body(tmp_path: Path) -> None:
    """Also of sagittal slices, whose rows go down, and of slices stored from the head downward."""
    assert read_volume(save_series(tmp_path / "axial", volume())).first_mm == pytest.approx(-100.0)

    def down(place: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [-8.0, -6.0, -100.0 - STEP * place]

    assert read_volume(save_series(tmp_path / "down", volume(), down)).first_mm == pytest.approx(-100.0 - STEP * (SHAPE[0] - 1))

    def sagittal(place: int, dataset: Dataset) -> None:
        dataset.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        dataset.ImagePositionPatient = [STEP * place, -6.0, 200.0]

    assert read_volume(save_series(tmp_path / "side", volume(), sagittal)).first_mm == pytest.approx(200.0 - ROW * (SHAPE[1] - 1))


def save(folder: Path, dataset: Dataset, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dataset.save_as(folder / name, enforce_file_format=True)


def save_series(folder: Path, pixels: NDArray[np.int16], edit: Edit | None = None, skip: tuple[int, ...] = ()) -> Path:
    """A file a slice, whose names say nothing about their order."""
    names = random.Random(3).sample(range(1000), len(pixels))
    for place, plane in enumerate(pixels):
        dataset = ct_slice(plane, place)
        if edit:
            edit(place, dataset)
        if place not in skip:
            save(folder, dataset, f"{names[place]:03d}.dcm")
    return folder


def refusal(path: Path, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read_volume(path, **options)
    assert str(path) not in str(caught.value)
    return caught.value


def test_slices_are_in_hounsfield_units_and_in_the_order_of_their_positions(tmp_path: Path) -> None:
    expected = volume()
    read = read_volume(save_series(tmp_path, expected))
    np.testing.assert_array_equal(read.hounsfield, expected)
    assert read.spacing_mm == pytest.approx((STEP, ROW, COLUMN))
    assert read.notes == ()


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(3)), signs=st.tuples(*[st.sampled_from((1, -1))] * 3))
def test_a_series_in_any_direction_is_turned_to_the_body(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], signs: tuple[int, int, int]
) -> None:
    """Slices along any of the body's axes, to either side: always the same volume."""
    body = np.random.default_rng(1).integers(-1000, 1000, (18, 20, 22)).astype(np.int16)  # z, y, x
    stack = body.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    unit = np.eye(3)[::-1]  # of z, y and x in the patient's coordinates x, y, z
    slicewise, down, across = (sign * unit[axis] for axis, sign in zip(order, signs, strict=True))
    normal = np.cross(across, down)

    def turn(place: int, dataset: Dataset) -> None:
        dataset.ImageOrientationPatient = [*map(float, across), *map(float, down)]
        dataset.ImagePositionPatient = [float(value) for value in slicewise * STEP * place]

    read = read_volume(save_series(tmp_path_factory.mktemp("series"), stack, turn))
    assert normal @ slicewise in (-1.0, 1.0)
    np.testing.assert_array_equal(read.hounsfield, body)
    assert read.spacing_mm == pytest.approx([(STEP, ROW, COLUMN)[order.index(axis)] for axis in range(3)])
    along = int(normal @ slicewise)  # a series is stacked along its normal, whatever its numbers
    origin = slicewise * STEP * (len(stack) - 1 if along < 0 else 0)
    original = make_affine(np.array([normal, down, across]), (STEP, ROW, COLUMN), origin)
    assert read.affine is not None
    np.testing.assert_array_equal(turn_back(read.hounsfield, read.affine, original), stack[::along])
    numbered = np.arange(body.size).reshape(body.shape)
    turned = numbered.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    for place in ((0, 0, 0), (3, 5, 7), (17, 0, 21)):  # lies where the files say
        ((k, row, column),) = np.argwhere(turned == numbered[place])
        expected = k * STEP * slicewise + row * ROW * down + column * COLUMN * across
        np.testing.assert_allclose((read.affine @ [*place, 1])[:3], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "signed", "slope", "intercept"), [(12, 0, 1, -1024), (16, 0, 0.5, -2000), (16, 1, 1, 0), (12, 1, 2, 0)]
)
def test_values_of_12_and_16_bits_are_rescaled_whether_signed_or_not(
    tmp_path: Path, bits: int, signed: int, slope: float, intercept: float
) -> None:
    expected = volume() // 4 * 2  # steps that every slope has

    def store(place: int, dataset: Dataset) -> None:
        stored = (expected[place] - intercept) / slope
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits - 1, signed
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        mask = 2**bits - 1  # bits above the stored ones are not part of the value
        dataset["PixelData"].value = (stored.astype(np.int32) & mask).astype("<u2").tobytes()

    np.testing.assert_array_equal(read_volume(save_series(tmp_path, expected, store)).hounsfield, expected)


def test_padding_and_what_lies_below_air_become_air(tmp_path: Path) -> None:
    expected = volume()

    def pad(place: int, dataset: Dataset) -> None:
        stored = expected[place].copy()
        stored[0, :5], stored[1, :5] = -2000, -1500
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit, dataset.RescaleIntercept = 1, 16, 15, 0
        dataset["PixelData"].value = stored.astype("<i2").tobytes()
        dataset.add_new("PixelPaddingValue", "SS", -2000)

    read = read_volume(save_series(tmp_path, expected, pad)).hounsfield
    assert (read[:, :2, :5] == -1024).all()
    np.testing.assert_array_equal(read[:, 2:], expected[:, 2:])


def test_a_compressed_series_is_read_as_the_plain_one(tmp_path: Path) -> None:
    read = read_volume(save_series(tmp_path, volume(), lambda place, dataset: dataset.compress(RLELossless)))
    np.testing.assert_array_equal(read.hounsfield, volume())


def item(**tags: Any) -> Dataset:
    dataset = Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def enhanced_ct(pixels: NDArray[np.int16], compress: bool = False) -> Dataset:
    """An Enhanced CT object, its frames from the head downward, with the geometry in functional groups."""
    whole = ct_slice(pixels[0], 0, SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=len(pixels))
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(whole, keyword)
    orientation = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    measures = item(PixelSpacing=[ROW, COLUMN], SliceThickness=STEP)
    whole.SharedFunctionalGroupsSequence = [item(PlaneOrientationSequence=[orientation], PixelMeasuresSequence=[measures])]
    rescale = item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
    whole.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[0, 0, -STEP * frame])], PixelValueTransformationSequence=[rescale])
        for frame in range(len(pixels))
    ]
    whole["PixelData"].value = (pixels[::-1].astype(np.int32) + 1024).astype("<u2").tobytes()
    if compress:
        whole.compress(RLELossless)
    return whole


@pytest.mark.parametrize("compress", [False, True])
def test_a_multi_frame_object_is_read_as_a_series(tmp_path: Path, compress: bool) -> None:
    save(tmp_path, enhanced_ct(volume(), compress), "one.dcm")
    for path in (tmp_path, tmp_path / "one.dcm"):
        read = read_volume(path)
        np.testing.assert_array_equal(read.hounsfield, volume())
        assert read.spacing_mm == pytest.approx((STEP, ROW, COLUMN))


def test_duplicates_localizers_and_other_files_are_set_aside_and_named(tmp_path: Path) -> None:
    save_series(tmp_path, volume())
    save(tmp_path, ct_slice(volume(1)[0], 2, InstanceNumber=99), "again.dcm")
    scout = {"SeriesInstanceUID": generate_uid(), "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    save(tmp_path, ct_slice(volume(1)[0], 0, **scout), "scout.dcm")
    (tmp_path / "DICOMDIR.txt").write_text("not an image")
    read = read_volume(tmp_path)
    np.testing.assert_array_equal(read.hounsfield, volume())
    assert len(read.notes) == 3
    assert all(any(word in note for note in read.notes) for word in ("position", "localizer", "without an image"))


def test_missing_slices_are_counted_and_placed(tmp_path: Path) -> None:
    error = refusal(save_series(tmp_path, np.concatenate([volume(), volume()]), skip=(3, 4, 8)))
    assert error.reason is SkipReason.MISSING_SLICES
    assert "3 positions without an image, the first between slices 3 and 4 of 9" in error.detail


def test_uneven_steps_are_refused(tmp_path: Path) -> None:
    def shift(place: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [0, 0, STEP * place + (1.0 if place > 2 else 0.0)]

    error = refusal(save_series(tmp_path, volume(), shift))
    assert error.reason is SkipReason.MISSING_SLICES
    assert "1 uneven steps of 3.50, not 2.50 mm" in error.detail


@settings(max_examples=6, deadline=None)
@given(noise=st.lists(st.floats(-0.04, 0.04), min_size=6, max_size=6))
def test_rounded_positions_are_even(tmp_path_factory: pytest.TempPathFactory, noise: list[float]) -> None:
    def move(place: int, dataset: Dataset) -> None:
        dataset.ImagePositionPatient = [0, 0, STEP * place + noise[place]]

    read = read_volume(save_series(tmp_path_factory.mktemp("series"), volume(), move))
    assert read.spacing_mm[0] == pytest.approx(STEP, abs=0.02)


def _tilt_tag(place: int, dataset: Dataset) -> None:
    dataset.GantryDetectorTilt = -12.5


def _tilt_positions(place: int, dataset: Dataset) -> None:
    dataset.ImagePositionPatient = [0, 0.1 * STEP * place, STEP * place]


def _other_rescale(place: int, dataset: Dataset) -> None:
    dataset.RescaleType = "EDW"


def _no_position(place: int, dataset: Dataset) -> None:
    if place == 4:
        del dataset.ImagePositionPatient


def _oblique(place: int, dataset: Dataset) -> None:
    half = 2**-0.5
    dataset.ImageOrientationPatient = [1, 0, 0, 0, half, half]
    dataset.ImagePositionPatient = [0, -half * STEP * place, half * STEP * place]


@pytest.mark.parametrize(
    ("edit", "reason", "words"),
    [
        (_tilt_tag, SkipReason.GANTRY_TILT, "12.5 degrees"),
        (_tilt_positions, SkipReason.GANTRY_TILT, "5.7 degrees"),
        (lambda place, dataset: setattr(dataset, "Modality", "MR"), SkipReason.NOT_CT, "modality MR"),
        (lambda place, dataset: delattr(dataset, "RescaleIntercept"), SkipReason.NOT_HOUNSFIELD, "6 of 6"),
        (_other_rescale, SkipReason.NOT_HOUNSFIELD, "6 of 6"),
        (_no_position, SkipReason.NO_GEOMETRY, "1 of 6 slices state no usable position"),
        (
            lambda place, dataset: setattr(dataset, "PixelSpacing", [1e-9, 1e-9]),
            SkipReason.NO_GEOMETRY,
            "a spacing that is not within 0.05 to 100.0 mm",
        ),
        (_oblique, SkipReason.NO_GEOMETRY, "more than 30 degrees"),
        (
            lambda place, dataset: setattr(dataset, "SeriesInstanceUID", f"1.2.{place % 2}"),
            SkipReason.MIXED_SERIES,
            "2 series with 6 images in one folder; give each series a folder of its own",
        ),
        (
            lambda place, dataset: setattr(dataset, "PixelSpacing", [ROW, COLUMN + (place == 5)]),
            SkipReason.MIXED_SERIES,
            "1 of 6 slices have another pixel spacing",
        ),
        (
            lambda place, dataset: setattr(dataset, "ImagePositionPatient", [5.0 * (place == 3), 0, STEP * place]),
            SkipReason.MIXED_SERIES,
            "shifted",
        ),
    ],
)
def test_what_is_no_single_straight_ct_series_is_refused(tmp_path: Path, edit: Edit, reason: SkipReason, words: str) -> None:
    error = refusal(save_series(tmp_path, volume(), edit))
    assert error.reason is reason
    assert words in error.detail


def test_a_time_series_is_refused(tmp_path: Path) -> None:
    save_series(tmp_path / "series", volume())
    for place, plane in enumerate(volume(1)):
        save(tmp_path / "series", ct_slice(plane, place, TemporalPositionIdentifier=2), f"second{place}.dcm")
    error = refusal(tmp_path / "series")
    assert error.reason is SkipReason.TIME_SERIES
    assert "12 images at 6 positions" in error.detail


def test_a_folder_that_was_copied_into_itself_is_one_series(tmp_path: Path) -> None:
    save_series(tmp_path, volume())
    for file in list(tmp_path.iterdir()):
        (tmp_path / f"copy of {file.name}").write_bytes(file.read_bytes())
    read = read_volume(tmp_path)
    np.testing.assert_array_equal(read.hounsfield, volume())
    assert "6 set aside" in read.notes[0]


def test_a_volume_beyond_the_limit_is_refused_before_a_pixel_is_decoded(tmp_path: Path) -> None:
    save_series(tmp_path, volume(), lambda place, dataset: setattr(dataset["PixelData"], "value", b"\0\0"))
    assert refusal(tmp_path, max_bytes=2 * volume().size - 1).reason is SkipReason.TOO_LARGE
    assert refusal(tmp_path, max_bytes=2 * volume().size).reason is SkipReason.CORRUPT


def test_neither_a_pipe_nor_a_deflated_bomb_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.dcm")
    assert refusal(tmp_path / "pipe.dcm").reason is SkipReason.UNREADABLE
    monkeypatch.setattr(dicom_pixels, "MAX_FILE_BYTES", 2**20)
    bomb = ct_slice(np.zeros((1024, 1024), np.int16), 0)
    bomb.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    save(tmp_path / "series", bomb, "bomb.dcm")
    assert (tmp_path / "series" / "bomb.dcm").stat().st_size < 2**16
    assert refusal(tmp_path / "series").reason is SkipReason.TOO_LARGE


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "absent", SkipReason.MISSING),
        (lambda folder: folder, SkipReason.NO_SLICES),
        (lambda folder: save_series(folder, volume()[:2]), SkipReason.NO_SLICES),
        (lambda folder: save_series(folder, np.full(SHAPE, 40, np.int16)), SkipReason.CONSTANT),
    ],
)
def test_what_is_no_volume_is_refused(tmp_path: Path, make: Callable[[Path], Path], reason: SkipReason) -> None:
    assert refusal(make(tmp_path)).reason is reason


@pytest.mark.parametrize("part", [0.3, 0.9])
@pytest.mark.parametrize("place", [0, 3])
def test_a_slice_that_was_cut_is_never_left_out_in_silence(tmp_path: Path, place: int, part: float) -> None:
    save_series(tmp_path, volume())
    file = next(file for file in tmp_path.iterdir() if dcmread(file).InstanceNumber == place + 1)
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    assert refusal(tmp_path).reason is SkipReason.CORRUPT


def test_a_damaged_file_never_raises_anything_else(tmp_path: Path) -> None:
    file = sorted(save_series(tmp_path, volume()).iterdir())[0]
    whole = file.read_bytes()
    header = whole.index(b"\xe0\x7f\x10\x00")

    @settings(max_examples=25, deadline=None)
    @given(
        changes=st.lists(st.tuples(st.integers(0, header + 20), st.integers(0, 255)), min_size=1, max_size=8),
        end=st.integers(1, len(whole)) | st.just(len(whole)),
    )
    def damage(changes: list[tuple[int, int]], end: int) -> None:
        content = bytearray(whole)
        for place, value in changes:
            content[place] = value
        file.write_bytes(content[:end])
        with suppress(ImageError):
            read_volume(tmp_path)

    damage()


def test_a_real_series_is_read_in_the_order_and_units_that_its_slices_state() -> None:
    """Five slices of a neck, 2.5 mm apart, whose files are numbered from the head downward."""
    folder = REAL / "98892001" / "CT5N"
    slices = sorted((dcmread(file) for file in folder.iterdir()), key=lambda one: float(one.ImagePositionPatient[2]))
    read = read_volume(folder)
    assert read.spacing_mm == pytest.approx((2.5, 0.488281, 0.488281))
    assert read.notes == ()
    assert [int(one.InstanceNumber) for one in slices] == [10, 9, 8, 7, 6]
    np.testing.assert_array_equal(read.hounsfield, np.stack([one.pixel_array.astype(np.int16) - 1024 for one in slices]))
    assert (read.hounsfield.min(), read.hounsfield.max()) == (-888, 85)


@pytest.mark.parametrize(
    ("folder", "reason", "words"),
    [
        ("77654033/CT2", SkipReason.MISSING_SLICES, "161 positions without an image, the first between slices 1 and 2 of 4"),
        ("98892001/CT2N", SkipReason.NO_SLICES, "2 are localizer images"),
        ("77654033/CR1", SkipReason.NOT_CT, "modality CR"),
    ],
)
def test_what_real_folders_lack_is_said(folder: str, reason: SkipReason, words: str) -> None:
    error = refusal(REAL / folder)
    assert error.reason is reason
    assert words in error.detail


def test_a_real_compressed_slice_is_in_hounsfield_units(tmp_path: Path) -> None:
    """A JPEG 2000 file of a scanner, three times at three positions; the oracle is pydicom's own decoding and rescale."""
    source = dcmread(REAL.parent / "693_J2KI.dcm")
    for place in range(3):
        source.SOPInstanceUID, source.ImagePositionPatient = generate_uid(), [0, 0, 5 * place]
        save(tmp_path, source, f"{place}.dcm")
    expected = np.clip(apply_rescale(source.pixel_array, source), -1024, None)
    read = read_volume(tmp_path).hounsfield
    assert read.shape == (3, 512, 512)
    assert (read == expected).mean() > 0.999  # but for pixels of padding, which are air
    assert read.min() == -1024 and 500 < read.max() < 3000
