"""What an export fits and measures for a run of more than two classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from pneumofed.common.config.experiment import ExperimentConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from pneumofed.common.model_bundle.calibration import Calibration
from pneumofed.server.export.measures import calibrate, measure_central
from pneumofed.server.export.source import Source
from tests.common.model_bundle.test_calibration import class_fit, drawn_classes

SURE = 3.0


def predictions(n: int, seed: int) -> Predictions:
    """Of a network of four classes that is too sure of itself."""
    truth, labels = drawn_classes(n, seed)
    tables = np.exp(SURE * truth) / np.exp(SURE * truth).sum(axis=1, keepdims=True)
    return Predictions(tables, labels.astype(np.int64), tuple(map(str, range(n))))


def source(validation: Predictions, test: Predictions | None = None) -> Source:
    config = build_config(ExperimentConfig, {"evaluation": {"bootstrap_samples": 20}})
    run = SimpleNamespace(predictions={} if test is None else {"test": test})
    found: Any = SimpleNamespace(
        validation=Statistics.of(validation, FEDERATED_GRID), design_effect=1.0, experiment=config, threshold=0.5, run=run
    )
    return cast("Source", found)


def test_the_counts_by_score_give_the_lines_that_the_images_would() -> None:
    truth, labels = drawn_classes(1500, seed=11)
    fit, exact = calibrate(source(predictions(1500, 11)), "temperature"), class_fit(SURE * truth, labels)
    assert [line.positives for line in fit.class_lines] == [line.positives for line in exact.class_lines]
    assert [line.slope for line in fit.class_lines] == pytest.approx([line.slope for line in exact.class_lines], rel=0.01)
    assert fit.slope == pytest.approx(exact.slope, rel=0.01)
    assert calibrate(source(predictions(300, 12)), "none").class_lines == ()


def test_the_card_s_numbers_have_each_class_s_calibration_error_which_falls() -> None:
    validation, test = predictions(1500, 13), predictions(1500, 14)
    fit = calibrate(source(validation), "temperature")
    errors = [measure_central(source(validation, test), given)[0].metrics for given in (Calibration(), fit)]
    for k in range(1, 4):
        before, after = (found[f"ece_class_{k}"].value or 0.0 for found in errors)
        assert after < 0.6 * before


def test_hospitals_with_more_images_a_patient_weigh_more_in_how_many_count_as_one() -> None:
    def effect(*counts: tuple[int | None, int | None]) -> float:
        reports = {str(number): SimpleNamespace(used=used, patients=patients) for number, (used, patients) in enumerate(counts)}
        found: Any = SimpleNamespace(run=SimpleNamespace(site_reports=lambda: reports))
        return cast("Any", Source.design_effect).fget(found)

    assert effect((70, 30), (35, 15)) == 70 / 30
    assert effect((100, 100), (100, 10)) == (100 * 1 + 100 * 10) / 200
    assert effect((None, None)) == 1.0
