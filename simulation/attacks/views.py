"""What the server sees of one hospital's training step, by protection.

The setting is the attacker's best: one step on one image or a few, without augmentation, and the server knows the step size, so that it
knows the gradient. A real round is many steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from client.privacy.gradients import ClippedGradients
from common.privacy.randomness import KEY_BYTES, RandomStream
from common.seeds import numpy_generator
from common.transforms import normalize
from simulation.attacks.inversion import Gradients, Target

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
