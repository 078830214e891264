"""Promise: what cannot be judged gets no probability. Attack: an image that must not be judged, on every public way to an answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import pneumofed
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.inference.explain.files import RESULT_FILE, ExplanationRequest, explain_files
from pneumofed.inference.predict.predict import csv_row, json_row, judge_files
from tests.inference.reading_room.stage import Stage, bundle, upload


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A photograph in colour, which no model here may judge."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 0], pixels[..., 2] = np.arange(64, dtype=np.uint8)[:, None] * 4, 200
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def numbers_in(answer: Any) -> list[str]:
    """Keys anywhere in `answer` that hold a number and speak of a probability, an interval, a class or a score of the network."""
    if isinstance(answer, dict):
        own = [
            key
            for key, value in answer.items()
            if re.search("prob|low|high|class|score|area|empty", key) and isinstance(value, float)
        ]
        return own + [key for value in answer.values() for key in numbers_in(value)]
    return [key for value in answer for key in numbers_in(value)] if isinstance(answer, list) else []


def test_the_python_interface_gives_none_and_explains_nothing(picture: Path) -> None:
    opened = pneumofed.open_bundle(bundle().folder)
    found = opened.predict(picture)
    assert (found.finding, found.probability, found.low, found.high, found.classes) == (None, None, None, None, {})
    for check in (True, False):
        with pytest.raises(pneumofed.ArgumentError, match="cannot judge"):
            pneumofed.explain(opened, picture, check=check)


def test_explain_writes_no_picture_and_no_number(picture: Path, tmp_path: Path) -> None:
    said: list[str] = []
    explain_files([picture], bundle(), tmp_path / "out", ExplanationRequest(("grad-cam", "occlusion")), said.append)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RESULT_FILE]
    written = json.loads((tmp_path / "out" / RESULT_FILE).read_text())
    (entry,) = written["images"]
    assert (entry["probability"], entry["verdict"], entry["maps"]) == (None, "cannot judge", {})
    assert entry["reasons"] and numbers_in(written) == []
    assert "P =" not in " ".join(said)


def test_predict_writes_none(picture: Path) -> None:
    (found,) = judge_files([picture], Predictor(bundle(), threads=1))
    assert numbers_in(json_row(found, 0.5)) == []
    row = csv_row(found, 0.5)
    assert {row[name] for name in ("probability", "low", "high", "finding")} == {""}


def test_the_reading_room_shows_none(picture: Path, tmp_path: Path) -> None:
    with Stage(tmp_path / "stage").signed_in() as client:
        (made,) = upload(client, picture.read_bytes())
        case = client.get(f"/api/cases/{made['case']}").json() if "case" in made else made
    assert case["verdict"] == "cannot judge"
    del case["image"]["facts"]  # of the file: its grey values have a low and a high end
    assert numbers_in(case) == []


def test_a_network_that_gives_nan_judges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(bundle(), threads=1)
    run = predictor.run
    monkeypatch.setattr(
        predictor,
        "run",
        lambda inputs, *values: {**run(inputs, *values), "logits": np.full((len(inputs), 2), np.nan, np.float32)},
    )
    from tests.model_bundles import phantom_images

    (found,) = predictor.judge([phantom_images(12)[0][0]])
    assert found.prediction is None and found.reasons
