"""De-identification of one X-ray image on arrival (DICOM PS3.15, annex E).

deidentify     the image's data set without what identifies the patient; the decisions are in `client.archive.profile`
encode_file    the DICOM file of such a data set
coarse_age     the age that is kept
is_burnt_in    whether an image is likely to have writing in its pixels, which no removal of tags takes away (PS3.15, E.3.1)
"""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import date
from io import BytesIO

import numpy as np
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from pydicom.valuerep import DSfloat

from pneumofed.client.archive.profile import (
    ACTIONS,
    CODES,
    FIRST_NUMBERS,
    METHOD_CODES,
    NUMBERS,
    ORIENTATION,
    TABLES,
    TERMS,
    TEXTS,
    VIEW_SEQUENCES,
    Action,
)
from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.dicom_decode import LookupTable, read_lookup_table, read_windows
from pneumofed.common.imaging.dicom_header import Pseudonyms
from pneumofed.common.imaging.dicom_pixels import PixelLayout, read_codes, read_layout
from pneumofed.common.imaging.dicom_tags import age_years_of, all_texts_of, codes_of, numbers_of, text_of
from pneumofed.common.imaging.dicom_views import REGION_CODES, VIEW_CODES, find_code
from pneumofed.common.imaging.patient_groups import PART_TERMS, is_view_term

MAX_AGE_YEARS = 90
"""All ages over 89 are one category, "age 90 or older" (HIPAA Safe Harbor, 45 CFR 164.514(b)(2)(i)(C))."""
MONTHS_UNTIL_YEARS = 2
"""Below this age in years, months are kept: the chest of a newborn is not that of a child of one year."""
_MAX_VALUES = 16
_STORAGE_CLASS = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.[0-9.]{1,30}")
"""Storage SOP classes of the standard (PS3.4, B.5); a private one could name its maker's customer."""
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary Capture Image Storage, and with a further `.N` its multi-frame kinds (PS3.4, B.5)."""
_CONVERSION_TYPES = frozenset({"DV", "DI", "DF", "WSD", "SD", "SI", "DRW", "SYN"})
"""Conversion Type (0008,0064): digitized video or film, workstation, scanned document or image, drawing (PS3.3, C.8.6.1). Films
have the patient's name exposed in a corner, screens show it."""
_IDENTIFYING = (
    *("PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "PatientBirthName", "PatientBirthDate"),
    *("AccessionNumber", "StudyID", "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName"),
    *("ReferringPhysicianName", "PerformingPhysicianName", "NameOfPhysiciansReadingStudy", "OperatorsName", "DeviceSerialNumber"),
    *(
        "RequestingPhysician",
        "AdmissionID",
        "IssuerOfPatientID",
        "IssuerOfAdmissionID",
        "ServiceEpisodeID",
        "PatientMotherBirthName",
    ),
    *("PatientAddress", "PatientTelephoneNumbers", "MedicalRecordLocator", "ConsultingPhysicianName", "PhysiciansOfRecord"),
    *("ResponsiblePerson", "ResponsibleOrganization", "InsurancePlanIdentification", "RequestingService"),
)


def deidentify(original: Dataset, pseudonyms: Pseudonyms) -> Dataset:
    """Makes a new data set with the image of `original` and nothing that identifies the patient, ready for `encode_file`.

    Its stored values, and with them what `common.imaging.images.read_image` gives, are those of `original`. Pure in the arguments.

    Args:
        original: the data set as the archive sent it, with file meta information and pixels in any transfer syntax that the
            image reader decodes; it is not changed.
        pseudonyms: the site's keyed pseudonyms, the same for all its images.

    Raises:
        ImageError: the image cannot be read, the patient is unknown, or it is no image of the standard's storage classes. On
            damaged bytes pydicom and the decoders may raise any other exception.
    """
    if not text_of(original, "PatientID"):
        raise ImageError(SkipReason.NO_PATIENT)
    if not text_of(original, "SOPInstanceUID") or not _STORAGE_CLASS.fullmatch(text_of(original, "SOPClassUID")):
        raise ImageError(SkipReason.CORRUPT, "no usable SOP class or instance UID")
    layout = read_layout(original)
    codes = read_codes(original, layout)
    clean = Dataset()
    _keep_terms(clean, original)
    _keep_views(clean, original)
    _keep_makers(clean, original)
    _keep_numbers(clean, original, layout)
    _keep_tables(clean, original, layout, codes)
    _replace_identity(clean, original, pseudonyms)
    clean.SOPClassUID = text_of(original, "SOPClassUID")
    _state_method(clean)
    _set_pixels(clean, layout, codes)
    return clean


def encode_file(clean: Dataset) -> bytes:
    """Encodes a de-identified data set as a DICOM file: an empty preamble, file meta information made anew, Explicit VR Little Endian."""
    buffer = BytesIO()
    clean.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def coarse_age(original: Dataset) -> str:
    """Computes the Age String (PS3.5, 6.2: AS) in years, below two years in months, 90 years at most; empty where no age is known.

    Where Patient's Age (0010,1010) is missing it comes from the dates of birth and study, as they are removed.
    """
    years = age_years_of(original)
    if years is None:
        years = _years_between(text_of(original, "PatientBirthDate"), text_of(original, "StudyDate"))
    if years is None:
        return ""
    if years < MONTHS_UNTIL_YEARS:
        return f"{math.floor(years * 12 + 1e-9):03d}M"
    return f"{min(math.floor(years + 1e-9), MAX_AGE_YEARS):03d}Y"


def is_burnt_in(dataset: Dataset) -> bool:
    """Reports whether writing stands in the pixels, as far as the tags say.

    Burned In Annotation (0028,0301) decides where it is there. Else an image counts as burnt in if it is a secondary capture, was
    converted from film, video, paper or a screen, or has SECONDARY or a screen save in its Image Type (0008,0008).
    """
    stated = text_of(dataset, "BurnedInAnnotation").upper()
    if stated in ("YES", "NO"):
        return stated == "YES"
    sop_class = text_of(dataset, "SOPClassUID")
    if sop_class == _SECONDARY_CAPTURE or sop_class.startswith(_SECONDARY_CAPTURE + "."):
        return True
    kinds = codes_of(dataset, "ImageType")
    return bool(_CONVERSION_TYPES & set(codes_of(dataset, "ConversionType"))) or any(
        kind == "SECONDARY" or "SCREEN" in kind or "SAVE" in kind for kind in kinds
    )


def _years_between(birth: str, study: str) -> float | None:
    try:
        days = (date.fromisoformat(study) - date.fromisoformat(birth)).days
    except ValueError:
        return None
    return days / 365.25 if 0 <= days < 130 * 366 else None


def _keep_terms(clean: Dataset, original: Dataset) -> None:
    """Keeps codes that are terms of the standard: technicians type into any field, and a name may look like any code."""
    for keyword in CODES:
        values = [value if _is_term(keyword, value) else "" for value in codes_of(original, keyword)[:_MAX_VALUES]]
        if any(values):
            setattr(clean, keyword, values if len(values) > 1 else values[0])
    if "PatientSex" not in clean:
        clean.PatientSex = ""


def _is_term(keyword: str, value: str) -> bool:
    if keyword == "ViewPosition":
        return is_view_term(value)
    if keyword == "BodyPartExamined":
        return bool(value.split()) and set(value.split()) <= PART_TERMS
    return value in TERMS[keyword]


def _keep_views(clean: Dataset, original: Dataset) -> None:
    """Keeps the codes of view and region that are known, and the orientation."""
    for keyword, known in zip(VIEW_SEQUENCES, (VIEW_CODES, REGION_CODES), strict=True):
        code = find_code(original, keyword, known)
        if code:
            setattr(clean, keyword, [_code_item(code.snomed, "SCT", code.meaning)])
    values = codes_of(original, ORIENTATION)
    is_orientation = len(values) == 2 and all(re.fullmatch("[APLRHF]{1,3}", value) for value in values)
    setattr(clean, ORIENTATION, values if is_orientation else None)


def _code_item(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _keep_makers(clean: Dataset, original: Dataset) -> None:
    """Keeps the device's maker and model, unless a word of theirs stands in a name or number of the patient, a person or the hospital."""
    identifying = _identifying_parts(original)
    for keyword in TEXTS:
        word = text_of(original, keyword).encode("ascii", "replace").decode()
        if word and not _holds(word, identifying):
            setattr(clean, keyword, word)


def _holds(word: str, identifying: set[str]) -> bool:
    whole = set(re.split(r"[^\w]+|_", word.casefold()))
    return any(part in word.casefold() if len(part) >= 3 else part in whole for part in identifying)


def _identifying_parts(original: Dataset) -> set[str]:
    """Words and numbers of at least two characters that identify the patient, a person or the hospital, and their forms without umlauts."""
    persons = [element.keyword for element in original if element.VR == "PN" and element.keyword]
    texts = [str(value) for keyword in {*_IDENTIFYING, *persons} for value in all_texts_of(original, keyword)]
    parts = {part.casefold() for text in texts for part in [text, *re.split(r"[^\w]+|_", text)] if len(part) >= 2}
    spelled = str.maketrans({"\u00e4": "ae", "\u00f6": "oe", "\u00fc": "ue", "\u00f8": "oe", "\u00e5": "aa", "\u00e6": "ae"})
    plain = {unicodedata.normalize("NFKD", part).encode("ascii", "ignore").decode() for part in parts}
    return {part for part in parts | {part.translate(spelled) for part in parts} | plain if len(part) >= 2}


def _keep_numbers(clean: Dataset, original: Dataset, layout: PixelLayout) -> None:
    """Keeps numbers so that the decoder reads in `clean` what it reads in `original`, whatever else stands beside them there."""
    windows = read_windows(original)
    pairs = {"WindowCenter": [window.center for window in windows], "WindowWidth": [window.width for window in windows]}
    for keyword in NUMBERS:
        values = pairs[keyword] if keyword in pairs else numbers_of(original, keyword)
        values = values[: 1 if keyword in FIRST_NUMBERS else _MAX_VALUES]
        if values and not any(map(math.isnan, values)):
            clean[keyword] = _number_element(keyword, values, layout.signed)


def _number_element(keyword: str, values: list[float], signed: bool) -> DataElement:
    representation = dictionary_VR(keyword)
    if representation == "DS":
        return DataElement(Tag(keyword), "DS", [DSfloat(value, auto_format=True) for value in values])
    if representation == "IS":
        return DataElement(Tag(keyword), "IS", [round(value) for value in values])
    if representation in ("FD", "FL"):
        return DataElement(Tag(keyword), representation, values)
    is_signed = representation == "SS" or (representation == "US or SS" and signed)
    words = np.array([round(value) % 2**16 for value in values], np.uint16)  # as writers give negative ones in unsigned tags
    return DataElement(Tag(keyword), "SS" if is_signed else "US", (words.view(np.int16) if is_signed else words).tolist())


def _keep_tables(clean: Dataset, original: Dataset, layout: PixelLayout, codes: np.ndarray) -> None:
    inputs = layout.values_of(np.unique(codes))
    for keyword in TABLES:
        table = read_lookup_table(original, keyword, inputs)
        if table:
            setattr(clean, keyword, [_table_item(table, keyword)])
            inputs = table.apply(inputs)


def _table_item(table: LookupTable, keyword: str) -> Dataset:
    item = Dataset()
    count = len(table.entries) % 2**16  # 0 stands for 65536: PS3.3, C.11.1.1.1
    item["LUTDescriptor"] = DataElement(Tag("LUTDescriptor"), "SS" if table.first < 0 else "US", [count, table.first, table.bits])
    item["LUTData"] = DataElement(Tag("LUTData"), "OW", np.rint(table.entries).astype("<u2").tobytes())
    if keyword == "ModalityLUTSequence":
        item.ModalityLUTType = "US"  # unspecified; type 1 in C.11.1
    return item


def _replace_identity(clean: Dataset, original: Dataset, pseudonyms: Pseudonyms) -> None:
    for keyword, action in ACTIONS.items():
        value = text_of(original, keyword) if action in (Action.UID, Action.PSEUDONYM) else ""
        if action is Action.UID:
            setattr(
                clean, keyword, pseudonyms.uid(value) if value else pseudonyms.uid(text_of(original, "SOPInstanceUID") + keyword)
            )
        elif action is Action.PSEUDONYM:
            make = pseudonyms.patient if keyword == "PatientID" else pseudonyms.accession
            setattr(clean, keyword, make(value) if value else "")
        elif action is Action.EMPTY:
            setattr(clean, keyword, None)
        elif action is Action.COARSEN:
            setattr(clean, keyword, coarse_age(original))


def _state_method(clean: Dataset) -> None:
    clean.PatientIdentityRemoved = "YES"
    clean.DeidentificationMethod = "DICOM PS3.15 annex E, keyed pseudonyms, dates removed"
    clean.LongitudinalTemporalInformationModified = "REMOVED"
    items = []
    for value, meaning in METHOD_CODES:
        items.append(_code_item(value, "DCM", meaning))
    clean.DeidentificationMethodCodeSequence = items


def _set_pixels(clean: Dataset, layout: PixelLayout, codes: np.ndarray) -> None:
    """Writes the Image Pixel module (PS3.3, C.7.6.3) for `codes`, compressed without loss by run lengths (PS3.5, annex G)."""
    clean.Rows, clean.Columns, clean.SamplesPerPixel = layout.rows, layout.columns, 1
    clean.PhotometricInterpretation = layout.photometric
    clean.BitsAllocated, clean.BitsStored, clean.HighBit = layout.bits_allocated, layout.bits_stored, layout.bits_stored - 1
    clean.PixelRepresentation = int(layout.signed)
    words = codes.view(np.int16) if layout.signed else codes
    if layout.bits_allocated == 8:
        words = words.astype(np.int8 if layout.signed else np.uint8)
    clean.file_meta = FileMetaDataset()
    clean.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    clean.compress(RLELossless, words, encoding_plugin="pylibjpeg", generate_instance_uid=False)
