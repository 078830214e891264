"""The page computes what Python computes: the page's functions run in Node, Python is the oracle."""

from __future__ import annotations

import base64
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import date, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from PIL import ImageOps
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
)

from pneumofed.common.errors import ImageError
from pneumofed.common.imaging.images import decode_image
from pneumofed.common.imaging.patient_groups import (
    CHEST_PARTS,
    OTHER_PARTS,
    AgeGroup,
    age_group_between,
    age_group_of_string,
    classify_view,
    is_other_part,
    view_group_of,
)
from pneumofed.common.imaging.types import Image, ImageInfo, Window
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.calibration import ClassLine
from pneumofed.common.model_bundle.image_statistics import cells_of, statistics_of, thumbnail
from pneumofed.common.model_bundle.manifest import Preprocessing
from pneumofed.common.model_bundle.predictor import Predictor, model_input
from pneumofed.common.model_bundle.suitability import score_images
from pneumofed.inference.web_model.page import facts_of
from tests.dicom_factory import dicom_bytes, draw_radiograph, lut_item
from tests.inference.web_model.node import NODE, Page, PageRefusesError, numbers, picture, received, running, sent
from tests.model_bundles import phantom_images

pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with running(tmp_path_factory.mktemp("page")) as found:
        yield found


def in_page(page: Page, data: bytes, bundle: Bundle, window: Window | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    given = {"center": window.center, "width": window.width} if window else None
    file = base64.b64encode(data).decode()
    answer = page.call("decode", file=file, window=given, codes=facts_of(bundle, "int8", "")["codes"])
    return received(answer), answer["info"]


def assert_same(page: Page, data: bytes, bundle: Bundle, window: Window | None = None) -> None:
    """Pixels, and all that decides over the image; or the same refusal."""
    try:
        expected = decode_image(data, window=window)
    except ImageError as error:
        with pytest.raises(PageRefusesError) as refused:
            in_page(page, data, bundle, window)
        assert str(refused.value) == error.reason.name.lower()
        return
    pixels, info = in_page(page, data, bundle, window)
    assert pixels.shape == expected.pixels.shape
    np.testing.assert_allclose(pixels, expected.pixels, rtol=0, atol=1.2e-7)  # one step of float32 next to 1
    own = expected.info
    assert (info["bits"], info["height_px"], info["width_px"]) == (own.bits, own.height_px, own.width_px)
    assert info["groups"] == dict(own.groups.known())
    if own.format == "dicom":
        assert (info["view"], info["modality"], info["body_part"]) == (own.view or "", own.modality or "", own.body_part or "")


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("shape", [(97, 131), (131, 64), (16, 40), (64, 64), (300, 224)])
@pytest.mark.parametrize("size", [32, 64, 224])
def test_the_networks_input_is_the_same_to_the_last_bit(page: Page, shape: tuple[int, int], size: int, fit: Any) -> None:
    pixels = np.random.default_rng(size).random(shape).astype(np.float32)
    preprocessing = Preprocessing(size_px=size, fit=fit, in_channels=1, mean=(0.5,), std=(0.2,))
    found = received(page.call("modelInput", picture=picture(pixels), size_px=size, fit=fit))
    assert np.array_equal(found, model_input(pixels, preprocessing))


def png(pixels: np.ndarray, mode: str | None = None, **options: Any) -> bytes:
    buffer = BytesIO()
    made = PIL.Image.fromarray(pixels) if mode is None else PIL.Image.fromarray(pixels).convert(mode)
    made.save(buffer, "PNG", **options)
    return buffer.getvalue()


def _pictures() -> dict[str, bytes]:
    draw = np.random.default_rng(1)
    grey, colour = draw.integers(0, 256, (41, 37), np.uint8), draw.integers(0, 256, (41, 37, 3), np.uint8)
    clear = draw.integers(0, 256, (41, 37, 4), np.uint8)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    found = {
        "grey": png(grey),
        "one bit": png(grey, "1"),
        "RGB": png(colour),
        "RGBA": png(clear),
        "palette": png(colour, "P"),
        "palette with a clear colour": png(colour, "P", transparency=7),
        "grey and alpha": png(clear[:, :, :2].copy().view(np.uint16)[:, :, 0].astype(np.uint8), "LA"),
        "grey with a clear grey": png(grey, transparency=int(grey[3, 3])),
        "turned": png(grey, exif=exif),
        "no contrast": png(np.full((41, 37), 9, np.uint8)),
        "too small": png(grey[:10]),
        "cut off": png(grey)[:700],
        **{f"16 bits, {bits} used": png((draw.integers(0, 2**bits, (41, 37))).astype(np.uint16)) for bits in (8, 10, 12, 14, 16)},
    }
    for depth, kind in ((1, 0), (2, 0), (4, 0), (16, 2), (16, 6), (16, 4), (8, 0)):
        found[f"written by hand, {depth} bits of kind {kind}, interlaced"] = _interlaced(depth, kind)
    return found


def _interlaced(depth: int, kind: int) -> bytes:
    """A PNG in seven passes (Adam7), which Pillow reads and does not write."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    values = np.random.default_rng(depth).integers(0, 2**depth, (19, 21, channels))
    lines = b""
    for top, left, down, across in (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):
        for row in values[top::down, left::across].reshape(len(values[top::down]), -1):
            bits = np.unpackbits(row.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, 16 - depth :].ravel()
            lines += b"\0" + np.packbits(bits).tobytes()
    return _png_of(depth, kind, (19, 21), lines, interlaced=True)


def _png_of(depth: int, kind: int, shape: tuple[int, int], lines: bytes, *, interlaced: bool = False) -> bytes:
    header = b"".join(side.to_bytes(4, "big") for side in shape[::-1]) + bytes([depth, kind, 0, 0, interlaced])
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(text).to_bytes(4, "big") + name + text + zlib.crc32(name + text).to_bytes(4, "big") for name, text in chunks
    )


@pytest.mark.parametrize("name", _pictures())
def test_a_png_has_the_same_grey_values_or_the_same_refusal(page: Page, bundle: Bundle, name: str) -> None:
    assert_same(page, _pictures()[name], bundle)


def test_every_filter_of_png_is_undone(page: Page, bundle: Bundle) -> None:
    smooth = np.rint(255 * phantom_images(1)[0][0].pixels).astype(np.uint8)
    for level in (1, 6, 9):
        assert_same(page, png(smooth, compress_level=level), bundle)
    rows, columns = smooth.shape
    lines = b"".join(bytes([row % 5]) + smooth[row].tobytes() for row in range(rows))  # the filters run, whatever they give
    assert_same(page, _png_of(8, 0, (rows, columns), lines), bundle)


def _item(code: str, scheme: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator = code, scheme
    return item


STORED = draw_radiograph()
SIGNED = draw_radiograph("i2", 12)
FILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "implicit": {"syntax": ImplicitVRLittleEndian},
    "big endian": {"syntax": ExplicitVRBigEndian},
    "deflated": {"syntax": DeflatedExplicitVRLittleEndian},
    "bare": {"preamble": False},
    "bare and implicit": {"preamble": False, "syntax": ImplicitVRLittleEndian},
    "white is low": {"PhotometricInterpretation": "MONOCHROME1"},
    "inverse shape": {"PresentationLUTShape": "INVERSE"},
    "window": {"WindowCenter": 2000, "WindowWidth": 1500},
    "two windows, the first of no use": {"WindowCenter": [5, 2000], "WindowWidth": [0, 1500]},
    "exact window": {"WindowCenter": 2000, "WindowWidth": 1500, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 2000, "WindowWidth": 1500, "VOILUTFunction": "SIGMOID"},
    "window of width 1": {"WindowCenter": 2000, "WindowWidth": 1},
    "narrow window": {"WindowCenter": 2000, "WindowWidth": 0.5},
    "rescaled": {"RescaleSlope": 2.5, "RescaleIntercept": -1024, "WindowCenter": 800, "WindowWidth": 3000},
    "computed tomography": {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024},
    "padding": {"PixelPaddingValue": int(STORED[0, 0])},
    "padding to a limit": {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 300},
    "VOI LUT": {"VOILUTSequence": [lut_item(0, np.arange(4096, dtype=np.uint16)[::-1] * 4, 14)]},
    "modality LUT": {"ModalityLUTSequence": [lut_item(100, np.arange(2000, dtype=np.uint16), 12)]},
    "pixels that are not square": {"PixelSpacing": [0.2, 0.1]},
    "shape by ratio": {"PixelAspectRatio": [3, 4]},
    "not to be used": {"PixelSpacing": [9, 1]},
    "colour": {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3},
    "frames": {"NumberOfFrames": 3},
    "rows are lacking": {"Rows": None},
    "more rows than pixels": {"Rows": 80},
    "high bit": {"HighBit": 11},
    "one grey": {"WindowCenter": 99999, "WindowWidth": 2},
    "lateral": {"ViewPosition": "LL", "PatientSex": "F", "PatientAge": "045Y"},
    "frontal and oblique": {"ViewPosition": "PA", "ViewCodeSequence": [_item("399356000", "SCT")]},
    "coded": {"ViewPosition": None, "ViewCodeSequence": [_item("R-10206", "SRT")], "PatientAge": "006M", "PatientSex": "M"},
    "region": {"BodyPartExamined": "HAND", "AnatomicRegionSequence": [_item("51185008", "SCT")]},
    "by its orientation": {"ViewPosition": None, "PatientOrientation": ["A", "F"]},
    "slanted": {"ViewPosition": None, "PatientOrientation": ["LA", "F"]},
    "on one side": {"ViewPosition": "AP", "PatientPosition": "HFDL"},
    "a hint": {"ViewPosition": None, "SeriesDescription": "Thorax seitlich"},
    "by days": {"PatientAge": None, "PatientBirthDate": "20200229", "StudyDate": "20220228"},
}


@pytest.mark.parametrize("name", FILES)
def test_a_dicom_file_has_the_same_grey_values_and_says_the_same_of_itself(page: Page, bundle: Bundle, name: str) -> None:
    assert_same(page, dicom_bytes(STORED, **FILES[name]), bundle)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_signed_and_short_values_are_read_alike(page: Page, bundle: Bundle, syntax: UID) -> None:
    assert_same(page, dicom_bytes(SIGNED, BitsStored=12, HighBit=11, syntax=syntax), bundle)
    assert_same(page, dicom_bytes(draw_radiograph("u1", 8), syntax=syntax), bundle)
    assert_same(page, dicom_bytes(draw_radiograph("i1", 8), syntax=syntax), bundle)
    assert_same(page, dicom_bytes(STORED | np.uint16(0xF000), BitsStored=12, HighBit=11, syntax=syntax), bundle)
    assert_same(page, dicom_bytes(STORED << np.uint16(4), BitsStored=12, HighBit=15, syntax=syntax), bundle)


def test_the_bundles_own_window_takes_the_place_of_the_files(page: Page, bundle: Bundle) -> None:
    assert_same(page, dicom_bytes(STORED, WindowCenter=50, WindowWidth=10), bundle, Window(1500.0, 2500.0))


@pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, RLELossless])
def test_a_compressed_dicom_file_is_refused(page: Page, bundle: Bundle, syntax: UID) -> None:
    data = dicom_bytes(draw_radiograph("u1", 8), syntax=syntax)
    with pytest.raises(PageRefusesError, match="unsupported_compression"):
        in_page(page, data, bundle)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_dicom_files_are_refused_and_nothing_else_happens(page: Page, bundle: Bundle, seed: int) -> None:
    draw = np.random.default_rng(seed)
    for _ in range(15):
        data = bytearray(dicom_bytes(STORED, WindowCenter=2000, WindowWidth=1500)[: draw.integers(200, 3400)])
        for place in draw.integers(132, len(data), 4):
            data[place] = draw.integers(256)
        try:
            in_page(page, bytes(data), bundle)
        except PageRefusesError:
            continue
        except AssertionError as crash:  # what the page's `decode` in model.js turns into `corrupt`
            assert "RangeError" in str(crash)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"II*\0 a TIFF file", "tiff"),
        (b"PK\x03\x04 an archive", "archive_file"),
        (b"no picture at all", "unknown_format"),
    ],
)
def test_other_files_are_refused_by_what_they_are(page: Page, bundle: Bundle, data: bytes, reason: str) -> None:
    with pytest.raises(PageRefusesError, match=reason):
        in_page(page, data, bundle)


VIEWS = [
    " ".join(words)
    for count in (1, 2)
    for words in itertools.product(
        [
            "",
            "PA",
            "AP",
            "LAT",
            "L",
            "R",
            "LL",
            "RLAT",
            "LLO",
            "RAO",
            "DECUB",
            "LLD",
            "AXIAL",
            "X",
            "TABLE",
            "XTABLE",
            "erect",
            "profil2",
        ],
        repeat=count,
    )
]


def test_views_parts_and_ages_are_classified_alike(page: Page) -> None:
    assert page.call("views", words=VIEWS) == [[classify_view(view).value, view_group_of(view)] for view in VIEWS]
    parts = ["", "CHEST", "hand", "HAND CHEST", "LUNGS", "Thorax", "SKULL, NECK", "unknown"]
    both = {"chest": sorted(CHEST_PARTS), "other": sorted(OTHER_PARTS)}
    assert page.call("parts", words=parts, parts=both) == [is_other_part(part) for part in parts]
    ages = [
        f"{number:03d}{unit}" for number in (0, 1, 2, 3, 4, 11, 12, 17, 18, 23, 24, 27, 28, 64, 65, 120, 999) for unit in "DWMY"
    ]
    groups = [age_group_of_string(age) for age in [*ages, "", "12", "5y"]]
    assert page.call("ages", strings=[*ages, "", "12", "5y"]) == [group.value if group else None for group in groups]


def test_an_age_by_two_days_is_the_same(page: Page) -> None:
    birth = date(2000, 2, 29)
    days = [birth + timedelta(days=days) for days in (-1, 0, 27, 28, 730, 731, 4382, 4383, 6574, 6575, 23741, 23742, 50000)]
    given = [[f"{birth:%Y%m%d}", f"{day:%Y%m%d}"] for day in days] + [["20010229", "20200101"], ["", "20200101"]]
    expected = [age_group_between(birth, day) for day in days] + [None, None]
    assert page.call("agesBetween", days=given) == [group.value if group else None for group in expected]


def _squares() -> list[np.ndarray]:
    drawn = [np.rint(255 * image.pixels).astype(np.float32) / np.float32(255) for image, _ in phantom_images(4, size_px=96)]
    padded = np.zeros((96, 96), np.float32)
    padded[20:70, 10:90] = drawn[0][20:70, 10:90]
    return [*drawn, padded, np.zeros((96, 96), np.float32), np.ones((96, 96), np.float32)]


@pytest.mark.parametrize("number", range(7))
def test_thumbnail_statistics_and_cells_are_the_same(page: Page, number: int) -> None:
    square = _squares()[number]
    found, grey = page.call("statistics", square=picture(square)), thumbnail(square)
    assert np.array_equal(numbers(found["grey"]), grey.ravel().astype(np.float32))
    np.testing.assert_allclose(numbers(found["statistics"]), statistics_of(grey), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(numbers(found["cells"]), cells_of(grey), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"modality": "CT"},
        {"modality": "CR", "body_part": "HAND"},
        {"view": "LATERAL"},
        {"colour": 0.2},
        {"height_px": 400, "width_px": 100},
        {"age_group": AgeGroup.CHILD, "sex": "F", "view": "AP"},
    ],
)
def test_a_judgement_is_the_same(page: Page, bundle: Bundle, changed: dict[str, Any]) -> None:
    predictor, facts = Predictor(bundle, "int8", threads=1), facts_of(bundle, "int8", "")
    turns = (lambda grey: grey, lambda grey: np.rot90(grey), lambda grey: np.rot90(grey, 2), lambda grey: np.float32(1) - grey)
    for turn, (image, _) in itertools.product(turns, phantom_images(3, seed=3)):
        info = replace(ImageInfo("png", 64, 64, 8), **changed)
        whole = Image(np.ascontiguousarray(turn(image.pixels)), info)
        expected = predictor.judge([whole])[0]
        square = predictor.prepare(whole)
        outputs = predictor.run(square[None, None])
        said = {name: getattr(info, name) for name in ("height_px", "width_px", "modality", "body_part", "view", "colour")}
        found = page.call(
            "judge",
            facts=facts,
            info=said | {"groups": dict(info.groups.known())},
            square=picture(square),
            logits=sent(outputs["logits"]),
            features=sent(outputs["features"]),
        )
        assert (found["verdict"], found["reasons"]) == (expected.verdict, [reason.value for reason in expected.reasons])
        population = expected.population.to_json()
        assert {name: found["population"][name] for name in ("status", "outside", "age_group", "sex", "view")} == {
            name: population[name] for name in ("status", "outside", "age_group", "sex", "view")
        }
        assert ("probability" in found) == (expected.prediction is not None), "no number without a judgement"
        if expected.prediction:
            own = expected.prediction
            for name in ("probability", "low", "high"):
                assert found[name] == pytest.approx(getattr(own, name), abs=1e-9)
            assert found["classes"] == pytest.approx(dict(own.classes), abs=1e-9)


def test_the_shares_of_many_classes_are_the_same(page: Page, bundle: Bundle) -> None:
    own, names = facts_of(bundle, "int8", ""), ["normal", "pneumonia", "tuberculosis", "mass"]
    image = next(one for one, _ in phantom_images(3, seed=3) if Predictor(bundle, "int8", threads=1).judge([one])[0].prediction)
    predictor = Predictor(bundle, "int8", threads=1)
    square = predictor.prepare(image)
    features = predictor.run(square[None, None])["features"]
    logits = np.array([[0.3, 40.0, -2.0, 1.5], [0.3, -1.0, -2.0, 1.5]], np.float32)
    lines = tuple(ClassLine(slope=slope, intercept=0.1 * slope) for slope in (0.3, 1.0, 2.0))
    for row, given in itertools.product(logits, ((), lines)):
        fit = bundle.manifest.calibration.model_copy(update={"class_lines": given})
        facts = own | {"classes": names, "calibration": fit.model_dump(mode="json")}
        said: dict[str, object] = {
            "height_px": 64,
            "width_px": 64,
            "modality": None,
            "body_part": None,
            "view": None,
            "colour": 0.0,
            "groups": {},
        }
        found = page.call(
            "judge", facts=facts, info=said, square=picture(square), logits=sent(row[None]), features=sent(features)
        )
        assert list(found["classes"].values()) == pytest.approx(fit.class_probabilities(row[None])[0].tolist(), abs=1e-9)


def test_the_tests_scores_are_the_same(page: Page, bundle: Bundle) -> None:
    suitability = bundle.manifest.suitability
    assert suitability
    predictor = Predictor(bundle, "int8", threads=1)
    for image, _ in phantom_images(5, seed=4):
        square = predictor.prepare(image)
        features = predictor.run(square[None, None])["features"]
        found = page.call("scores", facts=facts_of(bundle, "int8", ""), square=picture(square), features=sent(features))
        expected = score_images(suitability, square[None], features)[:, 0]
        assert [found[name] for name in ("features", "pixels", "turn")] == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_logit_that_is_no_number_is_not_judged(page: Page, bundle: Bundle) -> None:
    facts = {**facts_of(bundle, "int8", ""), "suitability": None}
    info = {"height_px": 64, "width_px": 64, "colour": 0, "groups": {}}
    square = picture(np.full((32, 32), 0.5, np.float32))
    found = page.call(
        "judge", facts=facts, info=info, square=square, logits=sent(np.array([np.nan, 1])), features=sent(np.zeros(128))
    )
    assert (found["verdict"], found["reasons"]) == ("cannot judge", ["far_from_reference"])


@pytest.mark.parametrize("orientation", range(9))
def test_the_orientation_of_a_photograph_is_applied_as_pillow_does(page: Page, tmp_path: Path, orientation: int) -> None:
    pixels = np.random.default_rng(0).random((5, 7)).astype(np.float32)
    image = PIL.Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(received(page.call("orient", picture=picture(pixels), orientation=orientation)), expected)


def test_colour_is_measured_alike(page: Page) -> None:
    draw = np.random.default_rng(2)
    for shape, spread in (((200, 150), 40), ((64, 64), 255), ((97, 301), 20)):
        base = draw.integers(0, 256 - spread, (*shape, 1))
        rgb = np.clip(base + draw.integers(0, spread, (*shape, 3)), 0, 255).astype(np.uint8)
        expected = decode_image(png(rgb)).info.colour
        found = page.call("colour", height=shape[0], width=shape[1], rgb=base64.b64encode(rgb.tobytes()).decode())
        assert found == pytest.approx(expected, abs=1 / 255)


def test_a_bundle_that_says_neither_what_it_may_judge_nor_for_whom_judges_what_the_file_allows(
    page: Page, bundle: Bundle
) -> None:
    unknown: dict[str, list[str]] = {"age": [], "sex": [], "view": []}
    facts = {**facts_of(bundle, "float32", ""), "suitability": None, "population": unknown}
    info = {"height_px": 64, "width_px": 64, "colour": 0, "groups": {}}
    square = picture(np.full((32, 32), 0.5, np.float32))
    found = page.call("judge", facts=facts, info=info, square=square, logits=sent(np.array([0, 9])), features=sent(np.zeros(128)))
    assert (found["verdict"], found["population"]["status"]) == ("pneumonia", "model_unknown")
