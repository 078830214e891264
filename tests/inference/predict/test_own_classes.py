"""What a bundle of own classes says of an image: a finding and its class, in tables, JSON, DICOM objects and Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pneumofed
from pneumofed.common.errors import ConfigError
from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.model_bundle.suitability import Prediction
from pneumofed.inference.explain.methods import choose_target
from pneumofed.inference.predict.dicom_contents import words
from pneumofed.inference.predict.dicom_objects import make_report, read_source_header
from pneumofed.inference.predict.predict import PredictionSummary, csv_row, find_files, json_row, judge_files
from tests.inference.predict.pictures import write_phantom
from tests.model_bundles import make_bundle

CLASSES = ("normal", "tuberculosis")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    folder = make_bundle(tmp_path_factory.mktemp("own") / "bundle", classes=CLASSES)
    return Predictor(load_bundle(folder, None), threads=1)


def test_a_finding_is_called_so_and_never_pneumonia(own: Predictor, tmp_path: Path) -> None:
    for number in range(6):
        write_phantom(tmp_path / f"{number}.dcm", number)
    summary = PredictionSummary.of(CLASSES)
    for result in judge_files(find_files([tmp_path]), own):
        summary.add(result)
        row = json_row(result, own.manifest.threshold.value)
        assert row["finding"] == ("finding" if row["probability"] >= row["threshold"] else "normal")
        assert row["classes"]["tuberculosis"] == pytest.approx(row["probability"], abs=1e-6)
        assert "pneumonia" not in json.dumps(row)
    assert summary.findings.keys() == {"finding", "normal"}
    assert sum(summary.findings.values()) == 6
    assert summary.findings["finding"]


def test_the_likeliest_class_is_one_that_the_decision_speaks_of() -> None:
    classes = {"normal": 0.5, "pneumonia": 0.2, "tuberculosis": 0.3}
    assert [Prediction(said, 0.5, 0.4, 0.6, classes, 0.0, None).likeliest for said in ("finding", "normal")] == [
        *("tuberculosis", "normal")
    ]


def test_tables_name_the_likeliest_of_more_than_two_classes(own: Predictor, tmp_path: Path) -> None:
    write_phantom(tmp_path / "a.dcm", 0)
    (result,) = judge_files(find_files([tmp_path]), own)
    assert result.prediction
    assert "likeliest" not in csv_row(result, 0.5)
    object.__setattr__(result.prediction, "classes", {"normal": 0.1, "pneumonia": 0.2, "tuberculosis": 0.7})
    object.__setattr__(result.prediction, "decision", "finding")
    row = csv_row(result, 0.5)
    assert (row["likeliest"], row["probability_tuberculosis"]) == ("tuberculosis", "0.700000")


def test_objects_for_the_archive_hold_each_class_and_no_code_of_pneumonia(own: Predictor, tmp_path: Path) -> None:
    read = own.read(write_phantom(tmp_path / "a.dcm", 0))
    (judgement,) = own.judge([read.image])
    assert judgement.prediction
    report = str(make_report([read_source_header(tmp_path / "a.dcm")], judgement, own))
    assert "118247008" in report
    assert "Probability of the class tuberculosis" in report
    assert "233604007" not in report
    assert any(line.startswith("tuberculosis ") for line in words(judgement.prediction, own, judgement.population))


def test_python_gives_the_class_too(own: Predictor, tmp_path: Path) -> None:
    answer = pneumofed.open_bundle(own.bundle.folder).predict(write_phantom(tmp_path / "a.dcm", 0))
    assert (answer.finding, answer.likeliest) in (("finding", "tuberculosis"), ("normal", "normal"))
    assert set(answer.classes) == set(CLASSES)


def test_a_class_called_pneumonia_is_explained_by_itself_and_no_other() -> None:
    classes = ("normal", "pneumonia", "tuberculosis")
    assert [choose_target(name, classes, "--target") for name in (None, "finding", "pneumonia", "tuberculosis")] == [
        *("pneumonia", "pneumonia", 1, 2)
    ]
    assert [choose_target(name, ("normal", "pneumonia"), "--target") for name in (None, "pneumonia", "normal")] == [
        *("pneumonia", "pneumonia", 0)
    ]
    with pytest.raises(ConfigError, match="expected finding or one of normal, pneumonia, tuberculosis, got 'tb'"):
        choose_target("tb", classes, "--target")
