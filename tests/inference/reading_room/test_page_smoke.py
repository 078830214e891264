"""One quick look at the page in a real Chromium; `test_page.py` goes the whole way."""

from __future__ import annotations

from pathlib import Path

import pytest

from pneumofed.common.model_bundle.bundle import load_bundle
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.inference.reading_room.file_judge import FileJudge
from tests.inference.reading_room.browser import CHROMIUM, Desk, launched, served
from tests.inference.reading_room.stage import Stage, phantom_dicom
from tests.model_bundles import judged_on, make_bundle


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_after_the_login_the_worklist_is_there_and_the_browser_complains_of_nothing(stage: Stage) -> None:
    with launched() as browser, served(stage) as address:
        desk = Desk(browser, address)
        desk.sign_in()
        desk.page.wait_for_selector("#list-empty:not([hidden])")
        assert desk.text("#hospital") == "North"
        assert desk.page.is_visible("#phantom"), "a model of phantoms says so"
        assert desk.complaints == []


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_child_under_an_adults_model_is_marked_in_the_list_and_beside_the_judgement(tmp_path: Path) -> None:
    bundle = load_bundle(make_bundle(tmp_path / "bundle", population=judged_on(age="adult")), None)
    stage = Stage(tmp_path, FileJudge(Predictor(bundle, threads=1)))
    with launched() as browser, served(stage) as address:
        desk = Desk(browser, address)
        desk.sign_in()
        desk.add(("a.dcm", phantom_dicom(PatientAge="005Y", ViewPosition="PA")))
        desk.page.wait_for_selector("#rows tr")
        assert "not judged for this population" in desk.text("#rows tr:first-child .chance")
        desk.open_first()
        assert desk.text("#finding .population") == (
            "Not judged for this population: children of 2 to 11 years. The model was judged on: adults of 18 to 64 years."
        )
        assert desk.complaints == []
    stage.room.close()
