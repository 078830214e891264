"""Which groups an image belongs to: the projection and the part of the body that it shows, and its patient's age and sex.

`classify_view` and `is_frontal` read a View Position or a table's cell, `is_other_part` a body part. What the codes of a DICOM file say
is read in `common.imaging.dicom_views`, which gives its answer as one of the words here, so that a manifest needs no more than a word.

An image whose view nobody states is `UNKNOWN`: it is trained on and judged, since many computed radiographs state none, and judged with
a note. An image that is stated to be anything else than frontal is left out of training and not judged.

A patient's group is kept or reported, never an age or a birth date. Age groups are those of ICH E11 (2000), "Clinical Investigation of
Medicinal Products in the Pediatric Population", section 2.5, whose upper limit of adolescence is taken as 17 years (it leaves 16 to 18 to
the region), and 65 years and over from ICH E7 (1993), section I.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import date
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


MAX_AGE_YEARS = 125
"""No older patient is on record (the oldest lived 122 years): 130 or 999 stands for an age that nobody knew."""
_DAYS_PER_YEAR = 365.25
_NEWBORN_DAYS = 28
_ROUNDING = 1e-6
"""Years, half a minute: ages come as fractions of years that were days or months."""


class AgeGroup(StrEnum):
    """The value is a fixed word: files keep it, pages translate it; `words` is plain English."""

    NEWBORN = "newborn"
    INFANT = "infant"
    CHILD = "child"
    ADOLESCENT = "adolescent"
    ADULT = "adult"
    OLDER_ADULT = "older_adult"

    @property
    def words(self) -> str:
        """The group in plain English, with its limits."""
        return _WORDS[self]


_WORDS = {
    AgeGroup.NEWBORN: "newborn of up to 27 days",
    AgeGroup.INFANT: "infant of 28 days to 23 months",
    AgeGroup.CHILD: "child of 2 to 11 years",
    AgeGroup.ADOLESCENT: "adolescent of 12 to 17 years",
    AgeGroup.ADULT: "adult of 18 to 64 years",
    AgeGroup.OLDER_ADULT: "adult of 65 years and over",
}
_BELOW_YEARS = {
    AgeGroup.NEWBORN: _NEWBORN_DAYS / _DAYS_PER_YEAR,
    AgeGroup.INFANT: 2.0,
    AgeGroup.CHILD: 12.0,
    AgeGroup.ADOLESCENT: 18.0,
    AgeGroup.ADULT: 65.0,
    AgeGroup.OLDER_ADULT: MAX_AGE_YEARS + 1.0,
}

AGE, SEX, VIEW = "age", "sex", "view"
KINDS: dict[str, tuple[str, ...]] = {AGE: tuple(AgeGroup), SEX: ("F", "M"), VIEW: ("AP", "PA")}
"""What a patient is grouped by, and the groups in the order of all tables."""


@dataclass(frozen=True)
class PatientGroups:
    """The groups of one image; None where nothing is known.

    Attributes:
        age: at the examination.
        sex: `F` or `M`.
        view: `AP` or `PA`; other frontal views, as of a table that says only `frontal`, are not known.
    """

    age: AgeGroup | None = None
    sex: str | None = None
    view: str | None = None

    def known(self) -> Iterator[tuple[str, str]]:
        """Yields (kind, group) of what is known, in the order of `KINDS`."""
        for field in fields(self):
            group = getattr(self, field.name)
            if group is not None:
                yield field.name, str(group)


def describe_group(kind: str, group: str) -> str:
    """Words a group.

    Args:
        kind: one of `KINDS`.
        group: one of its groups.
    """
    if kind == AGE:
        return AgeGroup(group).words
    return {"F": "women and girls", "M": "men and boys"}[group] if kind == SEX else f"{group} view"


def age_group_of(years: float | None) -> AgeGroup | None:
    """Finds the group of an age in years.

    None for no age, for more than `MAX_AGE_YEARS`, and for exactly 0: a table's 0 years may be any of a newborn and an infant.
    """
    if years is None or not _ROUNDING < years < MAX_AGE_YEARS + 1:
        return None
    return next(group for group, below in _BELOW_YEARS.items() if years < below - _ROUNDING)


def age_group_of_string(text: str) -> AgeGroup | None:
    """Finds the group of an Age String, e.g. 012D, 010W, 006M or 045Y (DICOM PS3.5, section 6.2, AS): completed units.

    None for anything else, and where the completed units leave the group open: 000Y and 000M may be newborns or infants.
    """
    match = re.fullmatch(r"(\d{1,3})([DWMY])", text.strip().upper())
    if match is None:
        return None
    number = int(match[1])
    if match[2] in "DW":
        days = number * (7 if match[2] == "W" else 1)
        return AgeGroup.NEWBORN if days < _NEWBORN_DAYS else age_group_of(days / _DAYS_PER_YEAR)
    return age_group_of(number / 12 if match[2] == "M" else float(number))


def age_group_between(birth: date | None, study: date | None) -> AgeGroup | None:
    """Finds the group on the day of the examination.

    Args:
        birth: day of birth.
        study: day of the examination.

    Returns:
        None where a day is not known or the birth lies after the examination.
    """
    if birth is None or study is None or birth > study:
        return None
    if (study - birth).days < _NEWBORN_DAYS:
        return AgeGroup.NEWBORN
    years = study.year - birth.year - ((study.month, study.day) < (birth.month, birth.day))
    return AgeGroup.INFANT if years < 2 else age_group_of(float(years))


def view_group_of(view: str | None) -> str | None:
    """Finds `AP` or `PA` in a word for a view such as `AP_HORIZONTAL` or `PA`; None where it is neither, both, or not frontal."""
    if not view or classify_view(view) is not Projection.FRONTAL:
        return None
    text = view.upper()
    words = set(re.findall("[A-Z]+", text))
    found = {"AP": bool(words & {"AP", "ANTEROPOSTERIOR"}), "PA": bool(words & {"PA", "POSTEROANTERIOR"})}
    named = [name for name, is_there in found.items() if is_there]
    return named[0] if len(named) == 1 else None


def groups_of(years: float | None, sex: str | None, view: str | None) -> PatientGroups:
    """Finds the groups of a row of a table.

    Args:
        years: age at the examination.
        sex: `F` or `M`; anything else is not known.
        view: word for the projection.
    """
    return PatientGroups(age_group_of(years), sex if sex in KINDS[SEX] else None, view_group_of(view))
