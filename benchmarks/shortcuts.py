"""How far grey levels and sharpness alone tell the classes apart: what a network may learn in place of the disease.

python -m benchmarks.shortcuts --data chest_xray

Fourteen numbers an image (means, deviations, shares and power by spatial frequency; no anatomy) and a logistic regression on them, fitted
on the training folder and judged on the test folder.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional

from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.imaging.images import read_image

SIDE_PX = 128
BANDS = (1, 3, 6, 12, 24, 40, 64)
"""Edges of the bands of spatial frequency, in cycles per image side."""

Numbers = npt.NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description="How far grey levels and sharpness alone tell the classes apart.")
    parser.add_argument("--data", type=Path, required=True, help="the folder with train/ and test/")
    options = parser.parse_args()
    (train, train_labels, patients), (test, test_labels, _) = (
        _describe(options.data, splits) for splits in (("train", "val"), ("test",))
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    unseen = cross_val_predict(model, train, train_labels, groups=patients, cv=GroupKFold(5), method="predict_proba")[:, 1]
    fitted = model.fit(train, train_labels).predict_proba(test)[:, 1]
    print(json.dumps({"data": str(options.data.name), "train": len(train), "test": len(test)}))
    for index, name in enumerate(_NAMES):
        areas = [roc_auc_score(labels, values[:, index]) for values, labels in ((train, train_labels), (test, test_labels))]
        print(f"{name:24} AUROC train {areas[0]:.3f}  test {areas[1]:.3f}")
    print(
        f"all of them              AUROC train {roc_auc_score(train_labels, unseen):.3f} (five folds by patient)"
        f"  test {roc_auc_score(test_labels, fitted):.3f}"
    )


def _describe(data: Path, splits: tuple[str, ...]) -> tuple[Numbers, npt.NDArray[np.int64], list[str]]:
    """Numbers [N, 14], labels [N] (1 is pneumonia) and patients of the images under `splits`."""
    records = read_kaggle(data, splits)[0].records
    labels = np.array([int(record.label != "normal") for record in records])
    return np.array([describe(read_image(record.path).pixels) for record in records]), labels, [r.patient for r in records]


def describe(pixels: npt.NDArray[np.float32]) -> list[float]:
    """The numbers of `_NAMES` of an image [H, W] in [0, 1]."""
    batch = torch.from_numpy(pixels)[None, None]
    small = functional.interpolate(batch, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True)[0, 0].numpy()
    middle = small[SIDE_PX // 4 : -SIDE_PX // 4, SIDE_PX // 4 : -SIDE_PX // 4]
    power = np.abs(np.fft.fftshift(np.fft.fft2(small - small.mean()))) ** 2
    radius = np.hypot(*(np.indices(power.shape) - SIDE_PX // 2))
    bands = [np.log(power[(radius >= low) & (radius < high)].mean()) for low, high in pairwise(BANDS)]
    steps = np.abs(np.diff(pixels, axis=0)).mean()
    return [
        small.mean(),
        small.std(),
        middle.mean(),
        middle.std(),
        (small < 0.06).mean(),
        (small > 0.9).mean(),
        steps,
        pixels.std(),
        *bands,
    ]


_NAMES = (
    "mean",
    "deviation",
    "mean of the middle",
    "deviation of the middle",
    "share of black",
    "share of white",
    "step to the pixel below",
    "deviation, full size",
    *(f"power, {low} to {high} cycles" for low, high in pairwise(BANDS)),
)


if __name__ == "__main__":
    main()
