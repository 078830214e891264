"""The mix of patients is watched by itself, and images only within their group: more children are no change of the scanner."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import kstest

from pneumofed.common.imaging.patient_groups import AgeGroup, PatientGroups
from pneumofed.inference.monitor.e_processes import Baseline, conformal_p_values
from pneumofed.inference.monitor.monitor import find_drift
from pneumofed.inference.monitor.page import write_drift_page
from pneumofed.inference.monitor.reference import (
    Observations,
    Reference,
    encode_groups,
    encode_words,
    group_shares,
    stratum_labels,
    unknown_groups,
)
from pneumofed.inference.monitor.store import STORE_FILE, MonitorStore, Observation
from pneumofed.inference.monitor.streams import Stream, watch
from pneumofed.inference.monitor.wording import as_numbers, describe_scanners, sentences
from tests.inference.monitor.drawn import draw_arrivals, draw_reference, one_after_another

CHILDREN_ARE_BRIGHTER = 1.5
"""Standard deviations."""


def ages(patients: int, children: float, seed: int) -> npt.NDArray[np.int64]:
    drawn = np.random.default_rng(seed).random(patients) < children
    return encode_groups(PatientGroups(AgeGroup.CHILD if one else AgeGroup.ADULT) for one in drawn)


def brighten(statistics: npt.NDArray[np.float64], groups: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return statistics + np.outer(groups[:, 0] == list(AgeGroup).index(AgeGroup.CHILD), [CHILDREN_ARE_BRIGHTER, 0.0])


def of_both_ages(seed: int = 0) -> Reference:
    reference, groups = draw_reference(400, seed), ages(400, 0.3, seed)
    return replace(reference, statistics=brighten(reference.statistics, groups), groups=groups)


def come(reference: Reference, patients: int, children: float, seed: int = 1, *, brighter: float = 0.0) -> Observations:
    found, groups = draw_arrivals(reference, patients, seed, brighter=brighter), ages(patients, children, seed)
    return replace(found, statistics=brighten(found.statistics, groups), groups=groups)


def alarmed(streams: list[Stream]) -> set[str]:
    return {stream.quantity for stream in streams if stream.alarm is not None}


def test_more_children_alarm_as_a_mix_and_not_as_a_change_of_the_scanner() -> None:
    reference = of_both_ages()
    found = one_after_another(come(reference, 100, 0.3), come(reference, 200, 0.8, 2))
    streams = watch(found, reference)
    assert alarmed(streams) == {"mix of ages"}
    (mix,) = [stream for stream in streams if stream.quantity == "mix of ages"]
    assert mix.direction == "lower"
    blind = replace(reference, groups=unknown_groups(400))
    assert "mean" in alarmed(watch(found, blind)), "without groups the children look like another scanner"


def test_a_changed_scanner_alarms_within_the_groups_while_the_mix_is_quiet() -> None:
    reference = of_both_ages()
    found = one_after_another(come(reference, 100, 0.3), come(reference, 200, 0.3, 2, brighter=1.5))
    assert alarmed(watch(found, reference)) == {"mean"}


def test_quiet_sites_of_both_ages_raise_no_more_alarms_than_promised() -> None:
    reference = of_both_ages()
    raised = sum(bool(alarmed(watch(come(reference, 150, 0.3, seed), reference))) for seed in range(10, 40))
    assert raised <= 4  # of 30 at 5 %: more come with a chance of 0.02


def test_p_values_within_strata_are_uniform_whatever_the_mix() -> None:
    rng, found, pooled = np.random.default_rng(5), [], []
    for _ in range(150):
        strata = (rng.random(60) < 0.2).astype(np.int64), (rng.random(25) < 0.8).astype(np.int64)
        values = [rng.standard_normal(len(one)) + 2.0 * one for one in strata]
        found.append(conformal_p_values(values[0], values[1], rng, strata))
        pooled.append(conformal_p_values(values[0], values[1], rng))
    assert kstest(np.concatenate(found), "uniform").pvalue > 1e-3
    assert kstest(np.concatenate(pooled), "uniform").pvalue < 1e-6


def test_a_p_value_within_a_stratum_is_that_of_the_stratum_by_itself_and_stays_when_more_arrive() -> None:
    values, strata = np.arange(30.0), np.arange(30) % 3
    both = conformal_p_values(values[:12], values[12:], np.random.default_rng(1), (strata[:12], strata[12:]))
    for label in range(3):
        ties = np.random.default_rng(1).uniform(size=18)[strata[12:] == label]
        known = values[:12][strata[:12] == label]
        for place, value in enumerate(values[12:][strata[12:] == label]):
            earlier = np.concatenate([known, values[12:][strata[12:] == label][:place]])
            expected = ((earlier < value).sum() + (1 - ties[place]) * ((earlier == value).sum() + 1)) / (len(earlier) + 1)
            assert both[strata[12:] == label][place] == pytest.approx(expected)
    fewer = conformal_p_values(values[:12], values[12:20], np.random.default_rng(1), (strata[:12], strata[12:20]))
    np.testing.assert_array_equal(both[:8], fewer)


def test_a_scanner_that_states_no_ages_is_compared_with_the_whole_reference() -> None:
    reference = of_both_ages()
    found = replace(come(reference, 200, 0.3, brighter=2.0), groups=unknown_groups(200))
    told, blind = watch(found, reference), watch(found, replace(reference, groups=unknown_groups(400)))
    assert "mix of ages" not in {stream.quantity for stream in told}
    for one, other in zip(told, blind, strict=True):
        np.testing.assert_array_equal(one.log_evidence, other.log_evidence)


def test_after_a_baseline_the_mix_is_compared_with_the_scanners_own() -> None:
    reference = of_both_ages()
    found = come(reference, 400, 0.9)
    streams = watch(found, reference, [Baseline("A", 0, 200)])
    assert alarmed([stream for stream in streams if not stream.test.own_baseline]) == {"mix of ages"}
    assert not alarmed([stream for stream in streams if stream.test.own_baseline])


def test_children_that_cannot_be_judged_count_in_the_mix() -> None:
    reference = of_both_ages()
    found = come(reference, 200, 0.8)
    refused = found.refused | (found.groups[:, 0] == list(AgeGroup).index(AgeGroup.CHILD))
    assert "mix of ages" in alarmed(watch(replace(found, refused=refused), reference))


def test_the_words_say_who_comes_and_that_the_images_are_as_before(tmp_path: Path) -> None:
    reference = of_both_ages()
    findings = find_drift(one_after_another(come(reference, 100, 0.3), come(reference, 200, 0.8, 2)), reference)
    scanners = describe_scanners(findings, reference)
    told = " ".join(sentences(findings, scanners))
    assert "the patients are younger, since about" in told
    assert "children of 2 to 11 years" in told
    assert "within each group of patients no quantity of the images alarms" in told
    (row,) = [row for row in as_numbers(findings, scanners)["scanners"][0]["quantities"] if row["quantity"] == "mix of ages"]
    now, usual = row["shares"]["child"]
    assert usual == pytest.approx((reference.groups[:, 0] == 2).mean())
    assert now == pytest.approx(0.8, abs=0.1)
    page = write_drift_page(tmp_path, findings, reference)[0].read_text()
    assert "Ages of the patients" in page
    assert row["meaning"] in page


def test_mixes_come_first_and_a_change_of_both_is_told_as_both() -> None:
    reference = of_both_ages()
    findings = find_drift(come(reference, 300, 0.9, brighter=3.0), reference)
    scanners = describe_scanners(findings, reference)
    assert [row.quantity for row in scanners[0].alarms][:2] == ["mix of ages", "mean"]
    assert "so it is not only the patients" in " ".join(sentences(findings, scanners))


def test_groups_of_words_and_of_patients_are_the_same_and_strata_tell_all_apart() -> None:
    patients = [
        PatientGroups(age, sex, view) for age in (None, *AgeGroup) for sex in (None, "F", "M") for view in (None, "AP", "PA")
    ]
    groups = encode_groups(patients)
    words = [[str(getattr(one, kind) or "") for one in patients] for kind in ("age", "sex", "view")]
    np.testing.assert_array_equal(encode_words(words), groups)
    assert len(set(stratum_labels(groups, ("age", "sex", "view")).tolist())) == len(patients)
    assert set(stratum_labels(groups, ()).tolist()) == {0}
    assert group_shares(groups, "sex") == {"F": 0.5, "M": 0.5}
    assert group_shares(unknown_groups(3), "sex") == {}
    assert encode_words([["grown up"], ["O"], ["LL"]]).tolist() == [[-1, -1, -1]]


SEEN = Observation(
    739_000, "A", "DOE^JANE", "normal", 0.1, np.zeros(2, np.float32), np.zeros(3), PatientGroups(AgeGroup.CHILD, "F", None)
)


def test_the_store_keeps_groups_and_takes_a_store_of_an_earlier_version(tmp_path: Path) -> None:
    store = MonitorStore(tmp_path)
    store.append("b", SEEN)
    with sqlite3.connect(store.path) as connection:
        for name in ("age_group", "sex", "view"):
            connection.execute(f"ALTER TABLE judged DROP COLUMN {name}")
    store.append("b", SEEN)
    assert store.read("b").groups.tolist() == [[-1, -1, -1], [2, 0, -1]]
    with pytest.raises(sqlite3.IntegrityError, match="append-only"), sqlite3.connect(tmp_path / STORE_FILE) as connection:
        connection.execute("UPDATE judged SET age_group = ''")


def test_a_reference_reads_its_groups_and_is_without_any_in_earlier_bundles() -> None:
    rng = np.random.default_rng(0)
    arrays = {"features": rng.random((80, 5)), "pixel_statistics": rng.random((80, 1)), "probabilities": rng.random(80)}
    assert Reference.of("b", ["mean"], arrays).kinds == ()
    known = arrays | {"age_group": np.array(["adult"] * 70 + [""] * 10), "sex": np.array(["F"] * 59 + [""] * 21)}
    reference = Reference.of("b", ["mean"], known)
    assert reference.kinds == ("age",)
    assert (reference.groups[:, 0] == 4).sum() == 70
    assert len(reference.groups_of("likeness")) == len(reference.rows)
