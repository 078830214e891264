"""For whom a model was judged, and whether a patient is one of them.

`JudgedPopulation` is a section of a bundle's manifest: each group of each held-out set with what was measured on it. `PopulationFinding` is
what a judgement says of its own patient: the groups, never an age or a date.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field

from pneumofed.common.config.experiment import Count, Fraction, Section
from pneumofed.common.errors import in_a_row
from pneumofed.common.imaging.patient_groups import AGE, KINDS, SEX, VIEW, AgeGroup, PatientGroups, describe_group

MIN_JUDGED_PATIENTS = 20
"""Patients with and as many without pneumonia, for a group to count as judged: of 20 of whom 18 are called rightly Wilson's 95 % interval
(Wilson 1927) is 0.70 to 0.97, of 10 with 9 it is 0.60 to 0.98; with fewer, sensitivity and specificity are hardly known."""

GroupKind = Literal["age", "sex", "view"]
Images = Annotated[int, Field(ge=0)]


class IntervalEstimate(Section):
    """A number with its 95 % interval; None where it is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


class JudgedGroup(Section):
    """What was measured on one group of one held-out set, at the operating point."""

    held_out: str
    """Name of the set, e.g. `test`."""
    kind: GroupKind
    groups: Annotated[tuple[str, ...], Field(min_length=1)]
    """The group; several where only the whole set's ages are known, as who exported the bundle stated them."""
    stated: bool = False
    """The images do not say it: who exported the bundle did."""
    images: Images
    patients: Images
    patients_with_pneumonia: Images
    patients_without: Images
    """Who have an image without pneumonia; a patient may count on both sides."""
    images_with_pneumonia: Images
    metrics: dict[str, IntervalEstimate] = Field(default_factory=dict)
    """`auroc`, `sensitivity`, `specificity`; empty where nothing can be measured."""

    @property
    def is_judged(self) -> bool:
        """Whether there are patients enough."""
        return min(self.patients_with_pneumonia, self.patients_without) >= MIN_JUDGED_PATIENTS


class SiteMix(Section):
    """The hospitals that trained the model; none is named."""

    sites: Images
    shares: tuple[Fraction, ...] = ()
    """Each hospital's part of the training images, the largest first, rounded to a twentieth; empty where they reported no counts."""


class JudgedPopulation(Section):
    """For whom a model was judged."""

    version: Literal[1] = 1
    min_patients: Count = MIN_JUDGED_PATIENTS
    groups: tuple[JudgedGroup, ...] = ()
    unknown_age: Images = 0
    """Held-out images whose patient's age nobody states."""
    mix: SiteMix

    def judged(self, kind: str) -> tuple[str, ...]:
        """Lists the groups of `kind` that count as judged, in the order of `KINDS`."""
        found = {group for one in self.groups if one.kind == kind and one.is_judged for group in one.groups}
        return tuple(group for group in KINDS[kind] if group in found)

    def check(self, groups: PatientGroups) -> PopulationFinding:
        """Finds whether a patient of `groups` is one of those for whom the model was judged."""
        known, judged = dict(groups.known()), {kind: self.judged(kind) for kind in KINDS}
        outside = tuple(kind for kind, group in known.items() if judged[kind] and group not in judged[kind])
        status = PopulationStatus.JUDGED
        if not judged[AGE]:
            status = PopulationStatus.MODEL_UNKNOWN
        elif AGE not in known:
            status = PopulationStatus.AGE_UNKNOWN
        return PopulationFinding(PopulationStatus.NOT_JUDGED if outside else status, groups, outside, judged)


class PopulationStatus(StrEnum):
    """Fixed words: pages translate them, scripts compare them."""

    JUDGED = "judged"
    NOT_JUDGED = "not_judged"
    AGE_UNKNOWN = "age_unknown"
    MODEL_UNKNOWN = "model_unknown"


@dataclass(frozen=True)
class PopulationFinding:
    """Whether the model was judged for the patient of one image.

    Attributes:
        status: `not_judged` if the patient is of a group that it was not judged for, in any kind; else `model_unknown` where nothing is
            known of the ages of those it was judged on, `age_unknown` where the image states no age, or `judged`.
        groups: of the patient.
        outside: the kinds (`age`, `sex`, `view`) in which the patient is of no judged group.
        judged: by kind, the groups that the model was judged for.
    """

    status: PopulationStatus
    groups: PatientGroups
    outside: tuple[str, ...]
    judged: Mapping[str, tuple[str, ...]]

    @property
    def outside_words(self) -> list[str]:
        """The groups of the patient that the model was not judged for, in plain English."""
        known = dict(self.groups.known())
        return [describe_group(kind, known[kind]) for kind in self.outside]

    @property
    def sentence(self) -> str:
        """The finding in plain English, for tables, reports and pages without a translation."""
        if self.status is PopulationStatus.MODEL_UNKNOWN:
            return (
                "not known which ages the model was judged on"
                if any(self.judged.values())
                else "not known for whom the model was judged"
            )
        if self.status is PopulationStatus.AGE_UNKNOWN:
            return f"age not known: the model was judged on {describe_groups(AGE, self.judged[AGE])}"
        if self.status is PopulationStatus.JUDGED:
            return f"judged for this population: {'; '.join(describe_group(*known) for known in self.groups.known())}"
        told = (
            f"{own}, the model was judged on {describe_groups(kind, self.judged[kind])}"
            for kind, own in zip(self.outside, self.outside_words, strict=True)
        )
        return f"not judged for this population: {'; '.join(told)}"

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values: status, groups of the patient, the kinds that are outside, what was judged, and the sentence."""
        return {
            "status": self.status.value,
            "age_group": self.groups.age.value if self.groups.age else None,
            "sex": self.groups.sex,
            "view": self.groups.view,
            "outside": list(self.outside),
            "judged": {kind: list(groups) for kind, groups in self.judged.items()},
            "sentence": self.sentence,
        }


def not_known(groups: PatientGroups) -> PopulationFinding:
    """Returns the finding of a bundle that does not say for whom it was judged."""
    return PopulationFinding(PopulationStatus.MODEL_UNKNOWN, groups, (), dict.fromkeys(KINDS, ()))


def describe_groups(kind: str, groups: tuple[str, ...]) -> str:
    """Words several groups of one kind, e.g. `adults, adults of 65 years and over` or `AP and PA views`.

    Args:
        kind: one of `KINDS`.
        groups: some of its groups, in their order.
    """
    if kind == SEX:
        return in_a_row({"F": "women and girls", "M": "men and boys"}[group] for group in groups)
    if kind == VIEW:
        return f"{in_a_row(groups)} views"
    return ", ".join(_PLURALS[AgeGroup(group)] for group in groups)


_PLURALS = {
    AgeGroup.NEWBORN: "newborns",
    AgeGroup.INFANT: "infants",
    AgeGroup.CHILD: "children of 2 to 11 years",
    AgeGroup.ADOLESCENT: "adolescents",
    AgeGroup.ADULT: "adults",
    AgeGroup.OLDER_ADULT: "adults of 65 years and over",
}
