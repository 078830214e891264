"""A CT series in a real Chromium: added as a folder, scrolled by every hand, with its map, on wide and narrow screens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser

from pneumofed.inference.reading_room.viewing import MAP_FILE
from tests.inference.reading_room.browser import CHROMIUM, Desk, served
from tests.inference.reading_room.series_files import ct_stage, edited, nifti_file, series_files, zip_of
from tests.inference.reading_room.stage import Stage, phantom_dicom, phantom_png
from tests.inference.reading_room.test_page import check
from tests.volume_bundles import GRID

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

SLICES = GRID.slices
MIDDLE = (SLICES + 1) // 2


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = ct_stage(tmp_path)
    yield made
    made.room.close()


def folder_of(path: Path, name: str, files: tuple[bytes, ...] | list[bytes]) -> Path:
    (path / name).mkdir(parents=True)
    for number, file in enumerate(files):
        (path / name / f"IM{number:03d}").write_bytes(file)
    return path / name


def add_folder(desk: Desk, folder: Path, count: int = 1) -> None:
    """Chooses a folder, and waits until each series in it is there or refused."""
    desk.page.wait_for_selector("#worklist[data-state]")
    desk.page.set_input_files("#folder", folder)
    done = ".upload:is([data-state=new], [data-state=known], [data-state=refused], [data-state=failed])"
    desk.page.wait_for_function("([s, n]) => document.querySelectorAll(s).length >= n", arg=[done, count])


def shown_slice(desk: Desk) -> int:
    """The number below the image, once that slice has come."""
    desk.page.wait_for_selector("#pane-main:not([data-waiting])")
    desk.page.wait_for_timeout(120)
    found = re.match(r"Slice (\d+) of (\d+) · (−?[\d.]+) mm", desk.text("#pane-main [data-corner=slice]"))
    assert found, desk.text("#pane-main [data-corner=slice]")
    assert int(found[2]) == SLICES
    first = float(GRID.axes()[0].ravel()[0])
    assert float(found[3].replace("−", "-")) == pytest.approx(first + (int(found[1]) - 1) * GRID.spacing_mm[0], abs=0.06)
    return int(found[1])


def draw_map(stage: Stage, plane: int, cells: int = 4) -> None:
    """Evidence in one plane of the map and one of its corners; the small network of the tests sees little."""
    (case,) = stage.room.cases.ids()
    values = np.zeros((8, cells, cells), np.float32)
    values[plane, 1, 2] = 1.0
    np.save(stage.room.store.path(case) / MAP_FILE, values)


def test_wheel_keys_slider_and_drag_go_through_the_slices(desk: Desk, tmp_path: Path) -> None:
    page = desk.page
    desk.sign_in()
    assert desk.text("#drop-title") == "Drop CT series here"
    add_folder(desk, folder_of(tmp_path, "chest", series_files()))
    assert desk.text(".upload-name").startswith("chest · 16 files")
    desk.open_first()
    assert shown_slice(desk) == MIDDLE
    assert desk.text("#pane-main [data-corner=window]") == "W 1,500 · L -600 HU"
    assert page.input_value("#preset") == "lungs"
    asked = [answer.url for answer in desk.answers if "/pixels?slice=" in answer.url]
    assert 0 < len(asked) < SLICES, "not all slices at once"
    box = page.locator("#pane-main > canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    zoom = desk.text("#pane-main [data-corner=zoom]")
    before = desk.picture()
    for expected in (MIDDLE - 1, MIDDLE - 2):
        page.mouse.wheel(0, 100)  # down is toward the feet
        assert shown_slice(desk) == expected
    assert desk.picture() != pytest.approx(before, abs=0.02)
    assert desk.text("#pane-main [data-corner=zoom]") == zoom
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_timeout(150)
    assert desk.text("#pane-main [data-corner=zoom]") != zoom
    assert shown_slice(desk) == MIDDLE - 2
    page.locator("#pane-main > canvas").focus()
    for key, expected in (
        ("ArrowUp", MIDDLE - 1), ("ArrowDown", MIDDLE - 2), ("Home", SLICES), ("PageDown", SLICES - 10), ("End", 1), ("ArrowDown", 1),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert shown_slice(desk) == expected
    page.locator("#pane-main .slices input").fill("12")
    assert shown_slice(desk) == 12
    page.locator("#pane-main .slices input").press("ArrowUp")
    assert shown_slice(desk) == 13
    page.click("#tool-scroll")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y + box["height"] / SLICES * 3 + 2, steps=6)
    page.mouse.up()
    assert shown_slice(desk) == 10


def test_presets_are_those_of_a_ct_and_a_drag_sets_the_window(desk: Desk, tmp_path: Path) -> None:
    page = desk.page
    desk.sign_in()
    desk.add(("v.nii.gz", nifti_file(tmp_path)))
    desk.open_first()
    words = {"1": "W 1,500 · L -600 HU", "2": "W 400 · L 40 HU", "3": "W 1,800 · L 400 HU", "4": "W 4,096 · L 1,024 HU"}
    pictures = []
    for key, expected in words.items():
        page.keyboard.press(key)
        page.wait_for_timeout(120)
        assert desk.text("#pane-main [data-corner=window]") == expected
        pictures.append(sum(desk.picture()))
    assert len({round(one, 1) for one in pictures}) == 4
    offered = page.eval_on_selector_all("#preset option:not([hidden])", "all => all.map((one) => one.value)")
    assert offered == ["lungs", "mediastinum", "bone", "full"]
    box = page.locator("#pane-main > canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 200, box["y"] + 200)
    page.mouse.down()
    page.mouse.move(box["x"] + 260, box["y"] + 230, steps=3)
    page.mouse.up()
    page.wait_for_timeout(120)
    assert page.input_value("#preset") == "custom"
    by_hand = desk.text("#pane-main [data-corner=window]")
    page.keyboard.press("ArrowUp")
    assert shown_slice(desk) == MIDDLE + 1
    assert desk.text("#pane-main [data-corner=window]") == by_hand, "the window stays from slice to slice"
    page.keyboard.press("r")
    page.wait_for_timeout(120)
    assert desk.text("#pane-main [data-corner=window]") == words["1"]


def test_the_map_is_of_the_slice_that_is_shown_and_the_reader_can_jump_to_the_strongest(
    desk: Desk, stage: Stage, tmp_path: Path
) -> None:
    page = desk.page
    desk.sign_in()
    add_folder(desk, folder_of(tmp_path, "chest", series_files()))
    draw_map(stage, plane=6)
    desk.open_first()
    (case,) = stage.room.cases.ids()
    strongest = page.evaluate("(id) => fetch(`/api/cases/${id}`).then((one) => one.json())", case)["image"]["facts"]["series"]
    assert strongest["strongest"]
    page.keyboard.press("h")
    page.wait_for_selector("#legend-box:not([hidden])")

    def tint() -> float:
        page.wait_for_timeout(250)
        red, _, blue = desk.picture()
        return red - blue

    colours = {}
    for number in range(1, SLICES + 1):
        page.locator("#pane-main .slices input").fill(str(number))
        assert shown_slice(desk) == number
        colours[number] = tint()
    coloured = [number for number, found in colours.items() if found > 0.3]
    assert coloured and max(coloured) - min(coloured) < SLICES / 2
    best = max(colours, key=lambda number: colours[number])
    assert best in coloured
    page.locator("#pane-main .slices input").fill(str(best))
    assert shown_slice(desk) == best
    strong = tint()
    page.keyboard.press("[")
    assert 0 < tint() < strong
    page.keyboard.press("h")
    assert tint() == pytest.approx(0.0, abs=0.05)
    page.keyboard.press("End")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("y")
    assert shown_slice(desk) == strongest["strongest"]
    page.click("#strongest")
    assert shown_slice(desk) == strongest["strongest"]
    assert "too coarse" not in desk.text("#map-warning")
    page.keyboard.press("h")
    page.wait_for_selector("#pane-main .slices i:not([hidden])")
    assert "too coarse" in desk.text("#map-warning")


def test_refusals_say_how_many_and_where_and_the_other_series_go_on(desk: Desk, tmp_path: Path) -> None:
    study = tmp_path / "study"
    files = list(series_files())
    folder_of(study, "whole", files)
    folder_of(study, "gap", [*files[:4], *files[6:]])
    folder_of(study, "tilt", edited(files, GantryDetectorTilt=12.5))
    folder_of(study, "radiograph", [phantom_dicom()])
    (study / "DICOMDIR").write_bytes(b"an index")
    (study / "other.zip").write_bytes(zip_of(series_files(1)))
    desk.sign_in()
    add_folder(desk, study, 5)
    told = {}
    for row in desk.page.locator(".upload").all():
        name = row.locator(".upload-name").inner_text().split(" · ")[0].split("/")[-1]
        told[name] = row.locator(".upload-words").inner_text()
    assert told["whole"] == told["other.zip"] == "Added to the worklist"
    assert told["gap"].startswith(
        "Slices are missing, or not evenly spaced. (2 positions without an image, the first between slices"
    )
    assert told["tilt"].startswith("The gantry was tilted") and "12.5 degrees" in told["tilt"]
    assert told["IM000"] == (
        "This is no CT series, and the model of this room judges CT. Use a room whose model judges radiographs. (modality DX)"
    )
    desk.page.click("#language")
    assert "层面缺失" in desk.text("#upload-rows")


def test_two_series_of_a_patient_go_through_their_slices_together(desk: Desk, tmp_path: Path) -> None:
    desk.sign_in()
    add_folder(desk, folder_of(tmp_path, "a", series_files(0, "P-77")))
    add_folder(desk, folder_of(tmp_path, "b", series_files(1, "P-77")), 2)
    desk.open_first()
    desk.page.keyboard.press("c")
    desk.page.wait_for_selector("#pane-previous[data-state=ready]")
    desk.page.keyboard.press("ArrowUp")
    assert shown_slice(desk) == MIDDLE + 1
    desk.page.wait_for_function(
        "(words) => document.querySelector('#pane-previous [data-corner=slice]').textContent.startsWith(words)",
        arg=f"Slice {MIDDLE + 1} of",
    )
    desk.page.keyboard.press("s")
    desk.page.keyboard.press("ArrowUp")
    assert shown_slice(desk) == MIDDLE + 2
    assert desk.text("#pane-previous [data-corner=slice]").startswith(f"Slice {MIDDLE + 1} of")


def test_a_finger_swipes_through_the_slices_on_a_narrow_screen(stage: Stage, chromium: Browser, tmp_path: Path) -> None:
    with served(stage) as address:
        desk = Desk(chromium, address, viewport={"width": 390, "height": 844}, has_touch=True, device_scale_factor=2)
        page = desk.page
        desk.sign_in()
        desk.add(("v.nii.gz", nifti_file(tmp_path)))
        draw_map(stage, plane=4)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        desk.open_first()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        box = page.locator("#pane-main > canvas").bounding_box()
        assert box is not None and box["width"] > 300
        touch = page.context.new_cdp_session(page)
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

        def send(kind: str, *points: tuple[float, float]) -> None:
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": a, "y": b} for a, b in points]})

        send("touchStart", (x, y))
        for part in range(1, 6):
            send("touchMove", (x, y - part * box["height"] / SLICES))
        send("touchEnd")
        assert shown_slice(desk) == MIDDLE + 5
        assert page.get_attribute("#tool-scroll", "aria-pressed") == "true"
        page.click("#tool-window")
        before = desk.text("#pane-main [data-corner=window]")
        send("touchStart", (x, y))
        send("touchMove", (x + 40, y))
        send("touchMove", (x + 80, y))
        send("touchEnd")
        page.wait_for_timeout(150)
        assert desk.text("#pane-main [data-corner=window]") != before
        assert shown_slice(desk) == MIDDLE + 5
        page.click("#heat")
        page.screenshot(path=str(tmp_path / "narrow.png"))
        check(desk)
        desk.context.close()
    assert desk.complaints == []


@pytest.mark.parametrize("size", [(1440, 900), (820, 1180)], ids=["desktop", "upright tablet"])
def test_words_can_be_read_and_controls_have_names(
    stage: Stage, chromium: Browser, tmp_path: Path, size: tuple[int, int]
) -> None:
    with served(stage) as address:
        desk = Desk(chromium, address, viewport={"width": size[0], "height": size[1]})
        desk.sign_in()
        desk.add(("v.nii.gz", nifti_file(tmp_path)), ("radiograph.png", phantom_png()))
        draw_map(stage, plane=4, cells=8)
        check(desk)
        desk.open_first()
        desk.page.keyboard.press("h")
        check(desk)
        desk.page.screenshot(path=str(tmp_path / f"wide{size[0]}.png"))
        desk.page.click("#open-help")
        check(desk)
        assert "Next slice toward the head, the feet" in desk.text("#help-keys")
        desk.page.keyboard.press("Escape")
        desk.page.click("#language")
        assert desk.text("#pane-main [data-corner=slice]").startswith(f"第 {MIDDLE} / {SLICES} 层")
        check(desk)
        desk.context.close()
    assert desk.complaints == []


def test_what_cannot_be_judged_is_scrolled_without_a_map(desk: Desk, tmp_path: Path) -> None:
    desk.sign_in()
    add_folder(desk, folder_of(tmp_path, "head", edited(series_files(), BodyPartExamined="HEAD")))
    desk.open_first()
    assert "not the chest" in desk.text("#finding")
    assert "%" not in desk.text("#finding")
    assert desk.page.is_disabled("#heat")
    assert desk.page.is_disabled("#strongest")
    desk.page.keyboard.press("ArrowDown")
    assert shown_slice(desk) == MIDDLE - 1
