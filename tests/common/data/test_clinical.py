"""Clinical values of tables: what fits comes in, in the schema's unit; what does not gets one sentence that names no value."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pneumofed.common.config.experiment import ClinicalConfig, ExperimentConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.data.clinical import with_clinical
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.data.manifest import DataReport, ImageRecord, Manifest, read_manifest, write_manifest
from pneumofed.common.data.sources.table import read_csv
from pneumofed.common.errors import ConfigError, DataError

SCHEMA = build_config(
    ClinicalConfig,
    {
        "columns": [
            {"name": "temperature", "unit": "°C", "low": 34, "high": 43},
            {"name": "crp", "unit": "mg/L", "low": 0, "high": 600},
            {"name": "symptoms", "kind": "codes", "codes": ["fever", "cough", "chills"]},
            {"name": "smoker", "kind": "binary"},
            {"name": "age", "unit": "years", "low": 0, "high": 120},
            {"name": "sex", "kind": "codes", "codes": ["F", "M"]},
        ]
    },
)
SECRET = "98.61"
"""Stands in cells that do not fit; no error may say it."""


def dataset(*rows: dict[str, str], **known: Any) -> Dataset:
    records = tuple(
        ImageRecord(Path(f"{number}.png"), f"p{number}", "normal", others=tuple(row.items()), row=number + 2, **known)
        for number, row in enumerate(rows)
    )
    names = tuple(record.patient for record in records)
    return Dataset(np.zeros((len(rows), 4, 4), np.uint8), np.zeros(len(rows), np.int64), names, names, DataReport(), records)


def values(*rows: dict[str, str], names: dict[str, str | None] | None = None, **known: Any) -> np.ndarray:
    found = with_clinical(dataset(*rows, **known), SCHEMA, names).clinical
    assert found is not None
    return found


def test_each_kind_is_read_and_what_is_not_known_is_nan() -> None:
    first, second = values(
        {"temperature": "38,5", "crp [mg/L]".lower(): "120", "symptoms": "Chills; fever", "smoker": "yes"},
        {"temperature": "n/a", "smoker": "0"},
        sex="F",
        age_years=63.0,
    )
    np.testing.assert_allclose(first, [38.5, 120, 1, 0, 1, 1, 63, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(second, [math.nan] * 5 + [0, 63, 1, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("header", "given", "read"), [("temperature [°f]", "98.6", 37.0), ("temperature (K)".lower(), "310.15", 37.0)]
)
def test_another_unit_in_the_header_is_converted(header: str, given: str, read: float) -> None:
    assert values({header: given})[0, 0] == pytest.approx(read, abs=1e-4)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"temperature": SECRET}, "row 2: 'temperature' lies outside 34 to 43 °C; is it Fahrenheit?"),
        ({"crp": "-98.61"}, "outside 0 to 600 mg/L"),
        ({"temperature": f"about {SECRET}"}, "row 2: 'temperature' is a number, and the cell holds text"),
        ({"crp": f"<{SECRET}"}, "holds text"),
        ({"smoker": SECRET}, "'smoker' is yes or no"),
        ({"symptoms": f"cough;{SECRET}"}, "a code that the run does not list; it takes fever, cough, chills"),
        ({"crp [mmol/l]": SECRET}, "column 'crp' is in mmol/l, the run takes mg/L"),
        ({"temprature": SECRET}, "there is no column 'temperature'; is it 'temprature'?"),
        ({"temp": SECRET}, "is it 'temp'?"),
        ({"crp": "3", "crp [mg/l]": SECRET, "symptoms (list)": "", "symptoms": ""}, ""),
    ],
)
def test_what_does_not_fit_is_one_sentence_without_the_value(row: dict[str, str], words: str) -> None:
    if not words:  # an exact name wins over one with a unit
        assert values(row)[0, 1] == 3.0
        return
    with pytest.raises(DataError) as error:
        values(row)
    assert words in str(error.value) and SECRET not in str(error.value) and "\n" not in str(error.value)


def test_a_site_may_spell_otherwise_or_have_no_such_column() -> None:
    assert values({"t_axillary": "37"}, names={"temperature": "T_axillary"})[0, 0] == 37.0
    assert np.isnan(values({"temp": "37"}, names={"temperature": None})[0, 0])
    with pytest.raises(DataError, match=r"'fever_chart', which is to be 'temperature', is no column"):
        values({"temp": "37"}, names={"temperature": "fever_chart"})


def test_a_manifest_keeps_its_other_columns(tmp_path: Path) -> None:
    rows = ({"temperature [°c]": "38.5", "ward": "=2+3"}, {"crp": "7"})
    records = tuple(replace(record, path=tmp_path / record.path) for record in dataset(*rows).records)
    write_manifest(Manifest(records), tmp_path / "manifest.csv")
    again = read_manifest(tmp_path / "manifest.csv")
    assert again.records == records and [record.row for record in again.records] == [2, 3]
    write_manifest(Manifest(tuple(replace(record, others=()) for record in records)), tmp_path / "plain.csv")
    assert (tmp_path / "plain.csv").read_text().splitlines()[0] == "path,patient,label,view,sex,age,manufacturer"


def test_only_named_columns_of_a_hospitals_table_come_into_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,patient,label,Name,Temperature [°C]\na.png,1,normal,DOE,38.5\n")
    assert read_csv(tmp_path / "t.csv")[0].records[0].others == ()
    assert read_csv(tmp_path / "t.csv", keep=["temperature"])[0].records[0].others == (("temperature [°c]", "38.5"),)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"name": "t"}, "needs its range"),
        ({"name": "t", "low": 5, "high": 5}, "low below high"),
        ({"name": "t", "kind": "binary", "unit": "°C"}, "is no number"),
        ({"name": "t", "kind": "codes"}, "codes are listed"),
        ({"name": "t", "kind": "codes", "codes": ["A", "a"]}, "a code twice"),
        ({"name": "t", "low": 0, "high": 1, "mean": 0.5}, "stated together"),
        ({"name": "free text", "kind": "binary"}, "should match pattern"),
    ],
)
def test_a_schema_that_means_nothing_is_refused(column: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_config(ExperimentConfig, {"clinical": {"columns": [column]}})


def test_a_configuration_without_clinical_values_is_written_as_before() -> None:
    plain, fused = (build_config(ExperimentConfig, one) for one in ({}, {"clinical": SCHEMA.model_dump()}))
    assert "clinical" not in plain.model_dump_json() and "clinical" not in plain.model_dump()["model"]
    assert ExperimentConfig.model_validate_json(fused.model_dump_json()) == fused
    changed = build_config(ExperimentConfig, {**fused.model_dump(), "clinical": {"fusion": "film"}})
    assert changed.clinical == SCHEMA.model_copy(update={"fusion": "film"})
