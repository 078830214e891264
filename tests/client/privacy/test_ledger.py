"""The ledger never holds less than was spent: not at once, not when killed, not when damaged; and it refuses what is beyond the budget."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.client.privacy.entries import DataUnits, LedgerEntry, total_epsilon
from pneumofed.client.privacy.ledger import Ledger
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.config.reader import build_config
from pneumofed.common.errors import BudgetError, PolicyError, describe_for_wire
from pneumofed.common.privacy.accounting import Mechanism, epsilon

ROUND = Mechanism(0.25, 1.5, 4)
DATA = DataUnits(("a1", "a2", "b1"), ("a", "a", "b"))
DELTA = 1e-3


def entry(number: int = 1, **values: Any) -> LedgerEntry:
    usual = LedgerEntry("run-1", number, "pneumonia", "0" * 64, "training", "patient", 2, ROUND, DELTA)
    return replace(usual, **values)


def limits(**values: Any) -> SitePolicy:
    return build_config(SitePolicy, values)


def count(ledger: Ledger) -> int:
    return sum(len(lineage.entries) for lineage in ledger.lineages())


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def test_rounds_are_composed_and_not_added(ledger: Ledger) -> None:
    spent = [ledger.spend(entry(number), DATA, limits()).lineage for number in range(1, 5)]
    assert spent == [epsilon([ROUND] * rounds, DELTA, "prv") for rounds in range(1, 5)]
    assert spent[3] < 4 * spent[0]


def test_a_round_beyond_the_budget_is_refused_with_what_remains(ledger: Ledger) -> None:
    budget = epsilon([ROUND] * 3, DELTA, "prv")
    for number in range(1, 4):
        ledger.spend(entry(number), DATA, limits(max_epsilon=budget))
    with pytest.raises(BudgetError) as refusal:
        ledger.spend(entry(4), DATA, limits(max_epsilon=budget + 0.1))
    assert refusal.value.remaining == pytest.approx(0.1)
    name, sentence = describe_for_wire(refusal.value)
    assert name == "BudgetError"
    assert sentence.startswith("the site's policy refuses this (max_epsilon): epsilon 0.")
    assert count(ledger) == 3


def test_a_refusal_crosses_processes_with_what_remains() -> None:
    error = pickle.loads(pickle.dumps(BudgetError("max_epsilon", "detail", 0.379)))
    assert (str(error), error.rule, error.remaining) == ("detail", "max_epsilon", 0.379)
    assert error.public_message.endswith("epsilon 0.37 remains")


@pytest.mark.parametrize("remaining", [-1.0, float("nan"), float("inf"), -float("inf")])
def test_what_remains_is_a_plain_number(remaining: float) -> None:
    assert BudgetError("max_epsilon", "", remaining).public_message.endswith("epsilon 0.00 remains")


def test_a_round_that_is_repeated_is_counted_again(ledger: Ledger) -> None:
    assert ledger.spend(entry(1), DATA, limits()).run < ledger.spend(entry(1), DATA, limits()).run
    assert count(ledger) == 2


def test_each_study_has_its_limit_and_all_share_one(ledger: Ledger) -> None:
    one = epsilon([ROUND], DELTA, "prv")
    rules = limits(max_epsilon_per_study=one, max_epsilon=epsilon([ROUND] * 2, DELTA, "prv"))
    ledger.spend(entry(1), DATA, rules)
    with pytest.raises(BudgetError) as refusal:
        ledger.spend(entry(2), DATA, rules)
    assert refusal.value.rule == "max_epsilon_per_study"
    ledger.spend(entry(1, study="other", run="run-2"), DATA, rules)
    with pytest.raises(BudgetError) as refusal:
        ledger.spend(entry(1, study="third", run="run-3"), DATA, rules)
    assert refusal.value.rule == "max_epsilon"


def test_the_run_is_told_of_itself_alone(ledger: Ledger) -> None:
    ledger.spend(entry(1), DATA, limits())
    spent = ledger.spend(entry(1, run="run-2"), DATA, limits())
    assert spent.run == epsilon([ROUND], DELTA, "prv") < spent.lineage


def test_limits_are_judged_at_the_hospitals_delta_or_at_a_smaller_one_of_a_run(ledger: Ledger) -> None:
    assert ledger.spend(entry(0), DATA, limits(max_delta=2e-3)).delta == 1e-3
    ledger.spend(entry(1, delta=1e-5), DATA, limits())
    assert ledger.spend(entry(2), DATA, limits()).delta == 1e-5
    assert ledger.spend(entry(3), DATA, limits(max_delta=2e-3)).delta == 1e-5
    assert ledger.spend(entry(3), DATA, limits(max_delta=1e-3)).delta == 1e-5
    with pytest.raises(PolicyError) as refusal:
        ledger.spend(entry(4), DATA, limits(max_delta=1e-4))
    assert refusal.value.rule == "max_delta"


def test_who_asks_for_patients_gets_no_run_that_protects_images(ledger: Ledger) -> None:
    with pytest.raises(PolicyError) as refusal:
        ledger.spend(entry(1, unit="image"), DATA, limits(min_unit="patient"))
    assert refusal.value.rule == "min_unit"


def test_a_mechanism_without_noise_uses_up_every_budget_and_is_remembered(ledger: Ledger) -> None:
    bare = entry(1, mechanism=Mechanism(0.1, 0.0, 1))
    with pytest.raises(BudgetError):
        ledger.spend(bare, DATA, limits(max_epsilon=1e6))
    assert ledger.spend(bare, DATA, limits()).lineage == float("inf")
    with pytest.raises(BudgetError):
        ledger.spend(entry(2), DATA, limits(max_epsilon=1e6))


def test_the_next_round_of_a_run_is_refused_without_the_data(ledger: Ledger) -> None:
    budget = limits(max_epsilon=epsilon([ROUND] * 2, DELTA, "prv"))
    ledger.foresee("run-1", "0" * 64, budget)
    ledger.spend(entry(1), DATA, budget)
    ledger.foresee("run-1", "0" * 64, budget)
    ledger.spend(entry(2), DATA, budget)
    with pytest.raises(BudgetError):
        ledger.foresee("run-1", "0" * 64, budget)
    ledger.foresee("run-2", "0" * 64, budget)
    assert count(ledger) == 2


# --- which data -----------------------------------------------------------------------------------------------------------------


def test_added_images_do_not_renew_the_budget(ledger: Ledger) -> None:
    ledger.spend(entry(1), DATA, limits())
    more = DataUnits((*DATA.digests, "c1"), (*DATA.patients, "c"))
    assert ledger.spend(entry(2), more, limits()).lineage == epsilon([ROUND] * 2, DELTA, "prv")
    newer = DataUnits(("c2",), ("c",))
    assert ledger.spend(entry(3), newer, limits()).lineage == epsilon([ROUND] * 3, DELTA, "prv")


def test_data_without_a_common_image_or_patient_has_its_own_budget(ledger: Ledger) -> None:
    ledger.spend(entry(1), DATA, limits())
    assert ledger.spend(entry(1), DataUnits(("z",), ("z",)), limits()).lineage == epsilon([ROUND], DELTA, "prv")


def test_the_same_image_under_another_name_is_the_same(ledger: Ledger) -> None:
    ledger.spend(entry(1), DATA, limits())
    assert ledger.spend(entry(1), DataUnits(("a1",), ("renamed",)), limits()).lineage == epsilon([ROUND] * 2, DELTA, "prv")


data_sets = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), min_size=1, max_size=8)


@settings(deadline=None, max_examples=25)
@given(sets=data_sets)
def test_what_was_spent_on_any_patient_is_never_under_counted(
    tmp_path_factory: pytest.TempPathFactory, sets: list[list[int]]
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.sqlite")
    told: list[tuple[set[int], Mechanism]] = []
    for number, patients in enumerate(sets):
        mechanism = Mechanism(1.0, 2.0 + number, 1)
        data = DataUnits([f"image {patient} of set {number}" for patient in patients], [str(patient) for patient in patients])
        spent = ledger.spend(entry(number, mechanism=mechanism), data, limits()).lineage
        told.append((set(patients), mechanism))
        for patient in patients:
            assert spent >= epsilon([mechanism for others, mechanism in told if patient in others], DELTA, "prv")
        assert spent == epsilon([m for _, m in _component(told)], DELTA, "prv")


def _component(told: list[tuple[set[int], Mechanism]]) -> list[tuple[set[int], Mechanism]]:
    """The data sets that are connected with the last one over common patients: slow and plain."""
    reached, before = set(told[-1][0]), 0
    while len(reached) != before:
        before = len(reached)
        for patients, _ in told:
            if patients & reached:
                reached |= patients
    return [item for item in told if item[0] & reached]


# --- images and patients --------------------------------------------------------------------------------------------------------


def test_images_are_accounted_for_as_patients_once_patients_are_protected(ledger: Ledger) -> None:
    image = entry(1, unit="image", images_per_patient=3)
    assert ledger.spend(image, DATA, limits()).level == "image"
    spent = ledger.spend(entry(2), DATA, limits())
    assert spent.level == "patient"
    assert spent.lineage == epsilon([Mechanism(1 - 0.75**3, 0.5, 4), ROUND], DELTA, "prv")


@pytest.mark.slow
@settings(deadline=None, max_examples=6)
@given(rate=st.floats(0.01, 0.9), noise=st.floats(1.0, 20.0), steps=st.integers(1, 50), images=st.integers(1, 5))
def test_images_of_a_patient_cost_no_less_than_the_independent_mixture(
    rate: float, noise: float, steps: int, images: int
) -> None:
    pld = pytest.importorskip("dp_accounting.pld", reason="the independent accountant is not installed")
    from scipy.stats import binom

    drawn = range(images + 1)
    weights = binom.pmf(list(drawn), images, rate)
    distribution = pld.privacy_loss_distribution.from_mixture_gaussian_mechanism(
        noise, [float(number) for number in drawn], list(weights / weights.sum()), value_discretization_interval=2e-3
    )
    expected = distribution.self_compose(steps).get_epsilon_for_delta(DELTA)
    image = entry(1, unit="image", images_per_patient=images, mechanism=Mechanism(rate, noise, steps))
    assert total_epsilon([image], DELTA, "patient") >= 0.99 * expected - 2e-3


# --- at once, and killed --------------------------------------------------------------------------------------------------------


def _spend_four_times(path: Path, budget: float, results: Any) -> None:
    for number in range(1, 5):
        try:
            Ledger(path).spend(entry(number), DATA, limits(max_epsilon=budget))
            results.put(True)
        except BudgetError:
            results.put(False)


def test_processes_at_once_share_one_budget(ledger: Ledger) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    budget = epsilon([ROUND] * 5, DELTA, "prv")
    processes = [context.Process(target=_spend_four_times, args=(ledger.path, budget, results)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=120) for _ in range(12)]
    for process in processes:
        process.join(60)
    assert answers.count(True) == 5
    assert count(ledger) == 5


def _spend_until_killed(path: Path, told: int) -> None:
    for number in range(1, 10_000):
        Ledger(path).spend(entry(number), DATA, limits())
        os.write(told, b".")


def test_a_process_that_is_killed_has_counted_what_it_began(ledger: Ledger) -> None:
    context = multiprocessing.get_context("fork")
    trained = 0
    for attempt in range(15):
        reader, writer = os.pipe()
        process = context.Process(target=_spend_until_killed, args=(ledger.path, writer))
        process.start()
        os.close(writer)
        trained += len(os.read(reader, 1))
        time.sleep(0.004 * attempt)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        while told := os.read(reader, 4096):
            trained += len(told)
        os.close(reader)
        assert count(ledger) >= trained
    assert trained >= 15


# --- damaged or lost ------------------------------------------------------------------------------------------------------------


def closed(ledger: Ledger) -> bool:
    try:
        ledger.spend(entry(9), DATA, limits())
    except PolicyError as error:
        assert error.public_message == "the site's policy refuses this (ledger)"
        return error.rule == "ledger"
    return False


def remove(path: Path) -> None:
    for file in path.parent.glob("ledger.sqlite*"):
        file.unlink()


def empty(path: Path) -> None:
    remove(path)
    path.touch()


def change(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement)


@pytest.mark.parametrize(
    "damage",
    [
        remove,
        lambda path: path.write_bytes(b"no database" * 1000),
        empty,
        lambda path: path.with_suffix(".mark").write_text("{"),
        lambda path: change(path, "UPDATE entry SET body = replace(body, '1.5', '9.5') WHERE number = 1"),
        lambda path: change(path, "DELETE FROM entry WHERE number = 3"),
        lambda path: change(path, "DELETE FROM entry WHERE number = 1"),
        lambda path: change(path, "DELETE FROM entry"),
        lambda path: change(path, "DROP TABLE unit"),
        lambda path: change(path, "DELETE FROM ledger"),
    ],
)
def test_a_ledger_that_is_lost_or_damaged_is_closed(ledger: Ledger, damage: Any) -> None:
    for number in range(1, 4):
        ledger.spend(entry(number), DATA, limits())
    damage(ledger.path)
    assert closed(ledger)
    assert closed(ledger)


def test_an_old_copy_in_its_place_is_closed(ledger: Ledger, tmp_path: Path) -> None:
    ledger.spend(entry(1), DATA, limits())
    shutil.copy(ledger.path, tmp_path / "copy")
    ledger.spend(entry(2), DATA, limits())
    remove(ledger.path)
    shutil.copy(tmp_path / "copy", ledger.path)
    assert closed(ledger)


def test_a_ledger_that_cannot_be_written_is_closed(ledger: Ledger) -> None:
    ledger.path.mkdir()
    assert closed(ledger)


def test_the_ledger_is_its_owners_alone_and_names_no_patient(ledger: Ledger) -> None:
    data = DataUnits(("digest-of-image",), ("DOE^JANE",))
    ledger.spend(entry(1), data, limits())
    files = list(ledger.path.parent.glob("ledger*"))
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert not any(b"DOE" in file.read_bytes() or b"digest-of" in file.read_bytes() for file in files)
