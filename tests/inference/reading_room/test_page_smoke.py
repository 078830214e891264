"""One quick look at the page in a real Chromium; `test_page.py` goes the whole way."""

from __future__ import annotations

import pytest

from tests.inference.reading_room.browser import CHROMIUM, Desk, launched, served
from tests.inference.reading_room.stage import Stage


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_after_the_login_the_worklist_is_there_and_the_browser_complains_of_nothing(stage: Stage) -> None:
    with launched() as browser, served(stage) as address:
        desk = Desk(browser, address)
        desk.sign_in()
        desk.page.wait_for_selector("#list-empty:not([hidden])")
        assert desk.text("#hospital") == "North"
        assert desk.page.is_visible("#phantom"), "a model of phantoms says so"
        assert desk.complaints == []
