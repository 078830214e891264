"""A model's probabilities for a data set: the one path of federated evaluation, central evaluation and baselines."""

from __future__ import annotations

import numpy as np
import torch

from common.compute import Compute
from common.data.dataset import Dataset
from common.transforms import normalize, to_model_input


@torch.inference_mode()
def predict(model: torch.nn.Module, dataset: Dataset, compute: Compute, in_channels: int, batch_size: int) -> np.ndarray:
    """Class probabilities, float64 [N, C], each row summing to 1, in the order of `dataset`.

    `model` is left in evaluation mode. The softmax is taken in float64: scores of a confident network that tie in float32 would
    otherwise cost AUROC.
    """
    model.eval()
    batches = [dataset.pixels[start : start + batch_size] for start in range(0, len(dataset.labels), batch_size)]
    logits = [_logits(model, pixels, compute, in_channels) for pixels in batches]
    return torch.softmax(torch.cat(logits), dim=1).numpy()


def _logits(model: torch.nn.Module, pixels: np.ndarray, compute: Compute, in_channels: int) -> torch.Tensor:
    images = normalize(to_model_input(pixels), in_channels)
    with compute.autocast():
        logits: torch.Tensor = model(compute.move(images))
    return logits.to("cpu", torch.float64)
