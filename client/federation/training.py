"""Local training: one setup, one loop, and what a round trains on.

    setup  = build_setup(model, class_counts, plan, compute)             model, optimizer, loss, and the rule of its steps
    data   = choose_examples(model, images, plan, compute, cache_dir)    the images, or their features where only the classifier is
                                                                         trained and each image is always the same
    result = train_locally(setup, data, plan)                            for each step: augment, add gradients, take the step

Private training has the same loop and another rule of the steps (`client.privacy.dp_sgd`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from pneumofed.common.config.experiment import ExperimentConfig, TrainingConfig
from pneumofed.common.data.dataset import Dataset
from pneumofed.common.imaging.augment import augment, draw_parameters, normalize, to_model_input
from pneumofed.common.models.build import classifier_of, freeze_in_round, set_trainable, train_mode
from pneumofed.common.models.compute import Compute, HeldRows, without_compiler
from pneumofed.common.models.features import FeatureSet, has_fixed_body, load_features
from pneumofed.common.models.recipe import build_loss, count_batches, schedule_factor
from pneumofed.common.seeds import derive_seed, numpy_generator, torch_generator

logger = logging.getLogger(__name__)
Examples = Dataset | FeatureSet
"""What the loop trains on: images, or their features below the classifier."""


class StepRule(Protocol):
    """What plain and private training differ in: which images a step takes, and how their gradients become one step."""

    def draw(self, data: Examples, plan: RoundPlan) -> Iterator[tuple[float, list[np.ndarray]]]:
        """Draws the images of each step.

        Args:
            data: what the round trains on.
            plan: where in the run the round stands; the order is drawn from its seeds.

        Returns:
            For each step of the round the progress of the run in [0, 1), and rows of `data`, int64, in lots that fit the
            memory.
        """

    def add_gradient(self, mean_loss: Callable[[], torch.Tensor], rows: int) -> None:
        """Adds the gradient of one lot.

        Args:
            mean_loss: computes the mean loss of the lot, a scalar with its graph; to be called once.
            rows: number of images in the lot.
        """

    def take_step(self) -> None:
        """Changes the weights by what was added."""

    def finish(self) -> None:
        """Called once, after the last step of the round."""


@dataclass(frozen=True)
class TrainingSetup:
    """What one round of local training steps with. A private setup has the same parts, wrapped by its mechanism."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: nn.Module
    compute: Compute
    rule: StepRule


@dataclass(frozen=True)
class RoundPlan:
    """Where in the run a round stands; all randomness of the round comes from it."""

    experiment: ExperimentConfig
    round: int
    site: str
    secret: str = ""
    """A part of the seeds that the coordinator does not know, in private training."""
    rate_factor: float = 1.0
    """On the learning rate, from the coordinator; see `common.models.recipe.plateau_factor`."""

    def seed_parts(self) -> tuple[int | str, ...]:
        return self.experiment.seed, self.round, self.site, *((self.secret,) if self.secret else ())


@dataclass(frozen=True)
class TrainingResult:
    """Sums of one round's training; `loss` and `accuracy` are means over the images seen, with augmentation; of none they are NaN."""

    loss: float
    accuracy: float
    steps: int
    images: int
    learning_rate: float
    duration_sec: float

    def metrics(self) -> dict[str, float]:
        speed = self.images / self.duration_sec if self.duration_sec else 0.0
        return {
            "train_loss": self.loss,
            "train_accuracy": self.accuracy,
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "train_sec": self.duration_sec,
            "images_per_sec": speed,
        }


def build_setup(model: nn.Module, class_counts: list[int], plan: RoundPlan, compute: Compute) -> TrainingSetup:
    """Builds the plain setup: the model's trainable parameters under the experiment's optimizer and loss.

    With FedProx the optimizer pulls toward the weights that `model` holds now, which are the global ones.

    Args:
        model: with the weights that the round starts from; it is frozen in part as the experiment says and moved to the
            device.
        class_counts: training images of the site by class, for a loss that weighs classes.
        plan: the experiment and the number of the round.
        compute: device and precision.
    """
    experiment = plan.experiment
    freeze, factor = freeze_in_round(experiment.model, plan.round)
    set_trainable(model, freeze)
    compute = compute.suited_to(model)
    model = compute.place(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _build_optimizer(trainable, experiment.training, experiment.training.learning_rate * factor)
    if experiment.proximal_mu > 0:
        pull_toward(optimizer, [parameter.detach().clone() for parameter in trainable], experiment.proximal_mu)
    loss = build_loss(experiment.loss, class_counts).to(compute.device)
    return TrainingSetup(model, optimizer, loss, compute, PlainSteps(optimizer, trainable, experiment.training, compute))


class PlainSteps:
    """Every image once an epoch, in random order; one lot a step, or with `training.micro_batch_size` as many as it takes.
    `training.local_steps` ends the last epoch early."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, trainable: list[nn.Parameter], training: TrainingConfig, compute: Compute
    ) -> None:
        self._optimizer, self._trainable, self._training = optimizer, trainable, training
        self._scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.needs_scaler)
        self._rows = 0

    def draw(self, data: Examples, plan: RoundPlan) -> Iterator[tuple[float, list[np.ndarray]]]:
        """Draws every image once an epoch, one batch a step, until the round's steps are done; see `StepRule.draw`.

        Args:
            data: what the round trains on.
            plan: where in the run the round stands; the order is drawn from its seeds.
        """
        order, steps = numpy_generator(*plan.seed_parts(), "batches"), self._training.local_steps
        a_pass = count_batches(len(data.labels), self._training.batch_size)
        epochs = self._training.local_epochs if steps is None else steps / a_pass
        for epoch in range(math.ceil(epochs)):
            batches = draw_batches(len(data.labels), self._training.batch_size, order)
            for number, index in enumerate(batches if steps is None else batches[: steps - epoch * a_pass]):
                done_epochs = (plan.round - 1) * epochs + epoch + number / len(batches)
                self._rows = len(index)
                yield done_epochs / (plan.experiment.rounds * epochs), self._lots(np.sort(index))

    def add_gradient(self, mean_loss: Callable[[], torch.Tensor], rows: int) -> None:
        """Adds the gradient of the lot's part of the batch's mean loss, scaled where the precision is float16; see
        `StepRule.add_gradient`.

        Args:
            mean_loss: computes the mean loss of the lot.
            rows: images in the lot.
        """
        share = rows / self._rows if self._training.micro_batch_size else 1.0
        loss = mean_loss()
        self._scaler.scale(loss if share == 1.0 else loss * share).backward()

    def _lots(self, index: np.ndarray) -> list[np.ndarray]:
        most = self._training.micro_batch_size
        return [index[start : start + most] for start in range(0, len(index), most)] if most else [index]

    def take_step(self) -> None:
        # A fused optimizer divides by the scale inside its step, after the hooks that add to gradients (FedProx, SCAFFOLD, Ditto).
        self._scaler.unscale_(self._optimizer)
        if self._training.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._trainable, self._training.max_grad_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def finish(self) -> None:
        """The weights are those of the last step."""


def pull_toward(optimizer: torch.optim.Optimizer, anchors: list[torch.Tensor], mu: float) -> None:
    """Adds the gradient of mu/2 * ||w - w_global||^2 (Li et al. 2020, FedProx, eq. 2) before each optimizer step.

    In the step and not in the loss: under Opacus the private optimizer writes `grad` anew from the per-sample gradients, which
    would silently drop a term of the loss.

    Args:
        optimizer: of the local training; under DP the plain one inside the private one.
        anchors: the global weights, one tensor for each of the optimizer's parameters in their order.
        mu: strength of the pull, above 0.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def pull(*_: Any) -> None:
        for parameter, anchor in zip(parameters, anchors, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=mu)

    optimizer.register_step_pre_hook(pull)


def draw_batches(images: int, batch_size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Draws one epoch's indices in random order, int64 [batch] each; every image once.

    A last batch of one joins the one before it, since BatchNorm cannot normalise a single value; a site's only image stands twice.

    Args:
        images: number of images, at least 1.
        batch_size: most images in a batch, save the last one.
        generator: of the order; it is advanced by one permutation.
    """
    order = generator.permutation(images)
    if images == 1:
        return [np.repeat(order, 2)]
    batches = [order[start : start + batch_size] for start in range(0, images, batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def train_locally(setup: TrainingSetup, data: Examples, plan: RoundPlan) -> TrainingResult:
    """Trains `setup.model` in place on `data` for one round and returns what happened.

    Pure in (weights, data, plan): the same call gives the same weights on the same machine and number of threads.

    Args:
        setup: model, optimizer, loss and rule of the steps.
        data: images or features; see `choose_examples`.
        plan: where in the run the round stands.
    """
    started = time.perf_counter()
    torch.manual_seed(derive_seed(*plan.seed_parts(), "dropout"))
    training = plan.experiment.training
    train_mode(setup.model, fix_statistics=training.fixes_statistics(plan.round, plan.experiment.rounds))
    views = torch_generator(*plan.seed_parts(), "augmentation")
    kept = torch_generator(*plan.seed_parts(), "clinical values")
    network = classifier_of(setup.model) if isinstance(data, FeatureSet) else setup.model
    base_rates = [float(group["lr"]) for group in setup.optimizer.param_groups]
    inputs, seen = Lots(data, plan, setup.compute), _Seen()
    steps, factor = 0, 1.0
    for progress, lots in setup.rule.draw(data, plan):
        factor = schedule_factor(training, progress) * plan.rate_factor
        for group, rate in zip(setup.optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        setup.optimizer.zero_grad(set_to_none=True)
        for rows in lots:
            parts, targets = inputs.take(rows, views, kept)
            _add_gradient(setup, network, parts, targets, seen)
        setup.rule.take_step()
        steps += 1
    setup.rule.finish()
    loss, accuracy, images = seen.means()
    return TrainingResult(loss, accuracy, steps, images, base_rates[0] * factor, time.perf_counter() - started)


def choose_examples(model: nn.Module, data: Dataset, plan: RoundPlan, compute: Compute, cache_dir: Path) -> Examples:
    """Returns `data`, or its features where they give the weights that the images would give, in a hundredth of the time.

    There is no setting for it, so that none can be wrong. Features are taken exactly where the network below the classifier is the same
    function of the same images in every step: its parameters are frozen in all rounds or there are none, which `train_mode` then keeps in
    evaluation, no augmentation is on, and the images have their full size. Else the images are taken.

    Args:
        model: on the device, with the weights that the round starts from.
        data: the site's training images.
        plan: the experiment and the number of the round.
        compute: device and precision for computing features.
        cache_dir: keeps features for the next rounds.

    Raises:
        DataError: `cache_dir` cannot be written for another reason than a full disk.
    """
    experiment = plan.experiment
    if not has_fixed_body(model, experiment.model) or not len(data):
        return data
    if experiment.augmentation.is_on:
        logger.info("augmentation is on: features of images are computed anew for each view; set it to 0 to compute them once")
        return data
    size_px = experiment.image.size_px
    if experiment.training.size_in_round(plan.round, experiment.rounds, size_px) != size_px:
        return data
    return FeatureSet(load_features(model, data, compute, experiment.model, cache_dir), data.labels, data.patients)


def _values(known: np.ndarray, plan: RoundPlan, kept: torch.Generator) -> torch.Tensor:
    """Clinical values float32 [N, K] with some taken away (`drop_value`, `drop_all`); all codes of a column go together."""
    schema, values = plan.experiment.clinical, torch.from_numpy(known)
    assert schema is not None
    gone = torch.rand(len(values), len(schema.columns), generator=kept) < schema.drop_value
    gone |= torch.rand(len(values), 1, generator=kept) < schema.drop_all
    slots = torch.tensor([column.slots for column in schema.columns])
    return values.masked_fill(gone.repeat_interleave(slots, dim=1), torch.nan)


class Lots:
    """What the network takes of a round's examples, on the device: augmented normalised images, or features.

    A card holds the decoded bytes of all images of the round, as far as they fit (`HeldRows`). There a lot becomes floats, is augmented and
    normalised; only the positions of its images and the parameters of their augmentation are sent.
    """

    def __init__(self, data: Examples, plan: RoundPlan, compute: Compute) -> None:
        self._plan, self._compute, self._features = plan, compute, isinstance(data, FeatureSet)
        self._values = HeldRows(np.asarray(data.features if isinstance(data, FeatureSet) else data.pixels), compute)
        self._labels = HeldRows(data.labels, compute)
        self._clinical = data.clinical if isinstance(data, Dataset) else None

    def take(
        self, rows: np.ndarray, views: torch.Generator, kept: torch.Generator
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Makes one lot.

        Args:
            rows: int64 [N], positions of the examples.
            views: of the augmentation; a generator of the CPU, so that every device trains on the same views. It is moved on.
            kept: likewise, of which clinical values are taken away.

        Returns:
            What the network is given: float32 [N, C, S, S] in channels-last memory, of volumes [N, 1, slices, S, S], or features [N, D],
            and where the run has clinical values these, float32 [N, K], NaN where missing; and int64 [N], the labels.
        """
        values, labels, experiment = self._values.take(rows), self._labels.take(rows), self._plan.experiment
        if self._features:
            return (values,), labels
        size_px = experiment.training.size_in_round(self._plan.round, experiment.rounds, experiment.image.size_px)
        images = augment(_shrink(to_model_input(values), size_px), draw_parameters(len(rows), experiment.augmentation, views))
        shown = self._compute.move(normalize(images, experiment.model.in_channels))
        if self._clinical is None:
            return (shown,), labels
        return (shown, _values(self._clinical[rows], self._plan, kept).to(self._compute.device)), labels


class _Seen:
    """Loss and right answers of each lot. They stay on the device until the round is over: reading one would wait for all that runs."""

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._right: list[torch.Tensor] = []
        self._rows: list[int] = []

    def add(self, loss: torch.Tensor, right: torch.Tensor, rows: int) -> None:
        self._losses.append(loss)
        self._right.append(right)
        self._rows.append(rows)

    def means(self) -> tuple[float, float, int]:
        """Mean loss, share of right answers and number of images; NaN where there was none."""
        if not self._rows:
            return math.nan, math.nan, 0
        losses, images = torch.stack(self._losses).cpu().tolist(), sum(self._rows)
        total = sum((loss * rows for loss, rows in zip(losses, self._rows, strict=True)), 0.0)
        return total / images, int(torch.stack(self._right).sum()) / images, images


def _shrink(images: torch.Tensor, size_px: int) -> torch.Tensor:
    if images.shape[-1] == size_px:
        return images
    return nn.functional.interpolate(images, size=(size_px, size_px), mode="bilinear", antialias=True)


def _add_gradient(
    setup: TrainingSetup, network: nn.Module, inputs: tuple[torch.Tensor, ...], targets: torch.Tensor, seen: _Seen
) -> None:
    """Adds the gradient of one lot, and to `seen` its mean loss and how many images were classified rightly."""
    compute, found = setup.compute, {}

    def mean_loss() -> torch.Tensor:
        with compute.autocast():
            found["logits"] = network(*inputs)
        found["loss"] = setup.loss(found["logits"].float(), targets)
        return found["loss"]

    setup.rule.add_gradient(mean_loss, len(targets))
    seen.add(found["loss"].detach(), (found["logits"].detach().argmax(dim=1) == targets).sum(), len(targets))


def _build_optimizer(parameters: list[nn.Parameter], cfg: TrainingConfig, learning_rate: float) -> torch.optim.Optimizer:
    if cfg.optimizer == "sgd":
        return without_compiler(torch.optim.SGD)(
            parameters, lr=learning_rate, momentum=cfg.momentum, weight_decay=cfg.weight_decay
        )
    # fused: one pass over the weights instead of seven, half the optimizer's time on a CPU
    adamw = without_compiler(torch.optim.AdamW)
    return adamw(parameters, lr=learning_rate, eps=cfg.adam_epsilon, weight_decay=cfg.weight_decay, fused=True)
