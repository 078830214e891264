"""The room's page in a real Chromium, served on a free port, with everything that the browser complained of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, Response, sync_playwright

from pneumofed.inference.reading_room.app import create_room_app
from pneumofed.simulation.phantoms.phantom import draw_patients, draw_picture
from pneumofed.simulation.phantoms.scanners import Examination, encode_dicom
from tests.inference.reading_room.stage import PASSWORD, READER, Stage
from tests.serving import serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def launched() -> Iterator[Browser]:
    """Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def served(stage: Stage) -> Iterator[str]:
    """Address of the room."""
    with serving(create_room_app(stage.room, ["127.0.0.1"])) as address:
        yield address


@lru_cache
def phantom_file(number: int = 0, patient: str = "", size_px: int = 160, view: str = "PA") -> bytes:
    """A phantom as DICOM; its patient's number tells nothing unless `patient` is given."""
    drawn = list(draw_patients("train", 12, 0))[number]
    pixels = draw_picture(drawn, 1, "train", 0, size_px)
    name = patient or f"P-{1040 + number}"
    return encode_dicom(
        pixels, Examination(f"{number} {size_px} {view}", "phantom", True, drawn.monochrome1, name, view, "F", 61.0)
    )


class Desk:
    """A browser in front of the room. What it asks for but cannot have is told by `complaints`."""

    def __init__(self, browser: Browser, address: str, **options: Any) -> None:
        self.address = address
        self.context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, "locale": "en-GB", **options})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.answers: list[Response] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("response", lambda answer: self.answers.append(answer))
        self.page.goto(address)

    def _hear(self, message: ConsoleMessage) -> None:
        """Chromium calls each answer above 399 an error; those that a session's end or a wrong password bring are none."""
        if message.type in ("error", "warning") and "status of 401" not in message.text:
            self.complaints.append(message.text)

    def sign_in(self, user: str = READER, password: str = PASSWORD) -> None:
        self.page.fill("#user", user)
        self.page.fill("#password", password)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#room:not([hidden])")

    def add(self, *files: tuple[str, bytes]) -> None:
        """Gives files to the chooser, and waits until each is there or refused."""
        self.page.wait_for_selector("#worklist[data-state]")
        held = [{"name": name, "mimeType": "application/octet-stream", "buffer": data} for name, data in files]
        self.page.set_input_files("#files", held)  # type: ignore[arg-type]
        done = ".upload:is([data-state=new], [data-state=known], [data-state=refused], [data-state=failed])"
        self.page.wait_for_function("([selector, n]) => document.querySelectorAll(selector).length >= n", arg=[done, len(files)])

    def open_first(self) -> None:
        """Opens the case on top of the worklist."""
        self.page.click("#rows tr:first-child a.open")
        self.wait_for_image()

    def wait_for_image(self) -> None:
        self.page.wait_for_selector("#pane-main[data-state=ready]")
        self.page.wait_for_timeout(100)

    def picture(self, pane: str = "pane-main") -> tuple[float, float, float]:
        """Mean red, green and blue of what a pane shows, 0 to 255."""
        script = """(id) => {
          const canvas = document.querySelector(`#${id} > canvas`);
          const copy = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
          const context = copy.getContext("2d", { willReadFrequently: true });
          context.drawImage(canvas, 0, 0);
          const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
          const sums = [0, 0, 0];
          for (let i = 0; i < data.length; i += 4) for (let c = 0; c < 3; c++) sums[c] += data[i + c];
          return sums.map((sum) => sum / (data.length / 4));
        }"""
        red, green, blue = self.page.evaluate(script, pane)
        return red, green, blue

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector).strip()
