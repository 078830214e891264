"""Images that are likely to have writing in their pixels, which no removal of tags takes away (DICOM PS3.15, E.3.1)."""

from __future__ import annotations

from pydicom.dataset import Dataset

from common.dicom.tags import codes_of, text_of

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary Capture Image Storage, and with a further `.N` its multi-frame kinds (PS3.4, B.5)."""
_CONVERSIONS = frozenset({"DV", "DI", "DF", "WSD", "SD", "SI", "DRW", "SYN"})
"""Conversion Type (0008,0064): digitized video or film, workstation, scanned document or image, drawing (PS3.3, C.8.6.1). Films
have the patient's name exposed in a corner, screens show it."""


def is_burnt_in(dataset: Dataset) -> bool:
    """Whether writing stands in the pixels, as far as the tags tell.

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
    return bool(_CONVERSIONS & set(codes_of(dataset, "ConversionType"))) or any(
        kind == "SECONDARY" or "SCREEN" in kind or "SAVE" in kind for kind in kinds
    )
