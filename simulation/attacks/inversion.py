"""Gradient inversion: the images of a training step from the gradient that the step sent.

Geiping et al. 2020, "Inverting Gradients: How easy is it to break privacy in federated learning?", section 4: the images whose gradient
points in the direction of the observed one, with a small total variation, found by Adam on the signs of the derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.models import classifier_of
from common.seeds import torch_generator
from common.transforms import normalize

Gradients = list[Tensor]
"""One tensor for each trainable parameter of a model, in the order of `named_parameters`."""

DECAY_AT = (3 / 8, 5 / 8, 7 / 8)
"""Shares of the iterations at which the step is divided by ten (the schedule of Geiping et al.'s published code)."""

START_CONTRAST = 0.1
"""Of the random grey images that restarts begin with. Noise of full contrast has to be smoothed away first, and much of it stays."""


@dataclass(frozen=True)
class InversionSettings:
    """How hard the attacker tries.

    Attributes:
        iterations: steps of each restart.
        restarts: from other random images; the one whose gradient fits best is kept.
        step: of Adam, in grey levels of [0, 1].
        total_variation: weight of the prior that neighbouring pixels are alike.
    """

    iterations: int = 800
    restarts: int = 1
    step: float = 0.03
    total_variation: float = 0.03


@dataclass(frozen=True)
class Target:
    """What the attacker knows: the model that was sent out, the loss it was trained with, and its input.

    `model` stands in evaluation mode; its BatchNorm layers, if any, use their running statistics, which the attacker knows too.
    """

    model: nn.Module
    loss: nn.Module
    size_px: int
    in_channels: int = 1

    def gradients(self, images: Tensor, labels: Tensor) -> Gradients:
        """The gradient of the mean loss over `images`, float32 [B, 1, S, S] in [0, 1], and `labels`, int64 [B]."""
        loss = self.loss(self.model(normalize(images, self.in_channels)), labels)
        return list(torch.autograd.grad(loss, _parameters(self.model)))


def infer_label(target: Target, observed: Gradients) -> int:
    """The label of the one image behind `observed`: the class whose logit the step pushes up.

    Zhao, Mopuri and Bilen 2020, "iDLG", section 3: the derivative of cross-entropy by a logit is p - y, negative for the true class
    alone; it is the gradient of the classifier's bias. (Label smoothing shifts it by less than p unless the model is certain.)
    """
    bias = classifier_of(target.model).bias
    names = [parameter is bias for parameter in _parameters(target.model)]
    return int(observed[names.index(True)].argmin())


def reconstruct(target: Target, observed: Gradients, labels: Tensor, settings: InversionSettings, seed: int) -> Tensor:
    """The images that explain `observed` best, float32 [B, 1, S, S] in [0, 1], one for each of `labels`, int64 [B].

    Pure in its arguments on one machine with one number of threads.
    """
    generator = torch_generator(seed, "inversion")
    found = [_descend(target, observed, labels, settings, generator) for _ in range(settings.restarts)]
    return min(found, key=lambda pair: pair[0])[1]


def cosine_distance(first: Gradients, second: Gradients) -> Tensor:
    """1 minus the cosine of the angle between two gradients over all parameters together (Geiping et al. 2020, eq. 4); scalar."""
    product = torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    lengths = [torch.stack([(a * a).sum() for a in side]).sum().clamp_min(1e-30).sqrt() for side in (first, second)]
    return 1.0 - product / (lengths[0] * lengths[1])


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, rows and columns (Rudin, Osher and Fatemi 1992, anisotropic); scalar."""
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()


def _descend(
    target: Target, observed: Gradients, labels: Tensor, settings: InversionSettings, generator: torch.Generator
) -> tuple[float, Tensor]:
    """(final cosine distance, images) of one restart."""
    shape = (len(labels), 1, target.size_px, target.size_px)
    images = (0.5 + START_CONTRAST * (torch.rand(shape, generator=generator) - 0.5)).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=settings.step)
    milestones = [round(share * settings.iterations) for share in DECAY_AT]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    distance = _distance_function(target, observed, labels)
    for _ in range(settings.iterations):
        objective = distance(images) + settings.total_variation * total_variation(images)
        (derivative,) = torch.autograd.grad(objective, [images])
        images.grad = derivative.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(0.0, 1.0)
    return float(distance(images).detach()), images.detach()


def _distance_function(target: Target, observed: Gradients, labels: Tensor) -> Callable[[Tensor], Tensor]:
    parameters = _parameters(target.model)

    def distance(images: Tensor) -> Tensor:
        loss = target.loss(target.model(normalize(images, target.in_channels)), labels)
        return cosine_distance(list(torch.autograd.grad(loss, parameters, create_graph=True)), observed)

    return distance


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
