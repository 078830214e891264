"""Writing what the user asked for beside the table: Structured Reports, and heat maps as secondary captures or PNG files."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from client.predict.answers import FileResult
from common.data.atomic import atomic_write
from common.errors import ConfigError, ImageError
from common.model_bundle.judgement import Judgement
from common.model_bundle.predictor import Predictor

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

NOT_DICOM = "no report: the image is no DICOM file"
NO_MAP = "no heat map: this network has none"
_HEADER = "not written: the image's header does not allow it"


class ArchiveWriter:
    """Writes the objects of one result after the other; one that cannot be made is noted in its result and stops nothing.

    DICOM objects are named by their SOP Instance UID, pictures by the source's name and a hash of its path; mode 0600.
    """

    def __init__(self, predictor: Predictor, reports: Path | None, overlays: Path | None) -> None:
        """
        Args:
            predictor: whose judgements they are.
            reports: folder for Structured Reports, made if missing; None for none.
            overlays: folder for heat maps, likewise.

        Raises:
            ConfigError: a folder cannot be made.
        """
        self._predictor, self._reports, self._overlays = predictor, reports, overlays
        for folder in filter(None, (reports, overlays)):
            _make_folder(folder)

    def write(self, result: FileResult) -> FileResult:
        """`result` with the names of the files that were written, or a note why one was not.

        Raises:
            ConfigError: a file cannot be written: the disk is full, or the folder is gone.
        """
        if result.judgement is None:
            return result
        try:
            return self._write_overlay(self._write_report(result, result.judgement), result.judgement)
        except OSError as error:
            raise ConfigError(f"results cannot be written ({error.strerror}); free some space, or give another folder") from None

    def _write_report(self, result: FileResult, judgement: Judgement) -> FileResult:
        if self._reports is None:
            return result
        if not result.loaded.instance:
            return replace(result, note=_join(result.note, NOT_DICOM))
        from client.predict.archive.report import make_report
        from client.predict.archive.source import read_source_header

        try:
            report = make_report(read_source_header(result.loaded.path), judgement, self._predictor)
        except (ImageError, ValueError, TypeError, AttributeError, KeyError) as error:
            return replace(result, note=_join(result.note, f"report {_HEADER}", type(error).__name__))
        return replace(result, report=str(_save(report, self._reports)))

    def _write_overlay(self, result: FileResult, judgement: Judgement) -> FileResult:
        if self._overlays is None or judgement.prediction is None:
            return result
        if judgement.prediction.activation_map is None:
            return replace(result, note=_join(result.note, NO_MAP))
        try:
            return replace(result, overlay=str(self._draw(result, judgement, self._overlays)))
        except (ImageError, ValueError, TypeError, AttributeError, KeyError) as error:
            return replace(result, note=_join(result.note, f"heat map {_HEADER}", type(error).__name__))

    def _draw(self, result: FileResult, judgement: Judgement, folder: Path) -> Path:
        from client.predict.heat import draw_heat

        path = result.loaded.path
        picture = draw_heat(self._predictor.read(path).image.pixels, judgement, self._predictor)
        if result.loaded.instance:
            from client.predict.archive.capture import make_capture
            from client.predict.archive.source import read_source_header

            return _save(make_capture(read_source_header(path), picture, self._predictor), folder)
        import PIL.Image

        target = folder / f"{path.stem}-{hashlib.sha256(bytes(path)).hexdigest()[:8]}.png"
        with atomic_write(target) as file:
            PIL.Image.fromarray(picture).save(file, "PNG")
        return target


def _save(dataset: Dataset, folder: Path) -> Path:
    target = folder / f"{dataset.SOPInstanceUID}.dcm"
    with atomic_write(target) as file:
        dataset.save_as(file, enforce_file_format=True)
    return target


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); give a folder that can be written") from None


def _join(*notes: str) -> str:
    return "; ".join(filter(None, notes))
