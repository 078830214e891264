"""Convolutions with standardised weights (Qiao et al. 2019), which De et al. 2022 (section 3.2) train better under noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.torchvision_shim import import_torchvision

_SqueezeExcitation: Any = import_torchvision().ops.misc.SqueezeExcitation

EPSILON = 1e-6
"""Added to a row's squared length, which is about 2 at the first weights, so that a vanishing row does no harm."""


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose filters have mean 0 and length 1: row o of the weight is used as u_o = (w_o - mean w_o) / length.

    With length^2 = ||w_o - mean w_o||^2 + `EPSILON`. Outputs of white unit input have variance 1, whatever the filter's size (Brock
    et al. 2021, eq. 1, without gain, which the norm layer that follows would undo). State dict and initial weights are those of
    `nn.Conv2d`, so weights of either may be loaded.

    Row o of the weight, flattened to D numbers, gets the gradient J d = s (d - mean d - u (u . d)), with d the gradient of u and
    s = 1 / length.
    """

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = centred * (centred.square().sum(dim=(1, 2, 3), keepdim=True) + EPSILON).rsqrt()
        return self._conv_forward(x, weight, self.bias)

    @torch.no_grad()
    def standardize_rows(self) -> tuple[Tensor, Tensor]:
        """u, float32 [O, D] in the order (height, width, channel) of a channels-last weight, and s, float32 [O]."""
        rows = self.weight.permute(0, 2, 3, 1).flatten(1)
        centred = rows - rows.mean(dim=1, keepdim=True)
        scale = (centred.square().sum(dim=1) + EPSILON).rsqrt()
        return centred * scale[:, None], scale

    def pull_back(self, gradients: Tensor) -> Tensor:
        """J d of `gradients` d, float32 [..., O, D] in the order of `standardize_rows`."""
        rows, scale = self.standardize_rows()
        along = (gradients * rows).sum(dim=-1, keepdim=True)
        return (gradients - gradients.mean(dim=-1, keepdim=True) - along * rows) * scale[:, None]

    def squared_loss(self, along_ones: Tensor, along_rows: Tensor) -> Tensor:
        """What of ||s d||^2 is missing in ||J d||^2 for each row: s^2 ((1 . d)^2 / D + (2 - ||u||^2) (u . d)^2).

        Args:
            along_ones: 1 . d, float32 [..., O].
            along_rows: u . d, float32 [..., O].
        """
        rows, scale = self.standardize_rows()
        weight = 2.0 - rows.square().sum(dim=1)
        return scale**2 * (along_ones.square() / rows.shape[1] + weight * along_rows.square())


def standardize_weights(model: nn.Module) -> None:
    """Makes every convolution of `model` a `StandardizedConv2d`, in place and with its weights.

    But those of squeeze-and-excitation, whose outputs no norm layer follows: a gate needs the freedom to be large.
    """
    gates = {id(part) for module in model.modules() if isinstance(module, _SqueezeExcitation) for part in module.modules()}
    for module in model.modules():
        if type(module) is nn.Conv2d and id(module) not in gates:
            module.__class__ = StandardizedConv2d
