"""One private round at a site: planned, accounted for, then trained."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from client.examples import choose_examples
from client.privacy.dp_sgd import PrivateRound, build_private_setup
from client.privacy.plan import SitePlan
from client.privacy.sampling import count_units
from client.privacy.spending import spend_round
from client.site import Site
from client.training import RoundPlan, TrainingResult, train_locally
from common.compute import Compute
from common.messages import Instruction
from common.party_config import SitePolicy
from common.privacy.secret import fingerprint, own_secret, round_key

OPEN = ("steps", "learning_rate", "train_sec")
"""Metrics of a private round that leave without noise: the first two are the plan's own, seconds tell how many units were drawn."""


def train_privately(
    model: nn.Module, site: Site, instruction: Instruction, compute: Compute, policy: SitePolicy
) -> tuple[TrainingResult, dict[str, float]]:
    """Trains `model` in place for one private round; what happened, and the metrics that may leave the site.

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
    plan = private.hide(RoundPlan(experiment, instruction.round, site.name))
    setup = build_private_setup(model, private, plan, compute)
    spent = spend_round(instruction.run, instruction.round, experiment, site, site_plan, policy)
    result = train_locally(setup, choose_examples(setup.model, site.train, plan, compute, site.cache_dir), plan)
    metrics = result.metrics()
    if not experiment.privacy.open_metrics:
        metrics = {name: metrics[name] for name in OPEN}
    return result, {**metrics, "epsilon": spent.run, "noise_multiplier": site_plan.noise_multiplier}


def plan_site(site: Site, instruction: Instruction) -> SitePlan:
    """The plan of the instruction's run at the site."""
    experiment, patients = instruction.experiment, site.train.patients
    return SitePlan.of(experiment, count_units(patients, experiment.privacy.unit), len(set(patients)))


def _round_key(site: Site, instruction: Instruction, compute: Compute) -> bytes:
    """A key that is new as soon as anything is that the update depends on; see `common.privacy.secret`."""
    arrays = instruction.arrays
    weights = hashlib.sha256() if arrays is None else hashlib.sha256(arrays.parameters.tobytes() + arrays.statistics.tobytes())
    context = (
        instruction.run,
        str(instruction.round),
        instruction.experiment.model_dump_json(),
        weights.hexdigest(),
        site.name,
        fingerprint(site.train),
        f"{compute.device.type} {compute.dtype}",
    )
    return round_key(own_secret(Path(site.config.work_dir)), context)
