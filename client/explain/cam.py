"""Class activation maps by gradients: Grad-CAM by Captum, Grad-CAM++ by us, since Captum has none."""

from __future__ import annotations

import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn import functional

from client.explain.score import LogOdds
from common.architectures import architecture_of


def target_layer(network: nn.Module) -> nn.Module:
    """The module of a network of `build_model` whose maps Grad-CAM weighs: the one whose output is averaged into the features.

    With one linear layer on the averages, Grad-CAM there is the class activation map of Zhou et al. 2016. `scattering` has maps but no
    averages: its head weighs 8 x 8 places one by one, Grad-CAM replaces these weights by their mean, and so it shows less there.
    """
    return network.get_submodule(architecture_of(network).maps or "scattering")


def grad_cam(score: LogOdds, image: Tensor) -> Tensor:
    """float32 [h, w], zero or more: ReLU of the feature maps weighted by their mean gradients (Selvaraju et al. 2017, eq. 1-2)."""
    found: Tensor = LayerGradCam(score, target_layer(score.network)).attribute(image, relu_attributions=True)
    return found[0, 0].detach()


def grad_cam_plus_plus(score: LogOdds, image: Tensor) -> Tensor:
    """float32 [h, w], zero or more: Grad-CAM++ (Chattopadhay et al. 2018).

    With Y = exp(S) and S linear in the maps A near the image, the derivatives of Y are powers of g = dS/dA (their eq. 16-18), so that
    alpha = g^2 / (2 g^2 + sum(A) g^3) (eq. 19), w_k = sum over places of alpha ReLU(dY/dA) (eq. 14), and the map is ReLU(sum_k w_k A_k)
    (eq. 2). exp(S) is a factor of the whole map and left out. Where g is not above zero ReLU makes the term zero, whatever alpha is;
    where A is below zero by a little (SiLU), its sum is taken as zero.
    """
    maps, gradient = _maps_and_gradient(score, image)
    positive = gradient.clamp_min(0.0)
    total = maps.sum(dim=(1, 2), keepdim=True).clamp_min(0.0)
    alpha = torch.where(positive > 0, 1.0 / (2.0 + total * positive), 0.0)
    weights = (alpha * positive).sum(dim=(1, 2), keepdim=True)
    return functional.relu((weights * maps).sum(dim=0))


def _maps_and_gradient(score: LogOdds, image: Tensor) -> tuple[Tensor, Tensor]:
    """The maps [D, h, w] of the target layer, and the gradient of the score by them."""
    kept: list[Tensor] = []
    handle = target_layer(score.network).register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        with torch.enable_grad():
            found = score(image.clone().requires_grad_())
            (gradient,) = torch.autograd.grad(found.sum(), kept[0])
    finally:
        handle.remove()
    return kept[0][0].detach(), gradient[0]
