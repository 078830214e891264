"""The viewer's tools in a real Chromium: numbers of the file, turning, measuring, the glass, attributes, digits, narrow screens."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser

from pneumofed.simulation.phantoms.phantom import draw_patients, draw_picture
from tests.dicom_factory import dicom_bytes
from tests.inference.reading_room.browser import CHROMIUM, Desk, served
from tests.inference.reading_room.stage import Stage, phantom_png

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

SPACING_MM = 0.5
SIDES = """() => {
  const shown = document.querySelector("#pane-main > canvas");
  const copy = Object.assign(document.createElement("canvas"), { width: shown.width, height: shown.height });
  const context = copy.getContext("2d", { willReadFrequently: true });
  context.drawImage(shown, 0, 0);
  const mean = (left) => {
    const { data } = context.getImageData(left, 0, shown.width / 2, shown.height);
    return data.reduce((sum, value, i) => (i % 4 ? sum : sum + value), 0) / (data.length / 4);
  };
  return [mean(0), mean(shown.width / 2)];
}"""
"""Mean grey of the left and the right half of what is shown."""


def chest(least: int = 0, **tags: Any) -> bytes:
    pixels = draw_picture(next(iter(draw_patients("train", 12, 0))), 1, "train", 0, 400)
    stored = np.maximum(np.rint(pixels * 3800).astype(np.uint16), least).astype(np.uint16)
    known = {"WindowCenter": 2000, "WindowWidth": 3600, "ImagerPixelSpacing": [SPACING_MM] * 2, "ViewPosition": "PA", "KVP": 117}
    return dicom_bytes(stored, **{"BitsStored": 12, **known, **tags})


def open_one(desk: Desk, *files: tuple[str, bytes]) -> None:
    desk.sign_in()
    desk.add(*files)
    desk.open_first()


def corner(desk: Desk, name: str) -> str:
    return desk.text(f"#pane-main [data-corner={name}]")


def drag(desk: Desk, dx: float, dy: float) -> float:
    """Drags from the canvas's middle, and returns what a screen pixel is of a pixel of the file."""
    box = desk.page.locator("#pane-main > canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    desk.page.mouse.move(x, y)
    desk.page.mouse.down()
    desk.page.mouse.move(x + dx, y + dy, steps=4)
    desk.page.mouse.up()
    desk.page.wait_for_timeout(150)
    return float(corner(desk, "zoom").rstrip("%").replace(",", "")) / 100


def test_files_of_one_window_show_the_same_width_and_level(desk: Desk) -> None:
    desk.sign_in()
    desk.add(("a.dcm", chest(0)), ("b.dcm", chest(600)), ("c.dcm", chest(0, PhotometricInterpretation="MONOCHROME1")))
    shown = set()
    for row in range(3):
        desk.page.click(f"#rows tr:nth-child({row + 1}) a.open")
        desk.wait_for_image()
        shown.add(corner(desk, "window"))
        desk.page.keyboard.press("Escape")
    assert shown == {"W 3,600 · L 2,000"}


def test_the_ruler_measures_in_mm_whatever_the_turn_and_says_where_that_holds(desk: Desk) -> None:
    open_one(desk, ("a.dcm", chest()))
    desk.page.keyboard.press("d")
    for _ in range(3):
        scale = drag(desk, 90, 120)
        found = re.fullmatch(r"([\d.]+) mm at the detector .*smaller in the patient", corner(desk, "length"))
        assert found and float(found[1]) == pytest.approx(150 / scale * SPACING_MM, rel=0.01)
        desk.page.keyboard.press("t")
        desk.page.keyboard.press("x")
    desk.page.keyboard.press("r")
    desk.page.wait_for_timeout(100)
    assert (corner(desk, "length"), corner(desk, "turned")) == ("", "")


def test_without_a_spacing_the_ruler_counts_pixels(desk: Desk) -> None:
    open_one(desk, ("a.png", phantom_png()))
    desk.page.keyboard.press("d")
    drag(desk, 100, 0)
    assert re.fullmatch(r"\d+ pixels the file states no size of a pixel", corner(desk, "length"))


def test_turning_and_mirroring_move_the_image_with_the_hand_and_are_said(desk: Desk) -> None:
    open_one(desk, ("a.dcm", chest()))
    left, right = desk.page.evaluate(SIDES)
    assert abs(left - right) > 0.5, "a picture whose sides differ"
    desk.page.keyboard.press("x")
    desk.page.wait_for_timeout(150)
    assert desk.page.evaluate(SIDES) == pytest.approx([right, left], abs=0.5)
    assert "MIRRORED" in corner(desk, "turned")
    desk.page.keyboard.press("x")
    for _ in range(2):
        desk.page.keyboard.press("t")
    desk.page.wait_for_timeout(150)
    assert desk.page.evaluate(SIDES) == pytest.approx([right, left], abs=0.5)
    assert corner(desk, "turned") == "turned by 180°"
    desk.page.click("#tool-pan")
    drag(desk, 60, 0)
    moved = desk.page.evaluate(SIDES)
    assert moved[1] - moved[0] > right - left if right > left else moved != [right, left]


def test_the_glass_follows_the_pointer_and_goes_with_it(desk: Desk) -> None:
    open_one(desk, ("a.dcm", chest()))
    plain = desk.picture()
    desk.page.keyboard.press("z")
    box = desk.page.locator("#pane-main > canvas").bounding_box()
    assert box is not None
    desk.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    desk.page.wait_for_timeout(250)
    assert desk.picture() != plain
    desk.page.mouse.move(box["x"] + box["width"] + 60, box["y"] + 300)
    desk.page.wait_for_timeout(150)
    assert desk.picture() == pytest.approx(plain, abs=0.01)


def test_attributes_are_technical_and_the_names_are_what_this_page_sent(desk: Desk, stage: Stage) -> None:
    open_one(desk, ("scan 17.dcm", chest(PatientName="Doe^Jane", ReferringPhysicianName="House^G")))
    assert desk.text("#case-sent") == "Sent from this page as scan 17.dcm · Doe Jane"
    desk.page.keyboard.press("v")
    told = desk.text("#tags-rows")
    assert "KVP" in told and "117" in told
    assert not re.search("doe|house|jane", told, re.IGNORECASE)
    desk.page.keyboard.press("Escape")
    desk.page.reload()
    desk.wait_for_image()
    assert desk.text("#case-sent") == "", "names are in the page's memory only"
    files = [path for path in stage.room.folder.path.rglob("*") if path.is_file() and path.name != "original"]
    assert files and not [path.name for path in files if re.search(rb"Doe|scan 17", path.read_bytes())]


def test_no_digit_means_two_things(desk: Desk) -> None:
    open_one(desk, ("a.png", phantom_png()))
    desk.page.keyboard.press("3")
    assert desk.page.input_value("#preset") == "lungs"
    for key, label in zip("67890", ("normal", "pneumonia", "bacterial", "viral", "unsure"), strict=True):
        desk.page.keyboard.press(key)
        assert desk.page.evaluate("document.querySelector('#labels input:checked').value") == label
        desk.page.keyboard.press("1")  # the focus is among the labels
        assert desk.page.input_value("#preset") == "lungs"


@pytest.mark.parametrize("size", [(1440, 900), (900, 1100), (900, 700), (420, 850)])
def test_narrow_screens_show_the_whole_verdict_and_nothing_beside(stage: Stage, chromium: Browser, size: tuple[int, int]) -> None:
    with served(stage) as address:
        desk = Desk(chromium, address, viewport={"width": size[0], "height": size[1]})
        desk.sign_in()
        desk.add(*((f"a file with a rather long name {n}.png", phantom_png(n)) for n in range(4)))
        desk.page.wait_for_selector("#rows tr >> nth=3")
        measure = (
            "(s) => { const b = document.querySelector(s).getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }"
        )
        width = "() => document.documentElement.scrollWidth"
        assert desk.page.evaluate(width) == size[0]
        for chip in range(4):
            box = desk.page.locator("#rows .chip").nth(chip).bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= size[0]
        desk.open_first()
        assert desk.page.evaluate(width) == size[0]
        left, top, right, bottom = desk.page.evaluate(measure, "#finding")
        assert left >= 0 and right <= size[0] and top >= 0 and bottom <= size[1], "seen without scrolling"
        desk.context.close()
    assert desk.complaints == []
