"""Gradient inversion: the images of a training step from the gradient that the step sent.

Geiping et al. 2020, "Inverting Gradients: How easy is it to break privacy in federated learning?", section 4: the images whose gradient
points in the direction of the observed one, with a small total variation, found by Adam on the signs of the derivatives.

What the server sees of one hospital's training step, by protection.

The setting is the attacker's best: one step on one image or a few, without augmentation, and the server knows the step size, so that it
knows the gradient. A real round is many steps.

How alike a reconstruction and an image are, and whether it tells whose image it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pneumofed.client.privacy.per_sample_gradients import ClippedGradients
from pneumofed.common.imaging.augment import normalize
from pneumofed.common.models.build import classifier_of
from pneumofed.common.privacy.randomness import KEY_BYTES, RandomStream
from pneumofed.common.seeds import numpy_generator, torch_generator

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


SCALE_BITS, MODULUS_BITS = 16, 32
"""Of the masked view: updates in units of 2^-16, added modulo 2^32."""


def private_view(target: Target, images: Tensor, labels: Tensor, clip_and_noise: tuple[float, float], seed: int) -> Gradients:
    """The sum of the images' clipped gradients with the noise of one step of DP-SGD, over their number.

    The server knows how many images were drawn, which Poisson sampling would hide from it.

    Args:
        target: model and loss.
        images: float32 [B, 1, S, S] in [0, 1], each a unit of its own.
        labels: int64 [B].
        clip_and_noise: `max_grad_norm` and `noise_multiplier`.
        seed: of the noise.
    """
    max_grad_norm, noise_multiplier = clip_and_noise
    clipped = ClippedGradients(target.model, max_grad_norm)
    for parameter in clipped.parameters:
        parameter.grad = None
    normal = normalize(images, target.in_channels)
    clipped.add(lambda: target.loss(target.model(normal), labels) * len(labels))
    clipped.fill_missing()
    stream = RandomStream(numpy_generator(seed, "noise of a view").bytes(KEY_BYTES))
    return [_noised(parameter, max_grad_norm * noise_multiplier, stream) / len(labels) for parameter in clipped.parameters]


def masked_view(gradients: Gradients, seed: int) -> Gradients:
    """One hospital's masked vector as secure aggregation sends it, read back as if it were a gradient.

    In fixed point, plus a mask that is uniform modulo 2^32: uniform itself, whatever the gradient is.
    """
    flat = torch.cat([gradient.flatten() for gradient in gradients]).double().numpy()
    whole = np.round(flat * 2.0**SCALE_BITS).astype(np.int64)
    mask = numpy_generator(seed, "mask").integers(0, 2**MODULUS_BITS, len(whole), dtype=np.int64)
    masked = (whole + mask) % 2**MODULUS_BITS
    signed = torch.from_numpy(np.where(masked >= 2 ** (MODULUS_BITS - 1), masked - 2**MODULUS_BITS, masked) / 2.0**SCALE_BITS)
    pieces = signed.float().split([gradient.numel() for gradient in gradients])
    return [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]


def _noised(parameter: torch.nn.Parameter, deviation: float, stream: RandomStream) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a parameter without a gradient: call ClippedGradients.fill_missing first")
    noise = stream.normal(parameter.numel()).view(parameter.shape)
    noisy = (parameter.grad.double() + deviation * noise).float()
    parameter.grad = None
    return noisy


Images = npt.NDArray[np.float64]

_LARGEST_PSNR = 100.0


def psnr(image: Images, other: Images) -> float:
    """Peak signal-to-noise ratio in dB of two images in [0, 1], 100 at most: -10 log10 of the mean squared difference."""
    error = float(np.mean((image - other) ** 2))
    return min(_LARGEST_PSNR, -10.0 * float(np.log10(max(error, 1e-12))))


def correlations(images: Images, candidates: Images) -> npt.NDArray[np.float64]:
    """Pearson's correlation over pixels of each of `images` [A, S, S] with each of `candidates` [B, S, S], float64 [A, B].

    An image without contrast has none: 0.
    """
    return _standardized(images) @ _standardized(candidates).T


def ranks(found: npt.NDArray[np.float64], truth: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Place of the true candidate among all by correlation, int64 [A], 1 where the reconstruction identifies it.

    Candidates that tie with the true one stand before it.

    Args:
        found: correlations [A, B].
        truth: position of the true candidate of each row.
    """
    of_truth = found[np.arange(len(truth)), truth]
    return (found >= of_truth[:, None]).sum(axis=1)


def match(reconstructions: Images, images: Images) -> npt.NDArray[np.int64]:
    """Which reconstruction stands for each image, int64: the assignment of the largest sum of correlations.

    Who inverts a batch cannot know the order; giving them the best one overstates the attack.
    """
    rows, columns = linear_sum_assignment(correlations(images, reconstructions), maximize=True)
    return columns[np.argsort(rows)].astype(np.int64)


def _standardized(images: Images) -> Images:
    flat = images.reshape(len(images), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 1e-9)
