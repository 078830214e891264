"""What an answer rests on where a model takes clinical values: the image, each value, and what the model says without them.

Integrated gradients (Sundararajan et al. 2017, eq. 1) over both inputs at once, along the straight path from the empty image of which no
value is known to this image with these values. What a value adds is the sum over all that it is for the network, the change from "not
known" to "known" among it. All parts together are the difference of the two log-odds, up to the error of the sum over the path, which is
reported. A value that is not known adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pneumofed.common.config.experiment import ClinicalConfig
from pneumofed.common.imaging.augment import normalize
from pneumofed.common.model_bundle.suitability import Prediction
from pneumofed.common.models.fusion import ClinicalNetwork
from pneumofed.inference.explain.attribution import empty
from pneumofed.inference.explain.cam import channels_of, log_odds
from pneumofed.inference.explain.methods import Target
from pneumofed.inference.predict.clinical_table import describe_values

JOINT_STEPS = 64
"""Of the path, at the middles of equal parts."""
STEPS_AT_ONCE = 8
ROUNDS_TO_ZERO = 0.005
"""Log-odds."""


@dataclass(frozen=True)
class JointEvidence:
    """What an image and its clinical values add to the log-odds of the target.

    Attributes:
        score: log-odds of the image with its values.
        empty: log-odds of the empty image of which no value is known.
        image: what the image adds.
        values: what each known value adds, by column.
        shown: each known value in words, by column.
        unknown: columns that are not known.
        image_only: calibrated probability of pneumonia without the values.
    """

    score: float
    empty: float
    image: float
    values: Mapping[str, float]
    shown: Mapping[str, str]
    unknown: tuple[str, ...]
    image_only: float | None

    @property
    def error(self) -> float:
        """By how much the parts miss the difference of the two log-odds."""
        return self.score - self.empty - self.image - sum(self.values.values())

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {
            **vars(self),
            "values": dict(self.values),
            "shown": dict(self.shown),
            "unknown": list(self.unknown),
            "error": self.error,
        }

    def lines(self) -> tuple[str, ...]:
        """Words it for a reader."""
        order = sorted(self.values, key=lambda name: -abs(self.values[name]))
        parts = [f"the image {_signed(self.image)}", *(f"{self.shown[name]} {_signed(self.values[name])}" for name in order)]
        said = f"The answer rests on, in log-odds: {', '.join(parts)} (integrated gradients over image and values)."
        without = f" Not known: {', '.join(self.unknown)}." if self.unknown else ""
        alone = "" if self.image_only is None else f" Without the values, from the image only: P = {self.image_only:.2f}."
        return (said + without + alone,)


def explain_jointly(
    network: ClinicalNetwork,
    image: Tensor,
    values: npt.NDArray[np.float32],
    schema: ClinicalConfig,
    target: Target = "pneumonia",
    prediction: Prediction | None = None,
) -> JointEvidence:
    """Computes what image and values add.

    Args:
        network: of the bundle; left in evaluation mode.
        image: float32 [1, 1, S, S] in [0, 1], or a volume [1, 1, slices, S, S].
        values: float32 [K], NaN where not known.
        schema: of the bundle.
        target: what the evidence is for.
        prediction: of the image, which says what the model answers without the values.
    """
    network.eval()
    channels, fusion = channels_of(network), network.fusion
    blank = empty(image)
    with torch.no_grad():
        known = fusion.encode(torch.from_numpy(values)[None])
        missing = fusion.encode(fusion.missing(1))

    def score(pictures: Tensor, encoded: Tensor) -> Tensor:
        features = network.image(normalize(pictures, channels))
        return log_odds(network.head(fusion.join(features, encoded)), target)

    slopes = [torch.zeros_like(image), torch.zeros_like(known)]
    places = (torch.arange(JOINT_STEPS) + 0.5) / JOINT_STEPS
    for part in places.split(STEPS_AT_ONCE if image.ndim == 4 else 1):
        pictures = (blank + part.reshape(-1, *(1 for _ in image.shape[1:])) * (image - blank)).requires_grad_()
        encoded = (missing + part[:, None] * (known - missing)).requires_grad_()
        found = torch.autograd.grad(score(pictures, encoded).sum(), [pictures, encoded])
        slopes = [total + one.sum(dim=0, keepdim=True) / JOINT_STEPS for total, one in zip(slopes, found, strict=True)]
    with torch.no_grad():
        ends = float(score(image, known)), float(score(blank, missing))
    added = (slopes[1] * (known - missing))[0].double().numpy()
    by_column, shown, unknown = _by_column(added, values, schema)
    alone = prediction.image_only if prediction else None
    return JointEvidence(*ends, float((slopes[0] * (image - blank)).sum()), by_column, shown, unknown, alone)


def _by_column(
    added: npt.NDArray[np.float64], values: npt.NDArray[np.float32], schema: ClinicalConfig
) -> tuple[dict[str, float], dict[str, str], tuple[str, ...]]:
    """What each known column adds, in its number and in its mark of not being known, the words for it, and the unknown ones."""
    both, shown = added[: schema.slots] + added[schema.slots :], describe_values(values, schema)
    found, slot = {}, 0
    for column in schema.columns:
        if column.name in shown:
            found[column.name] = float(both[slot : slot + column.slots].sum())
        slot += column.slots
    return found, shown, tuple(column.name for column in schema.columns if column.name not in shown)


def _signed(value: float) -> str:
    return "0.00" if abs(value) < ROUNDS_TO_ZERO else f"{value:+.2f}"
