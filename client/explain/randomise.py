"""Networks whose weights are taken away from the output on, for the sanity check of Adebayo et al. 2018."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from client.explain.score import seeded
from common.models import classifier_of

PARTS = 4


def randomised(network: nn.Module, share: float, seed: int) -> nn.Module:
    """A copy of `network`, of `build_model`, whose last `share` of layers have random weights: their cascade, section 3.1.

    Share 0 draws the classifier alone, 1 everything. Convolutions and linear layers are drawn by He et al. 2015, eq. 10, which keeps the
    variance of the signal through the depth; norms become the identity, their statistics included.
    """
    copied = copy.deepcopy(network).eval()
    layers = [
        module for module in copied.modules() if module is not classifier_of(copied) and hasattr(module, "reset_parameters")
    ]
    with seeded("randomised network", seed):
        _draw(classifier_of(copied))
        for module in layers[len(layers) - round(share * len(layers)) :]:
            _draw(module)
    return copied


def cascade(network: nn.Module, seed: int) -> Iterator[tuple[float, nn.Module]]:
    """(share of layers that are random, network), from the classifier alone to all of them, in `PARTS` equal parts."""
    for part in range(PARTS + 1):
        yield part / PARTS, randomised(network, part / PARTS, seed)


def _draw(module: nn.Module) -> None:
    module.reset_parameters()  # type: ignore[operator]
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
