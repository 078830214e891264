"""The image of one phantom: a chest with or without an opacity, in a posture, exposed and framed as a radiograph, and its mark.

An opacity is the share of the lungs' air that is gone, float32 [H, W] in [0, 1]. Bacterial pneumonia is drawn as one lobar
consolidation with soft borders and air bronchograms; viral pneumonia as bilateral interstitial lines and patches (the classic
radiographic contrast, e.g. Kermany et al. 2018, Cell 172, figure S6). Tuberculosis is drawn as the post-primary form: patches and a
thick-walled cavity in one lung's apex (e.g. Nachiappan et al. 2017, RadioGraphics 37:52). Severity runs from nearly invisible to plain.

A phantom differs from a patient's image by a word burnt into every picture (`burn_in`) and a file in every folder (`mark_folder`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import gaussian_filter

from pneumofed.simulation.phantoms.anatomy import Anatomy, Chest, Map, bump, distance, draw_chest, smooth_noise, soft_step

LEAST_SEVERITY = 0.3
"""Of an opacity: below, it could hardly be seen."""
BURNT_IN_WORD = "PHANTOM"
PHANTOM_MANUFACTURER = "phantom"
"""Manufacturer of each record of a phantom, or how it begins."""
PHANTOM_FILE = "PHANTOM.txt"
"""Marks a folder of phantoms; the text in it is `_WARNING` and what else is known of the set."""

_WARNING = """\
PHANTOM DATA. Every image in this folder and below is a drawing made by a program. It shows no patient.
Results on these images say nothing about medicine and must never stand beside results on real radiographs.
"""


@dataclass(frozen=True)
class Exposure:
    """How one radiograph is taken. Lengths in units of half the picture's height.

    Attributes:
        aspect: width over height.
        scale: magnification.
        shift_x: of the patient to the right.
        shift_y: of the patient downward.
        rotation_rad: of the patient in the picture.
        inspiration: air in the lungs relative to the patient's own.
        centre: attenuation that is shown as middle grey.
        latitude: attenuation over which the grey changes; larger is a flatter picture.
        tilt: slope of brightness from side to side, as of a turned patient or a grid off its centre.
        noise: standard deviation of the quantum noise in attenuation, where that is 1.
        blur: standard deviation of the blur.
        collimation: width of the black border.
        marker_x: place of the side marker, from the left border.
        marker_y: place of the side marker, from the top.
    """

    aspect: float
    scale: float
    shift_x: float
    shift_y: float
    rotation_rad: float
    inspiration: float
    centre: float
    latitude: float
    tilt: float
    noise: float
    blur: float
    collimation: float
    marker_x: float
    marker_y: float


EXPOSURE_RANGES: dict[str, tuple[float, float]] = {
    "aspect": (1.00, 1.30),
    "scale": (1.02, 1.20),
    "shift_x": (-0.06, 0.06),
    "shift_y": (-0.04, 0.08),
    "rotation_rad": (-0.06, 0.06),
    "inspiration": (0.80, 1.10),
    "centre": (0.80, 1.00),
    "latitude": (0.24, 0.36),
    "tilt": (-0.06, 0.06),
    "noise": (0.010, 0.035),
    "blur": (0.004, 0.010),
    "collimation": (-0.04, 0.06),
    "marker_x": (0.08, 0.16),
    "marker_y": (0.15, 1.0),
}
"""Ranges of the settings; each is drawn uniformly."""


def draw_exposure(rng: np.random.Generator) -> Exposure:
    """Draws an exposure whose every setting is uniform in its range."""
    return Exposure(**{field.name: float(rng.uniform(*EXPOSURE_RANGES[field.name])) for field in fields(Exposure)})


def draw_phantom(anatomy: Anatomy, label: str, size_px: int, rng: np.random.Generator) -> Map:
    """Draws one radiograph of a patient, not yet marked as a phantom.

    Args:
        anatomy: the patient's build.
        label: `normal`, `bacterial`, `viral` or `tuberculosis`.
        size_px: the longer side.
        rng: draws everything else: exposure, severity, place of the opacity, noise.

    Returns:
        float32 [H, W] in [0, 1].
    """
    exposure = draw_exposure(rng)
    x, y = _coordinates(exposure, size_px)
    chest = draw_chest(*_posture(x, y, exposure), anatomy, rng)
    air = chest.air * exposure.inspiration * (1.0 - _opacity(chest, label, rng))
    attenuation = chest.body - air + anatomy.vessels * chest.vessels * chest.lung
    pixels = _develop(attenuation + exposure.tilt * x, exposure, rng)
    return _frame(pixels, x, y, exposure)


def draw_lungs(anatomy: Anatomy, size_px: int, rng: np.random.Generator) -> Map:
    """Draws the lungs of the radiograph that `draw_phantom` draws from the same arguments.

    Args:
        anatomy: the patient's build.
        size_px: the longer side.
        rng: in the same state as for `draw_phantom`.

    Returns:
        float32 [H, W] in [0, 1], the share of each pixel that is lung.
    """
    exposure = draw_exposure(rng)
    return draw_chest(*_posture(*_coordinates(exposure, size_px), exposure), anatomy, rng).lung


def draw_opacity(anatomy: Anatomy, label: str, size_px: int, rng: np.random.Generator) -> Map:
    """Draws the opacity of the radiograph that `draw_phantom` draws from the same arguments: where an explanation should point.

    Args:
        anatomy: the patient's build.
        label: `normal`, `bacterial`, `viral` or `tuberculosis`.
        size_px: the longer side.
        rng: in the same state as for `draw_phantom`.

    Returns:
        float32 [H, W] in [0, 1], the share of each pixel's air that is gone; zero outside the lungs.
    """
    exposure = draw_exposure(rng)
    chest = draw_chest(*_posture(*_coordinates(exposure, size_px), exposure), anatomy, rng)
    return _opacity(chest, label, rng) * chest.lung


def bacterial(chest: Chest, severity: float, rng: np.random.Generator) -> Map:
    """Draws the opacity of one lobe's consolidation.

    Args:
        chest: whose lungs it lies in.
        severity: in [0, 1]; sets both its extent and its density.
        rng: draws its side, place and border.

    Returns:
        float32 [H, W] in [0, 1], the share of the air that is gone.
    """
    side = rng.choice((-1.0, 1.0))
    centre, reach = rng.uniform(0.15, 0.95), 0.17 + 0.25 * severity
    across = rng.uniform(0.10, 0.50)
    radius = distance(chest.hilum_distance - across, 1.1 * (chest.depth - centre))
    lobe = soft_step(reach - radius - 0.10 * _noise(chest.lung, 9, rng), 0.06)
    bronchi = 1.0 - 0.5 * chest.vessels
    return (chest.side == side) * lobe * bronchi * (0.45 + 0.50 * severity)


def viral(chest: Chest, severity: float, rng: np.random.Generator) -> Map:
    """Draws the opacity of interstitial lines and faint patches in both lungs, denser around the hila.

    Args:
        chest: whose lungs it lies in.
        severity: in [0, 1]; sets its density.
        rng: draws lines and patches.

    Returns:
        float32 [H, W] in [0, 1], the share of the air that is gone.
    """
    lines = bump(_noise(chest.lung, 32, rng), 0.35)
    patches = np.clip(_noise(chest.lung, 9, rng), 0.0, 2.0) / 2.0
    central = bump(chest.hilum_distance, 0.55)
    return severity * np.clip(0.40 * lines * (0.4 + central) + 0.80 * patches + 0.35 * central, 0.0, 1.0)


def tuberculosis(chest: Chest, severity: float, rng: np.random.Generator) -> Map:
    """Draws the opacity of an apical cavity with a thick wall, and of small patches around it.

    Args:
        chest: whose lungs it lies in.
        severity: in [0, 1]; sets the cavity's size, and its density.
        rng: draws its side, place and patches.

    Returns:
        float32 [H, W] in [0, 1], the share of the air that is gone.
    """
    side = rng.choice((-1.0, 1.0))
    depth, across, reach = rng.uniform(0.14, 0.30), rng.uniform(0.28, 0.45), 0.07 + 0.06 * severity
    radius = distance(chest.hilum_distance - across, 0.9 * (chest.depth - depth))
    wall = bump(radius - reach, 0.030)
    patches = np.clip(_noise(chest.lung, 26, rng), 0.0, 2.0) / 2.0 * bump(radius, 0.30) * (1.0 - bump(radius, 0.7 * reach))
    return (chest.side == side) * np.clip((0.35 + 0.60 * severity) * (0.9 * wall + 0.9 * patches), 0.0, 1.0)


def burn_in(pixels: Map) -> Map:
    """Returns a copy of `pixels`, float32 [H, W] in [0, 1], with the word PHANTOM in the lower left corner, white on black."""
    height, width = pixels.shape
    text = draw_text(BURNT_IN_WORD, max(8, round(max(height, width) / 18)))[:height, :width]
    marked = pixels.copy()
    marked[height - text.shape[0] :, : text.shape[1]] = text
    return marked


def mark_folder(folder: Path, details: str = "") -> None:
    """Writes the file `PHANTOM.txt`, which says that all below is phantom data.

    Args:
        folder: must exist.
        details: stand at the end of the file, for `read_details`.
    """
    (folder / PHANTOM_FILE).write_text(_WARNING + details, encoding="utf-8")


def read_details(folder: Path) -> str | None:
    """Reads the `details` that `mark_folder` wrote into `folder` itself; None where it did not."""
    file = folder / PHANTOM_FILE
    return file.read_text(encoding="utf-8").removeprefix(_WARNING) if file.is_file() else None


def is_phantom(folder: Path) -> bool:
    """Returns whether `folder` is marked as phantom data, itself or through a folder that it lies in."""
    absolute = folder.absolute()
    return any((place / PHANTOM_FILE).is_file() for place in (absolute, *absolute.parents))


@lru_cache(maxsize=64)
def draw_text(text: str, size_px: int) -> Map:
    """Draws white text on black in the font that Pillow brings.

    Args:
        text: one line.
        size_px: height of the font.

    Returns:
        float32 [h, w] in [0, 1]; kept in a cache, and so not writable.
    """
    font = ImageFont.load_default(size_px)
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("L", (math.ceil(right - left) + 4, math.ceil(bottom - top) + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), text, fill=255, font=font)
    drawn = np.asarray(image, dtype=np.float32) / np.float32(255.0)
    drawn.setflags(write=False)
    return drawn


def _opacity(chest: Chest, label: str, rng: np.random.Generator) -> Map:
    severity = float(rng.uniform(LEAST_SEVERITY, 1.0))
    if label == "normal":
        return np.zeros_like(chest.lung)
    return {"bacterial": bacterial, "viral": viral, "tuberculosis": tuberculosis}[label](chest, severity, rng)


def _coordinates(exposure: Exposure, size_px: int) -> tuple[Map, Map]:
    height, width = round(size_px / max(exposure.aspect, 1.0)), round(size_px * min(exposure.aspect, 1.0))
    row = (np.arange(height, dtype=np.float32) + 0.5) / height * 2.0 - 1.0
    column = ((np.arange(width, dtype=np.float32) + 0.5) / width * 2.0 - 1.0) * exposure.aspect
    y, x = np.meshgrid(row, column, indexing="ij")
    return x, y


def _posture(x: Map, y: Map, exposure: Exposure) -> tuple[Map, Map]:
    """The patient's own coordinates of the picture's points."""
    x, y = (x - exposure.shift_x) / exposure.scale, (y - exposure.shift_y) / exposure.scale
    cos, sin = math.cos(exposure.rotation_rad), math.sin(exposure.rotation_rad)
    return cos * x + sin * y, cos * y - sin * x


def _develop(attenuation: Map, exposure: Exposure, rng: np.random.Generator) -> Map:
    """Grey values of `attenuation`, bright where dense, with quantum noise.

    Fewer quanta pass where attenuation a is high, and the logarithm of a Poisson count has a deviation of 1 / sqrt(count), so the
    noise grows with exp(a / 2). The film's curve is a logistic of the logarithm of exposure, scaled to run from black air.
    """
    quanta = rng.standard_normal(attenuation.shape, dtype=np.float32)
    noisy = attenuation + exposure.noise * quanta * np.exp(0.5 * attenuation - 0.5)
    sharp = (noisy - exposure.centre) / exposure.latitude
    grey = 1.0 / (1.0 + np.exp(-gaussian_filter(sharp, exposure.blur * attenuation.shape[0] / 2.0)))
    black = 1.0 / (1.0 + math.exp(exposure.centre / exposure.latitude))
    return np.clip((grey - black) / (0.97 - black), 0.0, 1.0)


def _frame(pixels: Map, x: Map, y: Map, exposure: Exposure) -> Map:
    """`pixels` inside the collimator's border and with the marker R of the patient's right side."""
    columns = soft_step(exposure.aspect - np.abs(x[:1]) - exposure.collimation, 0.004)
    rows = soft_step(1.0 - np.abs(y[:, :1]) - exposure.collimation, 0.004)
    framed = pixels * rows * columns
    letter = draw_text("R", max(9, round(pixels.shape[0] / 12)))
    top, left = (round(place * pixels.shape[0] / 2.0) for place in (exposure.marker_y, exposure.marker_x))
    place = framed[top : top + letter.shape[0], left : left + letter.shape[1]]
    np.maximum(place, 0.9 * letter[: place.shape[0], : place.shape[1]], out=place)
    return framed


def _noise(like: Map, cells: int, rng: np.random.Generator) -> Map:
    """Smooth noise whose features are 1 / `cells` of the longer side of `like`."""
    longer = max(like.shape)
    height, width = like.shape
    return smooth_noise((height, width), (max(2, round(cells * height / longer)), max(2, round(cells * width / longer))), rng)
