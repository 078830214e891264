"""Virtual scanners: each hospital's radiographs look like its own device's (feature shift).

A profile is drawn apart from its use, so one scanner treats every image alike and only the quantum noise differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import affine_transform, gaussian_filter

from common.data.atomic import atomic_write
from common.data.manifest import ImageRecord, Manifest, read_manifest, write_manifest
from common.errors import ImageError, PneumofedError
from common.images import MIN_SIDE_PX, read_image
from common.seeds import numpy_generator
from simulation.fields import Map, distance
from simulation.phantom_mark import MANUFACTURER, burn_in, is_phantom, mark_folder

LONGEST_SIDE_PX = 512
_SHARPENING_RADIUS = 0.012
_PENUMBRA = 0.004
_VERSION = 1
"""To be raised whenever `apply` changes, so that older archives are drawn anew."""


@dataclass(frozen=True)
class Scanner:
    """How one device renders a chest. Lengths are shares of the picture's longer side, so that they hold at any resolution.

    Attributes:
        name: goes into the manifest's manufacturer column.
        zoom: magnification about the centre; above 1 crops the border, below 1 adds black around.
        blur: standard deviation of the detector's Gaussian blur.
        sharpening: strength of the edge enhancement (unsharp mask); 0 is none.
        gamma: exponent of the tone curve; above 1 is darker.
        contrast: bend of the film curve in [-2, 1]: above 0 steeper about middle grey, below 0 flatter.
        brightness: added to all grey values.
        vignetting: loss of light in the corners, in [0, 1].
        noise: standard deviation of the quantum noise at full brightness, where fewest quanta arrive.
        collimation: width of the black border of the collimator.
        bits: grey values are rounded to 2^bits steps.
        longest_side_px: resolution of the stored pictures.
    """

    name: str
    zoom: float = 1.0
    blur: float = 0.0
    sharpening: float = 0.0
    gamma: float = 1.0
    contrast: float = 0.0
    brightness: float = 0.0
    vignetting: float = 0.0
    noise: float = 0.0
    collimation: float = 0.0
    bits: int = 8
    longest_side_px: int = LONGEST_SIDE_PX


_RANGES = {
    "zoom": (0.92, 1.12),
    "blur": (0.0, 0.012),
    "sharpening": (0.0, 1.2),
    "gamma": (0.65, 1.55),
    "contrast": (-0.8, 0.9),
    "brightness": (-0.08, 0.08),
    "vignetting": (0.0, 0.35),
    "noise": (0.003, 0.05),
    "collimation": (0.0, 0.05),
}


def draw_scanner(index: int, seed: int) -> Scanner:
    """The scanner of hospital `index`; pure in its arguments, every property uniform in a range that leaves a chest legible."""
    rng = numpy_generator("scanner", seed, index)
    values = {name: float(rng.uniform(low, high)) for name, (low, high) in _RANGES.items()}
    bits, side = int(rng.choice((6, 7, 8))), int(rng.choice((256, 384, LONGEST_SIDE_PX)))
    return Scanner(f"virtual scanner {index}", **values, bits=bits, longest_side_px=side)


def apply(pixels: Map, scanner: Scanner, rng: np.random.Generator) -> Map:
    """`pixels`, float32 [H, W] in [0, 1], as `scanner` shows them: the same shape and range. `rng` draws the noise alone."""
    longer = max(pixels.shape)
    image = gaussian_filter(_magnify(pixels, scanner.zoom), scanner.blur * longer)
    image = image + scanner.sharpening * (image - gaussian_filter(image, _SHARPENING_RADIUS * longer))
    image = _tone(np.clip(image, 0.0, 1.0), scanner)
    radius, border = _geometry(*pixels.shape)
    image = image * (1.0 - scanner.vignetting * np.square(radius))
    quanta = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + scanner.noise * np.sqrt(np.maximum(image, 0.02)) * quanta
    image = image * np.clip((border - scanner.collimation) / _PENUMBRA + 1.0, 0.0, 1.0)
    steps = np.float32(2**scanner.bits - 1)
    return (np.round(np.clip(image, 0.0, 1.0) * steps) / steps).astype(np.float32)


def render_archive(manifest: Manifest, scanner: Scanner, folder: Path, seed: int) -> Manifest:
    """The archive of one virtual hospital: every image of `manifest` through `scanner`, as PNG in `folder`.

    Guarantees:
        The rows keep their order, patients and labels; only path and manufacturer change.
        Pure in the image files, the scanner and `seed`, wherever the files lie and in whatever order.
        Work that is already there is not done again, also after an interruption.
        A file that cannot be read keeps its row as it was, so that the site's data report counts it.
        Phantoms stay marked as phantoms.

    Args:
        manifest: the hospital's images; the files are left untouched.
        scanner: the hospital's device.
        folder: the hospital's own; made if need be. Holds `images/`, `manifest.csv` and `scanner.json` afterwards.
        seed: of the quantum noise.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    folder = folder.absolute()
    key = _archive_key(manifest, scanner, seed)
    if _is_rendered(folder, key):
        return read_manifest(folder / "manifest.csv")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "scanner.json").unlink(missing_ok=True)
    phantoms = {place for place in {record.path.parent for record in manifest.records} if is_phantom(place)}
    if phantoms:
        mark_folder(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        job = partial(_render, scanner=scanner, folder=folder / "images", seed=seed, phantoms=phantoms)
        rendered = Manifest(tuple(pool.map(job, manifest.records)))
    write_manifest(rendered, folder / "manifest.csv")
    (folder / "scanner.json").write_text(json.dumps({"key": key, "scanner": asdict(scanner)}, indent=2), encoding="utf-8")
    return rendered


def _magnify(pixels: Map, zoom: float) -> Map:
    centre = (np.asarray(pixels.shape) - 1.0) / 2.0
    return affine_transform(pixels, np.full(2, 1.0 / zoom), offset=centre * (1.0 - 1.0 / zoom), order=1, mode="constant")


def _tone(image: Map, scanner: Scanner) -> Map:
    """Gamma, then v + c v (1 - v) (2 v - 1), monotone for c in [-2, 1] with slope 1 + c / 2 in the middle, then brightness."""
    curved = image**scanner.gamma
    curved = curved + scanner.contrast * curved * (1.0 - curved) * (2.0 * curved - 1.0)
    return np.clip(curved + scanner.brightness, 0.0, 1.0)


@lru_cache(maxsize=16)
def _geometry(height: int, width: int) -> tuple[Map, Map]:
    """Distance from the centre (1 in the corners) and from the nearest border (as a share of the longer side), each [H, W]."""
    row, column = (np.arange(height, dtype=np.float32) + 0.5)[:, None], (np.arange(width, dtype=np.float32) + 0.5)[None, :]
    radius = distance(2.0 * row / height - 1.0, 2.0 * column / width - 1.0) / np.float32(np.sqrt(2.0))
    border = np.minimum(np.minimum(row, height - row), np.minimum(column, width - column)) / max(height, width)
    return radius, border


def _render(record: ImageRecord, scanner: Scanner, folder: Path, seed: int, phantoms: set[Path]) -> ImageRecord:
    """`record` with its picture rendered into `folder`, or as it was if its file cannot be read."""
    is_drawn = record.path.parent in phantoms
    try:
        digest = hashlib.sha256(record.path.read_bytes()).hexdigest()
    except OSError:
        return record
    target = folder / f"{hashlib.sha256((digest + _scanner_text(scanner, seed)).encode()).hexdigest()[:24]}.png"
    if not target.exists():
        try:
            pixels = read_image(record.path).pixels
        except ImageError:
            return record
        shown = apply(_shrink(pixels, scanner.longest_side_px), scanner, numpy_generator("noise", seed, digest))
        _write_png(burn_in(shown) if is_drawn else shown, target)
    return replace(record, path=target, manufacturer=f"{MANUFACTURER}, {scanner.name}" if is_drawn else scanner.name)


def _shrink(pixels: Map, longest_side_px: int) -> Map:
    """`pixels` with a longer side of at most `longest_side_px` and the same aspect ratio."""
    factor = longest_side_px / max(pixels.shape)
    if factor >= 1.0:
        return pixels
    height, width = (max(MIN_SIDE_PX, round(side * factor)) for side in pixels.shape)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _write_png(pixels: Map, path: Path) -> None:
    with atomic_write(path) as file:
        Image.fromarray(np.round(pixels * 255.0).astype(np.uint8)).save(file, format="PNG", compress_level=1)


def _scanner_text(scanner: Scanner, seed: int) -> str:
    return json.dumps([_VERSION, seed, asdict(scanner)], sort_keys=True)


def _archive_key(manifest: Manifest, scanner: Scanner, seed: int) -> str:
    """Changes with the rows, with any image file's size or time of change, with the scanner and with the seed."""
    key = hashlib.sha256(_scanner_text(scanner, seed).encode())
    for record in manifest.records:
        try:
            state = record.path.stat()
            seen = f"{state.st_size} {state.st_mtime_ns}"
        except OSError:
            seen = "unreadable"
        key.update(f"{record!r} {seen}\n".encode("utf-8", errors="surrogateescape"))
    return key.hexdigest()


def _is_rendered(folder: Path, key: str) -> bool:
    """Whether `folder` holds the finished archive of `key` with all its images."""
    try:
        if json.loads((folder / "scanner.json").read_text(encoding="utf-8"))["key"] != key:
            return False
        records = read_manifest(folder / "manifest.csv").records
    except (OSError, ValueError, KeyError, TypeError, PneumofedError):
        return False
    return all(record.path.exists() for record in records if record.path.is_relative_to(folder))
