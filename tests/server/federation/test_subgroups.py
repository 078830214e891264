"""Groups of patients: each has the images that its name says, and no group is the whole set or too small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pneumofed.common.data.manifest import ImageRecord
from pneumofed.server.federation.central_evaluation import LEAST_IN_SUBGROUP, find_subgroups

RECORDS = st.builds(
    ImageRecord,
    path=st.just(Path("image.png")),
    patient=st.just("p"),
    label=st.sampled_from(["normal", "pneumonia", "bacterial", "viral"]),
    view=st.sampled_from(["PA", "AP", None]),
    sex=st.sampled_from(["F", "M", None]),
    age_years=st.sampled_from([None, 0.5, 17.9, 18.0, 64.0, 90.0]),
)


def _belongs(record: ImageRecord, group: str) -> bool:
    kind, value = group.split(" ", 1)
    if kind != "age":
        return {"cause": record.label, "sex": record.sex, "view": record.view}[kind] == value
    low, *high = value.removesuffix(" and over").split(" to ")
    return record.age_years is not None and int(low) <= record.age_years < (int(high[0]) + 1 if high else 200)


@given(st.lists(RECORDS | st.none(), max_size=120))
def test_a_group_holds_exactly_the_images_that_its_name_says(records: list[ImageRecord | None]) -> None:
    for group, rows in find_subgroups(records).items():
        expected = [row for row, record in enumerate(records) if record is not None and _belongs(record, group)]
        np.testing.assert_array_equal(rows, expected)
        assert LEAST_IN_SUBGROUP <= len(rows) < len(records)


def test_a_cause_is_a_group_beside_the_normal_images() -> None:
    records = [ImageRecord(Path("image.png"), "p", label) for label in ["normal"] * 30 + ["viral"] * 20 + ["bacterial"] * 19]
    assert {name: len(rows) for name, rows in find_subgroups(records).items()} == {"cause viral": 20}
