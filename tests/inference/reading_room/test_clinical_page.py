"""Clinical values on the page, in a real Chromium: a table beside the images, a form, what does not fit, and what the answer rests on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.inference.reading_room.browser import CHROMIUM, Desk, phantom_file, served
from tests.inference.reading_room.stage import Stage
from tests.inference.reading_room.test_clinical_values import clinical_bundle

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

TABLE = "file;temperature [°F];name;symptoms\nfolder/doe jane.dcm;101,3;DOE^JANE;fever\nother.dcm;;ROE;\n".encode()


@pytest.fixture
def desk(tmp_path: Path, chromium: Browser) -> Iterator[Desk]:
    stage = Stage(tmp_path, model=clinical_bundle())
    with served(stage) as address:
        made = Desk(chromium, address, viewport={"width": 1440, "height": 1500})
        yield made
        made.context.close()
    stage.room.close()


def values_of(desk: Desk) -> dict[str, str]:
    return {name: desk.page.input_value(f"#clinical-{name}") for name in ("temperature", "age", "smoker")}


def test_a_reader_changes_values_and_sees_both_answers_and_what_they_rest_on(desk: Desk, tmp_path: Path) -> None:
    page = desk.page
    desk.sign_in()
    desk.add(("doe jane.dcm", phantom_file(0)), ("other.dcm", phantom_file(1)), ("values.csv", TABLE))
    assert "Clinical values for 2 images: temperature [°f], symptoms" in page.inner_text("#upload-rows")
    assert not any(
        "name" in (answer.request.post_data_buffer or b"").decode("latin-1").split("clinical")[-1]
        for answer in desk.answers
        if answer.url.endswith("/api/cases")
    )
    page.wait_for_selector("#rows tr >> nth=1")
    page.click("#rows tr:has-text('P-1040') a.open")
    desk.wait_for_image()
    assert values_of(desk) == {"temperature": "38.5", "age": "61", "smoker": "null"}
    assert desk.text("#clinical-temperature-source") == "from the table · 34 to 43"
    assert desk.text("#clinical-age-source") == "from the image file · 0 to 120"
    assert page.is_checked("[data-column=symptoms] label:has-text('fever') input")
    before = desk.text("#clinical-answer")
    page.fill("#clinical-temperature", "98.6")
    page.click("#clinical-judge")
    page.wait_for_selector("#clinical-problem:not(:empty)")
    assert desk.text("#clinical-problem") == "Temperature lies outside 34 to 43 °C. Check the unit."
    assert desk.text("#clinical-answer") == before
    page.fill("#clinical-temperature", "41,2")
    page.select_option("#clinical-smoker", "true")
    page.check("[data-column=symptoms] label:has-text('none of these') input")
    page.click("#clinical-judge")
    page.wait_for_selector("#clinical-smoker-source:has-text('given by reader')")
    assert values_of(desk) == {"temperature": "41.2", "age": "61", "smoker": "true"}
    assert desk.text("#clinical-answer") != before
    page.wait_for_selector("#evidence-rows li >> nth=4")
    assert "Temperature 41.2 °C" in desk.text("#evidence-rows")
    assert "Symptoms: none of these" in desk.text("#evidence-rows")
    page.screenshot(path=str(tmp_path / "clinical-en.png"))
    page.click("#language")
    page.wait_for_selector("#evidence-rows:has-text('体温')")
    assert "仅凭图像" in desk.text("#clinical-answer")
    page.screenshot(path=str(tmp_path / "clinical-zh.png"))
    assert [one for one in desk.complaints if "422" not in one] == []
