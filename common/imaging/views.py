"""Which projection of which part of the body an image is, by the words that files and tables use for it.

`classify_view` and `is_frontal` read a View Position or a table's cell, `is_other_part` a body part. What the codes of a DICOM file say
is read in `common.imaging.dicom_views`, which gives its answer as one of the words here, so that a manifest needs no more than a word.

An image whose view nobody states is `UNKNOWN`: it is trained on and judged, since many computed radiographs state none, and judged with
a note. An image that is stated to be anything else than frontal is left out of training and not judged.
"""

from __future__ import annotations

import re
from enum import StrEnum


class Projection(StrEnum):
    """The kinds of projection that matter for a model of frontal radiographs."""

    FRONTAL = "frontal"
    LATERAL = "lateral"
    OBLIQUE = "oblique"
    DECUBITUS = "decubitus"
    """The patient lies on one side: fluid and air lie elsewhere than in an upright or supine chest, though the beam is frontal."""
    OTHER = "other"
    UNKNOWN = "unknown"


_SIDE = "(?:LT|RT|LEFT|RIGHT|L|R)?"
_FRONTAL = re.compile("PA|AP|FRONTAL|FRONT|POSTEROANTERIOR|ANTEROPOSTERIOR|POSTERO|ANTERO|APPA|PAAP")
_LATERAL = re.compile(
    f"{_SIDE}(?:LAT|LATERAL|LATERALE|LATERALIS|PROFILE?)[0-9]?{_SIDE}|LATERO|SAGITTAL|SEITLICH|X?TLAT|XTABLELAT"
)
_LATERAL_CODES = frozenset({"LL", "RL", "LM", "ML"})
"""View Position (0018,5101) of C.8.1.1 and C.8.11.5: left and right lateral; too short to count within free text."""
_WEAK_LATERAL = frozenset({"XTABLE", "CROSSTABLE", "XTBL", "XTL"})
"""Across the table: lateral, unless the words beside it say otherwise."""
_OBLIQUE = re.compile(f"{_SIDE}(?:OBL|OBLIQUE|OBLIQUA|OBLIQ){_SIDE}|[LR][AP]O|[LR]LO|MLO|LMO")
_DECUBITUS = re.compile(f"{_SIDE}(?:DECUB|DECUBITUS|DECUBITO|DECUBITAL|DEC){_SIDE}|[LR]LD")
_OTHER = frozenset(
    (
        *(
            "SWIMMERS",
            "SWIMMER",
            "SWIM",
            "AXIAL",
            "TANGENTIAL",
            "SUNRISE",
            "MERCHANT",
            "WATERS",
            "TOWNES",
            "CALDWELL",
            "ODONTOID",
        ),
        *("OTHER", "CC", "XCC", "XCCL", "SMV", "SKYLINE", "FROGLEG", "SCAPY", "PLANTODORSAL", "DORSOPLANTAR", "VERTEX"),
    )
)
_NEUTRAL = frozenset(
    (
        *(
            "L",
            "R",
            "LT",
            "RT",
            "LEFT",
            "RIGHT",
            "X",
            "TABLE",
            "CROSS",
            "ANTERIOR",
            "POSTERIOR",
            "HORIZONTAL",
            "VERTICAL",
            "BEAM",
        ),
        *("ERECT", "UPRIGHT", "SUPINE", "PRONE", "STANDING", "SITTING", "PORTABLE", "MOBILE", "BEDSIDE", "LORDOTIC", "APICAL"),
        *("VIEW", "CHEST", "THORAX", "INSPIRATION", "EXPIRATION", "INSP", "EXP", "STEHEND", "LIEGEND", "AND", "SEMI", "1", "2"),
    )
)
"""Words that stand beside a view and do not say which it is."""


def classify_view(view: str) -> Projection:
    """Classifies a View Position (DICOM PS3.3, C.8.1.1 and C.8.11.5) or a table's word for it, in any usual spelling.

    Where a word of a frontal view stands beside one of another, e.g. `LAT PA`, the other counts: a frontal image that is left out costs
    less than a lateral that is judged as frontal.
    """
    words = _split(view)
    if words in (["L"], ["LAT", "L"], ["LAT", "R"]):  # PadChest's, and others', word for a lateral
        return Projection.LATERAL
    kinds = _kinds(words) | ({Projection.LATERAL} if _LATERAL_CODES & set(words) else set())
    order = (Projection.DECUBITUS, Projection.OBLIQUE, Projection.OTHER, Projection.LATERAL, Projection.FRONTAL)
    found = next((kind for kind in order if kind in kinds), Projection.UNKNOWN)
    is_across = bool(_WEAK_LATERAL & set(words)) or {"CROSS", "TABLE"} <= set(words) or {"X", "TABLE"} <= set(words)
    return Projection.LATERAL if found is Projection.UNKNOWN and is_across else found


def hint_of(description: str) -> Projection:
    """Classifies a Series Description or Protocol Name, which often names all views of an examination: only one kind counts."""
    kinds = _kinds(_split(description))
    return kinds.pop() if len(kinds) == 1 else Projection.UNKNOWN


def is_frontal(view: str) -> bool:
    """Returns False for what is stated not to be frontal, e.g. `LL`, `R LAT` or `OBLIQUE`; an unknown view passes."""
    return classify_view(view) in (Projection.FRONTAL, Projection.UNKNOWN)


def is_view_term(view: str) -> bool:
    """Whether `view` holds words for views only, so that it can name nobody."""
    words = _split(view)
    return bool(words) and all(
        word in _NEUTRAL | _LATERAL_CODES | _WEAK_LATERAL or bool(_kinds([word])) or classify_view(word) is not Projection.UNKNOWN
        for word in words
    )


OTHER_PARTS = frozenset(
    (
        *("ABDOMEN", "ANKLE", "ARM", "BREAST", "CALCANEUS", "CALF", "CLAVICLE", "COCCYX", "COLON", "CSPINE", "ELBOW"),
        *("EXTREMITY", "FEMUR", "FIBULA", "FINGER", "FOOT", "FOREARM", "HAND", "HEAD", "HEEL", "HIP", "HUMERUS", "JAW", "KNEE"),
        *("LEG", "LSPINE", "LSSPINE", "MANDIBLE", "MAXILLA", "NECK", "NOSE", "ORBIT", "PATELLA", "PELVIS", "SACRUM", "SCAPULA"),
        *("SCOLIOSIS", "SHOULDER", "SINUS", "SKULL", "SPINE", "SSPINE", "TEETH", "THIGH", "THUMB", "TIBIA", "TLSPINE"),
        *("TMJ", "TOE", "TSPINE", "WRIST", "ZYGOMA"),
    )
)
"""Body Part Examined (0018,0015), PS3.16, annex L, of other examinations. Whatever else stands there passes: sites write their own
words, in their own language."""
CHEST_PARTS = frozenset(
    (
        *("CHEST", "THORAX", "LUNG", "LUNGS", "CHESTABDOMEN", "CHESTABDPELVIS", "NECKCHEST", "NECKCHESTABDOMEN"),
        *("NECKCHESTABDPELV", "WHOLEBODY", "MEDIASTINUM", "HEART", "RIB", "RIBS", "STERNUM", "BRONCHUS", "TRACHEA", "SCJOINT"),
    )
)
"""Terms of the same annex that include the chest or lie within it."""
PART_TERMS = OTHER_PARTS | CHEST_PARTS
"""Terms that a de-identified file may keep: each is of the standard or names a part of the body and nothing else."""


def is_other_part(body_part: str) -> bool:
    """Whether `body_part` names a part of the body other than the chest; False where it is unknown."""
    words = set(_split(body_part))
    return not words & CHEST_PARTS and bool(words & OTHER_PARTS)


def _split(text: str) -> list[str]:
    return re.findall("[A-Z0-9]+", text.upper())


def _kinds(words: list[str]) -> set[Projection]:
    patterns = {
        Projection.FRONTAL: _FRONTAL,
        Projection.LATERAL: _LATERAL,
        Projection.OBLIQUE: _OBLIQUE,
        Projection.DECUBITUS: _DECUBITUS,
    }
    kinds = {kind for word in words for kind, pattern in patterns.items() if pattern.fullmatch(word)}
    kinds |= {Projection.OTHER} if _OTHER & set(words) else set()
    return kinds - {Projection.LATERAL} if Projection.DECUBITUS in kinds else kinds
