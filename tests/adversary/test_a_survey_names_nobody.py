"""Promise: a survey tells of no patient. Attack: both margins and all tables of an answer, two answers, and odd questions."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from flwr.app import Context, Message, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pneumofed.client.app import app
from pneumofed.client.federation.policy import UNRESTRICTED
from pneumofed.client.federation.small_cells import ToldTable, choose_table, is_safe, stays_open
from pneumofed.client.federation.survey import count_cells, read_surveys
from pneumofed.client.privacy.ledger import open_ledger
from pneumofed.client.privacy.ledger_report import accounts
from pneumofed.common.config.parties import SurveyField
from pneumofed.common.data.dataset import load_dataset
from pneumofed.common.data.manifest import Manifest, read_manifest
from pneumofed.common.privacy.randomness import RandomStream
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import read_failure
from pneumofed.common.wire.survey import FIELDS, NOT_STATED, OF_VOLUMES, SurveyAnswer, unpack_survey
from tests.adversary.hospital import Hospital
from tests.tiny import draw_manifest, tiny_experiment

ALL: tuple[SurveyField, ...] = get_args(SurveyField)
CELLS = ("a", "b", "c")
EVERY_NUMBER = set(range(10))


# --- tables against who knows the number of patients, every table and the program ---------------------------------------------------


def splits(patients: int, cells: int) -> list[tuple[int, ...]]:
    """All ways to deal patients to cells."""
    return [one for one in itertools.product(range(patients + 1), repeat=cells) if sum(one) == patients]


def all_tables(counts: Sequence[int]) -> list[ToldTable]:
    """Every table that could be told of these counts, by the rule for single cells and `is_safe`."""
    cells = CELLS[: len(counts)]
    shown = {cell: count for cell, count in zip(cells, counts, strict=True) if count >= 10}
    rounded = [{count // 10 * 10, -(-count // 10) * 10} for count in shown.values()]
    tables = [ToldTable(sum(counts), cells, dict(zip(shown, one, strict=True))) for one in itertools.product(*rounded)]
    return [table for table in tables if is_safe(table)]


def key_of(table: ToldTable) -> tuple[tuple[str, int], ...]:
    return tuple(table.shown.items())


@pytest.mark.parametrize("patients", [20, 23, 29, 38])
@pytest.mark.parametrize("cells", [2, 3])
def test_every_number_is_possible_in_every_hidden_cell(patients: int, cells: int) -> None:
    """By brute force: the counts that could have led to each table that may be told."""
    fitting = defaultdict(list)
    for counts in splits(patients, cells):
        for table in all_tables(counts):
            fitting[key_of(table)].append(counts)
    assert fitting
    for shown, found in fitting.items():
        for position, cell in enumerate(CELLS[:cells]):
            if cell not in dict(shown):
                assert {counts[position] for counts in found} == EVERY_NUMBER


@given(st.lists(st.integers(0, 60), min_size=2, max_size=8).filter(lambda counts: sum(counts) >= 20), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_what_is_chosen_is_a_rounding_of_what_is_there(counts: list[int], seed: int) -> None:
    named = {f"cell {number}": count for number, count in enumerate(counts)}
    key = hashlib.sha256(str(seed).encode()).digest()
    table = choose_table(named, RandomStream(key))
    assert table == choose_table(named, RandomStream(key))
    if table is None:
        return
    assert is_safe(table)
    assert set(table.shown) == {cell for cell, count in named.items() if count >= 10}
    for cell, told in table.shown.items():
        assert told % 10 == 0
        assert abs(told - named[cell]) < 10
        low, high = table.possible(cell)
        assert low <= named[cell] <= high


@pytest.mark.parametrize(("before", "after"), [(20, 40), (28, 50), (38, 58)])
def test_two_answers_leave_every_number_possible_where_patients_only_joined(before: int, after: int) -> None:
    """By brute force over both sets of counts; without the look at earlier answers some hidden cells have one value left."""
    tables = {counts: all_tables(counts) for patients in (before, after) for counts in splits(patients, 2)}
    fitting: dict[Any, tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
    careless: dict[Any, tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
    for first, then in itertools.product(splits(before, 2), splits(after, 2)):
        if not all(x <= y for x, y in zip(first, then, strict=True)):
            continue
        for one, other in itertools.product(tables[first], tables[then]):
            for position, cell in enumerate(one.cells):
                for kind in [careless, fitting] if stays_open(other, one) else [careless]:
                    found = kind[key_of(one), key_of(other), cell]
                    found[0].add(first[position])
                    found[1].add(then[position])
        if tables[first] and tables[then]:
            assert any(stays_open(other, one) for one in tables[first] for other in tables[then])
    assert fitting
    for (one_shown, other_shown, cell), possible in fitting.items():
        assert cell in dict(one_shown) or possible[0] == EVERY_NUMBER
        assert cell in dict(other_shown) or possible[1] == EVERY_NUMBER
    if before == 28:
        assert any(cell not in dict(one) and possible[0] < EVERY_NUMBER for (one, _, cell), possible in careless.items())


# --- a hospital, asked as a coordinator asks it -------------------------------------------------------------------------------------


def told(hospital: Hospital, *asked: SurveyField, run: str = "a" * 16, **changes: Any) -> SurveyAnswer:
    return unpack_survey(reply(hospital, asked, run, **changes).content, asked)[1]


def reply(hospital: Hospital, asked: Sequence[SurveyField], run: str = "a" * 16, kind: str = "query", **changes: Any) -> Message:
    """Its reply to a survey; `changes` are of the experiment that comes with it."""
    context = Context(1, 5, {"partition-id": 0}, RecordDict(), {"sites": str(hospital.federation.sites)})
    instruction = Instruction(tiny_experiment(**changes), run, 0, survey=tuple(asked))
    return app(Message(pack_instruction(instruction), dst_node_id=5, message_type=kind), context)


def refused(hospital: Hospital, *asked: SurveyField) -> str:
    answer = reply(hospital, asked)
    return read_failure(answer).sentence if answer.has_error() else ""


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    """60 patients, two thirds women, of whom 5 have an age; each second one has pneumonia."""
    found = Hospital(tmp_path, 60, survey=list(ALL))
    people = list(dict.fromkeys(found.manifest.patients))
    found.change(
        Manifest(
            tuple(
                replace(
                    one,
                    sex="M" if people.index(one.patient) % 3 == 0 else "F",
                    age_years=40.0 if people.index(one.patient) < 5 else None,
                    manufacturer="Doe and Sons, hand-made for Dr. Doe",
                )
                for one in found.manifest.records
            )
        )
    )
    return found


def test_a_table_is_of_patients_in_tens_and_small_cells_and_free_text_do_not_leave(hospital: Hospital) -> None:
    answer = told(hospital, *ALL)
    assert answer.patients == 60
    assert set(answer.tables["label"]) == {"normal", "pneumonia"}
    assert answer.tables["sex"]["F"] in (40,)
    assert answer.tables["manufacturer"] == {"another": 60}
    assert set(answer.missing) == {"view", "age", "year", *OF_VOLUMES}  # five ages are as good as none
    assert answer.withheld == ()
    assert "Doe" not in str(reply(hospital, ALL).content.config_records["survey"]["answer"])


@given(st.sets(st.sampled_from(ALL), min_size=1), st.sets(st.sampled_from(ALL), min_size=1))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_field_that_leaves_passes_the_policy(
    hospital: Hospital, allowed: set[SurveyField], asked: set[SurveyField]
) -> None:
    hospital.set_policy(survey=sorted(allowed))
    wanted = [field for field in ALL if field in asked]
    if not allowed & asked:
        assert refused(hospital, *wanted) == "the site's policy refuses this (survey)"
        return
    answer = reply(hospital, wanted)
    if answer.has_error():  # no table of those that are left may leave
        assert read_failure(answer).sentence == "the site's policy refuses this (survey)"
        return
    found = unpack_survey(answer.content, wanted)[1]
    assert {*found.tables, *found.missing} <= allowed & asked
    assert asked - allowed <= set(found.withheld)
    assert hospital.audit[-1].facts["tables"] == sorted(found.tables)


def test_the_default_policy_tells_labels_only(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 60)
    answer = told(hospital, "label", "sex", "images")
    assert set(answer.tables) == {"label"}
    assert set(answer.withheld) == {"sex", "images"}


def test_the_same_patients_have_the_same_table_and_few_changes_are_not_answered(hospital: Hospital) -> None:
    first = told(hospital, "label", "sex")
    assert told(hospital, "sex", "label", run="b" * 16).tables == first.tables
    everybody = hospital.manifest
    few = draw_manifest(hospital.federation.folder / "few", 19, seed=77).records
    hospital.change(Manifest((*everybody.records, *few)))
    assert told(hospital, "label", "sex") == first  # who joined waits
    other_sex = [replace(one, sex="F") if one.patient == "patient-0-0" else one for one in everybody.records]
    hospital.change(Manifest(tuple(other_sex)))
    changed = told(hospital, "label", "sex")
    assert changed.tables == {"label": first.tables["label"]}
    assert changed.withheld == ("sex",)
    hospital.change(Manifest(tuple(one for one in everybody.records if one.patient != "patient-0-0")))
    assert refused(hospital, "label", "sex") == "the site's policy refuses this (survey)"
    many = draw_manifest(hospital.federation.folder / "many", 40, seed=78).records
    hospital.change(Manifest((*everybody.records, *many)))
    assert told(hospital, "label").patients == 100
    assert any("on label" in sentence for sentence in read_surveys(Path(hospital.config.work_dir)))


def test_no_setting_of_the_experiment_changes_what_is_told(hospital: Hospital) -> None:
    first = told(hospital, *ALL)
    for changes in ({"image": {"size_px": 64, "fit": "crop"}}, {"task": "three_class"}, {"seed": 7}, {"name": "other"}):
        assert told(hospital, *ALL, **changes) == first


OWN = ["normal", "pneumonia", "tuberculosis", "mass"]


def own_hospital(folder: Path, **policy: Any) -> Hospital:
    """120 patients: 40 normal, 40 with pneumonia, 36 with tuberculosis, 4 with a mass."""
    found = Hospital(folder, 24, **policy)
    labels = ("normal", "pneumonia", "tuberculosis")
    drawn = draw_manifest(found.federation.folder / "own", 120, seed=5, labels=labels).records
    rare = {one.patient for one in [one for one in drawn if one.label == "tuberculosis"][:8]}  # two images each
    found.change(Manifest(tuple(replace(one, label="mass") if one.patient in rare else one for one in drawn)))
    return found


def told_own(hospital: Hospital, *asked: SurveyField, task: Any = OWN) -> SurveyAnswer:
    classes = () if isinstance(task, str) else task
    return unpack_survey(reply(hospital, asked, task=task).content, asked, classes)[1]


def test_a_run_s_own_classes_are_counted_and_one_of_few_is_hidden_with_the_rules_of_any_table(tmp_path: Path) -> None:
    hospital = own_hospital(tmp_path)
    answer = told_own(hospital, "label")
    assert answer.patients == 120
    assert answer.tables["label"] == {"normal": 40, "pneumonia": 40, "tuberculosis": answer.tables["label"]["tuberculosis"]}
    assert answer.tables["label"]["tuberculosis"] in (30, 40)
    assert told_own(hospital, "label") == answer, "the same patients have the same table"
    assert any("on label, by own classes" in sentence for sentence in read_surveys(Path(hospital.config.work_dir)))


def test_patients_by_label_are_told_by_one_list_of_classes_only(tmp_path: Path) -> None:
    hospital = own_hospital(tmp_path, survey=["label", "images"])
    assert set(told_own(hospital, "label", "images").tables) == {"label", "images"}
    for task in (OWN[:3], "binary"):
        later = told_own(hospital, "label", "images", task=task)
        assert (set(later.tables), later.withheld) == ({"images"}, ("label",))
    assert set(told_own(hospital, "label", task=[OWN[0], *reversed(OWN[1:])]).tables) == {"label"}, (
        "in another order it is the same list"
    )
    other = own_hospital(tmp_path / "other", survey=["label"])
    assert set(told_own(other, "label", task="three_class").tables) == {"label"}
    reply_to_own = reply(other, ["label"], task=OWN)
    assert reply_to_own.has_error(), "labels were told before, and nothing else is asked"


def test_no_other_table_is_about_the_patients_of_a_class_that_the_question_names(tmp_path: Path) -> None:
    hospital = own_hospital(tmp_path, survey=["label", "images"])
    assert told_own(hospital, "images").tables == told_own(hospital, "images", task="binary").tables
    assert sum(told_own(hospital, "images").tables["images"].values()) == 80, "the patients with normal and pneumonia"


def test_of_few_patients_nothing_is_told(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path, 19)
    assert refused(hospital, "label") == "the site's policy refuses this (survey)"
    assert not (Path(hospital.config.work_dir) / "surveys").exists()


@pytest.mark.parametrize(
    ("policy", "rule"),
    [
        ({"survey": []}, "survey"),
        ({"withhold": ["data_report"]}, "withhold"),
        ({"require_secure_aggregation": True}, "require_secure_aggregation"),
        ({"max_epsilon": 6}, "max_epsilon"),
        ({"max_epsilon_per_study": 6}, "max_epsilon_per_study"),
        ({"max_evaluations_per_day": 0}, "survey"),
    ],
)
def test_what_a_policy_forbids_is_refused_with_its_rule(hospital: Hospital, policy: dict[str, Any], rule: str) -> None:
    hospital.set_policy(**policy)
    assert refused(hospital, "label") == f"the site's policy refuses this ({rule})"
    assert hospital.audit[-1].facts["rule"] == rule


def test_a_limit_of_epsilon_lets_noised_tables_out_once_each_as_the_ledger_counts(hospital: Hospital) -> None:
    hospital.set_policy(max_epsilon=6, count_noise=5.0, min_unit="patient", survey=["label", "sex"])
    first = told(hospital, "label")
    assert first.noise == 5.0
    assert told(hospital, "label", run="b" * 16) == first
    assert [len(lineage.entries) for lineage in open_ledger(hospital.config).lineages()] == [1]
    told(hospital, "label", "sex")
    (account,) = accounts(open_ledger(hospital.config).lineages(), UNRESTRICTED.model_copy(update={"min_unit": "patient"}))
    assert sum(run.entries for run in account.runs) == 2
    assert 0 < account.epsilon < 6
    hospital.set_policy(max_epsilon=0.01, count_noise=5.0, min_unit="patient", survey=["label", "images"])
    assert refused(hospital, "images").startswith("the site's policy refuses this (max_epsilon)")
    assert told(hospital, "label") == first  # paid for already


def test_lists_of_invented_classes_give_no_second_noise_for_nothing(hospital: Hospital) -> None:
    hospital.set_policy(max_epsilon=6, count_noise=5.0, min_unit="patient", survey=["label"])
    lists = (["normal", "pneumonia", "x", "y"], ["normal", "x", "pneumonia", "y"], ["normal", "x", "y", "pneumonia"])
    found = []
    for classes in [*lists, *lists]:
        tables = unpack_survey(reply(hospital, ["label"], task=classes).content, ["label"], tuple(classes))[1].tables
        found.append(tables["label"])
    assert found[:3] == found[3:]
    assert [len(lineage.entries) for lineage in open_ledger(hospital.config).lineages()] == [3]


def test_statistics_that_the_hospital_opens_leave_beside_a_limit(hospital: Hospital) -> None:
    hospital.set_policy(max_epsilon=6, open_statistics=True)
    assert told(hospital, "label").noise is None


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_survey_is_no_way_around_the_rules_of_training(hospital: Hospital, kind: str) -> None:
    hospital.set_policy(strategies=[])
    answer = reply(hospital, ["label"], kind=kind)
    assert read_failure(answer).error == "MessageError"
    assert hospital.audit[-1].event == "malformed"


def test_a_damaged_record_of_what_was_told_refuses(hospital: Hospital) -> None:
    told(hospital, "label")
    for name in ("label.json", "label-told.json"):
        path = Path(hospital.config.work_dir) / "surveys" / name
        kept = path.read_bytes()
        path.write_text("[]")
        assert refused(hospital, "label") == "the site's policy refuses this (survey)"
        path.write_bytes(kept)
        assert refused(hospital, "label") == ""


def test_one_image_of_each_patient_counts_and_that_is_one_with_pneumonia(hospital: Hospital) -> None:
    records = list(hospital.manifest.records)
    sick = {one.patient for one in records if one.label == "pneumonia"}
    first = next(number for number, one in enumerate(records) if one.patient in sick)
    records[first] = replace(records[first], label="normal")  # a patient with images of both
    hospital.change(Manifest(tuple(records)))
    manifest = read_manifest(Path(hospital.config.manifest))
    experiment = tiny_experiment()
    dataset = load_dataset(manifest, experiment.task, experiment.image, hospital.federation.folder / "cache")
    cells = count_cells(dataset, ALL)
    assert {patient for patient, cell in cells["label"].items() if cell == "pneumonia"} == sick
    for field, found in cells.items():
        assert set(found) == set(manifest.patients)
        assert set(found.values()) <= {*FIELDS[field], NOT_STATED}
    assert set(cells["images"].values()) == {"2"}
