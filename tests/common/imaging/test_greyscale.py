"""Modality, VOI and inversion against pydicom's own formulas and against values worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.tag import Tag
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.dicom_decode import CODE_COUNT, decode_dicom, find_codes, map_codes
from pneumofed.common.imaging.types import LUNG_WINDOW, Window
from tests.dicom_factory import dicom_bytes, lut_item, make_dataset

RAMP = np.arange(1000, 1400, dtype=np.uint16).reshape(20, 20)
FUNCTIONS = st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"])


def draw_pixels(bits: int, signed: bool, seed: int) -> np.ndarray:
    low = -(2 ** (bits - 1)) if signed else 0
    values = np.random.default_rng(seed).integers(low, low + 2**bits, (16, 17))
    return values.astype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")


def read_grey(stored: np.ndarray, **tags: Any) -> np.ndarray:
    return decode_dicom(dicom_bytes(stored, **tags)).pixels


def output_range(dataset: Dataset) -> tuple[float, float]:
    """What pydicom shows black and white: the range of all stored values, after the modality LUT (PS3.3, C.11.2.1.2)."""
    bits, signed = dataset.BitsStored, dataset.PixelRepresentation
    ends = np.array([-(2 ** (bits - 1)) if signed else 0, 2 ** (bits - signed) - 1])
    low, high = apply_modality_lut(ends, dataset)
    return low, high


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(8, 16),
    signed=st.booleans(),
    rescale=st.tuples(st.sampled_from([1.0, 0.25, 2.0, -1.5]), st.integers(-2000, 2000)),
    window=st.tuples(st.integers(-3000, 6000), st.integers(1, 8000)),
    function=FUNCTIONS,
    seed=st.integers(0, 99),
)
def test_rescale_and_window_agree_with_pydicom(
    bits: int, signed: bool, rescale: tuple[float, int], window: tuple[int, int], function: str, seed: int
) -> None:
    stored = draw_pixels(bits, signed, seed)
    tags: dict[str, Any] = {
        "RescaleSlope": rescale[0],
        "RescaleIntercept": rescale[1],
        "WindowCenter": window[0],
        "WindowWidth": window[1],
    }
    tags |= {"BitsStored": bits, "VOILUTFunction": function}
    dataset = make_dataset(stored, **tags)
    low, high = output_range(dataset)
    with np.errstate(over="ignore"):  # pydicom's sigmoid far from the window
        expected = (apply_voi_lut(apply_modality_lut(stored, dataset), dataset) - low) / (high - low)
    assume(np.ptp(expected) > 0)
    np.testing.assert_allclose(read_grey(stored, **tags), expected, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(signed=st.booleans(), first=st.integers(-2048, 2047), count=st.integers(2, 3000), seed=st.integers(0, 99))
def test_a_voi_lut_agrees_with_pydicom(signed: bool, first: int, count: int, seed: int) -> None:
    assume(signed or first >= 0)
    stored = draw_pixels(12, signed, seed)
    entries = np.random.default_rng(seed).integers(0, 1024, count)
    assume(entries.max() >= 512)
    item = lut_item(first, entries, 10)
    dataset = make_dataset(stored, VOILUTSequence=[item])
    dataset.set_original_encoding(is_implicit_vr=False, is_little_endian=True)
    expected = apply_voi_lut(stored.astype(np.int32), dataset) / 1023
    assume(np.ptp(expected) > 0)
    np.testing.assert_allclose(read_grey(stored, BitsStored=12, VOILUTSequence=[item]), expected, atol=1e-6)


def test_a_modality_lut_comes_before_the_window() -> None:
    curve = (np.arange(400) ** 2 // 4).astype(np.uint16)
    pixels = read_grey(RAMP, ModalityLUTSequence=[lut_item(1000, curve, 16)], WindowCenter=10_000, WindowWidth=20_001)
    np.testing.assert_allclose(pixels, np.clip((curve[RAMP - 1000] - 9_999.5) / 20_000 + 0.5, 0, 1), atol=1e-6)


def test_a_modality_lut_replaces_the_rescale() -> None:
    item = lut_item(1000, np.arange(400)[::-1], 16)
    np.testing.assert_allclose(
        read_grey(RAMP, ModalityLUTSequence=[item], RescaleSlope=1, RescaleIntercept=5), (1399 - RAMP) / 399
    )


@pytest.mark.parametrize(
    ("syntax", "word", "bits"),
    [
        (ImplicitVRLittleEndian, "u1", 8),
        (ImplicitVRLittleEndian, "<u2", 8),
        (ImplicitVRLittleEndian, "<u2", 10),
        (ExplicitVRBigEndian, ">u2", 10),
    ],
)
def test_lut_data_are_bytes_or_words_in_the_files_order(syntax: UID, word: str, bits: int) -> None:
    entries = np.linspace(0, 2**bits - 1, 400).astype(np.uint16)
    pixels = read_grey(RAMP, syntax=syntax, VOILUTSequence=[lut_item(1000, entries, bits, word)])
    np.testing.assert_allclose(pixels, entries[RAMP - 1000] / (2**bits - 1), atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "full_scale"), [(0, 1023), (8, 1023), (10, 1023), (11, 2047), (12, 1023), (16, 1023), (99, 1023)]
)
def test_lut_bits_that_cannot_be_are_mended(bits: int, full_scale: int) -> None:
    entries = np.linspace(0, 1023, 400).astype(np.uint16)
    pixels = read_grey(RAMP, VOILUTSequence=[lut_item(1000, entries, bits)])
    np.testing.assert_allclose(pixels, entries[RAMP - 1000] / full_scale, atol=1e-6)


def test_the_first_input_of_a_lut_may_be_a_negative_value_in_an_unsigned_tag() -> None:
    item = lut_item(2**16 - 200, np.arange(400), 9)
    pixels = read_grey((RAMP - 1200).astype(np.int16), VOILUTSequence=[item])
    np.testing.assert_allclose(pixels, (RAMP - 1000) / 511, atol=1e-6)


def test_a_voi_lut_goes_before_a_window() -> None:
    item = lut_item(1000, np.arange(400), 9)
    image = decode_dicom(dicom_bytes(RAMP, VOILUTSequence=[item], WindowCenter=0, WindowWidth=10))
    np.testing.assert_allclose(image.pixels, (RAMP - 1000) / 511, atol=1e-6)
    assert image.info.window is None


def test_without_window_the_occurring_values_fill_the_range() -> None:
    np.testing.assert_allclose(read_grey(RAMP), (RAMP - 1000) / 399, atol=1e-6)


def test_the_first_window_of_several_is_applied() -> None:
    tags: dict[str, Any] = {"WindowCenter": [1200, 0], "WindowWidth": [401, 1]}
    image = decode_dicom(dicom_bytes(RAMP, **tags))
    np.testing.assert_allclose(image.pixels, np.clip((RAMP - 1199.5) / 400 + 0.5, 0, 1), atol=1e-6)
    assert image.info.window == Window(1200, 401)


def test_a_window_of_width_one_is_a_threshold() -> None:
    np.testing.assert_array_equal(read_grey(RAMP, WindowCenter=1200, WindowWidth=1), RAMP > 1199.5)


def test_the_callers_window_goes_before_everything_in_the_file() -> None:
    window = Window(1100.0, 101.0)
    tags: dict[str, Any] = {
        "WindowCenter": 0,
        "WindowWidth": 1,
        "VOILUTSequence": [lut_item(0, np.arange(9), 8)],
        "VOILUTFunction": "SIGMOID",
    }
    image = decode_dicom(dicom_bytes(RAMP, **tags), window)
    np.testing.assert_allclose(image.pixels, np.clip((RAMP - 1099.5) / 100 + 0.5, 0, 1), atol=1e-6)
    assert image.info.window == window


@pytest.mark.parametrize(
    ("tags", "inverted"),
    [
        ({}, False),
        ({"PresentationLUTShape": "IDENTITY"}, False),
        ({"PhotometricInterpretation": "MONOCHROME1"}, True),
        ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}, True),
        ({"PresentationLUTShape": "INVERSE"}, True),
    ],
)
def test_white_to_black_images_are_turned_round_once(tags: dict[str, Any], inverted: bool) -> None:
    ramp = (RAMP - 1000) / 399
    image = decode_dicom(dicom_bytes(RAMP, **tags))
    np.testing.assert_allclose(image.pixels, 1 - ramp if inverted else ramp, atol=1e-6)
    assert image.info.inverted is inverted


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_not_part_of_the_range(photometric: str) -> None:
    padded = RAMP.copy()
    padded[:5] = 0
    pixels = read_grey(padded, PixelPaddingValue=0, PhotometricInterpretation=photometric)
    assert (pixels[:5] == 0).all()
    ramp = (RAMP[5:] - 1100) / 299
    np.testing.assert_allclose(pixels[5:], ramp if photometric == "MONOCHROME2" else 1 - ramp, atol=1e-6)


def test_padding_may_be_a_range() -> None:
    pixels = read_grey(RAMP, PixelPaddingValue=1000, PixelPaddingRangeLimit=1099)
    assert (pixels[:5] == 0).all()
    np.testing.assert_allclose(pixels[5:], (RAMP[5:] - 1100) / 299, atol=1e-6)


def test_padding_may_be_a_signed_value_in_an_unsigned_tag() -> None:
    padded = (RAMP - 1200).astype(np.int16)
    padded[:5] = -2000
    signed = dicom_bytes(padded, PixelPaddingValue=-2000)
    unsigned = signed.replace(b"\x28\x00\x20\x01SS", b"\x28\x00\x20\x01US")
    assert unsigned != signed
    for data in (signed, unsigned):
        np.testing.assert_allclose(decode_dicom(data).pixels[5:], (RAMP[5:] - 1100) / 299, atol=1e-6)


def test_ct_without_window_gets_the_lung_window_in_hounsfield_units() -> None:
    hounsfield = np.linspace(-1400, 300, 400).astype(np.int16).reshape(20, 20)
    stored = (hounsfield + 1024).astype(np.int16)
    image = decode_dicom(dicom_bytes(stored, Modality="CT", RescaleSlope=1, RescaleIntercept=-1024))
    np.testing.assert_allclose(image.pixels, np.clip((hounsfield + 600.5) / 1499 + 0.5, 0, 1), atol=1e-6)
    assert image.info.window == LUNG_WINDOW


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 5000, "WindowWidth": 10},
        {"PixelPaddingValue": 1000, "PixelPaddingRangeLimit": 1398},
        {"PixelPaddingValue": 1000, "PixelPaddingRangeLimit": 1399},
        {"ModalityLUTSequence": [lut_item(0, np.full(10, 7), 8)]},
    ],
)
def test_an_image_of_one_grey_is_refused(tags: dict[str, Any]) -> None:
    with pytest.raises(ImageError) as caught:
        read_grey(RAMP, **tags)
    assert caught.value.reason == SkipReason.CONSTANT


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 99))
def test_mapping_codes_is_indexing(rows: int, columns: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, CODE_COUNT, (rows, columns)).astype(np.uint16)
    table = generator.random(CODE_COUNT, np.float32)
    np.testing.assert_array_equal(map_codes(codes, table), table[codes])
    np.testing.assert_array_equal(find_codes(codes), np.unique(codes))


def test_blocks_cover_a_large_image() -> None:
    codes = np.arange(3000 * 1000, dtype=np.uint32).astype(np.uint16).reshape(3000, 1000)
    table = np.arange(CODE_COUNT, dtype=np.float32)
    np.testing.assert_array_equal(map_codes(codes, table), codes)
    assert len(find_codes(codes)) == min(CODE_COUNT, codes.size)


@pytest.mark.parametrize("representation", ["US", "SS"])
def test_a_first_input_of_32768_and_above_is_unsigned_where_the_inputs_are(representation: str) -> None:
    item = lut_item(0, np.arange(400), 9)
    first = 40_000 if representation == "US" else 40_000 - 2**16
    item["LUTDescriptor"] = DataElement(Tag("LUTDescriptor"), representation, [400, first, 9])
    pixels = read_grey(RAMP + np.uint16(39_000), VOILUTSequence=[item])
    np.testing.assert_allclose(pixels, (RAMP - 1000) / 511, atol=1e-6)


def test_a_first_input_of_32768_is_unsigned_though_the_rescale_gives_some_negative_inputs() -> None:
    item = lut_item(33_000, np.arange(400), 9)
    stored = np.arange(400, dtype=np.uint16).reshape(20, 20) + np.uint16(34_024)
    stored[0, 0] = 0
    expected = np.clip(stored.astype(float) - 1024 - 33_000, 0, 399) / 511
    np.testing.assert_allclose(
        read_grey(stored, RescaleIntercept=-1024, RescaleSlope=1, VOILUTSequence=[item]), expected, atol=1e-6
    )
