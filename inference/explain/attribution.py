"""Attribution maps: one image, one method, one map of the evidence (`compute_attribution`).

What is explained is the log-odds of the target for an image in [0, 1] (`LogOdds`). Grad-CAM and Grad-CAM++ weigh the last feature maps by
gradients; Captum has the former, the latter is ours, since Captum has none. The other methods go through the pixels, by gradients along a
path or by taking parts of the image away, and are Captum's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from captum._utils.models.linear_model import SkLearnRidge
from captum.attr import GradientShap, IntegratedGradients, KernelShap, LayerGradCam, Lime, Occlusion
from scipy.ndimage import gaussian_filter
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.common.imaging.augment import normalize
from pneumofed.common.models.architectures import architecture_of
from pneumofed.common.seeds import derive_seed
from pneumofed.inference.explain.methods import Attribution, Method, Target

PATH_STEPS = 32
"""Sundararajan et al. 2017, section 5, take 20 to 300 steps."""
SHAP_DRAWS = 32
WINDOWS_TO_A_SIDE = 8
SUPERPIXELS = 64
SURROGATE_DRAWS = 384
"""Six for each superpixel: with fewer the estimates of two seeds agree less."""
SUPERPIXEL_COMPACTNESS = 0.3
"""Weight of the distance in the plane, in sides of a superpixel, against the difference in grey (Achanta et al. 2012, eq. 3: m / 100 is
0.1 to 0.4 of their scale of colour)."""
BATCH_IMAGES = 32

EMPTY_BLUR = 1 / 16
"""Deviation of the Gaussian that makes an image empty, as a share of its side. At 128 px that is 8 px: vessels, fissures and the borders
of ribs are gone, thorax and heart stay, so that what replaces a part fits its surroundings (Fong & Vedaldi 2017, section 4.1)."""


def compute_attribution(
    network: nn.Module, image: Tensor, method: Method, target: Target = "pneumonia", *, seed: int = 0
) -> Attribution:
    """Computes the map of the evidence for `target` in `image`.

    Guarantees:
        Pure in the arguments on one machine with one number of threads. Network and global generators are left as they were, but that the
        network is in evaluation mode.

    Args:
        network: of `build_model`: takes what `common.imaging.augment.normalize` makes.
        image: float32 [1, 1, S, S] in [0, 1], as `fit_square` makes it.
        method: one of `METHODS`.
        target: a class, or `pneumonia` for all but normal.
        seed: of what SHAP and LIME draw.

    Raises:
        ValueError: `image` is not one image, or there is no such class.
    """
    if image.ndim != 4 or image.shape[:2] != (1, 1) or image.shape[2] != image.shape[3]:
        raise ValueError(f"image: expected [1, 1, S, S], got {tuple(image.shape)}")
    score, side = LogOdds(network, target), image.shape[-1]
    with torch.inference_mode():
        found = float(score(image))
    with seeded("explanation", method, seed):
        values = _MAKERS[method](score, image)
    shown = np.nan_to_num(enlarge(values, side).numpy())
    return Attribution(shown, method, target, found, _cell_px(method, side, values.shape[-1]))


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


def empty(image: Tensor) -> Tensor:
    """Blurs `image` float32 [1, 1, S, S] until no detail is left: what stands where something was taken away."""
    blurred = gaussian_filter(image[0, 0].numpy(), EMPTY_BLUR * image.shape[-1])
    return torch.from_numpy(blurred)[None, None]


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seeds the global generators of torch and numpy, which Captum draws from, with `parts`; restores them afterwards."""
    seed, state = derive_seed(*parts), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        np.random.set_state(state)


def target_layer(network: nn.Module) -> nn.Module:
    """Finds the module of a network of `build_model` whose maps Grad-CAM weighs: the one whose output is averaged into the features.

    With one linear layer on the averages, Grad-CAM there is the class activation map of Zhou et al. 2016. `scattering` has maps but no
    averages: its head weighs 8 x 8 places one by one, Grad-CAM replaces these weights by their mean, and so it shows less there.
    """
    return network.get_submodule(architecture_of(network).maps or "scattering")


def grad_cam(score: LogOdds, image: Tensor) -> Tensor:
    """Computes Grad-CAM, float32 [h, w], zero or more: ReLU of the maps weighted by their mean gradients (Selvaraju et al. 2017, eq. 1-2).

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1].
    """
    found: Tensor = LayerGradCam(score, target_layer(score.network)).attribute(image, relu_attributions=True)
    return found[0, 0].detach()


def grad_cam_plus_plus(score: LogOdds, image: Tensor) -> Tensor:
    """Computes Grad-CAM++, float32 [h, w], zero or more (Chattopadhay et al. 2018).

    With Y = exp(S) and S linear in the maps A near the image, the derivatives of Y are powers of g = dS/dA (their eq. 16-18), so that
    alpha = g^2 / (2 g^2 + sum(A) g^3) (eq. 19), w_k = sum over places of alpha ReLU(dY/dA) (eq. 14), and the map is ReLU(sum_k w_k A_k)
    (eq. 2). exp(S) is a factor of the whole map and left out. Where g is not above zero ReLU makes the term zero, whatever alpha is;
    where A is below zero by a little (SiLU), its sum is taken as zero.

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1].
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


def integrated_gradients(score: LogOdds, image: Tensor) -> Tensor:
    """Integrates the gradient along the path from the empty image, float32 [S, S] (Sundararajan et al. 2017, eq. 1).

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1].

    Returns:
        Sums to about the difference of the two scores, the closer the larger `PATH_STEPS` is.
    """
    found = IntegratedGradients(score).attribute(image, empty(image), n_steps=PATH_STEPS, internal_batch_size=BATCH_IMAGES)
    return found[0, 0].detach().float()


def gradient_shap(score: LogOdds, image: Tensor) -> Tensor:
    """Computes expected gradients over three empty images, blurred, grey and black, float32 [S, S] (Erion et al. 2021, eq. 3).

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1]. Pure only inside `seeded`.
    """
    baselines = torch.cat([empty(image), torch.full_like(image, float(image.mean())), torch.zeros_like(image)])
    found: Tensor = GradientShap(score).attribute(image, baselines, n_samples=SHAP_DRAWS, stdevs=0.02)
    return found[0, 0].detach().float()


def occlusion(score: LogOdds, image: Tensor) -> Tensor:
    """Computes how far the score falls when the windows over a pixel are emptied, on the average of these windows, float32 [S, S].

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1].
    """
    window = max(2, image.shape[-1] // WINDOWS_TO_A_SIDE)
    found: Tensor = Occlusion(score).attribute(
        image,
        sliding_window_shapes=(1, window, window),
        strides=(1, window // 2, window // 2),
        baselines=empty(image),
        perturbations_per_eval=BATCH_IMAGES,
    )
    return found[0, 0].detach().float()


def kernel_shap(score: LogOdds, image: Tensor) -> Tensor:
    """Estimates the Shapley values of superpixels by weighted regression on random coalitions, float32 [S, S].

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1]. Pure only inside `seeded`.
    """
    return _surrogate(KernelShap(score), image)


def lime(score: LogOdds, image: Tensor) -> Tensor:
    """Computes the coefficients of superpixels in a ridge regression with penalty 1, as in the authors' own program, float32 [S, S].

    Captum's default, a Lasso with penalty 0.01, finds no superpixel at all where the score moves by a tenth of a log-odds.

    Args:
        score: the log-odds that are explained.
        image: float32 [1, 1, S, S] in [0, 1]. Pure only inside `seeded`.
    """
    return _surrogate(Lime(score, interpretable_model=SkLearnRidge(alpha=1.0)), image)


def superpixels(image: np.ndarray, count: int = SUPERPIXELS) -> np.ndarray:
    """Groups pixels that are near each other in place and grey value, int64 [S, S] from 0 to at most `count` - 1.

    k-means over (row, column, grey) from a square grid of centres, as SLIC (Achanta et al. 2012) without its search window. Deterministic.

    Args:
        image: float32 [S, S] in [0, 1].
        count: of superpixels, at least 1; rounded down to a square number.
    """
    side, cells = image.shape[0], int(np.sqrt(count))
    place = (np.indices(image.shape).reshape(2, -1).T + 0.5) * (cells / side * SUPERPIXEL_COMPACTNESS)
    points = np.column_stack([place, image.ravel()])
    middle = ((np.arange(cells) + 0.5) * side / cells).astype(int)
    starts = np.add.outer(middle * side, middle).ravel()
    found = KMeans(len(starts), init=points[starts], n_init=1, max_iter=10, algorithm="lloyd").fit_predict(points)
    return np.unique(found, return_inverse=True)[1].reshape(image.shape).astype(np.int64)


def _surrogate(method: KernelShap | Lime, image: Tensor) -> Tensor:
    segments = torch.from_numpy(superpixels(image[0, 0].numpy()))[None, None]
    # Sum over a superpixel is its coefficient, whatever its size.
    area = torch.bincount(segments.ravel()).float()[segments]
    found: Tensor = method.attribute(
        image, baselines=empty(image), feature_mask=segments, n_samples=SURROGATE_DRAWS, perturbations_per_eval=BATCH_IMAGES
    )
    return (found / area)[0, 0].detach().float()


_MAKERS: dict[Method, Callable[[LogOdds, Tensor], Tensor]] = {
    "grad-cam": grad_cam,
    "grad-cam++": grad_cam_plus_plus,
    "integrated-gradients": integrated_gradients,
    "gradient-shap": gradient_shap,
    "occlusion": occlusion,
    "kernel-shap": kernel_shap,
    "lime": lime,
}


def enlarge(values: Tensor, side: int) -> Tensor:
    """Scales `values` to float32 [side, side], bilinear between the middles of the cells.

    Args:
        values: [h, w]; of the wanted size already, they are only converted.
        side: in pixels.
    """
    if values.shape == (side, side):
        return values.float()
    return functional.interpolate(values[None, None].float(), (side, side), mode="bilinear", align_corners=False)[0, 0]


def _cell_px(method: Method, side: int, cells: int) -> float:
    if method == "occlusion":
        return side / WINDOWS_TO_A_SIDE
    return side / SUPERPIXELS**0.5 if method in ("kernel-shap", "lime") else side / cells
