"""The page in Chromium, from a folder and from a server, on a phone's screen; its judgements beside Python's.

`PNEUMOFED_CHEST_XRAY` names the Kaggle set for the tests on real radiographs; `PNEUMOFED_SCREENSHOTS` a folder for pictures of the page.
"""

from __future__ import annotations

import base64
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import Browser, BrowserContext
from playwright.sync_api import Page as Tab

from pneumofed.common.errors import ConfigError
from pneumofed.common.imaging.images import decode_image, read_image
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.inference.web_model.page import write_page
from pneumofed.inference.web_model.runtime import WebRuntime, load_runtime
from tests.dicom_factory import dicom_bytes
from tests.inference.reading_room.browser import CHROMIUM, launched
from tests.inference.web_model.real import resnet_bundle
from tests.model_bundles import phantom_images

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]

PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
    "locale": "en-GB",
}
INPUT_TOLERANCE = 1e-3
"""Of the network's input, whose grey levels are 1/255 = 3.9e-3 apart: none may differ by a level."""
PROBABILITY_TOLERANCE = 0.03
"""Of int8: the processor's and WebAssembly's kernels round differently, and a layer later a value takes another of its 256 steps."""
JUDGE = """async (files) => {
  const found = [];
  for (const file of files) {
    const bytes = Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0));
    try {
      const { square, logits, features, ...rest } = await pneumofed.judgeFile(new File([bytes], "x"));
      const raw = new Uint8Array(square.pixels.buffer);
      let letters = "";
      for (const byte of raw) letters += String.fromCharCode(byte);
      found.push({ ...rest, square: btoa(letters) });
    } catch (problem) {
      found.push({ problem: problem.reason ?? String(problem) });
    }
  }
  return found;
}"""

GONE = "navigator.serviceWorker.getRegistration().then((found) => !found?.installing && !found?.waiting && !found?.active)"
KEPT = "caches.keys().then((names) => Promise.all(names.map(async (name) => (await (await caches.open(name)).keys()).length)))"


@pytest.fixture(scope="module")
def runtime() -> WebRuntime:
    try:
        return load_runtime()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as found:
        yield found


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """ResNet18 at 224 pixels, with phantoms as its reference."""
    drawn = phantom_images(120, seed=1, size_px=224)
    labels = np.array([label for _, label in drawn])
    return resnet_bundle(tmp_path_factory.mktemp("resnet") / "bundle", [image for image, _ in drawn], labels, 224)


@pytest.fixture(scope="module")
def folder(resnet: Bundle, runtime: WebRuntime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(resnet, runtime, tmp_path_factory.mktemp("page") / "page").folder


@contextmanager
def opened(browser: Browser, address: str, **options: Any) -> Iterator[tuple[Tab, list[str], list[str]]]:
    """The page when its model is ready, what it asked for, and what the browser complained of."""
    context = browser.new_context(**options)
    tab, asked, complaints = context.new_page(), [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.goto(address)
    tab.wait_for_selector("body:is([data-state=ready], [data-state=failed])", timeout=60_000)
    assert tab.get_attribute("body", "data-state") == "ready"
    yield tab, asked, complaints
    context.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A plain static server: no headers of its own."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def phantom_file(number: int = 0, seed: int = 1, **tags: Any) -> bytes:
    pixels = phantom_images(120, seed=seed, size_px=224)[number][0].pixels
    return dicom_bytes(np.rint(pixels * 4095).astype(np.uint16), BitsStored=12, **tags)


def encoded(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def judged(tab: Tab, files: Sequence[bytes]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tab.evaluate(JUDGE, [base64.b64encode(file).decode() for file in files])
    return found


def assert_judged_alike(found: list[dict[str, Any]], files: Sequence[bytes], bundle: Bundle) -> None:
    predictor = Predictor(bundle, "int8", threads=1)
    side = bundle.manifest.preprocessing.size_px
    for answer, data in zip(found, files, strict=True):
        image = decode_image(data)
        assert "problem" not in answer, answer
        square = np.frombuffer(base64.b64decode(answer["square"]), "<f4").reshape(side, side)
        assert np.abs(square - predictor.prepare(image)).max() <= INPUT_TOLERANCE
        expected = predictor.judge([image])[0]
        assert answer["reasons"] == [reason.value for reason in expected.reasons]
        if expected.prediction is None:
            assert answer["verdict"] == "cannot judge" and "probability" not in answer
            continue
        assert answer["probability"] == pytest.approx(expected.prediction.probability, abs=PROBABILITY_TOLERANCE)
        if abs(expected.prediction.probability - expected.threshold) > PROBABILITY_TOLERANCE:
            assert answer["verdict"] == expected.verdict


def test_every_kind_of_file_is_judged_as_python_judges_it(browser: Browser, folder: Path, resnet: Bundle) -> None:
    grey = np.rint(255 * phantom_images(120, seed=1, size_px=300)[5][0].pixels).astype(np.uint8)
    colour = np.stack([grey, np.roll(grey, 2), grey], axis=2)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    files = [
        encoded(grey, "JPEG", quality=90),
        encoded(grey, "JPEG", quality=75, progressive=True),
        encoded(colour, "JPEG", quality=90, subsampling=2),
        encoded(grey, "JPEG", quality=90, exif=exif),
        encoded(grey, "PNG"),
        encoded(grey.astype(np.uint16) * 16, "PNG"),
        encoded(grey, "BMP"),
        encoded(np.stack([grey] * 3, axis=2), "WEBP", lossless=True),
        encoded(np.rot90(grey).copy(), "PNG"),
        encoded(255 - grey, "PNG"),
        *(phantom_file(number, seed=2) for number in range(20)),
        phantom_file(ViewPosition="LL"),
        phantom_file(Modality="CT"),
        phantom_file(PhotometricInterpretation="MONOCHROME1"),
    ]
    with opened(browser, (folder / "index.html").as_uri()) as (tab, asked, complaints):
        assert_judged_alike(judged(tab, files), files, resnet)
        bad = {
            "tiff": encoded(grey, "TIFF"),
            "corrupt": encoded(grey, "JPEG")[:900],
            "empty": b"",
            "multi_frame": encoded(grey, "WEBP", save_all=True, append_images=[PIL.Image.fromarray(255 - grey)]),
        }
        found = judged(tab, list(bad.values()))
        assert {name: answer.get("problem") for name, answer in zip(bad, found, strict=True)} == {name: name for name in bad}
        assert asked == [(folder / "index.html").as_uri()], "the page asks for nothing but itself"
        assert complaints == []


def test_the_page_cannot_send_anything(browser: Browser, folder: Path) -> None:
    with served(folder) as address, opened(browser, address) as (tab, _, complaints):
        assert complaints == []
        tries = """() => Promise.all([
          fetch("/index.html").then(() => "sent", () => "refused"),
          new Promise((resolve) => {
            const image = new Image();
            Object.assign(image, { onload: () => resolve("sent"), onerror: () => resolve("refused"), src: "http://127.0.0.1:9/?x" });
          }),
          new Promise((resolve) => {
            try {
              const socket = new WebSocket("ws://127.0.0.1:9/");
              Object.assign(socket, { onopen: () => resolve("sent"), onerror: () => resolve("refused") });
            } catch {
              resolve("refused");
            }
          }),
          import("/sw.js").then(() => "sent", () => "refused"),
          new Promise((resolve) => {
            const script = document.createElement("script");
            script.textContent = "globalThis.wasRun = true";
            document.body.append(script);
            resolve(globalThis.wasRun ? "sent" : "refused");
          }),
        ])"""
        assert tab.evaluate(tries) == ["refused"] * 5
        assert any("Content Security Policy" in text for text in complaints)


def _screenshot(tab: Tab, name: str) -> None:
    place = os.environ.get("PNEUMOFED_SCREENSHOTS")
    if place:
        tab.screenshot(path=str(Path(place) / f"{name}.png"))


def test_on_a_phone_both_languages_say_everything_and_a_thumb_reaches_the_buttons(browser: Browser, folder: Path) -> None:
    with opened(browser, (folder / "index.html").as_uri(), **PHONE) as (tab, _, complaints):
        _screenshot(tab, "start-en")
        held = [
            ("good.dcm", phantom_file(0, PatientAge="007Y", ViewPosition="PA")),
            ("adult.dcm", phantom_file(1, PatientAge="047Y", ViewPosition="PA")),
            (
                "turned.png",
                encoded(np.rot90(np.rint(255 * phantom_images(120, 1, 224)[3][0].pixels).astype(np.uint8)).copy(), "PNG"),
            ),
            ("lateral.dcm", phantom_file(2, ViewPosition="LL")),
            ("notes.txt", b"no image"),
        ]
        for count, (name, data) in enumerate(held, start=1):
            tab.set_input_files("#files", {"name": name, "mimeType": "application/octet-stream", "buffer": data})
            tab.wait_for_function("(n) => document.querySelectorAll('.result').length === n", arg=count)
            tab.evaluate("scrollTo(0, 0)")
            _screenshot(tab, f"{Path(name).stem}-en")
        words = {name: tab.inner_text(f".result:has-text('{name}')") for name, _ in held}
        assert "Judged for this population: children of 2 to 11 years" in words["good.dcm"]
        assert "Not judged for this population: adults of 18 to 64 years" in words["adult.dcm"]
        assert "The file says that it is no frontal view" in words["lateral.dcm"] and "%" not in words["lateral.dcm"]
        assert "Cannot judge" in words["turned.png"]
        assert "This is no DICOM" in words["notes.txt"]
        assert "Research use only" in tab.inner_text("footer")
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing lies beside the screen"
        for selector in ("#language", ".choose", "#clear"):
            box = tab.locator(selector).bounding_box()
            assert box and box["height"] >= 44 and box["width"] >= 44, selector
        choose = tab.locator(".choose").bounding_box()
        assert choose and choose["y"] > 844 / 2, "the button lies where the thumb is"
        tab.tap("#language")
        assert tab.get_attribute("html", "lang") == "zh-Hans"
        for name, _ in held:
            tab.locator(f".result:has-text('{name}')").scroll_into_view_if_needed()
            _screenshot(tab, f"{Path(name).stem}-zh")
        text = tab.inner_text("main")
        assert (
            "模型未在此类人群中评估" in text
            and "无法判断" in text
            and "文件标明不是正位片" in text
            and "仅供研究使用" in tab.inner_text("footer")
        )
        assert not any(word in text for word in ("web.", "fact.", "error.", "Judged", "Cannot"))
        tab.locator(".about").scroll_into_view_if_needed()
        _screenshot(tab, "about-zh")
        tab.tap("#clear")
        assert tab.locator(".result").count() == 0
        assert complaints == []


def test_from_a_server_the_page_can_be_installed_and_then_opens_without_it(browser: Browser, folder: Path) -> None:
    context: BrowserContext = browser.new_context(**PHONE)
    tab = context.new_page()
    with served(folder) as address:
        tab.goto(address)
        tab.wait_for_selector("#offline:not([hidden])", timeout=60_000)
        devtools = context.new_cdp_session(tab)
        manifest = devtools.send("Page.getAppManifest")
        assert manifest["url"].endswith("manifest.json") and manifest["errors"] == []
        problems = {error["errorId"] for error in devtools.send("Page.getInstallabilityErrors")["installabilityErrors"]}
        assert problems <= {"in-incognito"}, "a browser's test profile is incognito"
    for name in ("", "index.html"):  # the server is gone
        tab.goto(address + name)
        tab.wait_for_selector("body[data-state=ready]", timeout=60_000)
        assert judged(tab, [phantom_file()])[0]["verdict"] in ("pneumonia", "normal", "cannot judge")
    context.close()


def test_a_file_that_was_changed_on_its_way_is_not_kept(browser: Browser, folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "page"
    shutil.copytree(folder, changed)
    page = changed / "index.html"
    page.write_bytes(page.read_bytes().replace(b'data-t="web.words"', b'data-t="web.title"', 1))
    with served(changed) as address, opened(browser, address) as (tab, _, __):
        tab.wait_for_function(GONE)
        assert not any(tab.evaluate(KEPT))
        assert tab.is_hidden("#offline")


@pytest.mark.parametrize("slower", [1, 4, 6])
def test_milliseconds_an_image_and_megabytes(
    browser: Browser, folder: Path, slower: int, capsys: pytest.CaptureFixture[str]
) -> None:
    context = browser.new_context(**PHONE)
    tab = context.new_page()
    context.new_cdp_session(tab).send("Emulation.setCPUThrottlingRate", {"rate": slower})
    tab.goto((folder / "index.html").as_uri())
    tab.wait_for_selector("body[data-state=ready]", timeout=120_000)
    start = tab.evaluate("pneumofed.openModel().then(({ milliseconds }) => milliseconds)")
    times = [answer["milliseconds"] for answer in judged(tab, [phantom_file(number) for number in range(6)])][1:]
    by_step = {step: float(np.median([one[step] for one in times])) for step in times[0]}
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    with capsys.disabled():
        sys.stdout.write(f"CPU / {slower}: start {start:.0f} ms, image {by_step} ms, page {megabytes:.1f} MB\n")
    assert megabytes < 32
    assert sum(by_step.values()) < 3000 * slower
    context.close()


@pytest.fixture(scope="module")
def kaggle() -> Path:
    place = os.environ.get("PNEUMOFED_CHEST_XRAY", "")
    if not place:
        pytest.skip("PNEUMOFED_CHEST_XRAY does not name the folder of the Kaggle set")
    return Path(place)


def _files(folder: Path, count: int) -> list[Path]:
    return [path for kind in ("NORMAL", "PNEUMONIA") for path in sorted((folder / kind).iterdir())[:count]]


def test_200_real_radiographs_are_seen_and_judged_as_python_does(
    browser: Browser, runtime: WebRuntime, kaggle: Path, tmp_path: Path
) -> None:
    """At 128 pixels, so that each is scaled; the reference is of other patients, and a tenth of the likes of it is refused."""
    reference = _files(kaggle / "train", 100)
    labels = np.array([int(path.parent.name == "PNEUMONIA") for path in reference])
    bundle = resnet_bundle(tmp_path / "bundle", [read_image(path) for path in reference], labels, 128)
    folder = write_page(bundle, runtime, tmp_path / "page").folder
    files = [path.read_bytes() for path in _files(kaggle / "test", 100)]
    assert len(files) == 200
    turned = [encoded(np.rot90(np.rint(255 * decode_image(data).pixels).astype(np.uint8)).copy(), "PNG") for data in files[::20]]
    with opened(browser, (folder / "index.html").as_uri()) as (tab, _, complaints):
        found = judged(tab, [*files, *turned])
        assert_judged_alike(found, [*files, *turned], bundle)
        assert complaints == []
    verdicts = {answer["verdict"] for answer in found}
    assert verdicts == {"pneumonia", "normal", "cannot judge"}
