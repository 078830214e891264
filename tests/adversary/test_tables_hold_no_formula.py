"""Promise: a table can be opened in a spreadsheet, and gives back what was written. Attack: names that are formulas or hold controls."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.data.manifest import ImageRecord, Manifest, read_manifest, write_manifest
from pneumofed.common.data.tables import TableWriter, neutralize_cell, plain_text, read_table, restore_cell
from pneumofed.common.evaluation.predictions import Predictions

CELLS = st.text() | st.text("=+-@'\\;,|\"\t\r\n x1\u202e\x00\x1b\x85\uff1d\u3000", max_size=12)
FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")
PAYLOADS = (
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    " =1",
    "a;=1+1",
    "\x1b]0;owned\x07",
    "'=1",
    "'\\x41",
    "\uff1d1",
)


@given(st.lists(st.lists(CELLS, min_size=2, max_size=4), max_size=4))
@settings(max_examples=200, deadline=None)
def test_a_table_gives_back_every_cell_and_none_of_them_is_a_formula(rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    TableWriter(text).write_all(rows)
    assert not re.search("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text.getvalue())
    text.seek(0)
    assert list(read_table(text)) == rows
    for cell in [neutralize_cell(cell) for row in rows for cell in row]:
        parts = re.split("[;,|\t]", cell)  # whichever separator a spreadsheet takes
        assert not any(FORMULA.match(part) and not re.fullmatch(r"[-+][\d.eE+-]+", part) for part in parts), cell


@pytest.mark.parametrize("number", [-0.5, 1e-300, -3, 0, 12.25])
def test_numbers_stay_numbers(number: float) -> None:
    text = io.StringIO(newline="")
    TableWriter(text).write([number, str(number)])
    assert [float(cell) for cell in text.getvalue().strip().split(",")] == [number, number]


@pytest.mark.parametrize("cell", ["'t Hooft", "'", "O'Neil", r"C:\images\x41.png", "63", "", "Ångström", "a, b", "a-b"])
def test_ordinary_text_is_written_and_read_as_it_stands(cell: str) -> None:
    assert neutralize_cell(cell) == cell == restore_cell(cell)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_manifest_and_a_table_of_predictions_give_payloads_back_as_text(payload: str, tmp_path: Path) -> None:
    patient = payload.strip()  # a manifest's patients have no blanks around them
    table = tmp_path / "manifest.csv"
    write_manifest(Manifest((ImageRecord(tmp_path / f"x{payload.replace('/', '')}", f"p{patient}", "normal"),)), table)
    (record,) = read_manifest(table).records
    assert (record.path.name, record.patient) == (f"x{payload.replace('/', '')}", plain_text(f"p{patient}"))
    said = Predictions(np.array([[0.25, 0.75]]), np.array([1]), (payload,), (payload,))
    said.write_csv(tmp_path / "said.csv")
    found = Predictions.read_csv(tmp_path / "said.csv")
    assert (found.patients, found.images) == ((payload,), (payload,))
    assert np.array_equal(found.probabilities, said.probabilities)
    first = (tmp_path / "said.csv").read_text(encoding="utf-8").splitlines()[1].lstrip('"')
    assert not FORMULA.match(first)


def test_no_module_writes_a_table_past_the_neutralizer() -> None:
    root = Path(__file__).resolve().parents[2]
    houses = ("common", "client", "server", "inference", "simulation", "benchmarks", "pneumofed/cli")
    found = [
        path
        for house in houses
        for path in (root / house).rglob("*.py")
        if re.search(r"csv\.(writer|DictWriter)|to_csv", path.read_text())
    ]
    assert [path.name for path in found] == ["tables.py"]
