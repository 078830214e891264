"""Attacks on the import: nothing of PS3.15, Table E.1-1, and nothing that people type into a field, reaches the file."""

from __future__ import annotations

import csv
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.datadict import dictionary_is_retired, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from pneumofed.client.archive.deidentify import deidentify, encode_file
from pneumofed.client.archive.receiver import parse_file
from pneumofed.common.imaging.dicom_header import Pseudonyms
from tests.dicom_factory import dicom_bytes, draw_radiograph, make_dataset

PSEUDONYMS = Pseudonyms(b"k" * 32)
UIDS = {"StudyInstanceUID": "1.2.752.4711.1", "SeriesInstanceUID": "1.2.752.4711.2", "SOPInstanceUID": "1.2.752.4711.3"}
TABLE = Path(__file__).parents[1] / "client" / "archive" / "confidentiality_profile.csv"
"""Tag and action of the Basic Profile in Table E.1-1 of PS3.15, edition 2026c (by dicom-anonymizer 2.1.0, which parses the standard)."""
SECRETS: dict[str, Any] = {
    "DA": "19510317",
    "DT": "19510317101112",
    "TM": "101112.7341",
    "AS": "063Y",
    "UI": "1.2.752.99.77341",
    "DS": "77341.25",
    "IS": "773415",
    "AE": "ZQX8KJ_AE",
    "CS": "ZQX8KJ",
    "US": 7734,
    "UL": 77341555,
    "FD": 77341.25,
    "FL": 77341.25,
    "SL": 77341555,
}
NUMERIC = ("US", "UL", "FD", "FL", "SL", "SS", "AT")


def clean_of(dataset: Dataset) -> tuple[bytes, bytes]:
    """(the file before, the file after)."""
    dataset.file_meta = dcmread(BytesIO(dicom_bytes(draw_radiograph(), BitsStored=12, **UIDS))).file_meta  # type: ignore[arg-type]
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue(), encode_file(deidentify(parse_file(buffer.getvalue()), PSEUDONYMS))


def secret_of(representation: str) -> Any:
    if representation in ("OB", "OW", "UN"):
        return b"ZQX8KJ77"
    return SECRETS.get(representation, "ZQX8KJ")


def rows() -> list[tuple[int, str]]:
    with TABLE.open() as file:
        return [(int(row["tag"], 16), row["action"]) for row in csv.DictReader(file)]


def known(tag: int) -> str:
    try:
        return "" if tag >> 16 < 8 or dictionary_VR(tag) == "OB or OW" else dictionary_VR(tag)
    except KeyError:
        return ""


@pytest.mark.parametrize("nested", [False, True])
def test_each_attribute_of_the_standards_table_loses_its_value(nested: bool) -> None:
    tried = 0
    plain = make_dataset(draw_radiograph(), BitsStored=12, **UIDS)
    held: dict[int, Any] = {}
    for tag, _ in rows():
        representation = known(tag)
        if not representation or tag in (0x00080018, 0x00080016):
            continue
        item = Dataset()
        item[0x00100020] = DataElement(0x00100020, "LO", "ZQX8KJ")
        value = [item] if representation == "SQ" else secret_of(representation.split(" ")[0])
        held[tag] = value
        target = item if nested and representation != "SQ" else plain
        if nested:
            target = Dataset()
        target[tag] = DataElement(tag, representation.split(" ")[0], value, validation_mode=0)
        if nested:
            plain.setdefault(Tag(0x00400275), DataElement(0x00400275, "SQ", [])).value.append(target)
        tried += 1
    before, after = clean_of(plain)
    assert tried > 600
    assert b"ZQX8KJ" in before
    clean = dcmread(BytesIO(after))
    assert b"ZQX8KJ" not in after
    for tag, value in held.items():
        if nested or tag not in clean or dictionary_is_retired(tag):
            continue
        if clean[tag].keyword in ("PatientAge", "PatientSex", "SpecificCharacterSet", "PixelData"):
            continue  # kept by the Retain Patient Characteristics Option, or made anew
        assert str(clean[tag].value) != str(value), clean[tag].keyword


@pytest.mark.parametrize("name", ["ZWINGLI", "LI", "MUELLER", "OE", "ZQX8KJ", "77341", "KNEE LI", "PA 77341", "LI CHEST"])
@pytest.mark.parametrize(
    "keyword", ["BodyPartExamined", "ViewPosition", "ImageLaterality", "RescaleType", "DetectorType", "ImageType"]
)
def test_a_name_in_a_field_of_codes_does_not_arrive(name: str, keyword: str) -> None:
    dataset = make_dataset(
        draw_radiograph(), BitsStored=12, **(UIDS | {"PatientName": "M\u00fcller^Li", "SpecificCharacterSet": "ISO_IR 192"})
    )
    dataset[keyword] = DataElement(Tag(keyword), "CS", name, validation_mode=0)
    _, after = clean_of(dataset)
    clean = dcmread(BytesIO(after))
    assert not clean.get(keyword)


@pytest.mark.parametrize(
    "keyword",
    [
        "OtherPatientIDs",
        "RequestingPhysician",
        "AdmissionID",
        "PatientMotherBirthName",
        "IssuerOfPatientID",
        "ScheduledPerformingPhysicianName",
    ],
)
def test_an_identifier_in_the_makers_name_does_not_arrive(keyword: str) -> None:
    value: Any = ["OLD-1", "ZQX8KJ"] if keyword == "OtherPatientIDs" else "ZQX8KJ"
    dataset = make_dataset(draw_radiograph(), BitsStored=12, **(UIDS | {keyword: value, "Manufacturer": "ACME ZQX8KJ"}))
    _, after = clean_of(dataset)
    assert b"ZQX8KJ" not in after
    dataset = make_dataset(
        draw_radiograph(), BitsStored=12, **(UIDS | {"Manufacturer": "ACME", "ManufacturerModelName": "Ray 2"})
    )
    assert dcmread(BytesIO(clean_of(dataset)[1])).Manufacturer == "ACME"


def test_codes_of_view_and_region_arrive_without_what_the_file_says_they_mean() -> None:
    def item(value: str, scheme: str) -> Dataset:
        code = Dataset()
        code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, "ZQX8KJ"
        code.CodingSchemeVersion = "ZQX8KJ"
        return code

    sequences = {"ViewCodeSequence": [item("R-40888", "SRT")], "AnatomicRegionSequence": [item("T-D3000", "SRT")]}
    dataset = make_dataset(draw_radiograph(), BitsStored=12, PatientOrientation=["L", "F"], **UIDS, **sequences)
    _, after = clean_of(dataset)
    clean = dcmread(BytesIO(after))
    assert b"ZQX8KJ" not in after
    assert (clean.ViewCodeSequence[0].CodeValue, clean.ViewCodeSequence[0].CodeMeaning) == ("272479007", "postero-anterior")
    assert (clean.AnatomicRegionSequence[0].CodeValue, list(clean.PatientOrientation)) == ("51185008", ["L", "F"])
    dataset.ViewCodeSequence = [item("ZQX8KJ", "99HOSP")]
    assert "ViewCodeSequence" not in dcmread(BytesIO(clean_of(dataset)[1]))
