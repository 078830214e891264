"""Which projection of which part of the body a DICOM image is, from all that the standard offers.

View Code Sequence (0054,0220; type 1 in DX: PS3.3, C.8.11.5), View Position (0018,5101), Patient Orientation (0020,0020; C.7.6.1.1.1) and
Patient Position (0018,5100) each may say it. Where they disagree the one that is not frontal counts, since a frontal image that is left
out costs less than a lateral that is judged as frontal. Series Description and Protocol Name are hints: they count only where nothing
else says anything, and only if they name one view. Image Laterality says nothing of the projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydicom.dataset import Dataset

from pneumofed.common.imaging.dicom_tags import code_of, codes_of, text_of, value_of
from pneumofed.common.imaging.patient_groups import Projection, classify_view, hint_of

VIEW_TAGS = (
    *("ViewPosition", "ViewCodeSequence", "PatientOrientation", "PatientPosition", "SeriesDescription", "ProtocolName"),
    *("BodyPartExamined", "AnatomicRegionSequence"),
)
"""All tags that are read here."""


@dataclass(frozen=True)
class Code:
    """A coded concept that is read, and may be kept in a de-identified file.

    Attributes:
        snomed: its SNOMED CT code (SCT).
        legacy: its code of the former scheme SRT, also called SNM3 and 99SDM; empty where it has none.
        meaning: Code Meaning of the standard's context group.
        word: of `common.imaging.patient_groups`.
    """

    snomed: str
    legacy: str
    meaning: str
    word: str


VIEW_CODES = (
    Code("399033003", "R-10202", "frontal", "FRONTAL"),
    Code("399348003", "R-10206", "antero-posterior", "AP"),
    Code("272479007", "R-40888", "postero-anterior", "PA"),
    Code("272479007", "R-10214", "postero-anterior", "PA"),
    Code("399067008", "R-102CD", "lateral", "LATERAL"),
    Code("399198007", "R-10232", "right lateral", "RL"),
    Code("399173006", "R-10236", "left lateral", "LL"),
    Code("399260004", "R-10224", "medial-lateral", "ML"),
    Code("399352003", "R-10228", "lateral-medial", "LM"),
    Code("30730003", "G-A145", "Sagittal", "SAGITTAL"),
    Code("399160007", "R-10204", "frontal oblique", "OBLIQUE"),
    Code("399312000", "R-10208", "antero-posterior oblique", "OBLIQUE"),
    Code("399059000", "R-10216", "postero-anterior oblique", "OBLIQUE"),
    Code("399038007", "R-10210", "right posterior oblique", "RPO"),
    Code("399006002", "R-10212", "left posterior oblique", "LPO"),
    Code("399356000", "R-40985", "right anterior oblique", "RAO"),
    Code("399135007", "R-10220", "left anterior oblique", "LAO"),
    Code("399236003", "R-10234", "right oblique", "OBLIQUE"),
    Code("399184004", "R-10238", "left oblique", "OBLIQUE"),
    Code("399182000", "R-102C1", "oblique", "OBLIQUE"),
    Code("399368009", "R-10226", "medio-lateral oblique", "MLO"),
    Code("399099002", "R-10230", "latero-medial oblique", "LMO"),
    Code("260427002", "R-40783", "lateral oblique", "OBLIQUE"),
    Code("260426006", "R-40782", "medial oblique", "OBLIQUE"),
    Code("399132005", "R-10252", "frontal-oblique axial", "OBLIQUE"),
    Code("399325008", "R-10254", "sagittal-oblique axial", "OBLIQUE"),
    Code("399004004", "R-10246", "oblique axial", "OBLIQUE"),
    Code("399225005", "R-10250", "oblique caudo-cranial", "OBLIQUE"),
    Code("399288005", "R-10248", "oblique cranio-caudal", "OBLIQUE"),
    Code("399061009", "R-10241", "axial", "AXIAL"),
    Code("399162004", "R-10242", "cranio-caudal", "CC"),
    Code("399196006", "R-10244", "caudo-cranial", "AXIAL"),
    Code("399110001", "R-102C2", "tangential", "TANGENTIAL"),
    Code("399071006", "R-102C3", "plantodorsal", "PLANTODORSAL"),
    Code("399335002", "R-102C4", "dorsoplantar", "DORSOPLANTAR"),
    Code("399255003", "R-10256", "submentovertical", "SMV"),
)
"""PS3.16, CID 4010 (DX View): those that a radiograph of the trunk or a limb can have. R-10214 is the SRT code that CID 4010 had for
postero-anterior before R-40888."""

REGION_CODES = (
    Code("816094009", "", "Chest", "CHEST"),
    Code("51185008", "T-D3000", "Chest", "CHEST"),
    Code("39607008", "T-28000", "Lung", "LUNG"),
    Code("417437006", "R-FAB52", "Neck and Chest", "NECKCHEST"),
    Code("416550000", "R-FAB55", "Chest and Abdomen", "CHESTABDOMEN"),
    Code("416775004", "R-FAB56", "Chest, Abdomen and Pelvis", "CHESTABDPELVIS"),
    Code("416152001", "R-FAB53", "Neck, Chest and Abdomen", "NECKCHESTABDOMEN"),
    Code("416319003", "R-FAB54", "Neck, Chest, Abdomen and Pelvis", "NECKCHESTABDPELV"),
    Code("38266002", "T-D0010", "Entire body", "WHOLEBODY"),
    Code("72410000", "T-D3300", "Mediastinum", "MEDIASTINUM"),
    Code("113197003", "T-11300", "Rib", "RIB"),
    Code("56873002", "T-11210", "Sternum", "STERNUM"),
    Code("818981001", "", "Abdomen", "ABDOMEN"),
    Code("113345001", "T-D4000", "Abdomen", "ABDOMEN"),
    Code("818982008", "", "Abdomen and Pelvis", "ABDOMEN"),
    Code("816092008", "", "Pelvis", "PELVIS"),
    Code("12921003", "T-D6000", "Pelvis", "PELVIS"),
    Code("70258002", "T-15750", "Ankle joint", "ANKLE"),
    Code("40983000", "T-D8200", "Upper arm", "ARM"),
    Code("53120007", "T-D8000", "Upper limb", "ARM"),
    Code("76752008", "T-04000", "Breast", "BREAST"),
    Code("80144004", "T-12770", "Calcaneus", "CALCANEUS"),
    Code("51299004", "T-12310", "Clavicle", "CLAVICLE"),
    Code("64688005", "T-11BF0", "Coccyx", "COCCYX"),
    Code("71854001", "T-59300", "Colon", "COLON"),
    Code("122494005", "T-11501", "Cervical spine", "CSPINE"),
    Code("16953009", "T-15430", "Elbow joint", "ELBOW"),
    Code("66019005", "T-D0300", "Extremity", "EXTREMITY"),
    Code("71341001", "T-12710", "Femur", "FEMUR"),
    Code("87342007", "T-12750", "Fibula", "FIBULA"),
    Code("7569003", "T-D8800", "Finger", "FINGER"),
    Code("56459004", "T-D9700", "Foot", "FOOT"),
    Code("14975008", "T-D8500", "Forearm", "FOREARM"),
    Code("85562004", "T-D8700", "Hand", "HAND"),
    Code("69536005", "T-D1100", "Head", "HEAD"),
    Code("29836001", "T-D2500", "Hip", "HIP"),
    Code("24136001", "T-15710", "Hip joint", "HIP"),
    Code("85050009", "T-12410", "Humerus", "HUMERUS"),
    Code("661005", "T-D1213", "Jaw region", "JAW"),
    Code("72696002", "T-D9200", "Knee", "KNEE"),
    Code("30021000", "T-D9400", "Lower leg", "LEG"),
    Code("61685007", "T-D9000", "Lower limb", "LEG"),
    Code("122496007", "T-11503", "Lumbar spine", "LSPINE"),
    Code("91609006", "T-11180", "Mandible", "MANDIBLE"),
    Code("70925003", "T-11170", "Maxilla", "MAXILLA"),
    Code("45048000", "T-D1600", "Neck", "NECK"),
    Code("64234005", "T-12730", "Patella", "PATELLA"),
    Code("54735007", "T-11AD0", "Sacrum", "SACRUM"),
    Code("79601000", "T-12280", "Scapula", "SCAPULA"),
    Code("16982005", "T-D2220", "Shoulder", "SHOULDER"),
    Code("2095001", "T-22000", "Paranasal sinus", "SINUS"),
    Code("89546000", "T-11100", "Skull", "SKULL"),
    Code("421060004", "T-D04FF", "Spine", "SPINE"),
    Code("68367000", "T-D9100", "Thigh", "THIGH"),
    Code("76505004", "T-D8810", "Thumb", "THUMB"),
    Code("29707007", "T-D9800", "Toe", "TOE"),
    Code("122495006", "T-11502", "Thoracic spine", "TSPINE"),
    Code("74670003", "T-15460", "Wrist joint", "WRIST"),
    Code("13881006", "T-11166", "Zygoma", "ZYGOMA"),
)
"""PS3.16, CID 4009 (DX Anatomy Imaged), and the codes that it had for chest, abdomen and pelvis before 2022."""

_SNOMED = {"SCT"}
_LEGACY = {"SRT", "SNM3", "99SDM"}
"""Coding Scheme Designator (0008,0102): PS3.16, table 8-1."""


@dataclass(frozen=True)
class View:
    """What a file says of its projection.

    Attributes:
        projection: of the image.
        word: for a manifest, with `classify_view(word) == projection`; empty where nothing is known or written.
        source: keyword of the attribute that decided; empty where none did.
    """

    projection: Projection
    word: str = ""
    source: str = ""


def read_view(dataset: Dataset) -> View:
    """Finds the projection of an image, and which of its attributes says it."""
    stated = [View(kind, word, source) for kind, word, source in _statements(dataset) if kind is not Projection.UNKNOWN]
    for view in [*(view for view in stated if view.projection is not Projection.FRONTAL), *stated]:
        return view
    for keyword in ("SeriesDescription", "ProtocolName"):
        kind = hint_of(text_of(dataset, keyword))
        if kind is not Projection.UNKNOWN:
            return View(kind, kind.value.upper(), keyword)
    return View(Projection.UNKNOWN, code_of(dataset, "ViewPosition"))


def read_body_part(dataset: Dataset) -> str:
    """Finds the part of the body: the word of Anatomic Region Sequence (0008,2218), else Body Part Examined (0018,0015), else nothing."""
    region = find_code(dataset, "AnatomicRegionSequence", REGION_CODES)
    return region.word if region else code_of(dataset, "BodyPartExamined")


def find_code(dataset: Dataset, keyword: str, known: tuple[Code, ...]) -> Code | None:
    """Finds the coded concept in the first item of a sequence.

    Args:
        dataset: the file's tags.
        keyword: of the sequence.
        known: concepts to look for.

    Returns:
        The concept; None where the sequence is absent or its code is none of them.
    """
    items = value_of(dataset, keyword)
    if not items or not isinstance(items[0], Dataset):
        return None
    value, scheme = text_of(items[0], "CodeValue").upper(), text_of(items[0], "CodingSchemeDesignator").upper()
    if scheme in _SNOMED:
        return next((code for code in known if code.snomed == value), None)
    return next((code for code in known if scheme in _LEGACY and code.legacy == value), None)


def _statements(dataset: Dataset) -> Iterator[tuple[Projection, str, str]]:
    """(projection, word, keyword) of each attribute, the one that is kept as the word first."""
    position = text_of(dataset, "ViewPosition")
    kind = classify_view(position)
    yield kind, code_of(dataset, "ViewPosition") or kind.value.upper(), "ViewPosition"
    code = find_code(dataset, "ViewCodeSequence", VIEW_CODES)
    if code:
        yield classify_view(code.word), code.word, "ViewCodeSequence"
    if text_of(dataset, "PatientPosition").upper() in ("HFDR", "HFDL", "FFDR", "FFDL"):  # C.7.3.1.1.2
        yield Projection.DECUBITUS, "DECUBITUS", "PatientPosition"
    kind = _projection_of(codes_of(dataset, "PatientOrientation"))
    yield kind, kind.value.upper(), "PatientOrientation"


def _projection_of(orientation: list[str]) -> Projection:
    """By the directions of rows and columns: one or more of A, P, L, R, H, F each, the main one first (PS3.3, C.7.6.1.1.1)."""
    axis = {"L": "x", "R": "x", "A": "y", "P": "y", "H": "z", "F": "z"}
    if len(orientation) != 2 or not all(text and set(text) <= set(axis) for text in orientation):
        return Projection.UNKNOWN
    if any({"x", "y"} <= {axis[letter] for letter in text} for text in orientation):
        return Projection.OBLIQUE
    kinds = {"xz": Projection.FRONTAL, "yz": Projection.LATERAL, "xy": Projection.OTHER}
    return kinds.get("".join(sorted({axis[text[0]] for text in orientation})), Projection.UNKNOWN)
