"""How much features are worth under differential privacy: AUROC of a linear classifier on them, with and without noise.

    python -m benchmarks.private_features --data DATA --image-size 64 scattering resnet18:group resnet18:group:weights.pt

Each argument is NAME[:NORM[:WEIGHTS]] of the model section. The noise is that of full-batch gradient descent at --sites sites, each of
which clips its gradients to 1, sums them and adds its own Gaussian noise, so that no site needs to trust the coordinator. What is
measured on real images spends privacy too; this is a benchmark on a public set, no protocol.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from pneumofed.common.config.experiment import ImageConfig, ModelConfig
from pneumofed.common.config.reader import build_config
from pneumofed.common.data.dataset import Dataset, load_dataset
from pneumofed.common.data.sources.public_sets import read_kaggle
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import Compute, build_compute
from pneumofed.common.models.features import compute_features
from pneumofed.common.seeds import numpy_generator

MOMENTUM = 0.9
INVERSE_PENALTY = 20.0
"""C of scikit-learn's logistic regression on features of unit length; a tenth and ten times as much gave no more on scattering."""


@dataclass(frozen=True)
class Descent:
    """Full-batch private gradient descent. `epsilon` of the whole descent, at delta = 1 / units of a site."""

    epsilon: float
    sites: int
    steps: int
    learning_rate: float


def noise_multiplier(cfg: Descent, units: int) -> float:
    """Deviation of each site's noise for clipping norm 1, by Gaussian differential privacy (Dong, Roth & Su 2022).

    `steps` Gaussian mechanisms of multiplier s compose to mu = sqrt(steps) / s (corollary 3.3), which is (epsilon, delta)-private for
    delta = Phi(-epsilon / mu + mu / 2) - e^epsilon Phi(-epsilon / mu - mu / 2) (corollary 2.13). Exact, since no batch is drawn.
    """

    def excess(mu: float) -> float:
        low, high = -cfg.epsilon / mu - mu / 2, -cfg.epsilon / mu + mu / 2
        return float(norm.cdf(high) - exp(cfg.epsilon) * norm.cdf(low)) - cfg.sites / units

    return sqrt(cfg.steps) / brentq(excess, 1e-3, 50.0)


def descend(features: np.ndarray, labels: np.ndarray, share: np.ndarray, cfg: Descent, seed: int) -> np.ndarray:
    """float32 [D]: weights after the descent on `features` [N, D], averaged over its second half.

    `share` [N] is each image's part in its unit: 1 at image level, one over the patient's images at patient level, so that the sum of
    a patient's clipped gradients is no longer than 1.
    """
    rng, units = numpy_generator("private features", seed), share.sum()
    noise = noise_multiplier(cfg, round(units)) * sqrt(cfg.sites)
    weights, velocity, tail = (np.zeros(features.shape[1], dtype=np.float32) for _ in range(3))
    prior = np.log(labels.mean() / (1.0 - labels.mean()))
    clip = share / np.maximum(np.linalg.norm(features, axis=1), 1.0)
    for step in range(cfg.steps):
        miss = (expit(features @ weights + prior) - labels) * clip
        gradient = features.T @ miss.astype(np.float32) + noise * rng.standard_normal(len(weights), dtype=np.float32)
        velocity = MOMENTUM * velocity + (1.0 - MOMENTUM) * gradient / units
        weights = (weights - cfg.learning_rate * velocity).astype(np.float32)
        tail += weights * (step >= cfg.steps // 2)
    return tail


def main() -> None:
    arguments = _parse()
    compute = build_compute("auto", "fp32")
    with tempfile.TemporaryDirectory() as scratch:
        train, test = (_load(arguments.data, split, arguments.image_size, Path(scratch)) for split in ("train", "test"))
    cfg = Descent(arguments.epsilon, arguments.sites, arguments.steps, arguments.learning_rate)
    print(f"{'features':40s} {'D':>6s} {'ms/image':>8s} {'no noise':>8s} {'image':>15s} {'patient':>15s}")
    for name in arguments.models:
        _measure(name, train, test, cfg, compute)


def _measure(name: str, train: Dataset, test: Dataset, cfg: Descent, compute: Compute) -> None:
    parts = dict(zip(("name", "norm", "weights"), name.split(":"), strict=False))
    model_cfg = build_config(ModelConfig, parts)
    model, started = build_model(model_cfg, "binary", 0), time.perf_counter()
    x, y = (_unit_length(compute_features(model, data, compute, model_cfg.in_channels)) for data in (train, test))
    per_image_ms = 1e3 * (time.perf_counter() - started) / (len(train) + len(test))
    plain = LogisticRegression(C=INVERSE_PENALTY, max_iter=300).fit(x, train.labels)
    cells = [f"{roc_auc_score(test.labels, plain.decision_function(y)):8.4f}"]
    for share in (np.ones(len(train)), _patient_shares(train)):
        scores = [roc_auc_score(test.labels, y @ descend(x, train.labels, share, cfg, seed)) for seed in range(3)]
        cells.append(f"{np.mean(scores):.4f} ± {np.std(scores):.4f}")
    print(f"{name:40s} {x.shape[1]:6d} {per_image_ms:8.1f} {'  '.join(cells)}", flush=True)


def _unit_length(features: np.ndarray) -> np.ndarray:
    """Each image's own mean and length taken out, which looks at no other image."""
    features = features - features.mean(axis=1, keepdims=True)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _patient_shares(data: Dataset) -> np.ndarray:
    _, number, counts = np.unique(data.patients, return_inverse=True, return_counts=True)
    return 1.0 / counts[number]


def _load(folder: Path, split: str, size_px: int, scratch: Path) -> Dataset:
    manifest, _ = read_kaggle(folder, (split,))
    data = load_dataset(manifest, "binary", ImageConfig(size_px=size_px), scratch / split, keep_duplicates=split == "test")
    return data.subset(np.arange(len(data)))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME[:NORM[:WEIGHTS]]")
    parser.add_argument("--data", type=Path, required=True, help="folder in the Kaggle layout")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epsilon", type=float, default=6.0)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=256.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
