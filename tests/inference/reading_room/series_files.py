"""Drawn CT series as files in memory, and a room whose model judges CT."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from httpx import Response
from pydicom import dcmread

from pneumofed.common.model_bundle.bundle import Bundle, load_bundle
from pneumofed.simulation.phantoms.ct_sets import draw_ct, encode_series, write_nifti
from pneumofed.simulation.phantoms.scanners import Examination
from tests.inference.reading_room.stage import Stage
from tests.tiny import folder_of_process
from tests.volume_bundles import GRID, make_volume_bundle, patients


@lru_cache
def volume_bundle() -> Bundle:
    return load_bundle(make_volume_bundle(folder_of_process() / "bundle"), None)


def ct_stage(path: Path, **settings: Any) -> Stage:
    return Stage(path, model=volume_bundle(), **settings)


@lru_cache
def series_files(number: int = 0, patient: str = "") -> tuple[bytes, ...]:
    """The files of a series of 16 slices, from the head downward."""
    drawn = patients(80)[number]
    examination = Examination(
        f"series {number} {patient}", "Phantom", True, patient=patient or f"P{number}", sex=drawn.sex, age_years=40.0
    )
    return tuple(encode_series(draw_ct(drawn, "test", 0, GRID), GRID, examination))


def nifti_file(folder: Path, number: int = 0, ending: str = ".nii.gz") -> bytes:
    path = folder / f"drawn{ending}"
    write_nifti(draw_ct(patients(80)[number], "test", 0, GRID), GRID, path)
    return path.read_bytes()


def zip_of(files: Iterable[bytes], name: str = "study/series/{}.dcm") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, file in enumerate(files):
            archive.writestr(name.format(number), file)
    return buffer.getvalue()


def edited(files: Iterable[bytes], **tags: Any) -> list[bytes]:
    """The files with other tags."""
    found = []
    for file in files:
        dataset, buffer = dcmread(io.BytesIO(file)), io.BytesIO()
        for keyword, value in tags.items():
            setattr(dataset, keyword, value)
        dataset.save_as(buffer)
        found.append(buffer.getvalue())
    return found


def one_of(answer: Response) -> dict[str, Any]:
    """The only thing that came of an upload."""
    assert answer.status_code == 200, answer.text
    [found] = answer.json()["files"]
    return dict(found)
