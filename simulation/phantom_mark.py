"""What tells a phantom from a patient: a word burnt into every picture and a file in every folder."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from simulation.fields import Map

MARK = "PHANTOM"
MANUFACTURER = "phantom"
"""Of each record of a phantom, or how it begins."""
MARKER_FILE = "PHANTOM.txt"

_WARNING = """\
PHANTOM DATA. Every image in this folder and below is a drawing made by a program. It shows no patient.
Results on these images say nothing about medicine and must never stand beside results on real radiographs.
"""


def burn_in(pixels: Map) -> Map:
    """A copy of `pixels`, float32 [H, W] in [0, 1], with the word PHANTOM in the lower left corner, white on black."""
    height, width = pixels.shape
    text = draw_text(MARK, max(8, round(max(height, width) / 18)))[:height, :width]
    marked = pixels.copy()
    marked[height - text.shape[0] :, : text.shape[1]] = text
    return marked


def mark_folder(folder: Path, details: str = "") -> None:
    """Writes the file into `folder` that says that all below is phantom data, with `details` at its end."""
    (folder / MARKER_FILE).write_text(_WARNING + details, encoding="utf-8")


def read_details(folder: Path) -> str | None:
    """The `details` that `mark_folder` wrote into `folder` itself, or None where it did not."""
    file = folder / MARKER_FILE
    return file.read_text(encoding="utf-8").removeprefix(_WARNING) if file.is_file() else None


def is_phantom(folder: Path) -> bool:
    """Whether `folder` is marked as phantom data, itself or through a folder that it lies in."""
    absolute = folder.absolute()
    return any((place / MARKER_FILE).is_file() for place in (absolute, *absolute.parents))


@lru_cache(maxsize=64)
def draw_text(text: str, size_px: int) -> Map:
    """`text` in white on black, float32 [h, w] in [0, 1], in the font that Pillow brings; not to be changed in place."""
    font = ImageFont.load_default(size_px)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (math.ceil(right - left) + 4, math.ceil(bottom - top) + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), text, fill=255, font=font)
    drawn = np.asarray(image, dtype=np.float32) / np.float32(255.0)
    drawn.setflags(write=False)
    return drawn
