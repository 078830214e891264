"""Whether a model was judged for a patient: by groups that are told, and never by an age."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.common.imaging.patient_groups import AgeGroup, PatientGroups
from pneumofed.common.model_bundle.population import (
    MIN_JUDGED_PATIENTS,
    GroupKind,
    JudgedGroup,
    JudgedPopulation,
    SiteMix,
    not_known,
)


def group(kind: GroupKind, *names: str, least: int = MIN_JUDGED_PATIENTS) -> JudgedGroup:
    return JudgedGroup(
        held_out="test", kind=kind, groups=names, images=200, patients=100, patients_with_pneumonia=50, patients_without=least,
        images_with_pneumonia=100,
    )  # fmt: skip


def population(*groups: JudgedGroup) -> JudgedPopulation:
    return JudgedPopulation(groups=groups, mix=SiteMix(sites=2, shares=(0.5, 0.5)))


ADULTS = population(group("age", "adult"), group("age", "older_adult"), group("age", "child", least=19), group("view", "PA"))


def test_a_child_under_an_adults_model_is_told_so() -> None:
    found = ADULTS.check(PatientGroups(AgeGroup.CHILD, "F", "PA"))
    assert found.status == "not_judged"
    assert found.outside == ("age",)
    assert found.sentence == (
        "not judged for this population: child of 2 to 11 years, the model was judged on adults, adults of 65 years and over"
    )


@pytest.mark.parametrize(
    ("groups", "status"),
    [
        (PatientGroups(AgeGroup.ADULT, "M", "PA"), "judged"),
        (PatientGroups(AgeGroup.ADULT), "judged"),
        (PatientGroups(AgeGroup.ADULT, "M", "AP"), "not_judged"),
        (PatientGroups(None, "M", "PA"), "age_unknown"),
        (PatientGroups(None, "M", "AP"), "not_judged"),
    ],
)
def test_what_is_known_decides_and_an_unknown_age_is_said(groups: PatientGroups, status: str) -> None:
    assert ADULTS.check(groups).status == status


def test_sex_cannot_be_outside_where_nobody_stated_it() -> None:
    assert "sex" not in ADULTS.check(PatientGroups(AgeGroup.CHILD, "M", "AP")).outside


def test_a_group_with_one_patient_too_few_on_either_side_is_not_judged() -> None:
    assert population(group("age", "child")).judged("age") == ("child",)
    assert population(group("age", "child", least=MIN_JUDGED_PATIENTS - 1)).judged("age") == ()


def test_ages_that_were_stated_for_a_whole_set_count() -> None:
    assert population(group("age", "child", "infant")).judged("age") == ("infant", "child")


def test_a_model_of_unknown_ages_and_one_that_says_nothing_differ_in_words() -> None:
    adult = PatientGroups(AgeGroup.ADULT, "M", "PA")
    assert population(group("view", "PA")).check(adult).sentence == "not known which ages the model was judged on"
    assert population().check(adult).sentence == not_known(adult).sentence == "not known for whom the model was judged"


known = st.builds(
    PatientGroups, st.sampled_from([None, *AgeGroup]), st.sampled_from([None, "F", "M"]), st.sampled_from([None, "AP", "PA"])
)


@given(known, st.lists(st.sampled_from(list(AgeGroup)), unique=True))
def test_every_finding_has_a_sentence_and_is_plain_json(patient: PatientGroups, ages: list[AgeGroup]) -> None:
    found = population(*(group("age", age) for age in ages)).check(patient)
    told = json.loads(json.dumps(found.to_json()))
    assert told["sentence"]
    assert (told["status"] == "not_judged") == bool(told["outside"])
    assert ("age" in told["outside"]) == (bool(ages) and patient.age is not None and patient.age not in ages)


def test_the_section_survives_being_written() -> None:
    assert JudgedPopulation.model_validate_json(ADULTS.model_dump_json()) == ADULTS
