"""The number that is explained: the log-odds of the target, from an image in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from client.explain.methods import Target
from common.architectures import architecture_of
from common.seeds import derive_seed
from common.transforms import normalize

EMPTY_BLUR = 1 / 16
"""Deviation of the Gaussian that makes an image empty, as a share of its side. At 128 px that is 8 px: vessels, fissures and the borders
of ribs are gone, thorax and heart stay, so that what replaces a part fits its surroundings (Fong & Vedaldi 2017, section 4.1)."""


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
    """log P(target) - log P(not target), float32 [N], of `logits` [N, C]."""
    meant = target_mask(logits.shape[1], target)
    return torch.logsumexp(logits[:, meant], dim=1) - torch.logsumexp(logits[:, ~meant], dim=1)


def target_mask(classes: int, target: Target) -> np.ndarray:
    """bool [classes]: which of them are meant.

    Raises:
        ValueError: there is no such class, or no other.
    """
    numbers = np.arange(classes)
    mask = numbers > 0 if target == "pneumonia" else numbers == target
    if mask.all() or not mask.any():
        raise ValueError(f"target: expected pneumonia or one of {classes} classes, got {target!r}")
    return mask


def channels_of(network: nn.Module) -> int:
    """1 or 3: what the first convolution of a network of `build_model` takes; 1 where there is none."""
    first = architecture_of(network).first
    convolution = network.get_submodule(first) if first else None
    return convolution.in_channels if isinstance(convolution, nn.Conv2d) else 1


def empty(image: Tensor) -> Tensor:
    """`image` float32 [1, 1, S, S] without its detail, of the same shape: what stands where something was taken away."""
    blurred = gaussian_filter(image[0, 0].numpy(), EMPTY_BLUR * image.shape[-1])
    return torch.from_numpy(blurred)[None, None]


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Captum draws from the global generators of torch and numpy: inside they are pure in `parts`, afterwards as they were before."""
    seed, state = derive_seed(*parts), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        np.random.set_state(state)
