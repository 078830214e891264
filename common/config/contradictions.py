"""What settings of a run contradict one another across sections. Each function raises a ValueError, which the reader of a configuration
tells with its file; `common.config.experiment` calls them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pneumofed.common.config.choices import CORRECTED, COUNTS_STEPS, LEAST_SLICES_3D, NEEDS_SINGLE_UPDATES, VOLUME_NETWORKS

if TYPE_CHECKING:
    from pneumofed.common.config.experiment import ExperimentConfig


def _refuse(what: str, refused: Mapping[str, bool]) -> None:
    """Raises a ValueError that begins with `what` and goes on with the first sentence that holds."""
    for sentence, holds in refused.items():
        if holds:
            raise ValueError(f"{what} {sentence}")


def check_volume_settings(cfg: ExperimentConfig) -> None:
    """Refuses a network of radiographs for volumes and the reverse, and what is defined for radiographs only."""
    name, slices, augmentation = cfg.model.name, cfg.image.slices, cfg.augmentation
    known = " or ".join(VOLUME_NETWORKS)
    if not slices:
        if name in VOLUME_NETWORKS:
            raise ValueError(
                f"model.name '{name}' takes CT volumes, but image.slices is 0, which is radiographs: set it to 8 to 128"
            )
        return
    refused = {
        f"model.name '{name}' takes radiographs: take {known}": name not in VOLUME_NETWORKS,
        f"{name} halves a volume five times in each direction: take {LEAST_SLICES_3D} slices at least, or resnet18_slices": (
            name == "densenet121_3d" and slices < LEAST_SLICES_3D
        ),
        "image.fit 'crop' is of radiographs: leave it at 'pad'": cfg.image.fit != "pad",
        "model.in_channels must be 1: a volume has one grey value at each place": cfg.model.in_channels != 1,
        "model.weight_standardization is of two-dimensional convolutions: set it to false, or take resnet18_slices": (
            name == "densenet121_3d" and cfg.model.weight_standardization
        ),
        f"there are no ImageNet weights for {name}: set model.weights to 'none' or a file": cfg.model.weights == "imagenet",
        "augmentation.style, erase_borders and erase_markers are about how radiographs are taken and marked, and Hounsfield units are "
        "the same at every scanner: leave them at 0": any(
            (augmentation.style, augmentation.erase_borders, augmentation.erase_markers)
        ),
        "training.early_fraction shrinks radiographs: leave it at 0": cfg.training.early_fraction > 0,
    }
    _refuse(f"image.slices is {slices} but", refused)


def check_micro_batches(cfg: ExperimentConfig) -> None:
    lot = cfg.training.micro_batch_size
    if not lot:
        return
    refused = {
        "BatchNorm would normalise each lot by itself, and a step of lots would be another step: set model.norm to 'group'": (
            cfg.model.trains_batch_norm and cfg.training.batch_statistics_fraction > 0
        ),
        "private training has privacy.physical_batch_size for that: leave it at 0": cfg.privacy.mechanism != "none",
        f"training.batch_size is {cfg.training.batch_size}: a lot is a part of a batch": lot > cfg.training.batch_size,
    }
    _refuse(f"training.micro_batch_size is {lot} but", refused)


def check_local_sgd(cfg: ExperimentConfig) -> None:
    """Refuses what FedNova, SCAFFOLD and FedDyn do not hold for: their papers derive them for SGD."""
    name, training = cfg.strategy.name, cfg.training
    if name not in (*COUNTS_STEPS, *CORRECTED):
        return
    refused = {
        f"is derived for SGD, and training.optimizer is '{training.optimizer}': set it to 'sgd', with a learning rate and weight decay "
        "for SGD": training.optimizer != "sgd",
        "corrects gradients, which training.max_grad_norm would cut before the correction: leave it at 0": (
            name in CORRECTED and training.max_grad_norm > 0
        ),
        "needs training.proximal_mu, its alpha, above 0": name == "feddyn" and cfg.proximal_mu == 0,
        "needs steps that do not jump over the global weights: training.learning_rate times training.proximal_mu must be below 1": (
            training.learning_rate * cfg.proximal_mu >= 1
        ),
        "computes steps from exact gradients and numbers of images, and DP-SGD draws both: set privacy.mechanism to 'none'": (
            cfg.privacy.mechanism != "none"
        ),
    }
    _refuse(f"strategy.name '{name}'", refused)


def check_weights(cfg: ExperimentConfig) -> None:
    """Refuses to ask for sites of equal weight where they have it already, or where the weight is the site's own affair."""
    if cfg.strategy.weight_by == "images":
        return
    name = cfg.strategy.name
    refused = {
        f"strategy.name '{name}' takes no weighted mean: leave it at 'images'": name in ("fedmedian", "fedtrimmedavg", "krum"),
        "central_privacy gives every site the same weight already: leave it at 'images'": cfg.central_privacy.enabled,
        "under secure_aggregation each site weighs its own update: set secure_aggregation.max_examples to 1, which gives all the same "
        "weight, and leave this at 'images'": cfg.secure_aggregation.enabled,
    }
    _refuse(f"strategy.weight_by is '{cfg.strategy.weight_by}' but", refused)


def check_asynchronous(cfg: ExperimentConfig) -> None:
    """Refuses what is defined for updates that all start from the same weights, or by how many sites a round asks."""
    strategy, buffer = cfg.strategy, cfg.strategy.buffer
    if buffer is None:
        return
    refused = {
        f"strategy.name '{strategy.name}' takes all updates of a round as steps from the same weights; take fedavg, fedprox, fedbn, "
        "fedavgm, fedadam, fedyogi, fedmedian, fedtrimmedavg, krum or multikrum": strategy.name
        in ("fedexp", *COUNTS_STEPS, *CORRECTED),
        f"strategy.min_sites asks for {strategy.replies_needed} good updates a round: take a larger buffer": (
            buffer < strategy.replies_needed
        ),
        "strategy.enough_sites closes rounds too, and drops what comes later: leave one of the two out": (
            strategy.enough_sites is not None
        ),
        "strategy.fraction_train draws the sites of a round, and here every site trains on as soon as its last update is counted: leave "
        "it at 1": strategy.fraction_train < 1.0,
        "secure_aggregation needs sites that mask their updates of one round for each other, and here nobody knows beforehand whose "
        "updates meet in the buffer: switch it off, or leave strategy.buffer out": cfg.secure_aggregation.enabled,
        "central_privacy divides by the number of sites that a round asked, which a buffer does not wait for: switch it off, or leave "
        "strategy.buffer out": cfg.central_privacy.enabled,
    }
    _refuse(f"strategy.buffer is {buffer} but", refused)


def check_judging_in_training(cfg: ExperimentConfig) -> None:
    """Refuses to judge in the next training message what that message does not bring, or whom it does not reach."""
    if not cfg.evaluation.with_training:
        return
    refused = {
        "strategy.ema_decay has an average judged, which no training message brings: leave it at 0": cfg.strategy.ema_decay > 0,
        "strategy.buffer lets sites train on from models of different rounds: leave it out": cfg.strategy.buffer is not None,
        "evaluation.fraction_sites draws sites by themselves, and here those judge that are drawn to train: leave it at 1": (
            cfg.evaluation.fraction_sites < 1.0
        ),
    }
    _refuse("evaluation.with_training is on but", refused)


def check_dp_sgd(cfg: ExperimentConfig) -> None:
    """Refuses what would go around DP-SGD: everything that goes into a private update must pass the mechanism."""
    if cfg.privacy.mechanism == "none":
        return
    refused = {
        "strategy.name 'fedbn' keeps BatchNorm layers, which mix the images of a batch: take another strategy and model.norm 'group'": (
            cfg.strategy.name == "fedbn"
        ),
        "BatchNorm mixes the images of a batch, so that none has a gradient of its own: set model.norm to 'group', or freeze all but the "
        "classifier (model.freeze 'head_only'), which fixes its statistics": cfg.model.trains_batch_norm,
        "the loss would use the site's own class counts, a release that is not accounted: set loss.logit_adjustment to false and "
        "loss.class_weights to 'none'": cfg.loss.logit_adjustment or cfg.loss.class_weights != "none",
        "training.max_grad_norm clips the gradient of a whole batch: leave it at 0, privacy.max_grad_norm clips each unit's": (
            cfg.training.max_grad_norm > 0
        ),
        "training.precision 'fp16' scales the loss, and with it what is clipped: take 'bf16', 'fp32' or 'auto'": (
            cfg.training.precision == "fp16"
        ),
    }
    _refuse("privacy.mechanism is 'dp_sgd' but", refused)


def check_central_privacy(cfg: ExperimentConfig) -> None:
    """Refuses what would go around the coordinator's noise, or lets another site move the bound on a site's part in the sum."""
    if not cfg.central_privacy.enabled:
        return
    refused = {
        f"strategy.name '{cfg.strategy.name}' takes more than the noisy mean: take fedavg, fedprox, fedavgm, fedadam or fedyogi": (
            cfg.strategy.name in ("fedbn", *NEEDS_SINGLE_UPDATES)
        ),
        "BatchNorm's running statistics would leave without noise: set model.norm to 'group'": cfg.model.norm == "batch",
        "the sites' own clipping under secure_aggregation weighs by numbers of images, which this sum must not: switch one of the two "
        "off": cfg.secure_aggregation.enabled,
    }
    _refuse("central_privacy.enabled is true but", refused)


def check_cross_site(cfg: ExperimentConfig) -> None:
    """Refuses to send one hospital's model where the run promises that nobody sees it, or to send one that does not exist."""
    if not cfg.evaluation.cross_site:
        return
    refused = {
        "secure_aggregation hides what each site trained, and the model of one site would leave in the clear: switch one off": (
            cfg.secure_aggregation.enabled
        ),
        "privacy.mechanism is 'dp_sgd', and the model that a site trains alone has no noise and is in no ledger: switch one off": (
            cfg.privacy.mechanism != "none"
        ),
        "central_privacy hides what each site adds, and the model of one site would travel to the others without noise: switch one "
        "off": cfg.central_privacy.enabled,
        "the models that the sites judge are those that they train alone: set evaluation.alone to true too": (
            not cfg.evaluation.alone
        ),
    }
    _refuse("evaluation.cross_site is true but", refused)


def check_secure_aggregation(cfg: ExperimentConfig) -> None:
    """Refuses what needs single updates, which cannot be had from sums only."""
    if not cfg.secure_aggregation.enabled:
        return
    if cfg.evaluation.alone:
        raise ValueError("evaluation.alone sends numbers of each site by itself, which secure_aggregation hides: switch one off")
    strategy, needed = cfg.strategy, 3
    if strategy.name in NEEDS_SINGLE_UPDATES:
        raise ValueError(
            f"strategy.name: {strategy.name} looks at single updates, which secure_aggregation hides; take fedavg, fedprox, fedbn, "
            "fedavgm, fedadam or fedyogi, or switch secure_aggregation off"
        )
    if strategy.update_precision != "float32":
        raise ValueError(
            "strategy.update_precision must be 'float32' under secure_aggregation, which has its own number type "
            "(secure_aggregation.bits)"
        )
    if strategy.max_update_norm_factor != type(strategy).model_fields["max_update_norm_factor"].default:
        raise ValueError(
            "strategy.max_update_norm_factor compares single updates, which secure_aggregation hides; set "
            "secure_aggregation.clip_norm instead, which each site keeps itself"
        )
    if strategy.wait_for_sites:
        drawn = math.ceil(round(strategy.fraction_train * strategy.wait_for_sites, 9))
        needed = max(needed, math.ceil(round(cfg.secure_aggregation.threshold * drawn, 9)))
    if strategy.enough_sites is not None and strategy.enough_sites < needed:
        raise ValueError(
            f"strategy.enough_sites is {strategy.enough_sites} but a secure sum needs {needed} sites "
            "(secure_aggregation.threshold, and never fewer than 3)"
        )
