"""What is explained: the log-odds of a target by a network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from pneumofed.common.imaging.augment import normalize
from pneumofed.common.models.architectures import architecture_of
from pneumofed.inference.explain.methods import Target


class LogOdds(nn.Module):
    """Images float32 [N, 1, S, S] in [0, 1] -> log-odds of the target, float32 [N]; `network` is one of `build_model`, in evaluation mode.

    The log-odds and not one logit: adding the same number to all logits changes no probability, but it would change a logit.
    """

    def __init__(self, network: nn.Module, target: Target) -> None:
        super().__init__()
        self.network = network.eval()
        self.target = target
        self.channels = channels_of(network)

    def forward(self, images: Tensor) -> Tensor:
        return log_odds(self.network(normalize(images, self.channels)), self.target)


def log_odds(logits: Tensor, target: Target) -> Tensor:
    """Computes log P(target) - log P(not target), float32 [N].

    Args:
        logits: float32 [N, C], C at least 2.
        target: what the log-odds are of.
    """
    meant = target_mask(logits.shape[1], target)
    return torch.logsumexp(logits[:, meant], dim=1) - torch.logsumexp(logits[:, ~meant], dim=1)


def target_mask(classes: int, target: Target) -> np.ndarray:
    """Marks which classes `target` means, bool [classes].

    Args:
        classes: number of the network's classes.
        target: position of a class, or `pneumonia` for all but class 0.

    Raises:
        ValueError: there is no such class, or no other.
    """
    numbers = np.arange(classes)
    mask = numbers > 0 if target == "pneumonia" else numbers == target
    if mask.all() or not mask.any():
        raise ValueError(f"target: expected pneumonia or one of {classes} classes, got {target!r}")
    return mask


def channels_of(network: nn.Module) -> int:
    """Counts the channels, 1 or 3, that the first convolution of a network of `build_model` takes; 1 where there is none."""
    first = architecture_of(network).first
    convolution = network.get_submodule(first) if first else None
    return convolution.in_channels if isinstance(convolution, nn.Conv2d) else 1
