"""The page's own functions, called in one Node process."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pneumofed.inference.web_model.page import STATIC

NODE = shutil.which("node")
DRIVER = Path(__file__).with_name("driver.mjs")


class PageRefusesError(Exception):
    """The page refuses the file; the text is its reason."""


class Page:
    """Functions of the page by name."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def call(self, name: str, **values: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"call": name, **values}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "problem" in answer:
            raise PageRefusesError(answer["problem"])
        assert "crash" not in answer, answer["crash"]
        return answer["value"]


@contextmanager
def running(folder: Path) -> Iterator[Page]:
    """Starts Node on a copy of the page's modules in `folder`, which says that they are ECMAScript modules."""
    assert NODE
    for path in STATIC.glob("*.js"):
        shutil.copy(path, folder)
    (folder / "package.json").write_text('{"type": "module"}')
    command = [NODE, str(DRIVER), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Page(process)
        finally:
            process.kill()


def sent(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def picture(pixels: np.ndarray) -> dict[str, Any]:
    return {"height": pixels.shape[0], "width": pixels.shape[1], "data": sent(pixels)}


def received(answer: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(answer["data"]), "<f4").reshape(answer["height"], answer["width"])


def numbers(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")
