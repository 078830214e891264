"""A virtual hospital's archive: its part of a data set as DICOM files of one virtual scanner, drawn once and kept."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pneumofed.common.data.manifest import ImageRecord, Manifest, read_manifest, write_manifest
from pneumofed.common.errors import ImageError, PneumofedError
from pneumofed.common.files import atomic_write
from pneumofed.common.imaging.images import read_image
from pneumofed.common.imaging.types import MIN_SIDE_PX
from pneumofed.common.seeds import numpy_generator
from pneumofed.simulation.phantoms.anatomy import Map
from pneumofed.simulation.phantoms.image import PHANTOM_MANUFACTURER, burn_in, is_phantom, mark_folder
from pneumofed.simulation.phantoms.scanners import Examination, VirtualScanner, apply, encode_dicom, make_patient_id

_ARCHIVE_VERSION = 2
"""To be raised whenever `apply` or the files change, so that older archives are drawn anew."""


def render_archive(manifest: Manifest, scanner: VirtualScanner, folder: Path, seed: int) -> Manifest:
    """Renders the archive of one virtual hospital: every image of its manifest as its scanner shows it, as DICOM files.

    Guarantees:
        The rows keep their order, patients and labels; only path and manufacturer change.
        Pure in the image files, the scanner and `seed`, wherever the files lie and in whatever order. The files of phantoms have
        the patient's number, sex, age and view from their row too. Those of other images have nothing of theirs, so that copies
        of an image stay copies, and no patient is named.
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


def _render(record: ImageRecord, scanner: VirtualScanner, folder: Path, seed: int, phantoms: set[Path]) -> ImageRecord:
    """`record` with its picture rendered into `folder`, or as it was if its file cannot be read."""
    is_drawn = record.path.parent in phantoms
    try:
        data = record.path.read_bytes()
    except OSError:
        return record
    digest = hashlib.sha256(data).hexdigest()
    row = repr(replace(record, path=Path(), label="")) if is_drawn else ""
    name = hashlib.sha256((digest + _scanner_text(scanner, seed) + row).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    rendered = replace(
        record, path=folder / f"{name}.dcm", manufacturer=f"{PHANTOM_MANUFACTURER}, {scanner.name}" if is_drawn else scanner.name
    )
    if not rendered.path.exists():
        try:
            image = read_image(record.path)
        except ImageError:
            return record
        pixels = apply(_shrink(image.pixels, scanner.longest_side_px), scanner, numpy_generator("noise", seed, digest))
        ratio = image.pixels.size / len(data) if image.info.format == "jpeg" else 0.0
        examination = _examine(rendered, scanner, is_drawn, ratio)
        with atomic_write(rendered.path) as file:
            file.write(encode_dicom(burn_in(pixels) if is_drawn else pixels, examination))
    return rendered


def _examine(rendered: ImageRecord, scanner: VirtualScanner, is_drawn: bool, lossy_ratio: float) -> Examination:
    known = Examination(
        image=rendered.path.stem,
        manufacturer=rendered.manufacturer or "",
        is_drawn=is_drawn,
        monochrome1=scanner.monochrome1,
        lossy_ratio=lossy_ratio,
    )
    if not is_drawn:
        return known
    view, sex = rendered.view or "", rendered.sex or ""
    return replace(known, patient=make_patient_id(rendered.patient), view=view, sex=sex, age_years=rendered.age_years)


def _shrink(pixels: Map, longest_side_px: int) -> Map:
    """`pixels` with a longer side of at most `longest_side_px` and the same aspect ratio."""
    factor = longest_side_px / max(pixels.shape)
    if factor >= 1.0:
        return pixels
    height, width = (max(MIN_SIDE_PX, round(side * factor)) for side in pixels.shape)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _scanner_text(scanner: VirtualScanner, seed: int) -> str:
    return json.dumps([_ARCHIVE_VERSION, seed, asdict(scanner)], sort_keys=True)


def _archive_key(manifest: Manifest, scanner: VirtualScanner, seed: int) -> str:
    """Changes with the rows, with any image file's size or time of change, with the scanner and with the seed."""
    key = hashlib.sha256(_scanner_text(scanner, seed).encode())
    for record in manifest.records:
        try:
            state = record.path.stat()
            seen = f"{state.st_size} {state.st_mtime_ns}"
        except OSError:
            seen = "unreadable"
        others = repr(record.others) if record.others else ""
        key.update(f"{record!r} {seen}{others}\n".encode("utf-8", errors="surrogateescape"))
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
