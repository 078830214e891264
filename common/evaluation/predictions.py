"""What a model said about each image, beside the truth."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pneumofed.common.data.tables import TableWriter, read_table
from pneumofed.common.errors import DataError

SUM_TOLERANCE = 1e-5  # a float32 softmax over a few classes is within 1e-6
COLUMNS = ("image", "patient", "label")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Class probabilities and labels of N images, C classes; class 0 is normal, all others are pneumonia.

    Attributes:
        probabilities: float64 [N, C] in [0, 1], rows sum to 1.
        labels: int64 [N] in [0, C).
        patients: N opaque ids; images of one patient carry the same one.
        images: N opaque ids; running numbers unless given.

    Raises:
        DataError: shapes, ranges or lengths are not as above.
    """

    probabilities: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    patients: tuple[str, ...]
    images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "probabilities", np.asarray(self.probabilities, dtype=np.float64))
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int64))
        object.__setattr__(self, "images", self.images or tuple(map(str, range(len(self.labels)))))
        _check_shapes(self)
        _check_values(self)

    @classmethod
    def from_logits(
        cls, logits: npt.ArrayLike, labels: npt.ArrayLike, patients: tuple[str, ...], images: tuple[str, ...] = ()
    ) -> Predictions:
        """Computes the predictions of a model's logits by a softmax in float64, so that confident scores do not collapse into ties.

        Args:
            logits: real [N, C].
            labels: int64 [N] in [0, C).
            patients: N opaque ids; images of one patient carry the same one.
            images: N opaque ids; running numbers if empty.

        Raises:
            DataError: lengths or ranges do not fit, or a logit is NaN.
        """
        shifted = np.asarray(logits, dtype=np.float64)
        shifted = shifted - shifted.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        return cls(exponentials / exponentials.sum(axis=1, keepdims=True), np.asarray(labels), patients, images)

    def rows(self, index: npt.NDArray[np.int64]) -> Predictions:
        """Takes the images at the positions `index`, in that order."""
        patients, images = (tuple(names[row] for row in index) for names in (self.patients, self.images))
        return Predictions(self.probabilities[index], self.labels[index], patients, images)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return self.probabilities.shape[1]

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """P(pneumonia) = 1 - P(class 0) of each image, float64 [N]."""
        return 1.0 - self.probabilities[:, 0]

    @property
    def views(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """(scores, is positive), both [K, N]: the K two-class questions that the images answer.

        View 0 is pneumonia against normal. With more than two classes view k is class k against the rest. K is 1 for two
        classes, else C: normal against the rest is view 0 mirrored, so nothing is lost.
        """
        others = range(1, self.classes) if self.classes > 2 else ()
        scores = [self.scores, *(self.probabilities[:, k] for k in others)]
        positive = [self.labels != 0, *(self.labels == k for k in others)]
        return np.stack(scores), np.stack(positive)

    def write_csv(self, path: str | Path) -> None:
        """Writes one row an image: image, patient, label, probability_0, probability_1, ... Numbers are read back bit for bit."""
        header = (*COLUMNS, *(f"probability_{k}" for k in range(self.classes)))
        rows = zip(self.images, self.patients, self.labels.tolist(), self.probabilities.tolist(), strict=True)
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = TableWriter(file)
            writer.write(header)
            writer.write_all((image, patient, label, *row) for image, patient, label, row in rows)

    @classmethod
    def read_csv(cls, path: str | Path) -> Predictions:
        """The predictions that `write_csv` wrote.

        Raises:
            DataError: the file is no such table.
        """
        with Path(path).open(newline="", encoding="utf-8") as file:
            try:
                header, *rows = list(read_table(file)) or [[]]
            except csv.Error as error:
                raise DataError(f"{path} is no well-formed CSV file: {error}") from None
        classes = len(header) - len(COLUMNS)
        if tuple(header) != (*COLUMNS, *(f"probability_{k}" for k in range(classes))):
            raise DataError(f"{path}: expected the columns image, patient, label, probability_0, ..., got {header}")
        try:
            labels = np.array([int(row[2]) for row in rows], dtype=np.int64)
            probabilities = np.array([[float(cell) for cell in row[3:]] for row in rows]).reshape(len(rows), classes)
        except (ValueError, IndexError) as error:
            raise DataError(f"{path}: a row is cut short or holds something other than numbers: {error}") from error
        return cls(probabilities, labels, tuple(row[1] for row in rows), tuple(row[0] for row in rows))


def _check_shapes(predictions: Predictions) -> None:
    shape, n = predictions.probabilities.shape, len(predictions.labels)
    if predictions.labels.ndim != 1 or len(shape) != 2 or shape[0] != n or shape[1] < 2:
        raise DataError(
            f"predictions: expected probabilities [N, C >= 2] and labels [N], got {shape} and {predictions.labels.shape}"
        )
    if len(predictions.patients) != n or len(predictions.images) != n:
        raise DataError(
            f"predictions: expected a patient and an image for each of {n} labels, "
            f"got {len(predictions.patients)} patients and {len(predictions.images)} images"
        )


def _check_values(predictions: Predictions) -> None:
    probabilities, labels = predictions.probabilities, predictions.labels
    if not np.all((probabilities >= 0.0) & (probabilities <= 1.0)):  # NaN fails too
        raise DataError("predictions: expected probabilities in [0, 1], got others or NaN; has training diverged?")
    if not np.all(np.abs(probabilities.sum(axis=1) - 1.0) <= SUM_TOLERANCE):
        raise DataError("predictions: expected each image's probabilities to sum to 1; give probabilities, not logits")
    if labels.size and not 0 <= labels.min() <= labels.max() < predictions.classes:
        raise DataError(f"predictions: expected labels in 0..{predictions.classes - 1}, got {labels.min()}..{labels.max()}")
