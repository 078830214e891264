"""Gradient inversion: the images of a training step from the gradient that the step sent, and how alike they are to the true ones.

The attack (`reconstruct`) is that of Geiping et al. 2020, "Inverting Gradients: How easy is it to break privacy in federated learning?",
section 4: the images whose gradient points in the direction of the observed one, with a small total variation, found by Adam on the
signs of the derivatives.

What the server observes depends on the protection: the plain gradient (`Target.gradients`), a gradient under DP-SGD (`private_view`), or
one masked vector of secure aggregation (`masked_view`). The setting is the attacker's best: one step on one image or a few, without
augmentation, and the server knows the step size, so that it knows the gradient. A real round is many steps.

The success of the attack is measured by likeness (`psnr`, `correlations`) and by whether the reconstruction identifies its image among
all candidates (`ranks`).
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

Images = npt.NDArray[np.float64]
"""float64 [N, S, S] in [0, 1], or one image [S, S]."""

STEP_DECAY_AT = (3 / 8, 5 / 8, 7 / 8)
"""Shares of the iterations at which the step is divided by ten (the schedule of Geiping et al.'s published code)."""

START_CONTRAST = 0.1
"""Contrast of the random grey images that restarts begin with. Noise of full contrast must be smoothed away first, and much stays."""

MASK_SCALE_BITS, MASK_MODULUS_BITS = 16, 32
"""Fixed point of `masked_view`: updates in units of 2^-16, added modulo 2^32."""

_LARGEST_PSNR_DB = 100.0


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
        """Computes the gradient of the mean loss by the trainable parameters.

        Args:
            images: float32 [B, 1, S, S] in [0, 1].
            labels: int64 [B].
        """
        loss = self.loss(self.model(normalize(images, self.in_channels)), labels)
        return list(torch.autograd.grad(loss, _parameters(self.model)))


def infer_label(target: Target, observed: Gradients) -> int:
    """Infers the label of the one image behind `observed`: the class whose logit the step pushes up.

    Zhao, Mopuri and Bilen 2020, "iDLG", section 3: the derivative of cross-entropy by a logit is p - y, negative only for the true
    class; it is the gradient of the classifier's bias. (Label smoothing shifts it by less than p unless the model is certain.)

    Args:
        target: its classifier must have a bias that is trained.
        observed: gradient of a step on one image.
    """
    bias = classifier_of(target.model).bias
    names = [parameter is bias for parameter in _parameters(target.model)]
    return int(observed[names.index(True)].argmin())


def reconstruct(target: Target, observed: Gradients, labels: Tensor, settings: InversionSettings, seed: int) -> Tensor:
    """Reconstructs the images that explain `observed` best, one for each label.

    Pure in its arguments on one machine with one number of threads.

    Args:
        target: model and loss, as the server sent them out.
        observed: what the server sees of the step.
        labels: int64 [B], the true or the inferred ones.
        settings: how hard the attacker tries.
        seed: of the random images that restarts begin with.

    Returns:
        float32 [B, 1, S, S] in [0, 1], of the restart whose gradient fits best.
    """
    generator = torch_generator(seed, "inversion")
    found = [_descend(target, observed, labels, settings, generator) for _ in range(settings.restarts)]
    return min(found, key=lambda pair: pair[0])[1]


def cosine_distance(first: Gradients, second: Gradients) -> Tensor:
    """Computes 1 minus the cosine of the angle between two gradients (Geiping et al. 2020, eq. 4), over all parameters together.

    Args:
        first: one tensor for each parameter.
        second: the same shapes in the same order.

    Returns:
        Scalar in [0, 2]; 1 where either gradient is zero.
    """
    product = torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    lengths = [torch.stack([(a * a).sum() for a in side]).sum().clamp_min(1e-30).sqrt() for side in (first, second)]
    return 1.0 - product / (lengths[0] * lengths[1])


def total_variation(images: Tensor) -> Tensor:
    """Computes the mean absolute difference of neighbouring pixels, a scalar (Rudin, Osher and Fatemi 1992, anisotropic)."""
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()


def private_view(target: Target, images: Tensor, labels: Tensor, clip_and_noise: tuple[float, float], seed: int) -> Gradients:
    """Computes what DP-SGD discloses of one step: the sum of the images' clipped gradients with noise, over their number.

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
    """Computes one hospital's masked vector as secure aggregation sends it, read back as if it were a gradient.

    In fixed point, plus a mask that is uniform modulo 2^32: uniform itself, whatever the gradient is.

    Args:
        gradients: one tensor for each parameter; values beyond the range of the fixed point wrap around.
        seed: of the mask.

    Returns:
        Tensors of the same shapes.
    """
    flat = torch.cat([gradient.flatten() for gradient in gradients]).double().numpy()
    whole = np.round(flat * 2.0**MASK_SCALE_BITS).astype(np.int64)
    mask = numpy_generator(seed, "mask").integers(0, 2**MASK_MODULUS_BITS, len(whole), dtype=np.int64)
    masked = (whole + mask) % 2**MASK_MODULUS_BITS
    signed = torch.from_numpy(
        np.where(masked >= 2 ** (MASK_MODULUS_BITS - 1), masked - 2**MASK_MODULUS_BITS, masked) / 2.0**MASK_SCALE_BITS
    )
    pieces = signed.float().split([gradient.numel() for gradient in gradients])
    return [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]


def psnr(image: Images, other: Images) -> float:
    """Computes the peak signal-to-noise ratio of two images: -10 log10 of the mean squared difference.

    Args:
        image: float64 [S, S] in [0, 1].
        other: the same shape and range; the order does not matter.

    Returns:
        In dB, 100 at most, which equal images have.
    """
    error = float(np.mean((image - other) ** 2))
    return min(_LARGEST_PSNR_DB, -10.0 * float(np.log10(max(error, 1e-12))))


def correlations(images: Images, candidates: Images) -> npt.NDArray[np.float64]:
    """Computes Pearson's correlation over pixels of each image with each candidate. An image without contrast has none: 0.

    Args:
        images: float64 [A, S, S].
        candidates: float64 [B, S, S].

    Returns:
        float64 [A, B] in [-1, 1].
    """
    return _standardized(images) @ _standardized(candidates).T


def ranks(found: npt.NDArray[np.float64], truth: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Computes the place of the true candidate among all by correlation: 1 where the reconstruction identifies it.

    Candidates that tie with the true one stand before it.

    Args:
        found: correlations [A, B].
        truth: position of the true candidate of each row, int64 [A].

    Returns:
        int64 [A], from 1 to B.
    """
    of_truth = found[np.arange(len(truth)), truth]
    return (found >= of_truth[:, None]).sum(axis=1)


def match(reconstructions: Images, images: Images) -> npt.NDArray[np.int64]:
    """Assigns a reconstruction to each image, so that the sum of correlations is largest.

    Who inverts a batch cannot know the order; giving them the best one overstates the attack.

    Args:
        reconstructions: float64 [A, S, S].
        images: float64 [A, S, S], the true ones.

    Returns:
        int64 [A]: the number of the reconstruction that stands for each image.
    """
    rows, columns = linear_sum_assignment(correlations(images, reconstructions), maximize=True)
    return columns[np.argsort(rows)].astype(np.int64)


def _descend(
    target: Target, observed: Gradients, labels: Tensor, settings: InversionSettings, generator: torch.Generator
) -> tuple[float, Tensor]:
    """(final cosine distance, images) of one restart."""
    shape = (len(labels), 1, target.size_px, target.size_px)
    images = (0.5 + START_CONTRAST * (torch.rand(shape, generator=generator) - 0.5)).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=settings.step)
    milestones = [round(share * settings.iterations) for share in STEP_DECAY_AT]
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


def _noised(parameter: torch.nn.Parameter, deviation: float, stream: RandomStream) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a parameter without a gradient: call ClippedGradients.fill_missing first")
    noise = stream.normal(parameter.numel()).view(parameter.shape)
    noisy = (parameter.grad.double() + deviation * noise).float()
    parameter.grad = None
    return noisy


def _standardized(images: Images) -> Images:
    flat = images.reshape(len(images), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 1e-9)
