"""The gate's decision, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pneumofed.common.audit.log import AuditLog, read_entries
from pneumofed.common.errors import ReleaseError
from pneumofed.common.evaluation.class_comparison import ClassAreas, ClassesComparison, compare_classes
from pneumofed.common.evaluation.comparison import Areas, Margins, ModelComparison, NonInferiority
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.release import (
    ReleaseRecord,
    SiteVerdict,
    mark_of,
    read_record,
    read_verdict,
    require_release,
    write_signed,
)
from pneumofed.common.wire.keys import NodeKey, PrivateKey, parse_private_key
from pneumofed.server.release.gate import Evidence, decide_release, first_release
from pneumofed.server.release.release import Sets, publish, read_verdicts, summary_lines, write_release_page
from tests.model_bundles import signing_key
from tests.server.release.models import NOW, comparison, network, seal_network

MARGINS = Margins(auroc=0.02, point=0.05), Margins(auroc=0.05, point=0.1)
GOOD = {"test": comparison(seed=1), "external": comparison(seed=2)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("models")
    return seal_network(folder / "old", network(0)), seal_network(folder / "new", network(1))


def gate(models: tuple[Bundle, Bundle], evidence: Evidence) -> ReleaseRecord:
    return decide_release(models, evidence, MARGINS, lambda: NOW)


def test_a_model_that_is_not_worse_anywhere_is_released(models: tuple[Bundle, Bundle]) -> None:
    sites = {"north": comparison(seed=3), "south": comparison(seed=4)}
    record = gate(models, Evidence(GOOD, sites, ["north", "south"], 2))
    assert (record.decision, record.reasons) == ("released", ())
    assert {place.name for place in record.places if place.passed} == {"test", "external", "north", "south"}
    assert (record.places[0].checks[0].margin, record.places[2].checks[0].margin) == (0.02, 0.05)


@pytest.mark.parametrize("where", ["test", "external", "north"])
def test_one_set_on_which_it_is_worse_refuses_and_is_named(models: tuple[Bundle, Bundle], where: str) -> None:
    bad = comparison(worse=3.2)
    central = {name: bad if name == where else good for name, good in GOOD.items()}
    record = gate(models, Evidence(central, {"north": bad if where == "north" else comparison(seed=5)}, ["north"], 1))
    assert record.decision == "refused"
    assert all(reason.startswith(f"{where}:") for reason in record.reasons)
    assert any("lower on these cases, the margin is" in reason for reason in record.reasons)


def test_too_few_cases_refuse_with_the_number_that_would_do(models: tuple[Bundle, Bundle]) -> None:
    record = gate(models, Evidence(GOOD, {"small": comparison(each=12)}, ["small"], 1))
    assert record.decision == "refused"
    assert any("not enough data to tell" in reason and "would be needed" in reason for reason in record.reasons)
    needed = [check.needed for check in record.places[-1].checks if check.verdict is NonInferiority.TOO_FEW]
    assert needed and all(number is not None and min(number) > 12 for number in needed)


def test_a_site_without_a_verdict_and_a_set_that_is_missing_refuse(models: tuple[Bundle, Bundle]) -> None:
    record = gate(models, Evidence({"test": GOOD["test"]}, {}, ["north"], 3))
    assert record.reasons == (
        "external set: not compared",
        "north: no verdict",
        "2 of 3 sites that trained the model: no verdict",
    )


def test_a_released_bundle_carries_a_mark_that_a_reading_room_can_require(models: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    new, trusted = models[1], [signing_key().public_key()]
    record, audit = gate(models, Evidence(GOOD, {})), AuditLog(tmp_path / "audit.jsonl")
    publish(record, new.folder, signing_key(), [tmp_path], audit)
    assert require_release(new, mark_of(new.folder), trusted) == record == read_record(tmp_path / "release.json", trusted)
    assert read_entries(audit.path)[0].facts["decision"] == "released"
    with pytest.raises(ReleaseError, match="another model"):
        require_release(models[0], mark_of(new.folder), trusted)
    with pytest.raises(ReleaseError, match="does not trust"):
        require_release(new, mark_of(new.folder), [stranger().public_key()])
    publish(gate(models, Evidence({}, {})), new.folder, signing_key(), [tmp_path])
    with pytest.raises(ReleaseError, match="cannot be read"):
        require_release(new, mark_of(new.folder), trusted)
    with pytest.raises(ReleaseError, match="not released"):
        require_release(new, tmp_path / "release.json", trusted)


def test_a_changed_record_is_refused(models: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    publish(gate(models, Evidence({}, {})), models[1].folder, signing_key(), [tmp_path])
    envelope = json.loads((tmp_path / "release.json").read_text())
    envelope["content"]["decision"] = "released"
    (tmp_path / "release.json").write_text(json.dumps(envelope))
    with pytest.raises(ReleaseError, match="changed after it was signed"):
        read_record(tmp_path / "release.json", None)


def test_the_first_model_is_released_and_says_that_it_was_compared_with_nothing(models: tuple[Bundle, Bundle]) -> None:
    record = first_release(models[1], GOOD, MARGINS, NOW)
    assert record.released and record.old is None
    assert "a first model" in write_release_page(record)


def test_the_page_says_decision_reasons_and_every_number(models: tuple[Bundle, Bundle]) -> None:
    record = gate(models, Evidence(GOOD, {"small": comparison(each=12)}, ["small"], 1))
    page = write_release_page(record)
    assert page.startswith("# Not released: new")
    assert all(reason in page for reason in record.reasons)
    assert page.count("| small |") == 3
    assert models[1].digest in page
    assert "refused" in summary_lines(record)[0]


def verdict(models: tuple[Bundle, Bundle], site: str = "north", told: ModelComparison | None = None) -> SiteVerdict:
    return SiteVerdict(site=site, time=NOW, old=models[0].digest, new=models[1].digest, comparison=told or comparison(each=20))


def stranger() -> PrivateKey:
    return parse_private_key(NodeKey.generate("stranger").private, "test")


def test_sites_verdicts_are_taken_with_their_own_signature_alone(models: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    north, keys = stranger(), {}
    keys = {"north": north.public_key(), "south": stranger().public_key()}
    write_signed(tmp_path / "v" / "north.json", verdict(models), north)
    assert read_verdicts([tmp_path / "v"], keys, models) == {"north": verdict(models).comparison}
    write_signed(tmp_path / "forged.json", verdict(models, "south"), north)
    with pytest.raises(ReleaseError, match="does not trust"):
        read_verdict(tmp_path / "forged.json", keys)
    with pytest.raises(ReleaseError, match="compared other models"):
        read_verdicts([tmp_path / "v"], keys, (models[1], models[0]))
    with pytest.raises(ReleaseError, match="another verdict of north"):
        read_verdicts([tmp_path / "v", tmp_path / "v" / "north.json"], keys, models)
    with pytest.raises(ReleaseError, match="no key of north"):
        read_verdicts([tmp_path / "v"], {}, models)


def test_impossible_numbers_are_refused() -> None:
    told = comparison(each=20).model_dump()
    for change in ({"sensitivity": {**told["sensitivity"], "gained": 999}}, {"auroc": {**told["auroc"], "covariance": 5.0}}):
        with pytest.raises(ValidationError):
            ModelComparison.model_validate({**told, **change})


def by_class(sharp: tuple[float, float, float], seed: int = 0, each: int = 300) -> ClassesComparison:
    """A good old model of three classes and a new one whose score of class k lies `sharp[k]` above the others' where it is true."""
    rng, labels = np.random.default_rng(seed), np.repeat([0, 1, 2], each)
    shared, names = rng.normal(size=(3 * each, 3)), tuple(map(str, range(3 * each)))
    tables = []
    for peaks in ((5.0, 5.0, 5.0), sharp):
        logits = np.array(peaks)[labels, None] * np.eye(3)[labels] + shared + 0.1 * rng.normal(size=shared.shape)
        tables.append(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))
    old, new = (Predictions(table, labels, names, names) for table in tables)
    return compare_classes(old, new, (0.5, 0.5), (tables[0], tables[1]), ("normal", "pneumonia", "tuberculosis"))


def test_a_model_of_own_classes_is_released_where_the_mean_holds_and_each_class_reaches_the_floor(
    models: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    record = gate(models, Evidence({"test": by_class((5, 5, 5)), "external": by_class((5, 5, 5), 1)}, {}))
    assert (record.decision, record.reasons) == ("released", ())
    assert [check.metric for check in record.places[0].checks] == ["auroc", "sensitivity", "specificity", "auroc_macro"]
    page = write_release_page(record)
    assert "| test | tuberculosis | 300 / 600 |" in page and "mean AUROC over classes" in page
    again = ReleaseRecord.model_validate_json(record.model_dump_json())
    assert again == record and isinstance(again.places[0].comparison, ClassesComparison)
    assert "classes" not in gate(models, Evidence(GOOD, {})).places[0].comparison.model_dump()


def test_a_class_that_a_model_has_unlearnt_refuses_though_any_finding_is_found_as_well_as_before(
    models: tuple[Bundle, Bundle],
) -> None:
    unlearnt = swapped()
    assert {
        check.metric: check.verdict
        for check in gate(models, Evidence({"test": unlearnt, "external": GOOD["external"]}, {})).places[0].checks
    } == {
        "auroc": NonInferiority.NOT_WORSE,
        "sensitivity": NonInferiority.NOT_WORSE,
        "specificity": NonInferiority.NOT_WORSE,
        "auroc_macro": NonInferiority.WORSE,
    }
    reasons = gate(models, Evidence({"test": unlearnt, "external": GOOD["external"]}, {})).reasons
    assert any(reason.startswith("test: mean AUROC over classes was") for reason in reasons)
    assert any("AUROC of tuberculosis against the rest" in reason and "the floor is 0.7" in reason for reason in reasons)
    first = first_release(models[1], {"test": unlearnt}, MARGINS, NOW)
    assert not first.released and first_release(models[1], {"test": by_class((5, 5, 5))}, MARGINS, NOW).released


def swapped() -> ClassesComparison:
    """A new model that tells normal from any finding as the old one does, and takes one finding for the other."""
    labels = np.repeat([0, 1, 2], 300)
    rng, names = np.random.default_rng(0), tuple(map(str, range(900)))
    logits = 5.0 * np.eye(3)[labels] + rng.normal(size=(900, 3))
    old = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    new = old[:, [0, 2, 1]]
    both = [Predictions(table, labels, names, names) for table in (old, new)]
    return compare_classes(both[0], both[1], (0.5, 0.5), (old, new), ("normal", "pneumonia", "tuberculosis"))


def test_a_set_without_a_class_and_a_site_that_tells_of_classes_are_refused(models: tuple[Bundle, Bundle]) -> None:
    one = by_class((5, 5, 5))
    none = one.model_copy(
        update={"macro": Areas(), "classes": {**one.classes, "tuberculosis": ClassAreas(area=Areas(), patients=(0, 900))}}
    )
    reasons = gate(models, Evidence({"test": none, "external": GOOD["external"]}, {})).reasons
    assert any("of tuberculosis it has 0 patients" in reason for reason in reasons)
    verdict = {"site": "north", "time": NOW, "old": "0" * 64, "new": "1" * 64, "comparison": one.model_dump()}
    with pytest.raises(ValidationError):
        SiteVerdict.model_validate(verdict)


ADULTS, FAR = {"adults": "a.csv"}, {"adults": "a.csv", "far": "f.csv"}
OWN = ["test", "adults"]


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, ("test", "external")),
        ({"external_manifest": "e.csv"}, ("test", "external")),
        ({"held_out": ADULTS}, ("test", "adults", "external")),
        ({"held_out": ADULTS, "reference_sets": OWN}, ("test", "adults", "external")),
        ({"held_out": FAR, "reference_sets": OWN}, ("test", "adults", "far")),
    ],
)
def test_all_sets_and_one_of_other_hospitals_must_be_compared(
    tmp_path: Path, settings: dict[str, Any], needed: tuple[str, ...]
) -> None:
    """A set whose name says nothing is of other hospitals only where the coordinator says which ones are not."""
    (tmp_path / "coordinator.yaml").write_text(json.dumps({"run_dir": ".", "test_manifest": "t.csv", **settings}))
    assert Sets.of_run(tmp_path).needed == needed
