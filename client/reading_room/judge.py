"""What a worker does with a file: read, judged by the bundle's model, and made ready for the viewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from client.explain.fast import quick_focus
from client.reading_room.reading import ORIGINAL, JudgedFile, Viewing, header_of, map_area, write_viewing
from client.reading_room.workers import ImageJob, JobOutcome
from common.errors import ImageError
from common.image_types import Image, Window
from common.model_bundle.judgement import Judgement

if TYPE_CHECKING:  # it loads ONNX Runtime
    from common.model_bundle.predictor import Predictor


@dataclass(frozen=True)
class FileJudge:
    """Reads and judges files with one model."""

    predictor: Predictor

    def __call__(self, job: ImageJob) -> JobOutcome:
        """What came of the job."""
        try:
            read = self.predictor.read(job.folder / ORIGINAL)
        except ImageError as error:
            return error
        (judgement,) = self.predictor.judge([read.image], [job.folder.name])
        viewing = self._viewing(read.image, judgement, job.explain)
        window = write_viewing(job.folder, read.image, judgement, viewing) if job.keep else Window(0.5, 1.0)
        return JudgedFile(header_of(read), read.image.info, window, judgement, viewing)

    def _viewing(self, image: Image, judgement: Judgement, explain: bool) -> Viewing:
        height, width = image.pixels.shape
        fit = self.predictor.manifest.preprocessing.fit
        found = judgement.prediction.activation_map if judgement.prediction else None
        warnings = quick_focus(image.pixels, found, fit).warnings if explain and found is not None else ()
        shown = None if found is None else evidence(found)
        return Viewing(shown, map_area(height, width, fit), tuple(warning.name.lower() for warning in warnings))


def load_file_judge(bundle: Path, trusted: Sequence[Path] | None, precision: Literal["float32", "int8"]) -> FileJudge:
    """A reader with the bundle's model, on one thread: the room has a process for each core.

    Raises:
        BundleError: the bundle was changed.
        ConfigError: a key cannot be read.
    """
    from common.keys import read_public_key
    from common.model_bundle.bundle import open_bundle
    from common.model_bundle.predictor import Predictor

    keys = None if trusted is None else [read_public_key(path) for path in trusted]
    return FileJudge(Predictor(open_bundle(bundle, keys), precision, threads=1))


def evidence(activation_map: np.ndarray) -> np.ndarray:
    """float32 [h, w] in [0, 1]: the evidence for pneumonia in parts of the strongest evidence of the image, for or against.

    So the map of an image in which nothing speaks for pneumonia stays dark, instead of showing its least doubt in the brightest colour.
    """
    strongest = float(np.abs(activation_map).max())
    if not strongest > 0:
        return np.zeros_like(activation_map, dtype=np.float32)
    return np.clip(activation_map / strongest, 0, 1).astype(np.float32)
