"""What a network's classifier sees of each image: computed once where only the classifier is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from common.compute import Compute
from common.data.dataset import Dataset
from common.inference import predict
from common.models import classifier_of


def compute_features(
    model: torch.nn.Module, dataset: Dataset, compute: Compute, in_channels: int, batch_size: int = 16
) -> np.ndarray:
    """float32 [N, D]: the input of the classifier of `model`, a network of `build_model`, for each image of `dataset`, in its order.

    The images are not augmented, and `model` is left in evaluation mode: the classifier of these rows is that of the network.
    """
    seen: list[np.ndarray] = []

    def keep(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].float().cpu().numpy())

    handle = classifier_of(model).register_forward_pre_hook(keep)
    try:
        predict(model, dataset, compute, in_channels, batch_size)
    finally:
        handle.remove()
    return np.concatenate(seen)
