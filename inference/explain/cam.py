"""What is explained, the log-odds of a target by a network, and its class activation maps: at the last feature maps or finer, that is at an
earlier layer, of a larger input, or as a mean over several sizes.

Grad-CAM is Captum's and Grad-CAM++ ours, since Captum has none. `activation_map` makes either at the asked `Detail`; which detail finds
a known opacity best is measured by `benchmarks.map_localisation`. `volume_map` makes either of a CT volume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from captum.attr import LayerGradCam
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.common.errors import ConfigError, in_a_row
from pneumofed.common.imaging.augment import normalize
from pneumofed.common.models.architectures import architecture_of
from pneumofed.common.models.fusion import IMAGE, ClinicalNetwork
from pneumofed.inference.explain.methods import ACTIVATION_METHODS, Detail, Method, Target

SCALES = (1.0, 1.25, 1.5, 1.75)
"""Sides of the input over the network's own, for the mean over several sizes: 128, 160, 192 and 224 px for a network of 128 px."""
LARGEST_SCALE = SCALES[-1]


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
    """Counts the channels, 1 or 3, that a network of `build_model` takes: its first convolution; 1 where there is none."""
    if (channels := architecture_of(network).in_channels) is not None:
        return channels
    first = architecture_of(network).first
    convolution = network.get_submodule(first) if first else None
    return convolution.in_channels if isinstance(convolution, nn.Conv2d) else 1


Cam = Callable[[LogOdds, Tensor, nn.Module | None], Tensor]


def target_layer(network: nn.Module) -> nn.Module:
    """Finds the module of a network of `build_model` whose maps Grad-CAM weighs: the one whose output is averaged into the features.

    With one linear layer on the averages, Grad-CAM there is the class activation map of Zhou et al. 2016. `scattering` has maps but no
    averages: its head weighs 8 x 8 places one by one, Grad-CAM replaces these weights by their mean, and so it shows less there.

    Raises:
        ConfigError: a study's own network averages no maps.
    """
    architecture = architecture_of(network)
    if architecture.pooled is None and architecture.in_channels is not None:
        raise ConfigError(
            "grad-cam: this network averages no feature maps over the picture; "
            "integrated-gradients, gradient-shap, occlusion, kernel-shap and lime work"
        )
    return network.get_submodule(
        architecture.maps or architecture.pooled or f"{IMAGE}.scattering" * isinstance(network, ClinicalNetwork) or "scattering"
    )


def finer_layer(network: nn.Module) -> nn.Module:
    """Finds the last module of a network of `build_model` whose maps have twice the cells to a side of those of `target_layer`.

    Raises:
        ConfigError: the network has none.
    """
    name = architecture_of(network).finer_maps
    if name is None:
        raise ConfigError("detail finer-layer: this network has no finer layer; larger-input and several-sizes work")
    return network.get_submodule(name)


def activation_map(cam: Cam, score: LogOdds, image: Tensor, larger: Tensor, detail: Detail) -> tuple[Tensor, float]:
    """Computes a class activation map at `detail`.

    Args:
        cam: `grad_cam` or `grad_cam_plus_plus`.
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1], S the side that the network was trained at.
        larger: the same image, float32 [1, 1, L, L], L being `larger_side(S)`; what is between is scaled down from it.
        detail: which maps.

    Returns:
        The map, float32 [h, w] or, of several sizes, [S, S]; zero or more. And the side of its cells in pixels of `image`: of several
        sizes the mean of theirs, since the coarse ones blur what the fine ones show.
    """
    side = image.shape[-1]
    if detail == "several-sizes":
        found = [cam(score, _scaled(image, larger, round(scale * side)), None) for scale in SCALES]
        # Each map counts the same: the size of Grad-CAM's values goes with the number of its cells.
        maps = torch.stack([enlarge(one / one.max().clamp_min(1e-12), side) for one in found])
        return maps.mean(dim=0), sum(side / one.shape[-1] for one in found) / len(found)
    values = cam(
        score, larger if detail == "larger-input" else image, finer_layer(score.network) if detail == "finer-layer" else None
    )
    return values, side / values.shape[-1]


def larger_side(side: int) -> int:
    """Returns the side of the largest input in pixels, for a network that was trained at `side`."""
    return round(LARGEST_SCALE * side)


def _scaled(image: Tensor, larger: Tensor, side: int) -> Tensor:
    return image if side == image.shape[-1] else at_size(larger, side)


def at_size(images: Tensor, side: int) -> Tensor:
    """Scales squares.

    Args:
        images: float32 [N, 1, L, L].
        side: in pixels.
    """
    return functional.interpolate(images, (side, side), mode="bilinear", antialias=True) if side != images.shape[-1] else images


def grad_cam(score: LogOdds, image: Tensor, layer: nn.Module | None = None) -> Tensor:
    """Computes Grad-CAM, float32 [h, w], zero or more: ReLU of the maps weighted by their mean gradients (Selvaraju et al. 2017, eq. 1-2).

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1].
        layer: whose maps are weighed; None for `target_layer`.
    """
    found: Tensor = LayerGradCam(score, layer or target_layer(score.network)).attribute(image, relu_attributions=True)
    return found[0, 0].detach()


def grad_cam_plus_plus(score: LogOdds, image: Tensor, layer: nn.Module | None = None) -> Tensor:
    """Computes Grad-CAM++, float32 [h, w], zero or more (Chattopadhay et al. 2018).

    With Y = exp(S) and S linear in the maps A near the image, the derivatives of Y are powers of g = dS/dA (their eq. 16-18), so that
    alpha = g^2 / (2 g^2 + sum(A) g^3) (eq. 19), w_k = sum over places of alpha ReLU(dY/dA) (eq. 14), and the map is ReLU(sum_k w_k A_k)
    (eq. 2). exp(S) is a factor of the whole map and left out. Where g is not above zero ReLU makes the term zero, whatever alpha is;
    where A is below zero by a little (SiLU), its sum is taken as zero.

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1].
        layer: whose maps are weighed; None for `target_layer`.
    """
    maps, gradient, _ = _maps_and_gradient(score, image, layer or target_layer(score.network))
    return functional.relu((_plus_plus_weights(maps[0], gradient[0]) * maps[0]).sum(dim=0))


def _plus_plus_weights(maps: Tensor, gradient: Tensor) -> Tensor:
    """w_k of `grad_cam_plus_plus` for maps [K, ...] over any number of axes; as many axes, of length 1."""
    places = tuple(range(1, maps.ndim))
    positive = gradient.clamp_min(0.0)
    total = maps.sum(dim=places, keepdim=True).clamp_min(0.0)
    alpha = torch.where(positive > 0, 1.0 / (2.0 + total * positive), 0.0)
    return (alpha * positive).sum(dim=places, keepdim=True)


def _maps_and_gradient(score: LogOdds, image: Tensor, layer: nn.Module) -> tuple[Tensor, Tensor, float]:
    """The output of `layer` for one image or volume, the gradient of the score by it, and the score."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        with torch.enable_grad():
            found = score(image.clone().requires_grad_())
            (gradient,) = torch.autograd.grad(found.sum(), kept[0])
    finally:
        handle.remove()
    return kept[0].detach(), gradient, float(found.detach())


def enlarge(values: Tensor, side: int) -> Tensor:
    """Scales `values` to float32 [side, side], bilinear between the middles of the cells.

    Args:
        values: [h, w]; of the wanted size already, they are only converted.
        side: in pixels.
    """
    if values.shape == (side, side):
        return values.float()
    return functional.interpolate(values[None, None].float(), (side, side), mode="bilinear", align_corners=False)[0, 0]


_LAYERS: dict[Detail, Callable[[nn.Module], nn.Module]] = {"last-layer": target_layer, "finer-layer": finer_layer}
"""Of volumes."""


@dataclass(frozen=True)
class VolumeMap:
    """A map of evidence over one volume.

    Attributes:
        values: float32 [slices, S, S], zero or more, in the coordinates of the model's input: from foot to head, front to back, the
            patient's right to left.
        score: log-odds of the target by the network, not calibrated.
        cells: places of the maps that it was made of, along slices, rows and columns.
    """

    values: NDArray[np.float32]
    score: float
    cells: tuple[int, int, int]

    def peak(self) -> tuple[int, int, int]:
        """Returns slice, row and column of the largest value."""
        place = np.unravel_index(int(self.values.argmax()), self.values.shape)
        return int(place[0]), int(place[1]), int(place[2])


def volume_map(
    network: nn.Module, volume: Tensor, target: Target = "pneumonia", method: Method = "grad-cam", detail: Detail = "last-layer"
) -> VolumeMap:
    """Computes Grad-CAM or Grad-CAM++ over a volume: ReLU of the maps weighted over all places of the volume.

    With A_k the maps and S the log-odds, Grad-CAM weighs each by the mean of dS/dA_k over slices, rows and columns (Selvaraju et al. 2017,
    eq. 1 and 2), and Grad-CAM++ as `grad_cam_plus_plus` says (Chattopadhay et al. 2018, eq. 14 to 19). The map is
    brought to the volume by linear interpolation along each axis.

    Args:
        network: of `build_model`, one of `VOLUME_NETWORKS`; left in evaluation mode.
        volume: float32 [1, 1, slices, S, S] in [0, 1].
        target: a class, or `pneumonia` for all but normal.
        method: `grad-cam` or `grad-cam++`.
        detail: `last-layer` or `finer-layer`.

    Raises:
        ValueError: `volume` is not one volume.
        ConfigError: another method or detail.
    """
    refuse_others((method,), detail)
    if volume.ndim != 5 or volume.shape[:2] != (1, 1):
        raise ValueError(f"volume: expected [1, 1, slices, S, S], got {tuple(volume.shape)}")
    score = LogOdds(network, target)
    output, slope, found = _maps_and_gradient(score, volume, _LAYERS[detail](network))
    # A layer of slices has their maps one by one, [slices, K, h, w], one in three dimensions [1, K, d, h, w].
    maps, gradient = (one.float().transpose(0, 1) if one.ndim == 4 else one[0].float() for one in (output, slope))
    weights = gradient.mean(dim=(1, 2, 3), keepdim=True) if method == "grad-cam" else _plus_plus_weights(maps, gradient)
    coarse = functional.relu((weights * maps).sum(dim=0))
    fine = functional.interpolate(coarse[None, None], tuple(volume.shape[2:]), mode="trilinear", align_corners=False)[0, 0]
    depth, height, width = coarse.shape
    return VolumeMap(np.nan_to_num(fine.numpy()), found, (depth, height, width))


def refuse_others(methods: Sequence[Method], detail: Detail) -> None:
    """Refuses what is not made of volumes.

    Raises:
        ConfigError: another method than a class activation map, or another detail than of a layer.
    """
    if others := [method for method in methods if method not in ACTIVATION_METHODS]:
        raise ConfigError(f"method {others[0]}: of a CT volume there are {in_a_row(ACTIVATION_METHODS)}")
    if detail not in _LAYERS:
        raise ConfigError(f"detail {detail}: of a CT volume there are {in_a_row(_LAYERS)}")
