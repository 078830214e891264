"""Judging images with a bundle, by ONNX Runtime: no torch is needed."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime

from pneumofed.common.config.classes import positive_word
from pneumofed.common.config.experiment import ClinicalConfig
from pneumofed.common.errors import BundleError
from pneumofed.common.imaging.images import fit_square, read_image
from pneumofed.common.imaging.types import Image, Window
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.calibration import pneumonia_score
from pneumofed.common.model_bundle.image_statistics import pixel_statistics
from pneumofed.common.model_bundle.manifest import NETWORK, QUANTIZED, BundleManifest, Preprocessing
from pneumofed.common.model_bundle.suitability import Inputs, Judgement, Prediction, Reason, check_suitability

if TYPE_CHECKING:
    from pneumofed.common.imaging.dicom_header import DicomHeader


Floats = npt.NDArray[np.float32]

BATCH = 16
CLINICAL_INPUT = "clinical"
"""Name of the graph's second input, where the model takes clinical values: float32 [N, K] in their own units, NaN where not known."""
WEIGHT_BITS = "weight_bits"
"""Key of the int8 graph's metadata: bits of its weights, 7 where no processor can cut off a sum of two products. Without it they are 8."""
_PRODUCT = (
    "CAg6XAoYCgF4CgF3EgF5Ig1NYXRNdWxJbnRlZ2VyEgFnWhMKAXgSDgoMCAISCAoCCAEKAggIWhMKAXcSDgoMCAMSCAoCCAgKAggBYhMKAXkSDgoMCAYSCAoCCAEKAggBQgQK"
    "ABAN"
)
"""ONNX graph of one MatMulInteger: uint8 x [1, 8], int8 w [8, 1] -> int32 y [1, 1]."""


@dataclass(frozen=True)
class Radiograph:
    """A file as `Predictor.read` gives it: the image, and for a DICOM file the identifying tags, which name a patient.

    Of a model for CT it is a volume, and the tags are those of the first file of its series.
    """

    image: Image
    header: DicomHeader | None = field(repr=False)


class Predictor:
    """A bundle's model, ready to judge. May be used by several threads at once."""

    def __init__(self, bundle: Bundle, precision: Literal["float32", "int8"] = "float32", threads: int = 0) -> None:
        """
        Args:
            bundle: opened, hence checked.
            precision: which of the bundle's two graphs.
            threads: of the CPU; 0 leaves the choice to ONNX Runtime.

        Raises:
            BundleError: the bundle has no such graph, it was changed after the bundle was opened, or this processor does not compute it
                as it was measured.
        """
        self.bundle = bundle
        self._session = open_session(bundle.read(NETWORK if precision == "float32" else QUANTIZED), threads)
        if precision == "int8" and self._session.get_modelmeta().custom_metadata_map.get(WEIGHT_BITS) != "7" and saturates():
            raise BundleError(
                f"the int8 graph of {bundle.manifest.name} has weights of 8 bits, whose sums this processor cuts off, so that it would "
                "answer otherwise than the card says: use float32, or have the bundle exported again"
            )

    @property
    def manifest(self) -> BundleManifest:
        return self.bundle.manifest

    @property
    def window(self) -> Window | None:
        """What to give `read_image` as its window."""
        window = self.manifest.preprocessing.window
        return Window(window.center, window.width) if window else None

    def read(self, path: Path) -> Radiograph:
        """The radiograph in the file `path`, through the bundle's own window if it has one; of a model for CT the volume at `path`, the
        folder of a DICOM series, a multi-frame DICOM file or a NIfTI file.

        Raises:
            ImageError: it cannot be used.
        """
        if self.takes_volumes:
            from pneumofed.common.model_bundle.series import read_series  # of CT only

            return Radiograph(*read_series(path, self.manifest.preprocessing.image))
        image = read_image(path, window=self.window)
        if image.info.format != "dicom":
            return Radiograph(image, None)
        from pneumofed.common.imaging.dicom_header import (
            read_header,  # pydicom takes a third of a second to import: only those who have DICOM pay
        )

        return Radiograph(image, read_header(path))

    def prepare(self, image: Image) -> Floats:
        """float32 [S, S] in [0, 1], what the network sees of `image`; an image whose pixels are that already stays as it is. Of a model
        for CT float32 [slices, S, S], as `read` made it.

        Raises:
            ValueError: a radiograph for a model for CT, or the reverse.
        """
        if self.takes_volumes != (image.pixels.ndim == 3):
            raise ValueError(
                f"expected {'a CT volume' if self.takes_volumes else 'a radiograph'}, got an array {image.pixels.shape}"
            )
        if self.takes_volumes:
            return image.pixels
        return model_input(image.pixels, self.manifest.preprocessing)

    @property
    def takes_volumes(self) -> bool:
        """Whether the model judges CT volumes in place of radiographs."""
        return self.manifest.preprocessing.slices > 0

    @property
    def clinical(self) -> ClinicalConfig | None:
        """The clinical values that the model takes beside an image; None where it takes none."""
        return self.manifest.model.clinical

    def judge(
        self, images: Sequence[Image], names: Sequence[str] | None = None, values: Sequence[Floats | None] = ()
    ) -> list[Judgement]:
        """One judgement for each image, in order; the same whatever else is judged with it, up to float32's last digits.

        Args:
            images: as `read` gives them.
            names: of each image, for `Judgement.image`; without them their places in `images`, from 0.
            values: float32 [K] of each image, as `common.data.clinical` reads them; None where none is known. Without them no image has
                any.

        Raises:
            ValueError: there are not as many names, or values, as images.
        """
        known = [str(place) for place in range(len(images))] if names is None else names
        if len(known) != len(images):
            raise ValueError(f"expected a name for each of {len(images)} images, got {len(known)}")
        if values and len(values) != len(images):
            raise ValueError(f"expected values for each of {len(images)} images, or none, got {len(values)}")
        found: list[Judgement] = []
        for start in range(0, len(images), BATCH):
            rows = slice(start, start + BATCH)
            found += self._judge_batch(images[rows], known[rows], list(values or [None] * len(images))[rows])
        return found

    def run(self, inputs: Floats, values: Floats | None = None) -> dict[str, Floats]:
        """The graph's outputs by name (`logits` [N, C], `features` [N, D], ...).

        Args:
            inputs: float32 [N, 1, S, S] in [0, 1], or volumes [N, 1, slices, S, S], which go one by one.
            values: clinical values, float32 [N, K]; None where none is known, or the model takes none.
        """
        names = [output.name for output in self._session.get_outputs()]
        if inputs.ndim == 5 and len(inputs) > 1:
            rows = [slice(row, row + 1) for row in range(len(inputs))]
            single = [self.run(inputs[row], None if values is None else values[row]) for row in rows]
            return {name: np.concatenate([found[name] for found in single]) for name in names}
        return dict(zip(names, self._session.run(names, graph_inputs(self._session, inputs, values)), strict=True))

    def _judge_batch(self, images: Sequence[Image], names: Sequence[str], values: Sequence[Floats | None]) -> list[Judgement]:
        squares = np.stack([self.prepare(image) for image in images])
        table = self._table(values)
        outputs = self.run(squares[:, None], table)
        statistics = pixel_statistics(squares)
        infos = [image.info for image in images]
        inputs = Inputs(squares, outputs["features"], statistics, infos, self.takes_volumes)
        finite = [bool(np.isfinite(row).all()) for row in outputs["logits"]]
        checked = check_suitability(self.manifest.suitability, inputs)
        reasons = [found.reasons or (() if finite[row] else (Reason.FAR_FROM_REFERENCE,)) for row, found in enumerate(checked)]
        predictions = self._predict(outputs)
        if table is not None:
            predictions = self._beside_image_only(predictions, squares, table)
        return [
            Judgement(
                image=names[row],
                model=self.manifest.name,
                model_digest=self.bundle.digest,
                threshold=self.manifest.threshold.value,
                calibrated=self.manifest.calibration.method != "none",
                reasons=reasons[row],
                suitability=finding.scores,
                features=outputs["features"][row],
                pixel_statistics=statistics[row],
                prediction=None if reasons[row] else predictions[row],
                population=self.manifest.check_population(images[row].info.groups),
            )
            for row, finding in enumerate(checked)
        ]

    def _table(self, values: Sequence[Floats | None]) -> Floats | None:
        """The rows as one table; None where no value is known."""
        if self.clinical is None or all(row is None for row in values):
            return None
        unknown = np.full(self.clinical.slots, np.nan, dtype=np.float32)
        return np.stack([unknown if row is None else row for row in values])

    def _beside_image_only(self, predictions: list[Prediction], squares: Floats, table: Floats) -> list[Prediction]:
        """Each prediction with what the same network says of the image without any value, where values were given."""
        scores = pneumonia_score(self.run(squares[:, None])["logits"])
        alone = self.manifest.calibration.probability(scores).tolist()
        known = [bool(np.isfinite(row).any()) for row in table]
        return [replace(one, image_only=alone[row]) if known[row] else one for row, one in enumerate(predictions)]

    def _predict(self, outputs: dict[str, Floats]) -> list[Prediction]:
        """What the calibrated network says of each image, whether or not it may be asked."""
        calibration, threshold = self.manifest.calibration, self.manifest.threshold.value
        scores, classes = pneumonia_score(outputs["logits"]), calibration.class_probabilities(outputs["logits"])
        low, high = calibration.interval(scores)
        positive = positive_word(self.manifest.classes)
        maps = outputs.get("cam")
        return [
            Prediction(
                decision=positive if probability >= threshold else "normal",
                probability=probability,
                low=float(low[row]),
                high=float(high[row]),
                classes=dict(zip(self.manifest.classes, classes[row].tolist(), strict=True)),
                score=float(scores[row]),
                activation_map=None if maps is None else maps[row],
            )
            for row, probability in enumerate(calibration.probability(scores).tolist())
        ]


def model_input(pixels: Floats, preprocessing: Preprocessing) -> Floats:
    """Computes what the network sees of an image, with the 256 grey levels that the training cache keeps.

    Args:
        pixels: float32 [H, W] in [0, 1].
        preprocessing: gives the side S and whether the image is padded or cropped to a square.

    Returns:
        float32 [S, S] in [0, 1].
    """
    square = fit_square(pixels, preprocessing.size_px, preprocessing.fit)
    return (np.rint(square * 255.0) / 255.0).astype(np.float32)


def graph_inputs(session: onnxruntime.InferenceSession, images: Floats, values: Floats | None = None) -> dict[str, Floats]:
    """Names what a graph is given; clinical values that it takes and nobody gives are not known, NaN.

    Args:
        session: of the graph.
        images: float32 [N, 1, S, S] in [0, 1].
        values: float32 [N, K]; not looked at where the graph takes none.
    """
    second = [one for one in session.get_inputs() if one.name == CLINICAL_INPUT]
    if not second:
        return {"image": images}
    missing = np.full((len(images), second[0].shape[1]), np.nan, dtype=np.float32)
    return {"image": images, CLINICAL_INPUT: missing if values is None else values}


@lru_cache
def saturates() -> bool:
    """Finds out whether this processor cuts off the sum of two products of uint8 and int8.

    x86 processors without VNNI do: ONNX Runtime adds two products in 16 bits there (`vpmaddubsw`), and 2 * 255 * 127 has none. Weights
    within +-64 have no such sum.
    """
    session = open_session(b64decode(_PRODUCT), threads=1)
    found = session.run(None, {"x": np.full((1, 8), 255, np.uint8), "w": np.full((8, 1), 127, np.int8)})[0]
    return int(found[0, 0]) != 8 * 255 * 127


def open_session(network: bytes, threads: int = 0) -> onnxruntime.InferenceSession:
    """Opens an ONNX Runtime session on the CPU; it logs only errors.

    Args:
        network: the ONNX graph, serialised; checked by the caller.
        threads: of the CPU for one operator; 0 leaves the choice to ONNX Runtime.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
