"""What a worker does with an uploaded file: it is read, judged, with clinical values where some are known, and made ready to be viewed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pneumofed.common.errors import ImageError
from pneumofed.common.imaging.types import Image, Window
from pneumofed.common.model_bundle.suitability import Judgement
from pneumofed.common.ops.study_code import is_study_code
from pneumofed.inference.explain.focus import quick_focus
from pneumofed.inference.predict.clinical_table import with_stated
from pneumofed.inference.reading_room.clinical import Values, view_evidence
from pneumofed.inference.reading_room.viewing import (
    ORIGINAL_FILE,
    JudgedFile,
    Viewing,
    evidence,
    header_of,
    map_area,
    write_viewing,
)

if TYPE_CHECKING:
    from pneumofed.common.model_bundle.bundle import Bundle
    from pneumofed.common.model_bundle.predictor import Predictor, Radiograph
    from pneumofed.common.models.fusion import ClinicalNetwork


@dataclass(frozen=True)
class ImageJob:
    """The file `original` in `folder`, and what is asked about it.

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
class FileJudge:
    """Reads and judges files with one model.

    Attributes:
        predictor: of the model.
        network: in PyTorch, of a model that takes clinical values, to tell what an answer rests on; None where that cannot be told.
    """

    predictor: Predictor
    network: ClinicalNetwork | None = None

    def __call__(self, job: ImageJob) -> JudgedFile | ImageError:
        """What came of the job."""
        try:
            read = self.predictor.read(job.folder / ORIGINAL_FILE)
        except ImageError as error:
            return error
        values = self._values(job, read)
        (judgement,) = self.predictor.judge([read.image], [job.folder.name], [values])
        viewing = self._viewing(read.image, judgement, job.explain)
        window, name = write_viewing(job.folder, read.image, judgement, viewing) if job.keep else (Window(0.5, 1.0), "")
        evidence = self._evidence(read.image, values, judgement) if job.evidence else None
        return JudgedFile(header_of(read), read.image.info, window, judgement, viewing, name, values, evidence)

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


def load_file_judge(bundle: Path, trusted: Sequence[Path] | None, precision: Literal["float32", "int8"]) -> FileJudge:
    """Loads the bundle's model to judge files on one thread: the room has a process for each core.

    Args:
        bundle: its folder.
        trusted: files of public keys of who may sign it; None checks the signature only against the bundle's own key.
        precision: of the ONNX graph.

    Raises:
        BundleError: the bundle was changed.
        ConfigError: a key cannot be read.
    """
    from pneumofed.common.model_bundle.bundle import load_bundle
    from pneumofed.common.model_bundle.predictor import Predictor
    from pneumofed.common.wire.keys import read_public_key

    keys = None if trusted is None else [read_public_key(path) for path in trusted]
    opened = load_bundle(bundle, keys)
    return FileJudge(Predictor(opened, precision, threads=1), load_clinical_network(opened))


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
