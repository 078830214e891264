"""The table of those for whom a model was judged is that of scikit-learn, and what nobody stated stays unknown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import recall_score, roc_auc_score

from pneumofed.common.data.manifest import ImageRecord
from pneumofed.common.errors import ConfigError
from pneumofed.common.imaging.patient_groups import AgeGroup, age_group_of
from pneumofed.server.export.measures import measure_population, read_stated_ages
from pneumofed.server.export.source import Source, read_finished_run
from tests.server.export.finished_run import write_finished_run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return read_finished_run(write_finished_run(tmp_path_factory.mktemp("study") / "run", patients=120).path)


def records(source: Source) -> dict[str, ImageRecord]:
    """Two images of each patient; ages 1 to 79, none for every tenth image; both sexes and views."""
    images = source.run.predictions["test"].images
    return {
        image: ImageRecord(
            Path("x"), f"p{number}", "normal", view=("PA", "AP")[number % 2], sex=("F", "M")[number % 3 % 2],
            age_years=None if number % 10 == 0 else float(1 + number % 79),
        )
        for number, image in enumerate(images)
    }  # fmt: skip


def test_each_number_of_each_group_is_scikit_learns(source: Source) -> None:
    known, predictions = records(source), source.run.predictions["test"]
    found = measure_population(source, {"test": known}, {})
    said = predictions.scores >= source.threshold
    assert {one.kind for one in found.groups} == {"age", "sex", "view"}
    for one in found.groups:
        (name,) = one.groups
        value = {"age": lambda row: age_group_of(row.age_years), "sex": lambda row: row.sex, "view": lambda row: row.view}[
            one.kind
        ]
        rows = np.flatnonzero([value(known[image]) == name for image in predictions.images])
        truth, patients = predictions.labels[rows] != 0, np.array(predictions.patients)[rows]
        assert (one.images, one.images_with_pneumonia, one.patients) == (len(rows), truth.sum(), len(set(patients)))
        assert (one.patients_with_pneumonia, one.patients_without) == (len(set(patients[truth])), len(set(patients[~truth])))
        if truth.any() and not truth.all():
            assert one.metrics["auroc"].value == pytest.approx(roc_auc_score(truth, predictions.scores[rows]))
            assert one.metrics["sensitivity"].value == pytest.approx(recall_score(truth, said[rows]))
            assert one.metrics["specificity"].value == pytest.approx(recall_score(~truth, ~said[rows]))
    assert found.unknown_age == 12
    assert sum(one.images for one in found.groups if one.kind == "age") == 108


def test_stated_ages_are_of_the_images_without_one(source: Source) -> None:
    found = measure_population(source, {"test": records(source)}, {"test": (AgeGroup.INFANT, AgeGroup.CHILD)})
    (stated,) = [one for one in found.groups if one.stated]
    assert (stated.images, stated.groups, found.unknown_age) == (12, ("infant", "child"), 0)


def test_without_a_manifest_nothing_is_known(source: Source) -> None:
    found = measure_population(source, {}, {})
    assert (found.groups, found.unknown_age) == ((), 120)


def test_hospitals_are_shares_without_names(source: Source) -> None:
    mix = measure_population(source, {}, {}).mix
    assert (mix.sites, mix.shares) == (2, (0.5, 0.5))


def test_a_patients_age_and_name_are_not_in_the_section(source: Source) -> None:
    written = measure_population(source, {"test": records(source)}, {}).model_dump_json()
    assert "age_years" not in written
    assert not any(patient in written for patient in source.run.predictions["test"].patients)


@pytest.mark.parametrize("text", ["test", "=child", "test=", "test=kid", "test=child,"])
def test_stated_ages_that_say_nothing_known_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected SET=GROUP"):
        read_stated_ages([text])


def test_stated_ages_are_read_once_a_set_and_need_images_without_an_age(source: Source) -> None:
    assert read_stated_ages(["test=child, infant"]) == {"test": (AgeGroup.INFANT, AgeGroup.CHILD)}
    with pytest.raises(ConfigError, match="once"):
        read_stated_ages(["test=child", "test=adult"])
    with pytest.raises(ConfigError, match="not judged on such a set"):
        measure_population(source, {}, {"elsewhere": (AgeGroup.CHILD,)})
    all_known = {image: ImageRecord(Path("x"), "p", "normal", age_years=30.0) for image in source.run.predictions["test"].images}
    with pytest.raises(ConfigError, match="states the age of every image"):
        measure_population(source, {"test": all_known}, {"test": (AgeGroup.CHILD,)})
