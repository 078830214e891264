"""The learning rate over a run: the sites' training follows it, and so does what the coordinator's momentum remembers.

`schedule_factor` is what a site computes by itself; `plateau_factor` what the coordinator decides from round to round and sends along.
`gradient_weight` is what the local steps of a round add up to. Site and coordinator compute the same number from the experiment, the
round and the site's number of images, so that it need not travel, and so that no site can state another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pneumofed.common.config.experiment import ExperimentConfig, TrainingConfig
from pneumofed.common.errors import ConfigError
from pneumofed.common.models.build import freeze_in_round

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
    steps = count_batches(images, training.batch_size) * training.local_epochs
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
        values: the monitored value of each round so far, in order. A round that has none changes nothing.
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
