"""What a worker does with an uploaded file or CT series: it is read, judged, with clinical values where known, and made ready to view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.types import MAX_VOLUME_BYTES, Image, Window
from pneumofed.common.imaging.volumes import Volume, field_of_view, is_nifti, read_volume
from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.common.ops.study_code import is_study_code
from pneumofed.inference.explain.focus import MIN_CELLS, Misplaced, quick_focus
from pneumofed.inference.predict.clinical_table import with_stated
from pneumofed.inference.reading_room.clinical import Values, view_evidence
from pneumofed.inference.reading_room.image_facts import says_ct
from pneumofed.inference.reading_room.series import kind_of, unpack_zip, write_series
from pneumofed.inference.reading_room.viewing import (
    ORIGINAL_FILE,
    JudgedFile,
    Viewing,
    evidence,
    header_of,
    map_area,
    original_of,
    write_viewing,
)

if TYPE_CHECKING:
    from pneumofed.common.model_bundle.bundle import Bundle
    from pneumofed.common.model_bundle.manifest import OperatingPoint
    from pneumofed.common.model_bundle.predictor import Predictor, Radiograph
    from pneumofed.common.models.fusion import ClinicalNetwork

PICTURES = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
"""Pillow's names of what a radiograph may be and a CT series never is."""


@dataclass(frozen=True)
class ImageJob:
    """The file `original` in `folder`, or the CT series there, and what is asked about it.

    Attributes:
        folder: of the file.
        keep: what the viewer needs is written beside it.
        explain: it is found out where the map lies, which takes longer than the judgement.
        values: clinical values, float32 [K]; None where none were given.
        stated: age, sex and view that the file states are taken where `values` has none.
        evidence: it is computed what image and values add to the answer, which takes as long as some 150 judgements.
    """

    folder: Path
    keep: bool = False
    explain: bool = False
    values: Values | None = field(default=None, repr=False, compare=False)
    stated: bool = True
    evidence: bool = False


@dataclass(frozen=True)
class SeriesLimits:
    """What one CT series may cost: `files` of it, `unpacked_bytes` of an archive that holds it, `voxel_bytes` in memory, 2 a voxel."""

    files: int = 2048
    unpacked_bytes: int = 2**30
    voxel_bytes: int = MAX_VOLUME_BYTES


@dataclass(frozen=True)
class FileJudge:
    """Reads and judges files with one model.

    Attributes:
        predictor: of the model.
        network: in PyTorch, of a model that takes clinical values, to tell what an answer rests on; None where that cannot be told.
        limits: of a CT series, where the model judges these.
    """

    predictor: Predictor
    network: ClinicalNetwork | None = None
    limits: SeriesLimits = SeriesLimits()

    def __call__(self, job: ImageJob) -> JudgedFile | ImageError:
        """What came of the job."""
        try:
            if self.predictor.takes_volumes:
                return self._judge_series(job)
            read = _read_radiograph(self.predictor, job.folder / ORIGINAL_FILE)
        except ImageError as error:
            return error
        values = self._values(job, read)
        (judgement,) = self.predictor.judge([read.image], [job.folder.name], [values])
        viewing = self._viewing(read.image, judgement, job.explain)
        window, name = write_viewing(job.folder, read.image, judgement, viewing) if job.keep else (Window(0.5, 1.0), "")
        evidence = self._evidence(read.image, values, judgement) if job.evidence else None
        return JudgedFile(header_of(read), read.image.info, window, judgement, viewing, name, values, evidence)

    def _judge_series(self, job: ImageJob) -> JudgedFile:
        from pneumofed.common.data.cache import image_digest
        from pneumofed.common.model_bundle.predictor import Radiograph
        from pneumofed.common.model_bundle.series import as_input, read_series_header

        path, digest = original_of(job.folder), ""
        if path.is_file() and kind_of(path) == "zip":
            unpack_zip(job.folder, self.limits.files, self.limits.unpacked_bytes)
            path = original_of(job.folder)
            digest = image_digest(path)
        _refuse_picture(path)
        volume = read_volume(path, max_bytes=self.limits.voxel_bytes)
        header = None if is_nifti(path) else read_series_header(path)
        image = as_input(volume, self.predictor.manifest.preprocessing.image, header)
        (judgement,) = self.predictor.judge([image], [job.folder.name])
        viewing = _view_series(volume, judgement)
        window, name = write_series(job.folder, volume, image, judgement, viewing) if job.keep else (Window(0.5, 1.0), "")
        return JudgedFile(header_of(Radiograph(image, header)), image.info, window, judgement, viewing, name, sha256=digest)

    def _values(self, job: ImageJob, read: Radiograph) -> Values | None:
        schema = self.predictor.clinical
        if schema is None:
            return None
        values = None if job.values is None or np.isnan(job.values).all() else job.values
        return with_stated(values, read.header, schema) if job.stated and read.header else values

    def _evidence(self, image: Image, values: Values | None, judgement: Judgement) -> dict[str, Any] | None:
        schema = self.predictor.clinical
        if self.network is None or schema is None or values is None or judgement.prediction is None:
            return None
        import torch

        from pneumofed.inference.explain.clinical import explain_jointly

        square = torch.from_numpy(self.predictor.prepare(image))[None, None]
        return view_evidence(explain_jointly(self.network, square, values, schema, prediction=judgement.prediction))

    def _viewing(self, image: Image, judgement: Judgement, explain: bool) -> Viewing:
        height, width = image.pixels.shape
        fit = self.predictor.manifest.preprocessing.fit
        found = judgement.prediction.activation_map if judgement.prediction else None
        warnings = quick_focus(image.pixels, found, fit).warnings if explain and found is not None else ()
        shown = None if found is None else evidence(found)
        return Viewing(shown, map_area(height, width, fit), tuple(warning.name.lower() for warning in warnings))


def _read_radiograph(predictor: Predictor, path: Path) -> Radiograph:
    """The radiograph at `path`.

    Raises:
        ImageError: it cannot be used; CT_IMAGE of a slice or a series of CT, which no model of radiographs judges.
    """
    try:
        read = predictor.read(path)
    except ImageError as error:
        if error.reason is SkipReason.MULTI_FRAME and says_ct(path):
            raise ImageError(SkipReason.CT_IMAGE) from None
        raise
    if read.image.info.modality == "CT":
        raise ImageError(SkipReason.CT_IMAGE)
    return read


def _refuse_picture(path: Path) -> None:
    """Refuses a picture by its content, in the place of a sentence about slices that it has not.

    Raises:
        ImageError: NOT_CT of JPEG, PNG, TIFF, BMP or WebP.
    """
    if not path.is_file() or is_nifti(path):
        return
    try:
        with PIL.Image.open(path, formats=PICTURES) as picture:
            kind = picture.format
    except Exception:  # no picture, or a damaged one: what reads series says what is wrong with it
        return
    raise ImageError(SkipReason.NOT_CT, f"a {kind} picture")


def _view_series(volume: Volume, judgement: Judgement) -> Viewing:
    """The map of a series, [d, h, w], which covers the model's field of view. Lungs and marks are found in radiographs only."""
    found = judgement.prediction.activation_map if judgement.prediction else None
    span, (top, height), (left, width) = field_of_view(volume)
    if found is None:
        return Viewing(None, (left, top, width, height), span=span)
    shown = evidence(found)
    warning = Misplaced.EMPTY if not shown.any() else Misplaced.TOO_COARSE if min(shown.shape[1:]) < MIN_CELLS else None
    return Viewing(shown, (left, top, width, height), (warning.name.lower(),) if warning else (), span)


def load_file_judge(
    bundle: Path,
    trusted: Sequence[Path] | None,
    precision: Literal["float32", "int8"],
    limits: SeriesLimits,
    threshold: OperatingPoint,
) -> FileJudge:
    """Loads the bundle's model to judge files on one thread: the room has a process for each core.

    Args:
        bundle: its folder.
        trusted: files of public keys of who may sign it; None checks the signature only against the bundle's own key.
        precision: of the ONNX graph.
        limits: of a CT series.
        threshold: that decides, the bundle's or the hospital's own.

    Raises:
        BundleError: the bundle was changed.
        ConfigError: a key cannot be read.
    """
    from pneumofed.common.model_bundle.bundle import load_bundle
    from pneumofed.common.model_bundle.predictor import Predictor
    from pneumofed.common.wire.keys import read_public_key

    keys = None if trusted is None else [read_public_key(path) for path in trusted]
    opened = load_bundle(bundle, keys).deciding_at(threshold)
    return FileJudge(Predictor(opened, precision, threads=1), load_clinical_network(opened), limits)


def load_clinical_network(bundle: Bundle) -> ClinicalNetwork | None:
    """Loads the network in PyTorch, on one thread; None where it takes no clinical values, or is a study's own, whose code is not run here.

    Args:
        bundle: opened, hence checked.

    Raises:
        BundleError: its weights do not fit.
    """
    if bundle.manifest.model.clinical is None or is_study_code(bundle.manifest.model.name):
        return None
    import torch

    from pneumofed.common.models.fusion import ClinicalNetwork

    torch.set_num_threads(1)
    network = bundle.load_network()
    assert isinstance(network, ClinicalNetwork)
    return network
