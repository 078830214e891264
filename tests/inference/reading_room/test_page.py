"""The room's page driven in a real Chromium: the whole way of a radiologist, and every state in which things are not well."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser
from sqlalchemy import update

from pneumofed.inference.explain.focus import Focus, Misplaced
from pneumofed.inference.reading_room import file_judge
from pneumofed.inference.reading_room.cases import Case
from pneumofed.inference.reading_room.viewing import MAP_FILE
from tests.inference.reading_room.browser import CHROMIUM, Desk, phantom_file, served
from tests.inference.reading_room.stage import ADMIN, READER, Stage

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

BAD = ("scan of DOE^JANE.dcm", b"this is a letter, not a radiograph")


def test_the_whole_way_of_a_radiologist(desk: Desk, stage: Stage) -> None:
    page = desk.page
    desk.sign_in()
    page.wait_for_selector("#list-empty:not([hidden])")
    desk.add(("chest.dcm", phantom_file(0)), BAD, ("other.dcm", phantom_file(1)), ("again.dcm", phantom_file(0)))
    assert desk.text(".upload[data-state=refused] .upload-words") == "This is no DICOM, JPEG, PNG, TIFF, BMP or WebP file."
    assert page.locator(".upload[data-state=new]").count() == 2
    assert desk.text(".upload[data-state=known] .upload-words") == "Already in the worklist"
    page.wait_for_selector("#rows tr >> nth=1")
    assert desk.text("#list-count") == "2 unread of 2"
    page.click("#rows tr:has(.chip.pneumonia) a.open")
    desk.wait_for_image()
    assert desk.text("#case-name") in ("P-1040", "P-1041")
    assert sum(desk.picture()) > 30
    page.click("#correct")
    page.check("#labels input[value=viral]")
    page.fill("#note", "Both bases <b>hazy</b>.")
    page.click("#save")
    page.wait_for_selector("#history li")
    assert "Viral pneumonia" in desk.text("#history")
    assert "Both bases <b>hazy</b>." in desk.text("#history")
    page.keyboard.press("Escape")
    page.wait_for_selector("#rows tr.read")
    assert "Viral pneumonia" in desk.text("#rows tr.read td.reading")
    assert [said.label for _, said in stage.room.cases.readings()] == ["viral"]


def test_the_heat_map_colours_its_place_and_its_strength_is_the_reader_s(desk: Desk, stage: Stage) -> None:
    desk.sign_in()
    desk.add(("chest.dcm", phantom_file(0)))
    draw_map(stage, np.array([[1.0, 0.0], [0.0, 0.0]], np.float32))
    desk.open_first()
    plain = desk.picture()
    desk.page.keyboard.press("h")
    desk.page.wait_for_selector("#legend-scale:not([hidden])")
    strengths = []
    for _ in range(2):
        desk.page.wait_for_timeout(200)
        red, _, blue = desk.picture()
        strengths.append(red - blue)
        desk.page.keyboard.press("]")
    assert 1 < strengths[0] < strengths[1]
    desk.page.keyboard.press("h")
    desk.page.wait_for_timeout(200)
    assert desk.picture() == pytest.approx(plain, abs=0.01)


def test_a_heat_map_in_which_nothing_stands_out_says_so(desk: Desk, stage: Stage) -> None:
    desk.sign_in()
    desk.add(("chest.dcm", phantom_file(0)))
    draw_map(stage, np.zeros((2, 2), np.float32))
    desk.open_first()
    desk.page.keyboard.press("h")
    desk.page.wait_for_selector("#legend-empty:not([hidden])")
    assert desk.text("#legend-empty") == "No place stands out in this heat map"


def test_a_heat_map_outside_the_lungs_says_so_in_both_languages_while_it_is_shown(
    desk: Desk, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_judge, "quick_focus", lambda *_: Focus(0.9, 0.5, 0.4, 0.0, (Misplaced.OUTSIDE, Misplaced.MARKS)))
    desk.sign_in()
    desk.add(("chest.dcm", phantom_file(0)))
    draw_map(stage, np.array([[1.0, 0.0], [0.0, 0.0]], np.float32))
    desk.open_first()
    assert desk.page.is_hidden("#map-warning")
    desk.page.keyboard.press("h")
    desk.page.wait_for_selector("#map-warning:not([hidden])")
    assert "outside the lungs" in desk.text("#map-warning")
    assert "markers or text" in desk.text("#map-warning")
    desk.page.click("#language")
    desk.page.wait_for_function("document.querySelector('#map-warning').textContent.includes('肺野之外')")
    desk.page.keyboard.press("h")
    desk.page.wait_for_selector("#map-warning", state="hidden")


def draw_map(stage: Stage, values: np.ndarray) -> None:
    """Another map for the only case; the small network of the tests sees little."""
    (case,) = stage.room.cases.ids()
    np.save(stage.room.store.path(case) / MAP_FILE, values)


def test_what_cannot_be_judged_has_reasons_and_no_number(desk: Desk, stage: Stage) -> None:
    desk.sign_in()
    desk.add(("lateral.dcm", phantom_file(0, view="LL")))
    desk.page.wait_for_selector("#rows .chip.cannot_judge")
    assert "no frontal view" in desk.text("#rows td.chance")
    desk.open_first()
    assert "no frontal view" in desk.text("#finding")
    assert "%" not in desk.text("#finding") + desk.text("#rows")
    assert desk.page.is_hidden("#agree")
    assert desk.page.is_hidden("#classes-section")
    assert desk.page.is_disabled("#heat")
    desk.page.click("#save")
    assert desk.text("#decision-problem") == "Choose a finding first."
    desk.page.check("#labels input[value=unsure]")
    desk.page.click("#save")
    desk.page.wait_for_selector("#history li")
    (case,) = stage.room.cases.ids()
    found = stage.room.cases.find(case)
    assert found is not None
    assert found.finding == "unsure"


def test_an_administrator_can_take_a_case_away_and_a_radiologist_cannot(desk: Desk, stage: Stage) -> None:
    desk.sign_in()
    desk.add(("one.dcm", phantom_file(0)))
    desk.open_first()
    assert desk.page.is_hidden("#remove")
    desk.page.click("#who summary")
    desk.page.click("#logout")
    desk.page.wait_for_selector("#login:not([hidden])")
    desk.sign_in(ADMIN)
    desk.open_first()
    desk.page.click("#remove")
    desk.page.click("#remove-yes")
    desk.page.wait_for_selector("#list-empty:not([hidden])")
    assert stage.room.cases.ids() == set()


def test_window_zoom_and_invert_are_done_on_the_image_that_is_here(desk: Desk) -> None:
    desk.sign_in()
    desk.add(("chest.dcm", phantom_file(0)))
    desk.open_first()
    before, asked = sum(desk.picture()), len(desk.answers)
    box = desk.page.locator("#pane-main > canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    desk.page.mouse.move(x, y)
    desk.page.mouse.down()
    desk.page.mouse.move(x, y + 150, steps=3)
    desk.page.mouse.up()
    desk.page.wait_for_timeout(150)
    assert sum(desk.picture()) < before, "a drag downwards raises the level: a darker picture"
    assert desk.page.input_value("#preset") == "custom"
    desk.page.keyboard.press("r")
    desk.page.wait_for_timeout(150)
    assert sum(desk.picture()) == pytest.approx(before, rel=0.01)
    fitted = desk.text("#pane-main [data-corner=zoom]")
    desk.page.mouse.wheel(0, -400)
    desk.page.wait_for_timeout(150)
    assert desk.text("#pane-main [data-corner=zoom]") != fitted
    desk.page.keyboard.press("o")
    desk.page.wait_for_timeout(150)
    assert desk.text("#pane-main [data-corner=zoom]") == "100%"
    desk.page.keyboard.press("i")
    assert desk.page.get_attribute("#invert", "aria-pressed") == "true"
    assert len(desk.answers) == asked


def test_two_studies_of_a_patient_move_together(desk: Desk) -> None:
    desk.sign_in()
    desk.add(("now.dcm", phantom_file(0, "P-77")), ("before.dcm", phantom_file(1, "P-77", 120)), ("else.dcm", phantom_file(2)))
    desk.page.click("#rows tr:has-text('P-77') a.open")
    desk.wait_for_image()
    assert desk.page.locator("#compare option").count() == 2
    desk.page.keyboard.press("c")
    desk.page.wait_for_selector("#pane-previous[data-state=ready]")
    desk.page.keyboard.press("+")
    desk.page.keyboard.press("+")
    desk.page.wait_for_timeout(200)
    zooms = [desk.text(f"#{pane} [data-corner=zoom]") for pane in ("pane-main", "pane-previous")]
    assert len(set(zooms)) == 2, "images of different sizes show the same place at different magnifications"
    desk.page.keyboard.press("f")
    desk.page.wait_for_timeout(200)
    assert [desk.text(f"#{pane} [data-corner=zoom]") for pane in ("pane-main", "pane-previous")] != zooms
    desk.page.keyboard.press("c")
    assert desk.page.is_hidden("#pane-previous")


def test_everything_can_be_done_with_the_keyboard(desk: Desk, stage: Stage) -> None:
    keyboard = desk.page.keyboard
    desk.sign_in()
    desk.add(("one.dcm", phantom_file(0)), ("two.dcm", phantom_file(1)))
    desk.page.wait_for_selector("#rows tr >> nth=1")
    desk.page.evaluate("document.activeElement.blur()")
    keyboard.press("?")
    assert desk.page.locator("#help-keys kbd").count() > 20
    keyboard.press("Escape")
    keyboard.press("/")
    keyboard.type("P-1041")
    desk.page.wait_for_function("() => document.querySelectorAll('#rows tr').length === 1")
    keyboard.press("Escape")
    keyboard.press("ArrowDown")
    assert desk.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is seen"
    keyboard.press("Enter")
    desk.wait_for_image()
    keyboard.press("h")
    keyboard.press("2")
    keyboard.press("ArrowUp")
    keyboard.press("e")
    keyboard.press("ArrowDown")
    keyboard.press("ArrowDown")
    chosen = desk.page.evaluate("document.querySelector('#labels input:checked').value")
    keyboard.press("Tab")
    keyboard.type("typed, not clicked: a e i o u ?")
    keyboard.press("Control+Enter")
    desk.page.wait_for_selector("#history li")
    assert [said.label for _, said in stage.room.cases.readings()] == [chosen]
    assert "a e i o u ?" in desk.text("#history")
    keyboard.press("Escape")
    desk.page.wait_for_selector("#worklist:not([hidden])")


def test_single_keys_can_be_switched_off(desk: Desk) -> None:
    desk.sign_in()
    desk.add(("one.dcm", phantom_file(0)))
    desk.open_first()
    desk.page.click("#open-help")
    desk.page.uncheck("#keys-on")
    desk.page.click("#help-close")
    desk.page.keyboard.press("i")
    assert desk.page.get_attribute("#invert", "aria-pressed") == "false"


def test_next_and_previous_follow_the_worklist(desk: Desk) -> None:
    desk.sign_in()
    desk.add(*[(f"{n}.dcm", phantom_file(n)) for n in range(3)])
    desk.page.click("#sort-probability")
    desk.page.wait_for_selector("th[aria-sort=descending] #sort-probability")
    desk.page.wait_for_function("() => document.querySelectorAll('#rows tr').length === 3")
    order = desk.page.eval_on_selector_all("#rows tr", "rows => rows.map(row => row.dataset.case)")
    desk.open_first()
    for case in (order[1], order[2]):
        desk.page.keyboard.press("n")
        desk.page.wait_for_url(f"**/#/case/{case}")
        desk.wait_for_image()
    desk.page.keyboard.press("n")
    desk.page.wait_for_selector("#toast:not([hidden])")
    assert desk.text("#toast") == "This is the last case of the worklist."
    desk.page.keyboard.press("p")
    desk.page.wait_for_url(f"**/#/case/{order[1]}")


def test_filters_narrow_the_worklist_and_say_when_nothing_is_left(desk: Desk) -> None:
    desk.sign_in()
    desk.add(("one.dcm", phantom_file(0)), ("two.dcm", phantom_file(1)))
    desk.page.select_option("#filter-status", "read")
    desk.page.wait_for_selector("#list-nothing:not([hidden])")
    desk.page.click("#empty-clear")
    desk.page.wait_for_function("() => document.querySelectorAll('#rows tr').length === 2")


def test_a_session_that_ended_costs_no_typed_word(desk: Desk, stage: Stage) -> None:
    desk.sign_in()
    desk.add(("one.dcm", phantom_file(0)))
    desk.open_first()
    desk.page.click("#correct") if desk.page.is_visible("#correct") else None
    desk.page.check("#labels input[value=normal]")
    desk.page.fill("#note", "a long and careful note")
    stage.room.sessions.close_all(READER)
    desk.page.click("#save")
    desk.page.wait_for_selector("#login:not([hidden])")
    assert desk.page.is_hidden("#room"), "nothing of a patient is seen behind the login"
    assert "Your session has ended" in desk.text("#login-reason")
    desk.page.fill("#password", "not this one")
    desk.page.click("#login-button")
    desk.page.wait_for_selector("#login-reason[data-kind=bad]")
    desk.sign_in()
    desk.page.wait_for_selector("#history li")
    assert "a long and careful note" in desk.text("#history")


def test_another_user_finds_nothing_of_the_first(desk: Desk, stage: Stage) -> None:
    desk.sign_in()
    desk.add(("one.dcm", phantom_file(0)))
    desk.open_first()
    desk.page.fill("#note", "the first reader's thought")
    stage.room.sessions.close_all(READER)
    desk.page.keyboard.press("Escape")
    desk.page.evaluate("document.activeElement.blur()")
    desk.page.keyboard.press("n")
    desk.page.wait_for_selector("#login:not([hidden])")
    desk.page.on("dialog", lambda dialog: dialog.accept())
    desk.sign_in(ADMIN)
    desk.page.wait_for_selector("#worklist:not([hidden]) #rows tr")
    assert desk.text("#user-name") == ADMIN
    assert desk.page.input_value("#note") == ""


def test_a_server_that_is_away_is_told_and_found_again(desk: Desk) -> None:
    desk.sign_in()
    desk.add(("one.dcm", phantom_file(0)))
    desk.open_first()
    desk.page.fill("#note", "kept")
    desk.context.set_offline(True)
    desk.page.click("#agree") if desk.page.is_visible("#agree") else desk.page.click("#save")
    desk.page.wait_for_selector("#lost:not([hidden])")
    assert "Your note is kept" in desk.text("#decision-problem")
    desk.context.set_offline(False)
    desk.page.click("#lost-now")
    desk.page.wait_for_selector("#lost", state="hidden")
    assert desk.page.input_value("#note") == "kept"
    desk.complaints = [one for one in desk.complaints if "ERR_INTERNET_DISCONNECTED" not in one]


def test_chinese_is_complete_and_remembered(desk: Desk) -> None:
    desk.sign_in()
    desk.add(("one.dcm", phantom_file(0)), BAD)
    desk.page.click("#language")
    assert desk.page.get_attribute("html", "lang") == "zh-Hans"
    assert desk.text(".upload[data-state=refused] .upload-words") == "不是 DICOM、JPEG、PNG、TIFF、BMP 或 WebP 文件。"
    assert "例" in desk.text("#list-count")
    desk.page.reload()
    desk.page.wait_for_selector("#rows tr")
    assert desk.text("#list-title") == "工作列表"
    desk.open_first()
    own = r"pneumofed|Shift|English|reader|North|phantom[\w-]*|DX|PA|AP|DICOM|JPEG|PNG|P-\d+|[0-9A-Fa-f]{6,}|1:1|\b[A-Z]\b"
    left = re.findall(r"[A-Za-z]{2,}", re.sub(own, "", desk.text("#room")))
    assert left == []


def test_what_a_file_says_is_never_run(desk: Desk) -> None:
    desk.sign_in()
    desk.add(("one.dcm", phantom_file(0, "<img src=x onerror=alert(1)>")))
    desk.page.wait_for_selector("#rows tr")
    assert "<img src=x" in desk.text("#rows")
    desk.open_first()
    assert desk.text("#case-name").startswith("<img src=x")
    assert desk.page.locator("img[src='x']").count() == 0


def test_nothing_of_a_patient_is_in_addresses_titles_or_the_browser_s_store(desk: Desk) -> None:
    desk.sign_in()
    desk.add(("DOE JANE.dcm", phantom_file(0, "P-4711")))
    desk.page.fill("#search", "P-4711")
    desk.page.wait_for_function("() => document.querySelectorAll('#rows tr').length === 1")
    desk.open_first()
    desk.page.fill("#note", "Secret words")
    desk.page.click("#agree") if desk.page.is_visible("#agree") else None
    store = desk.page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])")
    told = [answer.url for answer in desk.answers] + [desk.page.url, desk.page.title(), store]
    assert not [one for one in told if re.search("4711|DOE|Secret", one)]
    desk.page.wait_for_timeout(300)


@pytest.mark.parametrize("size", [(1440, 900), (1180, 820), (820, 1180)], ids=["desktop", "tablet", "upright tablet"])
def test_words_can_be_read_and_controls_have_names(stage: Stage, chromium: Browser, size: tuple[int, int]) -> None:
    with served(stage) as address:
        desk = Desk(chromium, address, viewport={"width": size[0], "height": size[1]})
        check(desk)
        desk.sign_in()
        desk.add(("one.dcm", phantom_file(0)), ("two.dcm", phantom_file(1)), ("three.dcm", phantom_file(2)), BAD)
        check(desk)
        desk.open_first()
        check(desk)
        desk.page.evaluate("document.activeElement.blur()")
        desk.page.keyboard.press("e")
        desk.page.click("#open-help")
        check(desk)
        desk.context.close()
    assert desk.complaints == []


def check(desk: Desk) -> None:
    """What an accessibility checker would look for: contrast, names, labels, unique ids, nothing cut off at the side."""
    desk.page.wait_for_timeout(150)
    script = (Path(__file__).parent / "accessibility.js").read_text(encoding="utf-8")
    assert desk.page.evaluate(script) == []


def test_all_classes_are_shown_with_the_likeliest_by_name(desk: Desk, stage: Stage, tmp_path: Path) -> None:
    desk.sign_in()
    desk.add(("chest.dcm", phantom_file(0)))
    classes = {"normal": 0.36, "pneumonia": 0.2, "tuberculosis": 0.3, "oedema": 0.06, "mass": 0.05, "rib_fracture": 0.03}
    values: dict[str, Any] = {
        "verdict": "finding",
        "probability": 0.64,
        "low": 0.5,
        "high": 0.7,
        "threshold": 0.4,
        "classes": classes,
    }
    with stage.room.cases._session() as session:
        session.execute(update(Case).values(**values))
    desk.open_first()
    assert desk.text("#finding .chip") == "Likeliest: Tuberculosis"
    assert desk.text("#finding .likeliest") == "Most probable finding: Tuberculosis, 30%; by itself less than normal, 36%."
    rows = [row.replace("\n", " ") for row in desk.page.locator("#classes li").all_inner_texts()]
    assert rows == ["Normal 36%", "Tuberculosis 30%", "Pneumonia 20%", "Oedema 6%", "Mass 5%", "Rib fracture 3%"]
    desk.page.screenshot(path=str(tmp_path / "classes.png"))
    desk.page.click("#language")
    desk.page.wait_for_selector("#finding .likeliest:has-text('最可能的异常')")
