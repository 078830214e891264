"""Data reports add up: every image is accounted for, and nothing of a patient is in them."""

from __future__ import annotations

import json
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.data.manifest import DataReport, DataWarning
from pneumofed.common.errors import SkipReason

COUNTS = st.integers(0, 1000)


@st.composite
def reports(draw: st.DrawFn, found: int | None = None) -> DataReport:
    skipped = Counter(draw(st.dictionaries(st.sampled_from(SkipReason), COUNTS, max_size=3)))
    used = draw(COUNTS) if found is None else found
    return DataReport(
        found=used + skipped.total(),
        used=used,
        skipped=skipped,
        classes=Counter(draw(st.dictionaries(st.sampled_from(["normal", "pneumonia"]), COUNTS))),
        patients=draw(COUNTS),
        warnings=Counter(draw(st.dictionaries(st.sampled_from(DataWarning), COUNTS, max_size=2))),
    )


@settings(max_examples=50)
@given(reports(), reports(), reports())
def test_reports_are_a_commutative_monoid(a: DataReport, b: DataReport, c: DataReport) -> None:
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + DataReport() == a == DataReport() + a


@settings(max_examples=30)
@given(reports(), reports())
def test_the_sum_accounts_for_every_image(a: DataReport, b: DataReport) -> None:
    total = a + b
    assert total.found == total.used + total.skipped.total() == a.found + b.found


@settings(max_examples=30)
@given(st.data(), reports())
def test_two_steps_in_a_row_account_for_every_image(data: st.DataObject, later: DataReport) -> None:
    first = data.draw(reports(found=later.found))
    whole = first.then(later)
    assert whole.found == whole.used + whole.skipped.total() == first.found


@settings(max_examples=30)
@given(reports())
def test_what_may_leave_the_site_is_counts_and_fixed_sentences(report: DataReport) -> None:
    public = json.loads(json.dumps(report.public()))
    fixed = {reason.value for reason in SkipReason} | {warning.value for warning in DataWarning} | {"normal", "pneumonia"}
    for key in ("skipped", "classes", "warnings"):
        counts = public.pop(key)
        assert set(counts) <= fixed
        assert all(isinstance(count, int) for count in counts.values())
    assert public == {"found": report.found, "used": report.used, "patients": report.patients}
