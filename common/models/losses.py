"""Training losses with class weights from a site's own counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.common.config.experiment import LossConfig
from pneumofed.common.errors import EmptySiteError

EFFECTIVE_NUMBER_BETA = 0.999
"""One of the values tried by Cui et al. 2019, section 5.1 (0.9, 0.99, 0.999, 0.9999)."""

_SMALLEST_MISS = 1e-8
"""Floor of 1 - p in the focal factor: the derivative of (1 - p)^gamma at p = 1 is infinite for gamma below 1."""


class WeightedLoss(nn.Module):
    """Focal loss with class weights and label smoothing; gamma = 0 is cross-entropy.

    For a sample with logits z, p = softmax(z) and target q, the one-hot label smoothed to (1 - e) q + e / C, the loss is
    sum_c q_c w_c (1 - p_c)^gamma (-log p_c): Lin et al. 2017, eq. 5, summed over the classes of a smoothed target.

    The result is the mean over samples, sum_i loss_i / N, and not torch's mean over weights, sum_i loss_i / sum_i w_(y_i): so the
    gradient is a mean of per-sample gradients, none of which depends on another sample (differential privacy needs this), and a
    batch of weightless samples gives 0 and not NaN.

    With `log_prior` the logits are z + log_prior: logit adjustment (Menon et al. 2021, eq. 10). Each site then explains its own mix
    of classes by the prior, and z estimates what all sites share, the evidence in the image; this is what FedLC does against label
    skew (Zhang et al. 2022, section 4). A site with only one class has next to nothing left to explain: its gradients are next to nothing
    (AdamW needs `training.adam_epsilon` to see that).

    The smoothed target is carried to the site's mix by the same prior, q_c * prior_c over its sum, so that cross-entropy asks the same
    z = log q of every site. A target that kept e / C would ask for z = log q - log_prior: of a site with only pneumonia, whose
    prior says 0.999 already, to call its pneumonia normal.

    Attributes:
        class_weights: float32 [C].
        log_prior: float32 [C]; zeros without adjustment.
    """

    class_weights: Tensor
    log_prior: Tensor

    def __init__(
        self, class_weights: Tensor, gamma: float = 0.0, label_smoothing: float = 0.0, log_prior: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights.to(torch.float32))
        self.register_buffer("log_prior", torch.zeros(len(class_weights)) if log_prior is None else log_prior.to(torch.float32))
        self.gamma = gamma
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the mean loss of a batch, in float32.

        Args:
            logits: [N, C], N at least 1, of any floating point type.
            labels: int64 [N] in [0, C).

        Returns:
            A scalar.
        """
        log_p = functional.log_softmax(logits.float() + self.log_prior, dim=1)
        loss = -(self._targets(labels, logits.shape[1]) * self.class_weights * log_p)
        if self.gamma > 0.0:
            loss = loss * (-torch.expm1(log_p)).clamp_min(_SMALLEST_MISS) ** self.gamma
        return loss.sum() / labels.numel()

    def _targets(self, labels: Tensor, classes: int) -> Tensor:
        """float32 [N, C]: the smoothed one-hot labels under the site's own mix of classes; rows sum to 1."""
        smoothed = functional.one_hot(labels, classes).float() * (1.0 - self.label_smoothing) + self.label_smoothing / classes
        return torch.softmax(smoothed.log() + self.log_prior, dim=1)


def build_loss(cfg: LossConfig, class_counts: Sequence[int]) -> WeightedLoss:
    """Builds the loss that a site trains with.

    Args:
        cfg: which loss, weights and adjustment.
        class_counts: training samples of each class at the site, [C].

    Raises:
        EmptySiteError: the site has no sample at all.
    """
    weights = class_weights(cfg, class_counts)
    gamma = cfg.focal_gamma if cfg.name == "focal" else 0.0
    return WeightedLoss(weights, gamma, cfg.label_smoothing, log_prior(class_counts) if cfg.logit_adjustment else None)


def log_prior(class_counts: Sequence[int]) -> Tensor:
    """Computes the logarithm of each class's share of the site's samples, float32 [C], one sample added to each, so that none is -inf."""
    counts = torch.tensor(class_counts, dtype=torch.float64) + 1.0
    return (counts / counts.sum()).log().float()


def class_weights(cfg: LossConfig, class_counts: Sequence[int]) -> Tensor:
    """Computes the weight of each class by the rule `cfg.class_weights`.

    `none` gives ones. Else a class without samples weighs 0, no class weighs more than `cfg.max_class_weight`, and the mean
    weight over the site's samples is 1, so that gradient and learning rate mean the same at all sites. (A ceiling below 1 does
    not allow this: then every class weighs the ceiling.)

    Args:
        cfg: rule and ceiling.
        class_counts: training samples of each class at the site, [C].

    Returns:
        float32 [C].

    Raises:
        EmptySiteError: the site has no sample at all.
    """
    counts = torch.tensor(class_counts, dtype=torch.float64)
    if counts.sum() <= 0:
        raise EmptySiteError(f"class counts {list(class_counts)}: expected at least one training sample, check the manifest")
    if cfg.class_weights == "none":
        return torch.ones(len(class_counts))
    rule = _effective_number if cfg.class_weights == "effective" else torch.clone
    weights = torch.where(counts > 0, 1.0 / rule(counts), 0.0)
    return _with_unit_mean(weights, counts, cfg.max_class_weight).float()


def _effective_number(counts: Tensor) -> Tensor:
    """Cui et al. 2019, eq. 2: (1 - beta^n) / (1 - beta)."""
    return (1.0 - EFFECTIVE_NUMBER_BETA**counts) / (1.0 - EFFECTIVE_NUMBER_BETA)


def _with_unit_mean(weights: Tensor, counts: Tensor, ceiling: float) -> Tensor:
    """min(s * weights, ceiling) with the scale s for which the mean over samples is 1, found by capping class after class."""
    capped = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        free = ~capped & (weights > 0)
        if not free.any():
            return torch.where(capped, torch.full_like(weights, ceiling), 0.0)
        left = counts.sum() - ceiling * counts[capped].sum()
        scaled = weights * left / (weights * counts)[free].sum()
        beyond = free & (scaled > ceiling)
        if not beyond.any():
            return torch.where(capped, ceiling, scaled)
        capped |= beyond
