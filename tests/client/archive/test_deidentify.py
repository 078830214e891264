"""De-identification: no attribute carries an identifier through, and the file says what was done."""

from __future__ import annotations

from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.datadict import DicomDictionary, dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
)

from pneumofed.client.archive.deidentify import coarse_age, deidentify, encode_file
from pneumofed.client.archive.import_images import ImportRules, prepare_import
from pneumofed.client.archive.profile import ACTIONS, KEPT, NUMBERS, WRITTEN, Action
from pneumofed.client.archive.receiver import parse_file
from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.dicom_header import Pseudonyms
from pneumofed.common.imaging.dicom_tags import ASPECT_TAGS
from pneumofed.common.imaging.images import decode_image, read_image
from tests.dicom_factory import dicom_bytes, draw_radiograph, lut_item, make_dataset

PSEUDONYMS = Pseudonyms(b"k" * 32)
UIDS: dict[str, Any] = {
    "StudyInstanceUID": "1.2.752.4711.1",
    "SeriesInstanceUID": "1.2.752.4711.2",
    "SOPInstanceUID": "1.2.752.4711.3",
}
TEXT_VRS = frozenset({"AE", "AS", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UN", "UR", "UT", "OB", "OW"})
SECRET = "ZQX8KJ"


def _clean(data: bytes) -> Dataset:
    return dcmread(BytesIO(encode_file(deidentify(parse_file(data), PSEUDONYMS))))


def _image(**tags: Any) -> bytes:
    return dicom_bytes(draw_radiograph(), BitsStored=12, **(UIDS | {"AccessionNumber": "ACC-90210"} | tags))


def test_no_attribute_of_the_dictionary_carries_an_identifier_through() -> None:
    """Every public text attribute holds an identifier of its own; none of them is in the bytes of the file that is written."""
    dataset = make_dataset(draw_radiograph(), BitsStored=12, **UIDS)
    secrets = []
    for number, (tag, entry) in enumerate(sorted(DicomDictionary.items())):
        if tag >> 16 <= 6 or entry[0] not in TEXT_VRS or entry[4] in KEPT | set(UIDS) or tag in dataset:
            continue
        secrets.append(f"{SECRET}{number:05d}")
        value: Any = secrets[-1].encode() if entry[0] in ("OB", "OW", "UN") else secrets[-1]
        dataset[tag] = DataElement(tag, entry[0], value, validation_mode=0)
    dataset.file_meta = dcmread(BytesIO(_image())).file_meta
    assert len(secrets) > 1800
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    assert buffer.getvalue().count(SECRET.encode()) >= len(secrets)
    assert SECRET.encode() not in encode_file(deidentify(parse_file(buffer.getvalue()), PSEUDONYMS))


def test_nothing_of_the_original_identifiers_is_in_the_bytes_of_the_file() -> None:
    identifiers = {
        "PatientName": "Zwingli^Ottoline^Q", "PatientID": "MRN-77341", "PatientBirthDate": "19510317", "StudyDate": "20230911",
        "StudyTime": "101112", "SeriesDate": "20230912", "ContentDate": "20230913", "AcquisitionDateTime": "20230914101113",
        "AccessionNumber": "ACC-90210", "StudyID": "STD-5511", "InstitutionName": "Saint Elsewhere", "StationName": "XROOM-7",
        "ReferringPhysicianName": "Quackenbush^Hugo", "OperatorsName": "Rittenhouse^Ida", "DeviceSerialNumber": "SN-88123",
        "PatientAddress": "12 Elm Grove", "OtherPatientIDs": "OLD-1234", "StudyDescription": "Thorax of Zwingli",
        "ProtocolName": "Zwingli thorax", "ImageComments": "call daughter 555-0199", "DetectorID": "DET-4321",
        "BodyPartExamined": "ZWINGLI CHEST", "Manufacturer": "ACME for Saint Elsewhere", **UIDS,
    }  # fmt: skip
    dataset = make_dataset(draw_radiograph(), BitsStored=12, **identifiers)
    dataset.add_new(0x60000022, "LO", "overlay of Zwingli")
    dataset.add_new(0x60003000, "OW", b"OVERLAYBITS!")
    dataset.add_new(0x50000022, "LO", "curve of Zwingli")
    block = dataset.private_block(0x0019, "ACME PRIVATE", create=True)
    block.add_new(1, "LO", "private Zwingli")
    item = Dataset()
    item.PatientID, item.PatientName = "MRN-77341", "Zwingli^Ottoline"
    dataset.OtherPatientIDsSequence, dataset.RequestAttributesSequence = [item], [item]
    dataset.file_meta = dcmread(BytesIO(_image())).file_meta
    dataset.file_meta.SourceApplicationEntityTitle = "ZWINGLI_AE"
    buffer = BytesIO()
    dataset.preamble = b"preamble of Zwingli".ljust(128, b"\0")
    dataset.save_as(buffer, enforce_file_format=True)
    written = encode_file(deidentify(parse_file(buffer.getvalue()), PSEUDONYMS)).upper()
    parts = {part for text in identifiers.values() for part in [text, *text.split("^")] if len(part) > 2}
    for part in parts | {"ZWINGLI", "OVERLAYBITS", "ELSEWHERE", "ACME PRIVATE"}:
        assert part.upper().encode() in buffer.getvalue().upper()
        assert part.upper().encode() not in written


def test_only_listed_attributes_are_written_and_each_action_is_carried_out() -> None:
    clean = _clean(_image(PatientAge="063Y", StudyDescription="x", SoftwareVersions="1", WindowCenter="2000", WindowWidth="4000"))
    assert {element.keyword for element in clean} <= WRITTEN
    for keyword, action in ACTIONS.items():
        assert (keyword in clean) == (action is not Action.REMOVE), keyword
        if action is Action.EMPTY:
            assert not clean[keyword].value, keyword
    assert clean.PatientID == PSEUDONYMS.patient("HOSPITAL-4711")
    assert clean.AccessionNumber == PSEUDONYMS.accession("ACC-90210")
    for keyword, uid in UIDS.items():
        assert clean[keyword].value == PSEUDONYMS.uid(uid)
    assert clean.file_meta.MediaStorageSOPInstanceUID == clean.SOPInstanceUID


def test_the_file_says_that_and_how_it_was_deidentified() -> None:
    clean = _clean(_image())
    assert clean.PatientIdentityRemoved == "YES"
    assert clean.DeidentificationMethod
    assert [item.CodeValue for item in clean.DeidentificationMethodCodeSequence] == ["113100", "113108"]
    assert clean.LongitudinalTemporalInformationModified == "REMOVED"


def test_every_keyword_of_the_profile_is_one_of_the_standard() -> None:
    assert all(tag_for_keyword(keyword) is not None for keyword in [*ACTIONS, *KEPT])
    assert not KEPT & set(ACTIONS)
    assert not [keyword for keyword in KEPT if dictionary_VR(keyword) in ("DA", "DT", "TM", "PN", "AE")]


@pytest.mark.parametrize(("dtype", "bits"), [("u1", 8), ("i1", 8), ("u2", 12), ("i2", 12), ("u2", 16), ("i2", 16)])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_the_image_stays_the_same(tmp_path: Path, dtype: str, bits: int, syntax: UID) -> None:
    tags = {
        "PixelPaddingValue": 0,
        "RescaleSlope": "0.3333333",
        "RescaleIntercept": "-7.5",
        "PhotometricInterpretation": "MONOCHROME1",
    }
    _compare(tmp_path, dicom_bytes(draw_radiograph(dtype, bits), syntax=syntax, BitsStored=bits, **(UIDS | tags)))


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEG2000Lossless])
def test_the_image_of_a_compressed_file_stays_the_same(tmp_path: Path, syntax: UID) -> None:
    _compare(
        tmp_path, dicom_bytes(draw_radiograph(), syntax=syntax, BitsStored=12, WindowCenter="2000", WindowWidth="3000", **UIDS)
    )


@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
@pytest.mark.parametrize(("dtype", "first"), [("u2", 100), ("i2", -2000)])
def test_lookup_tables_keep_their_effect_and_lose_their_text(tmp_path: Path, keyword: str, dtype: str, first: int) -> None:
    item = lut_item(first, np.arange(4096)[::-1] ** 2 // 4096, 12)
    item.LUTExplanation = SECRET
    data = dicom_bytes(draw_radiograph(dtype), BitsStored=12, **(UIDS | {keyword: [item]}))
    assert SECRET.encode() in data
    assert SECRET.encode() not in _compare(tmp_path, data)


def _compare(folder: Path, data: bytes) -> bytes:
    written = encode_file(deidentify(parse_file(data), PSEUDONYMS))
    before, after = folder / "before", folder / "after"
    before.write_bytes(data)
    after.write_bytes(written)
    np.testing.assert_array_equal(read_image(before).pixels, read_image(after).pixels)
    assert read_image(before).info == read_image(after).info
    return written


def test_unused_bits_and_bytes_behind_the_pixels_are_not_kept() -> None:
    stored = draw_radiograph()
    dirty = stored | np.uint16(0xA000)  # an overlay of old, in the four bits that no value uses
    pixels = dirty.tobytes() + b"ZWINGLI behind the image"
    clean = _clean(dicom_bytes(stored, BitsStored=12, PixelData=pixels, **UIDS))
    np.testing.assert_array_equal(clean.pixel_array, stored)
    assert b"ZWINGLI" not in encode_file(clean)


@pytest.mark.parametrize(
    ("age", "kept"),
    [("089Y", "089Y"), ("090Y", "090Y"), ("097Y", "090Y"), ("063Y", "063Y"), ("018M", "018M"), ("030M", "002Y"), ("012D", "000M"),
     ("100W", "022M"), ("", ""), ("SEVEN", "")],
)  # fmt: skip
def test_ages_are_coarse_and_bounded(age: str, kept: str) -> None:
    assert coarse_age(make_dataset(draw_radiograph(), PatientAge=age)) == kept


def test_a_missing_age_comes_from_the_dates_before_they_go() -> None:
    assert coarse_age(make_dataset(draw_radiograph(), PatientBirthDate="19300102", StudyDate="20240101")) == "090Y"
    assert coarse_age(make_dataset(draw_radiograph(), PatientBirthDate="20200601", StudyDate="20240101")) == "003Y"
    assert coarse_age(make_dataset(draw_radiograph(), PatientBirthDate="20250101", StudyDate="20240101")) == ""


def test_images_of_one_patient_stay_together_and_studies_keep_their_images() -> None:
    first, second = _clean(_image()), _clean(_image(SOPInstanceUID="1.2.752.4711.9"))
    other = _clean(_image(PatientID="SOMEONE-ELSE"))
    assert first.PatientID == second.PatientID != other.PatientID
    assert first.StudyInstanceUID == second.StudyInstanceUID
    assert first.SOPInstanceUID != second.SOPInstanceUID


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PatientID": ""}, SkipReason.NO_PATIENT),
        ({"SOPClassUID": "1.2.3.4"}, SkipReason.CORRUPT),
        ({"NumberOfFrames": 3}, SkipReason.MULTI_FRAME),
        ({"PixelData": b""}, SkipReason.CORRUPT),
        ({"BurnedInAnnotation": "YES"}, SkipReason.BURNT_IN),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, SkipReason.BURNT_IN),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7.2"}, SkipReason.BURNT_IN),
        ({"ConversionType": "DF"}, SkipReason.BURNT_IN),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, SkipReason.BURNT_IN),
        ({"ViewPosition": "LL"}, SkipReason.NOT_FRONTAL),
        ({"SOPInstanceUID": "1.2.99"}, SkipReason.NOT_DELIVERED),
    ],
)
def test_images_that_cannot_be_used_have_a_reason(tags: dict[str, Any], reason: SkipReason) -> None:
    with pytest.raises(ImageError) as caught:
        prepare_import(parse_file(_image(**tags)), UIDS["SOPInstanceUID"], PSEUDONYMS, ImportRules())
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    "tags",
    [{}, {"BurnedInAnnotation": "NO", "ConversionType": "DF"}, {"ImageType": ["DERIVED", "PRIMARY"]}, {"BurnedInAnnotation": ""}],
)
def test_plain_radiographs_pass(tags: dict[str, Any]) -> None:
    assert prepare_import(parse_file(_image(**tags)), UIDS["SOPInstanceUID"], PSEUDONYMS, ImportRules())


def test_keep_burnt_in_and_all_views_overrule() -> None:
    data = _image(BurnedInAnnotation="YES", ViewPosition="LL")
    written = prepare_import(
        parse_file(data), UIDS["SOPInstanceUID"], PSEUDONYMS, ImportRules(frontal_only=False, keep_burnt_in=True)
    )
    assert dcmread(BytesIO(written)).BurnedInAnnotation == "YES"


FILE = {
    "PixelPaddingValue": "4000", "PixelPaddingRangeLimit": "4095", "RescaleIntercept": "-100", "RescaleSlope": "2",
    "WindowCenter": "2048", "WindowWidth": "1024", **dict.fromkeys(ASPECT_TAGS, r"2\1"),
}  # fmt: skip
"""All numbers that the decoder reads, as a file has them."""
SPELT = (
    r"{0}\{1}",
    r"{0}\{1}\{1}",
    "{0}\\",
    r"\{0}",
    r"{0}\N/A",
    r"N/A\{0}",
    "N/A",
    "",
    "{0},5",
    r"0\{0}",
    r"-1\{0}",
    20 * r"\{0}",
)
"""Values that follow, a trailing or leading empty one, text for one or all of them, and none that a window may have."""


def _seen(data: bytes) -> tuple[Any, ...]:
    """What a model would be given of a file."""
    try:
        image = decode_image(data)
    except ImageError as error:
        return (error.reason,)
    return image.pixels.tobytes(), image.pixels.shape, image.info.window, image.info.inverted


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize("tag", sorted(FILE))
def test_the_file_that_is_written_decodes_as_the_original_whatever_is_wrong_with_its_numbers(tag: str, syntax: UID) -> None:
    assert set(FILE) <= set(NUMBERS)
    whole = {"WindowCenter", "WindowWidth"} if tag.startswith("Window") else {*FILE} - {*ASPECT_TAGS} | {tag}
    used = {*whole, *ASPECT_TAGS[ASPECT_TAGS.index(tag) :]} if tag in ASPECT_TAGS else whole
    second = {"WindowCenter": "1000", "WindowWidth": "500"}
    for spelt, other in product(SPELT, SPELT if tag == "WindowCenter" else ("{0}",)):
        numbers = {name: FILE[name] for name in used} | {tag: spelt.format(FILE[tag], second.get(tag, FILE[tag]))}
        if tag == "WindowCenter":
            numbers["WindowWidth"] = other.format("1024", "500")
        original = dicom_bytes(draw_radiograph(), syntax=syntax, BitsStored=12, text=numbers, **UIDS)
        assert _seen(encode_file(deidentify(parse_file(original), PSEUDONYMS))) == _seen(original), (spelt, other)
