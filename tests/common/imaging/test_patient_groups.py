"""Groups of patients by age, sex and view, from values as files have them."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumofed.common.imaging.images import read_image
from pneumofed.common.imaging.patient_groups import (
    KINDS,
    AgeGroup,
    PatientGroups,
    age_group_between,
    age_group_of,
    age_group_of_string,
    describe_group,
    groups_of,
    view_group_of,
)
from tests.dicom_factory import write_dicom

STORED = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) % 4096


@pytest.mark.parametrize(
    ("text", "group"),
    [
        *(("000D", "newborn"), ("027D", "newborn"), ("028D", "infant"), ("003W", "newborn"), ("004W", "infant")),
        *(("001M", "infant"), ("023M", "infant"), ("024M", "child"), ("001Y", "infant"), ("002Y", "child"), ("011Y", "child")),
        *(("143M", "child"), ("144M", "adolescent"), ("012Y", "adolescent"), ("017Y", "adolescent"), ("018Y", "adult")),
        *(("064Y", "adult"), ("065Y", "older_adult"), ("125Y", "older_adult"), ("12m", "infant"), ("45Y ", "adult")),
        *(("126Y", None), ("999Y", None), ("000Y", None), ("000M", None), ("", None), ("045", None), ("Y", None), ("-05Y", None)),
    ],
)
def test_an_age_string_gives_its_group_or_none_where_it_leaves_it_open(text: str, group: str | None) -> None:
    assert age_group_of_string(text) == group


@pytest.mark.parametrize("years", range(1, 126))
def test_a_table_a_string_and_two_dates_agree_at_every_age_in_years(years: int) -> None:
    expected = age_group_of_string(f"{years:03d}Y")
    assert age_group_of(float(years)) == expected
    assert age_group_between(date(1900, 6, 15), date(1900 + years, 6, 15)) == expected


def test_the_group_changes_on_the_birthday_and_on_day_28() -> None:
    born = date(2004, 2, 29)
    assert age_group_between(born, date(2022, 2, 28)) == AgeGroup.ADOLESCENT
    assert age_group_between(born, date(2022, 3, 1)) == AgeGroup.ADULT
    assert [age_group_between(born, born + timedelta(days=days)) for days in (0, 27, 28)] == ["newborn", "newborn", "infant"]


def test_a_birth_after_the_examination_or_a_missing_day_says_nothing() -> None:
    assert age_group_between(date(2030, 1, 1), date(2026, 1, 1)) is None
    assert age_group_between(None, date(2026, 1, 1)) is None
    assert age_group_between(date(1800, 1, 1), date(2026, 1, 1)) is None


@pytest.mark.parametrize("years", [None, 0.0, -1.0, 126.0, 999.0, float("nan"), float("inf")])
def test_a_number_that_is_no_age_has_no_group(years: float | None) -> None:
    assert age_group_of(years) is None


@pytest.mark.parametrize(
    ("view", "group"),
    [
        ("PA", "PA"),
        ("ap", "AP"),
        ("AP_HORIZONTAL", "AP"),
        ("FRONTAL", None),
        ("LL", None),
        ("LAT PA", None),
        ("", None),
        (None, None),
    ],
)
def test_a_view_is_ap_or_pa_only_where_one_of_them_is_said(view: str | None, group: str | None) -> None:
    assert view_group_of(view) == group


def test_a_row_of_a_table_is_known_by_what_it_has() -> None:
    assert list(groups_of(30.0, "O", "PA").known()) == [("age", "adult"), ("view", "PA")]
    assert list(PatientGroups().known()) == []


def test_every_group_has_words() -> None:
    assert len({describe_group(kind, group) for kind, groups in KINDS.items() for group in groups}) == 10


@pytest.mark.parametrize(
    ("tags", "group"),
    [
        ({"PatientAge": "005Y"}, "child"),
        ({"PatientAge": "999Y", "PatientBirthDate": "20200101", "StudyDate": "20260101"}, "child"),
        ({"PatientAge": "000Y", "PatientBirthDate": "20251220", "StudyDate": "20260101"}, "newborn"),
        ({"PatientAge": "", "PatientBirthDate": "19400101", "StudyDate": "20260101"}, "older_adult"),
        ({"PatientAge": "", "PatientBirthDate": "20300101", "StudyDate": "20260101"}, None),
        ({"PatientAge": "", "PatientBirthDate": "19400101", "StudyDate": ""}, None),
    ],
)
def test_a_dicom_image_has_the_group_of_its_age_or_else_of_its_dates(
    tmp_path: Path, tags: dict[str, Any], group: str | None
) -> None:
    info = read_image(write_dicom(tmp_path / "a.dcm", STORED, BitsStored=12, **tags)).info
    assert info.groups.age == group
    assert tags.get("PatientBirthDate", "no date") not in repr(info)
