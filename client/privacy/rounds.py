"""One private round at a site: planned, accounted for, then trained."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from pneumofed.client.federation.disclosure import OPEN_METRICS
from pneumofed.client.federation.site_data import SiteData
from pneumofed.client.federation.training import RoundPlan, TrainingResult, choose_examples, train_locally
from pneumofed.client.privacy.dp_sgd import PrivateRound, build_private_setup
from pneumofed.client.privacy.plan import SitePlan, count_units
from pneumofed.client.privacy.spending import spend_round
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.models.compute import Compute
from pneumofed.common.privacy.randomness import data_fingerprint, own_secret, round_key
from pneumofed.common.wire.instructions import Instruction


def train_privately(
    model: nn.Module, site: SiteData, instruction: Instruction, compute: Compute, policy: SitePolicy
) -> tuple[TrainingResult, dict[str, float]]:
    """Trains `model` in place for one private round; returns what happened, and the metrics that may leave the site.

    The round is in the site's ledger before its first step.

    Args:
        model: with the round's first weights.
        site: the site's data.
        instruction: what the coordinator asks.
        compute: device and precision.
        policy: the site's, as it stood when the message came.

    Raises:
        ConfigError: the model or the site's data do not allow private training.
        PolicyError, BudgetError: policy or ledger refuse the round (see `spend_round`); nothing was trained.
    """
    experiment = instruction.experiment
    site_plan = plan_site(site, instruction)
    private = PrivateRound.of(
        site_plan, site.train, _round_key(site, instruction, compute), secure=experiment.privacy.secure_noise
    )
    plan = private.hide(RoundPlan(experiment, instruction.round, site.name, rate_factor=instruction.rate_factor))
    setup = build_private_setup(model, private, plan, compute)
    spent = spend_round(instruction.run, instruction.round, experiment, site, site_plan, policy)
    result = train_locally(setup, choose_examples(setup.model, site.train, plan, compute, site.cache_dir), plan)
    metrics = result.metrics()
    if not experiment.privacy.open_metrics:
        metrics = {name: metrics[name] for name in OPEN_METRICS}
    return result, {**metrics, "epsilon": spent.run, "noise_multiplier": site_plan.noise_multiplier}


def plan_site(site: SiteData, instruction: Instruction) -> SitePlan:
    """Makes the plan of the instruction's run at the site.

    Args:
        site: the site's data; only its counts enter.
        instruction: what the coordinator asks.

    Raises:
        ConfigError: the run is not private, or the site has too few patients.
    """
    experiment = instruction.experiment
    return SitePlan.of(experiment, count_units(site.train.patients, experiment.privacy.unit), site.patients)


def _round_key(site: SiteData, instruction: Instruction, compute: Compute) -> bytes:
    """A key that is new as soon as anything is that the update depends on; see `common.privacy.randomness`."""
    arrays = instruction.arrays
    weights = hashlib.sha256() if arrays is None else hashlib.sha256(arrays.parameters.tobytes() + arrays.statistics.tobytes())
    context = (
        instruction.run,
        str(instruction.round),
        instruction.experiment.model_dump_json(exclude={"personal"}),  # of no update
        weights.hexdigest(),
        site.name,
        data_fingerprint(site.train),
        f"{compute.device.type} {compute.dtype}",
        *(() if instruction.rate_factor == 1.0 else (repr(instruction.rate_factor),)),
    )
    return round_key(own_secret(Path(site.config.work_dir)), context)
