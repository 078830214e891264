"""What is known of the images that a model judged, as columns; no pixel and no patient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observations:
    """N judged images in the order of their arrival; row i of each is the same image.

    Attributes:
        days: int64 [N], proleptic Gregorian ordinals of the days of judgement, not decreasing.
        scanners: the group of each image, e.g. manufacturer and model.
        units: an opaque word for the patient, or for the study where that is all that is known; never empty.
        statistics: float64 [N, K], of the pixels.
        embedding: float64 [N, E], see `Embedding`.
        probabilities: float64 [N], calibrated P(pneumonia); nan where refused.
        refused: bool [N], whether the model would not judge.
        expected_errors: float64 [N], the calibrated probability that the verdict is wrong; nan where refused.
        corrected: bool [N], whether the reader changed the verdict.
        read_order: int64 [N], rank of the image in the order of reading; -1 where no reader said anything.
        read_days: int64 [N], day of reading; -1 likewise.
    """

    days: npt.NDArray[np.int64]
    scanners: npt.NDArray[np.str_]
    units: npt.NDArray[np.str_]
    statistics: Floats
    embedding: Floats
    probabilities: Floats
    refused: npt.NDArray[np.bool_]
    expected_errors: Floats
    corrected: npt.NDArray[np.bool_]
    read_order: npt.NDArray[np.int64]
    read_days: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.days)

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_] | slice) -> Observations:
        """Those of `rows`, an index, a mask or a slice."""
        return Observations(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})
