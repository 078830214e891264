"""DP-SGD (Abadi et al. 2016, algorithm 1) as a rule for the steps of `client.federation.training`'s one loop, and a round of it at a site.

    each step   draws units by Poisson sampling, one image of each          `client.privacy.plan`
                views each image `augmentation_multiplicity` times and
                averages the views' gradients (De et al. 2022, section 3.4)
                clips each unit's gradient to `max_grad_norm`, adds up      `client.privacy.per_sample_gradients`
                adds noise of deviation noise_multiplier * max_grad_norm    `PrivateOptimizer`, `common.privacy.randomness`
                divides by the expected number of units, and steps
    at the end  puts the moving average of the weights in their place

A step without any unit is a step too, of noise only. Rate, noise and number of steps come from the `SitePlan`, which accounts for the
very same numbers. Opacus gives the private optimizer and the accountants; per-unit gradients, clipping and random numbers are ours,
the first for speed, the last for secrecy. A private round (`train_privately`) is planned, accounted for, then trained.

Guarantee: a round is `SitePlan.round_mechanism()` for who knows neither the site's secret nor the draws of sampling, augmentation and
dropout. The numbers of units and steps, and the seconds, count as public.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from torch import Tensor, nn

from pneumofed.client.federation.requests import OPEN_METRICS
from pneumofed.client.federation.site_data import SiteData
from pneumofed.client.federation.training import (
    Examples,
    RoundPlan,
    TrainingResult,
    TrainingSetup,
    build_setup,
    choose_examples,
    train_locally,
)
from pneumofed.client.privacy.ledger import spend_round
from pneumofed.client.privacy.per_sample_gradients import ClippedGradients, refuse_mixing, refuse_mixing_loss
from pneumofed.client.privacy.plan import SitePlan, UnitSampler, count_units, split_into_lots
from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import PrivacyConfig
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.errors import ConfigError
from pneumofed.common.models.build import train_mode
from pneumofed.common.models.compute import Compute
from pneumofed.common.ops.study_code import is_study_code, names_in
from pneumofed.common.privacy.randomness import KEY_BYTES, RandomStream, data_fingerprint, own_secret, round_key, tensors_tag
from pneumofed.common.wire.instructions import Instruction

NORMALS_ADDED = 4
"""Under `secure_noise` a noise value is half the sum of so many normals: n = 2 of Holohan and Braghin 2021, section 5.1, as Opacus'
`secure_mode`. Who sees one double cannot work out the pairs of uniform numbers that it came from."""


@dataclass(frozen=True)
class PrivateRound:
    """What a site's private round is made of: its plan, its key, and how many units share the sum.

    Attributes:
        plan: rate, steps and noise.
        key: 32 secret bytes, used for no other round.
        expected_units: rate times units; divides the sum.
    """

    plan: SitePlan
    key: bytes
    expected_units: float

    @classmethod
    def of(cls, plan: SitePlan, data: Dataset, key: bytes, *, secure: bool) -> PrivateRound:
        """Makes the round of a site with `data`. With `secure` the key is not `key` but one that the operating system draws now.

        Args:
            plan: the site's, for the run.
            data: the site's training images.
            key: 32 bytes, a function of the site's secret and everything that the update depends on.
            secure: take no key that can be made again: the round cannot be repeated bit for bit.
        """
        expected = plan.sampling_rate * count_units(data.patients, plan.unit)
        return cls(plan, secrets.token_bytes(KEY_BYTES) if secure else key, expected)

    def stream(self, purpose: str) -> RandomStream:
        return RandomStream(round_key(self.key, [purpose]))

    def hide(self, plan: RoundPlan) -> RoundPlan:
        """`plan` with a secret in its seeds: augmentation and dropout depend on a unit's place in its batch, which others shift."""
        return replace(plan, secret=round_key(self.key, ["views"]).hex())


class PrivateOptimizer(DPOptimizerFastGradientClipping):
    """Opacus' optimizer for gradients that are clipped already, with noise from a keystream, added in double precision."""

    def __init__(self, optimizer: torch.optim.Optimizer, private: PrivateRound, cfg: PrivacyConfig) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=private.plan.noise_multiplier,
            max_grad_norm=cfg.max_grad_norm,
            expected_batch_size=private.expected_units,
        )
        self._private, self._steps, self._added = private, 0, NORMALS_ADDED if cfg.secure_noise else 1

    def add_noise(self) -> None:
        stream, deviation = self._stream_of_step(), self.noise_multiplier * self.max_grad_norm / self._added**0.5
        for parameter in self.params:
            _check_processed_flag(parameter.summed_grad)
            noisy = parameter.summed_grad.double()
            for _ in range(self._added):
                noise = stream.normal(parameter.numel()).view(parameter.shape)
                noisy.add_(noise.to(noisy.device), alpha=deviation)
            parameter.grad = noisy.to(parameter.dtype)
            _mark_as_processed(parameter.summed_grad)

    def _stream_of_step(self) -> RandomStream:
        """The noise of a step, by the number of the step and the very sum that it hides.

        The round's key covers what the sum is computed from, but not how: other kernels, another number of threads or another version
        of a library may round otherwise, and chosen weights may make much of it. Two sums that differ in a bit share no noise.
        """
        self._steps += 1
        tag = tensors_tag(round_key(self._private.key, ["sum", str(self._steps)]), [p.summed_grad for p in self.params])
        return self._private.stream(f"noise {self._steps} {tag}")


class MovingAverage:
    """Of the weights after each step, with bias correction: sum of (1 - d) d^(T - t) w_t over (1 - d^T) (Kingma and Ba 2015, sec. 3)."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay, self._weight = parameters, decay, 0.0
        self._sums = [torch.zeros_like(parameter) for parameter in parameters]

    @torch.no_grad()
    def include(self) -> None:
        self._weight = self._decay * self._weight + 1.0 - self._decay
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            total.mul_(self._decay).add_(parameter, alpha=1.0 - self._decay)

    @torch.no_grad()
    def replace_weights(self) -> None:
        """Puts the average in the place of the weights; needs one step at least."""
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            parameter.copy_(total / self._weight)


class PrivateSteps:
    """The step rule of DP-SGD; see the head of this module."""

    def __init__(
        self, optimizer: PrivateOptimizer, gradients: ClippedGradients, private: PrivateRound, cfg: PrivacyConfig
    ) -> None:
        self._optimizer, self._gradients, self._private, self._cfg = optimizer, gradients, private, cfg
        self._average = MovingAverage(gradients.parameters, cfg.ema_decay) if cfg.ema_decay > 0 else None

    def draw(self, data: Examples, plan: RoundPlan) -> Iterator[tuple[float, list[np.ndarray]]]:
        """Draws units by Poisson sampling, one image of each; see `StepRule.draw`.

        Args:
            data: what the round trains on.
            plan: where in the run the round stands; the draws come from the round's key and not from its seeds.
        """
        steps, rounds = self._private.plan.steps_per_round, plan.experiment.rounds
        sampler = UnitSampler.of(data.patients, self._private.plan.unit, self._private.plan.sampling_rate)
        stream, cfg = self._private.stream("sampling"), self._cfg
        for step in range(steps):
            lots = split_into_lots(sampler.draw(stream), cfg.augmentation_multiplicity, cfg.physical_batch_size)
            yield ((plan.round - 1) * steps + step) / (rounds * steps), lots

    def add_gradient(self, mean_loss: Callable[[], Tensor], rows: int) -> None:
        """Adds the clipped gradients of the units in a lot; see `StepRule.add_gradient`.

        Args:
            mean_loss: computes the mean loss of the lot.
            rows: images in the lot, the views of each unit one after the other.
        """
        units = rows // self._cfg.augmentation_multiplicity
        self._gradients.add(lambda: mean_loss() * units, units)

    def take_step(self) -> None:
        self._gradients.fill_missing()
        self._optimizer.step()
        if self._average is not None:
            self._average.include()

    def finish(self) -> None:
        if self._average is not None:
            self._average.replace_weights()


def build_private_setup(model: nn.Module, private: PrivateRound, plan: RoundPlan, compute: Compute) -> TrainingSetup:
    """Builds the plain setup with its optimizer and its steps made private; FedProx pulls inside the plain optimizer, after the noise.

    Args:
        model: with the weights that the round starts from.
        private: plan and key of the round.
        plan: with the secret of `PrivateRound.hide`.
        compute: device and precision.

    Raises:
        ConfigError: a trainable layer has no per-unit gradient, a study's own network or loss mixes images, or the device computes only
            in float16.
    """
    cfg = plan.experiment.privacy
    if compute.needs_scaler:
        raise ConfigError(
            "this device trains in float16, whose scaled loss would change what is clipped; set training.precision to fp32"
        )
    equal_counts = [1] * len(classes_of(plan.experiment.task))  # the site's own are not accounted
    setup = build_setup(model, equal_counts, plan, compute)
    if names_in(plan.experiment):
        _check_study(setup, plan)
    gradients = ClippedGradients(setup.model, cfg.max_grad_norm, cfg.augmentation_multiplicity)
    optimizer = PrivateOptimizer(setup.optimizer, private, cfg)
    return replace(setup, optimizer=optimizer, rule=PrivateSteps(optimizer, gradients, private, cfg))


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


def _check_study(setup: TrainingSetup, plan: RoundPlan) -> None:
    experiment = plan.experiment
    if is_study_code(experiment.model.name):
        train_mode(setup.model)
        refuse_mixing(setup.model, experiment.model.in_channels, experiment.image.size_px)
    if is_study_code(experiment.loss.name):
        refuse_mixing_loss(setup.loss, len(classes_of(experiment.task)))
