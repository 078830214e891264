"""Which groups the patient of an image belongs to: age, sex and projection. A group is kept or reported, never an age or a birth date.

Age groups are those of ICH E11 (2000), "Clinical Investigation of Medicinal Products in the Pediatric Population", section 2.5, whose upper
limit of adolescence is taken as 17 years (it leaves 16 to 18 to the region), and 65 years and over from ICH E7 (1993), section I.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import date
from enum import StrEnum

from pneumofed.common.imaging.views import Projection, classify_view

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
