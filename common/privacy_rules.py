"""What of an experiment would go around its own protection: refused when the configuration is read.

Each rule raises a ValueError that names the setting and says what to do; the schema turns it into a `ConfigError`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from common.config_types import NEEDS_SINGLE_UPDATES

if TYPE_CHECKING:
    from common.config import ExperimentConfig


def check_dp_sgd(cfg: ExperimentConfig) -> None:
    """Everything that goes into a private update must pass the mechanism; what would go around it is refused."""
    if cfg.privacy.mechanism == "none":
        return
    refused = {
        "strategy.name 'fedbn' keeps BatchNorm layers, which mix the images of a batch: take another strategy and model.norm 'group'": (
            cfg.strategy.name == "fedbn"
        ),
        "BatchNorm mixes the images of a batch, so that none has a gradient of its own: set model.norm to 'group'": (
            cfg.model.norm == "batch"
        ),
        "the loss would use the site's own class counts, a release that is not accounted: set loss.logit_adjustment to false and "
        "loss.class_weights to 'none'": cfg.loss.logit_adjustment or cfg.loss.class_weights != "none",
        "training.max_grad_norm clips the gradient of a whole batch: leave it at 0, privacy.max_grad_norm clips each unit's": (
            cfg.training.max_grad_norm > 0
        ),
        "training.precision 'fp16' scales the loss, and with it what is clipped: take 'bf16', 'fp32' or 'auto'": (
            cfg.training.precision == "fp16"
        ),
    }
    for sentence, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"privacy.mechanism is 'dp_sgd' but {sentence}")


def check_central_privacy(cfg: ExperimentConfig) -> None:
    """Each site's part in the sum must have a bound that no other site moves, and nothing may go around the noise."""
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
    for sentence, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"central_privacy.enabled is true but {sentence}")


def check_secure_aggregation(cfg: ExperimentConfig) -> None:
    """What needs single updates cannot be had of sums alone.

    Raises:
        ValueError: names the setting and what to do.
    """
    if not cfg.secure_aggregation.enabled:
        return
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
