"""Text of a DICOM header in UTF-8, whatever character set and mistakes its writer had: for objects that name the same patient."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime

from pydicom import charset
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.valuerep import PersonName

UTF8 = "ISO_IR 192"
"""The one character set that holds all others (PS3.3, C.12.1.1.2)."""
_MISNAMED = {"GB2312": "GB18030", "GB18030-2000": "GB18030", "ISO_IR 58": "GB18030", "UTF-8": UTF8, "UTF8": UTF8}
"""Names that writers use for sets of the standard: GB 2312 and GBK are parts of GB 18030."""
_SEXES = ("M", "F", "O")


def copy_as_utf8(dataset: Dataset, keywords: Iterable[str]) -> None:
    """Rewrites attributes of type 2 in place so that they can be written in UTF-8; what cannot be read or is no such value is left empty.

    Args:
        dataset: as read from a file; its Specific Character Set becomes `UTF8`.
        keywords: the attributes, of VR LO, SH, PN, CS, DA or TM; made where missing.
    """
    encodings = _encodings(dataset)
    values = {keyword: _read(dataset, keyword, encodings) for keyword in keywords}
    dataset.SpecificCharacterSet = UTF8
    for keyword, value in values.items():
        if keyword in dataset:
            del dataset[keyword]
        setattr(dataset, keyword, value or None)


def _encodings(dataset: Dataset) -> list[str]:
    try:
        names = dataset.get("SpecificCharacterSet") or ""
        names = [names] if isinstance(names, str) else list(names)
        return charset.convert_encodings([_MISNAMED.get(str(name).strip().upper(), str(name).strip()) for name in names])
    except Exception:  # a name that pydicom does not know
        return charset.convert_encodings("")


def _read(dataset: Dataset, keyword: str, encodings: list[str]) -> str:
    representation = dictionary_VR(keyword)
    try:
        raw = getattr(dataset.get_item(keyword), "value", None)
        if isinstance(raw, bytes):
            raw = _decode(raw, representation, encodings)
        text = str(raw if raw is not None else "").rstrip("\0").strip()
    except Exception:  # pydicom raises whatever its decoders meet
        return ""
    if representation == "DA":
        return _date(text)
    if representation == "TM":
        return _time(text)
    if representation == "CS":
        return text.upper() if text.upper() in _SEXES else ""
    return "" if "\ufffd" in text or not text.isprintable() else text


def _decode(raw: bytes, representation: str, encodings: list[str]) -> str:
    if representation == "PN":
        return str(PersonName(raw, encodings).decode(encodings))
    return charset.decode_bytes(raw, encodings, {ord("\\")})


def _date(text: str) -> str:
    """YYYYMMDD, also of the form YYYY.MM.DD that ACR-NEMA had (PS3.5, 6.2); empty for what is no day."""
    digits = re.sub(r"[.\-/]", "", text)
    try:
        return datetime.strptime(digits, "%Y%m%d").strftime("%Y%m%d") if re.fullmatch("[0-9]{8}", digits) else ""
    except ValueError:
        return ""


def _time(text: str) -> str:
    """HHMMSS.FFFFFF or its beginning, also with the colons that ACR-NEMA had (PS3.5, 6.2); empty for what is no time."""
    compact = text.replace(":", "")
    return compact if re.fullmatch(r"([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?", compact) else ""
