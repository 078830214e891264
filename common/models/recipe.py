"""The recipe of a training: its loss, with class weights from a site's own counts, and its learning rate over a run.

The sites' training follows the learning rate, and so does what the coordinator's momentum remembers. `schedule_factor` is what a site
computes by itself; `plateau_factor` what the coordinator decides from round to round and sends along. `gradient_weight` is what the local
steps of a round add up to. Site and coordinator compute the same number from the experiment, the round and the site's number of images, so
that it need not travel, and so that no site can state another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pneumofed.common.config.experiment import ExperimentConfig, LossConfig, TrainingConfig
from pneumofed.common.errors import ConfigError, EmptySiteError
from pneumofed.common.models.build import freeze_in_round
from pneumofed.common.ops.study_code import StudyCode, call_with, find_study_code, is_study_code

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


class StudyLoss(nn.Module):
    """A study's own loss, on logits z + log_prior as `WeightedLoss`.

    Attributes:
        log_prior: float32 [C]; zeros without adjustment.
    """

    log_prior: Tensor

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], log_prior: Tensor, code: StudyCode) -> None:
        super().__init__()
        self.register_buffer("log_prior", log_prior)
        self.loss, self._code = loss, code

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the mean loss of a batch.

        Args:
            logits: [N, C], N at least 1, of any floating point type.
            labels: int64 [N] in [0, C).

        Returns:
            A scalar.

        Raises:
            ConfigError: the study's loss gives anything else.
        """
        found = self.loss(logits.float() + self.log_prior, labels)
        if not isinstance(found, Tensor) or found.ndim:
            came = f"a tensor [{', '.join(map(str, found.shape))}]" if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"{self._code}: the loss gives {came}, expected one number, the mean over the batch")
        return found


def build_loss(cfg: LossConfig, class_counts: Sequence[int]) -> WeightedLoss | StudyLoss:
    """Builds the loss that a site trains with.

    Args:
        cfg: which loss, weights and adjustment.
        class_counts: training samples of each class at the site, [C].

    Raises:
        EmptySiteError: the site has no sample at all.
        ConfigError: a study's own loss is not here, or its function gives nothing that can be called.
    """
    weights = class_weights(cfg, class_counts)
    if is_study_code(cfg.name):
        return _build_study_loss(find_study_code(cfg.name), class_counts, adjusted=cfg.logit_adjustment)
    gamma = cfg.focal_gamma if cfg.name == "focal" else 0.0
    return WeightedLoss(weights, gamma, cfg.label_smoothing, log_prior(class_counts) if cfg.logit_adjustment else None)


def _build_study_loss(code: StudyCode, class_counts: Sequence[int], *, adjusted: bool) -> StudyLoss:
    """The function may take `classes` and `class_counts`, and gives a function or module of (logits [N, C], labels [N])."""
    loss = call_with(code, {"classes": len(class_counts), "class_counts": list(class_counts)})
    if not callable(loss):
        raise ConfigError(f"{code} returns {type(loss).__name__}, expected a loss: a function or module of (logits, labels)")
    if isinstance(loss, nn.Module) and any(True for _ in loss.parameters()):
        raise ConfigError(f"{code}: the loss has parameters of its own, which nothing would train or send")
    return StudyLoss(loss, log_prior(class_counts) if adjusted else torch.zeros(len(class_counts)), code)


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


_POINTS = 64
"""At which the schedule is looked up for the mean of a round."""


def schedule_factor(cfg: TrainingConfig, progress: float) -> float:
    """Computes the learning rate at one moment of a run, as a share of `learning_rate`.

    `one_cycle` rises by half a cosine from 1/25 over `warmup_fraction`, then falls by half a cosine to `final_factor`
    (Smith and Topin 2018; the shape and the 25 are torch's `OneCycleLR` defaults). `cosine` falls from 1 to `final_factor`. `plateau`
    is 1 here: its factor is decided between rounds (`plateau_factor`).

    Args:
        cfg: `schedule`, `warmup_fraction` and `final_factor`.
        progress: done share of all steps of the run, in [0, 1).
    """
    if cfg.schedule in ("constant", "plateau"):
        return 1.0
    if cfg.schedule == "one_cycle" and progress < cfg.warmup_fraction:
        return _half_cosine(1.0 / 25.0, 1.0, progress / cfg.warmup_fraction)
    start = cfg.warmup_fraction if cfg.schedule == "one_cycle" else 0.0
    return _half_cosine(1.0, cfg.final_factor, (progress - start) / (1.0 - start) if start < 1.0 else 1.0)


def rate_of_round(experiment: ExperimentConfig, round_number: int) -> float:
    """Computes the mean learning rate of a round, as a share of `learning_rate`; above 0.

    Args:
        experiment: schedule, rounds and the two-phase schedule of the model section.
        round_number: counted from 1.
    """
    _, fine_tuning = freeze_in_round(experiment.model, round_number)
    places = ((round_number - 1 + (point + 0.5) / _POINTS) / experiment.rounds for point in range(_POINTS))
    return fine_tuning * sum(schedule_factor(experiment.training, place) for place in places) / _POINTS


def count_batches(images: int, batch_size: int) -> int:
    """Counts the steps of one pass over a site's images: a last batch of one image joins the batch before it.

    Args:
        images: training images, at least 1.
        batch_size: images in a batch.
    """
    full, rest = divmod(images, batch_size)
    last = rest or batch_size
    batches = full + (rest > 0)
    return batches - 1 if batches > 1 and last == 1 else batches


def gradient_weight(experiment: ExperimentConfig, round_number: int, images: int, rate_factor: float = 1.0) -> float:
    """Computes how far a round of local SGD moves a parameter whose gradient is 1 in every step; above 0.

    (weights before - weights after) / gradient_weight is therefore the mean of the round's gradients, whatever the schedule, and it is
    FedNova's learning rate times ||a||_1 (Wang et al. 2020, section 4) with the rate inside the sum: steps times rate for plain SGD,
    sum of rate (1 - momentum^k) / (1 - momentum) with momentum (their eq. 5 on), and geometric with a proximal term, whose pull shrinks
    what earlier steps did. Weight decay counts as part of the gradient. A step that float16 training skips is counted.

    Args:
        experiment: its optimizer is SGD.
        round_number: from 1.
        images: the site's training images, at least 1.
        rate_factor: the round's `plateau_factor`.
    """
    training = experiment.training
    _, fine_tuning = freeze_in_round(experiment.model, round_number)
    steps = training.local_steps or count_batches(images, training.batch_size) * training.local_epochs
    moved = velocity = 0.0
    for step in range(steps):
        progress = ((round_number - 1) * steps + step) / (experiment.rounds * steps)
        rate = training.learning_rate * fine_tuning * schedule_factor(training, progress) * rate_factor
        velocity = training.momentum * velocity + 1.0 - experiment.proximal_mu * moved
        moved += rate * velocity
    return moved


def variate_change(before: np.ndarray, after: np.ndarray, server_variate: np.ndarray | None, weight: float) -> np.ndarray:
    """Computes a site's new control variate minus its old one: (before - after) / weight - c, float32 [P].

    SCAFFOLD, option II (Karimireddy et al. 2020, eq. 4), with the sum of the steps' rates in the place of K times one rate.

    Args:
        before: the round's global weights, float32 [P].
        after: the site's weights as the coordinator has them, float32 [P].
        server_variate: c, float32 [P]; None is zero.
        weight: `gradient_weight` of the site's round.
    """
    mean_gradient = (before - after) / np.float32(weight)
    return mean_gradient if server_variate is None else mean_gradient - server_variate


def plateau_factor(cfg: TrainingConfig, values: Sequence[float | None]) -> float:
    """Decides the factor on the learning rate of the round that follows those of `values`; 1 under another schedule.

    The rule is that of torch's `ReduceLROnPlateau` with an absolute threshold and no cooldown: a round improves if it is better than
    the best before it by more than `min_delta`; after more than `patience_rounds` rounds in a row that do not, the factor is multiplied
    by `plateau.factor`, and counting begins anew. It never falls below `final_factor`. Pure in its arguments: a resumed run decides
    as an unbroken one.

    Args:
        cfg: `schedule`, `plateau` and `final_factor`.
        values: the monitored value of each round so far, in order. A round that has none, as one that is not validated, changes nothing.
    """
    if cfg.schedule != "plateau":
        return 1.0
    rule, factor, bad, best = cfg.plateau, 1.0, 0, math.inf
    for value in values:
        if value is None or not math.isfinite(value):
            continue
        loss = value if rule.monitor == "loss" else -value
        best, bad = (loss, 0) if loss < best - rule.min_delta else (best, bad + 1)
        if bad > rule.patience_rounds:
            factor, bad = max(factor * rule.factor, cfg.final_factor), 0
    return factor


def refuse_plateau(experiment: ExperimentConfig, where: str) -> None:
    """Refuses the schedule `plateau` where nothing is validated between rounds.

    Args:
        experiment: its training section counts.
        where: what trains, for the sentence.

    Raises:
        ConfigError: `training.schedule` is `plateau`.
    """
    if experiment.training.schedule == "plateau":
        raise ConfigError(
            f"training.schedule 'plateau' decides by validation statistics, and {where} has none; take constant, cosine or one_cycle"
        )


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
