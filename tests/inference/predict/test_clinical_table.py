"""Clinical values at prediction: found for their image, by the rules of a site's manifest."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pneumofed.common.errors import DataError
from pneumofed.inference.predict.clinical_table import ClinicalTable, read_clinical_table, values_of
from tests.common.data.test_clinical import SCHEMA


def test_a_table_beside_images_is_found_by_path_and_by_name(tmp_path: Path) -> None:
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["File", "CRP", "sex"], ["a/1.png", 5, "female"], ["b/1.png", 6, ""], ["2.png", 7, "m"]])
    table = ClinicalTable.read(tmp_path / "table.csv", SCHEMA)
    found = [table.find(path) for path in (tmp_path / "b" / "1.png", Path("/elsewhere/2.png"), Path("/elsewhere/1.png"))]
    assert [None if one is None else one[1] for one in found] == [6.0, 7.0, None]
    assert found[1] is not None and found[1][-1] == 1.0
    assert (
        table.describe_use()
        == "2 of 3 images have a row in the table of clinical values (3 rows); the other 1 were judged by the image only"
    )


def test_what_a_dicom_file_states_fills_in_where_the_table_does_not(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("file,crp,sex\n1.dcm,5,F\n2.dcm,6,\n")
    table = ClinicalTable.read(tmp_path / "table.csv", SCHEMA)
    header = SimpleNamespace(age_years=63.0, sex="M", view="PA")
    first, second, third = (table.find(tmp_path / f"{number}.dcm", header) for number in (1, 2, 3))
    assert first is not None and second is not None and third is not None
    assert first[-3:].tolist() == [63.0, 1.0, 0.0] and second[-3:].tolist() == [63.0, 0.0, 1.0]
    assert third[-3:].tolist() == [63.0, 0.0, 1.0] and np.isnan(third[1])
    unfit = SimpleNamespace(age_years=999.0, sex="O", view="")
    assert table.find(tmp_path / "3.dcm", unfit) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,crp\n1,5\n", "no column 'file'"),
        ("file,bilirubin\na.png,5\n", "none of the model's clinical columns is there; it takes temperature, crp"),
        ("file,crp\na.png,5\na.png,6\n", "row 3: its file stands in an earlier row too"),
    ],
)
def test_a_table_that_cannot_serve_says_why(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(DataError, match=words.replace("(", r"\(")):
        read_clinical_table(tmp_path / "table.csv", SCHEMA)


def test_values_by_name_are_as_those_of_a_table() -> None:
    given = {"temperature": 38.5, "crp": None, "symptoms": ["cough"], "smoker": False, "sex": "M"}
    np.testing.assert_allclose(values_of(given, SCHEMA), [38.5, math.nan, 0, 1, 0, 0, math.nan, 0, 1], rtol=1e-6)
    with pytest.raises(DataError, match="'bilirubin' is no column of this model"):
        values_of({"bilirubin": 3}, SCHEMA)
    with pytest.raises(DataError, match="is it Fahrenheit"):
        values_of({"temperature": 98.6}, SCHEMA)
