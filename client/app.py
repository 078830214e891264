"""The ClientApp: what a hospital answers to each message of the coordinator.

Each handler is a function (instruction, site configuration, policy) -> reply content; `_answer` gives it the site and turns every
failure into a reply without details, so that a site that fails is named and the run goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from pneumofed.client.federation.correction import SiteCorrection
from pneumofed.client.federation.disclosure import Disclosure
from pneumofed.client.federation.ditto import PersonalModels, prepare_personal
from pneumofed.client.federation.evaluations import admit_evaluation, coarsen
from pneumofed.client.federation.fedbn import LocalNorms
from pneumofed.client.federation.policy_decision import RunRequest
from pneumofed.client.federation.requests import Handler, answer_request, open_site_data, read_request
from pneumofed.client.federation.site_data import SiteData, class_number, find_site_config, site_log
from pneumofed.client.federation.suitability_scores import count_patients
from pneumofed.client.federation.training import RoundPlan, TrainingResult, build_setup, choose_examples, train_locally
from pneumofed.client.secure_aggregation.participant import MaskPlan, answer_step, begin_masking
from pneumofed.common.config.experiment import ExperimentConfig, ModelConfig, TaskName
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.errors import EmptySiteError, MessageError, PolicyError
from pneumofed.common.evaluation.predictions import Predictions
from pneumofed.common.evaluation.statistics import FEDERATED_GRID, Statistics
from pneumofed.common.models.build import build_model
from pneumofed.common.models.compute import Compute, build_compute
from pneumofed.common.models.features import predict_cached
from pneumofed.common.secure_aggregation.masking import SumVector
from pneumofed.common.secure_aggregation.protocol import pack_masked, pack_reply
from pneumofed.common.secure_aggregation.quantization import TrainingSums, UpdateCodec, encode_statistics
from pneumofed.common.seeds import numpy_generator
from pneumofed.common.wire.messages import (
    Evaluation,
    Instruction,
    ModelArrays,
    Presence,
    Update,
    build_failure,
    decode_update,
    encode_update,
    pack_evaluation,
    pack_presence,
    pack_update,
    unpack_arrays,
)
from pneumofed.common.wire.parameter_layout import ArraysLayout

logger = logging.getLogger(__name__)

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answers an enrolment request or a step of secure aggregation.

    Args:
        message: the coordinator's instruction.
        context: Flower's, with the node's and the run's configuration.

    Returns:
        The reply; where anything failed, one that names the class of the error and no more.
    """
    return _answer(message, context, answer_query)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answers a request to train for one round.

    Args:
        message: the coordinator's instruction.
        context: Flower's, with the node's and the run's configuration.

    Returns:
        The reply; where anything failed, one that names the class of the error and no more.
    """
    return _answer(message, context, train_round)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Answers a request to judge the global model on the site's validation patients.

    Args:
        message: the coordinator's instruction.
        context: Flower's, with the node's and the run's configuration.

    Returns:
        The reply; where anything failed, one that names the class of the error and no more.
    """
    return _answer(message, context, evaluate_round)


def answer_query(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> RecordDict:
    """Answers what needs no training: enrolment, or a step of secure aggregation.

    Args:
        instruction: what the coordinator asks.
        config: the site's own.
        policy: the site's, as it stood when the message came.
    """
    if instruction.step:
        return pack_reply(Presence(config.name, ""), answer_step(instruction, config, policy))
    return answer_enrolment(instruction, config, policy)


def answer_enrolment(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> RecordDict:
    """Reports who the site is and what data it has for the experiment, in counts; decodes the images on the way.

    Args:
        instruction: what the coordinator asks.
        config: the site's own.
        policy: the site's, as it stood when the message came.

    Raises:
        PolicyError: the site holds fewer training patients than the policy asks for.
        DataError: its data cannot be read.
    """
    site = open_site_data(instruction, config, policy, "query")
    layout = ArraysLayout.of(_model(instruction.experiment.model, instruction.experiment.task))
    return pack_presence(Disclosure.of(site, instruction.experiment, policy).presence(layout.digest))


def train_round(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> RecordDict:
    """Trains the global model on the site's training patients for one round.

    Args:
        instruction: what the coordinator asks, with the global weights.
        config: the site's own.
        policy: the site's, as it stood when the message came.

    Returns:
        The update with its counts; in secure aggregation one vector of both, under masks.

    Raises:
        EmptySiteError: the site has no training image.
        PolicyError, BudgetError: policy or ledger refuse the round; nothing was trained.
    """
    if instruction.experiment.secure_aggregation.enabled or instruction.step:
        plan = begin_masking(instruction, config, policy, "train")
        trained = _train(instruction, config, policy)
        return pack_masked(trained.releases.presence(trained.layout.digest), trained.masked(plan, instruction))
    trained = _train(instruction, config, policy)
    presence = trained.releases.presence(trained.layout.digest)
    update = Update.of(presence, trained.arrays, trained.releases.train, trained.metrics)
    travelling = _travelling(trained.arrays, instruction, trained.site.name)
    if trained.correction is not None:
        precision = instruction.experiment.strategy.update_precision
        sent = unpack_arrays(decode_update(travelling, _arrays_of(instruction), precision))
        trained.correction.keep(sent.parameters, trained.releases.train)
    return pack_update(update, travelling)


@dataclass(frozen=True)
class LocalTraining:
    """The result of one round of local training, and what of it may leave the site."""

    site: SiteData
    releases: Disclosure
    layout: ArraysLayout
    arrays: ModelArrays
    result: TrainingResult
    metrics: Mapping[str, float]
    """Those that may leave the site."""
    correction: SiteCorrection | None = None
    """Of the site's gradients, under the strategies that have one."""

    def masked(self, plan: MaskPlan, instruction: Instruction) -> SumVector:
        """Encodes the update and its counts as one vector under the site's masks.

        Args:
            plan: the masks that the sites agreed on for this round.
            instruction: what the coordinator asked, with the weights that the round started from.
        """
        experiment, base, result = instruction.experiment, _arrays_of(instruction), self.result
        classes = self.site.class_counts(class_number(experiment))
        sizes = self.layout.parameter_count, self.layout.statistic_count, len(classes)
        codec = UpdateCodec(experiment.secure_aggregation, *sizes, plan.sites)
        difference = ModelArrays(self.arrays.parameters - base.parameters, self.arrays.statistics - base.statistics)
        sums = TrainingSums(sum(classes), 0, 0, 0.0, classes)
        if result.images and plan.metrics and "train_loss" in self.metrics:  # else not even their sum may leave
            right = round(result.accuracy * result.images)
            sums = TrainingSums(sum(classes), result.images, right, result.loss * result.images, classes)
        vector = codec.encode(difference, sums)
        plan.hide(vector)
        return vector


def _train(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> LocalTraining:
    experiment = instruction.experiment
    compute = build_compute(config.device, experiment.training.precision, config.threads)
    site = open_site_data(instruction, config, policy, "train")
    if not len(site.train.labels):
        raise EmptySiteError(f"{site.name}: no training image")
    releases = Disclosure.of(site, experiment, policy)
    model, layout = _model_with(instruction, config, norms_before_round=instruction.round)
    train_own = prepare_personal(instruction, site, model, compute)
    plan = RoundPlan(experiment, instruction.round, site.name, rate_factor=instruction.rate_factor)
    correction = SiteCorrection.read(instruction, config.work_dir, layout)
    metrics: Mapping[str, float]
    if experiment.privacy.mechanism == "none":
        setup = build_setup(model, site.class_counts(class_number(experiment)), plan, compute)
        if correction is not None:
            correction.steer(setup)
        result = train_locally(setup, choose_examples(setup.model, site.train, plan, compute, site.cache_dir), plan)
        metrics = result.metrics()
    else:
        from pneumofed.client.privacy.rounds import train_privately  # Opacus costs a second to import

        result, metrics = train_privately(model, site, instruction, compute, policy)
    arrays = ModelArrays(*layout.flatten(model))
    if experiment.strategy.name == "fedbn":
        LocalNorms.of(config.work_dir, instruction.run, layout).keep(arrays, instruction.round)
    train_own()
    logger.info("round %d: trained %d steps, loss %.4f", instruction.round, result.steps, result.loss)
    return LocalTraining(site, releases, layout, arrays, result, releases.metrics(metrics), correction)


def _travelling(arrays: ModelArrays, instruction: Instruction, site: str) -> ArrayRecord:
    """The record that goes to the coordinator in place of `arrays`, in the number type that the experiment names."""
    experiment = instruction.experiment
    generator = numpy_generator(experiment.seed, instruction.round, site, "rounding")
    return encode_update(arrays, _arrays_of(instruction), experiment.strategy.update_precision, generator)


def evaluate_round(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> RecordDict:
    """Judges the global model on the site's validation patients; only sums leave (see `common.evaluation.statistics`).

    Args:
        instruction: what the coordinator asks, with the global weights.
        config: the site's own.
        policy: the site's, as it stood when the message came.

    Returns:
        Mergeable statistics; those of no image where the policy withholds them; with `personal.method` those of the site's own model
        too, where they may leave. In secure aggregation under masks, and nothing rather than those of no image: who is counted adds
        something.

    Raises:
        PolicyError: too many were asked for, or the answer and an earlier one would tell a few patients apart.
        EmptySiteError: the site has nothing to add to a secure sum.
    """
    if instruction.suitability is not None:
        return _score_round(instruction, config, policy)
    started = time.perf_counter()
    experiment = instruction.experiment
    secure = experiment.secure_aggregation.enabled or instruction.step
    plan = begin_masking(instruction, config, policy, "evaluate") if secure else None
    compute = build_compute(config.device, "fp32", config.threads)
    site = open_site_data(instruction, config, policy, "evaluate")
    model, layout = _model_with(instruction, config, norms_before_round=instruction.round + 1)
    releases = Disclosure.of(site, experiment, policy)
    statistics = _no_statistics(experiment)  # what is sent where nothing may be judged
    personal = None
    if not releases.withholds("validation_statistics"):
        site = _admitted(site, instruction, config, policy)
        statistics = coarsen(evaluate_model(compute.place(model), site, experiment, compute), policy.score_bins)
        if plan is None and releases.shows_personal(experiment):
            personal = _personal_statistics(site, instruction, config, policy, compute)
    presence = releases.presence(layout.digest)
    if plan is not None:
        if releases.withholds("validation_statistics"):
            raise PolicyError("min_validation_patients", "too few validation patients for a sum")
        if not statistics.n:
            raise EmptySiteError(f"{site.name}: no validation statistics for the sum")
        vector = encode_statistics(statistics)
        plan.hide(vector)
        return pack_masked(presence, vector)
    metrics = {"evaluate_sec": time.perf_counter() - started}
    numbers = personal.to_numbers() if personal else None
    return pack_evaluation(Evaluation(presence, statistics.n, metrics, statistics.to_numbers(), numbers))


def _admitted(site: SiteData, instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> SiteData:
    """The site with those validation patients whom one more answer may be about; the answer is counted.

    Raises:
        PolicyError: none may leave.
    """
    if config.policy is None:
        return site
    request = RunRequest.of(instruction.experiment, "evaluate", instruction.run, instruction.round)
    return replace(site, validation=admit_evaluation(site.validation, request, policy, Path(config.work_dir)))


def _personal_statistics(
    site: SiteData, instruction: Instruction, config: SiteConfig, policy: SitePolicy, compute: Compute
) -> Statistics | None:
    """Statistics of the site's own model on the patients on whom the global one was judged, as one more answer; None where there is no
    such model yet, or the policy lets no more answers leave: the global model's goes without them."""
    own = PersonalModels.of(config.work_dir, instruction.run).before(instruction.round + 1)
    if own is None or not len(site.validation.labels):
        return None
    try:
        site = _admitted(site, instruction, config, policy)
    except PolicyError as error:
        logger.info("round %d: nothing of the site's own model leaves (%s)", instruction.round, error)
        return None
    model = _model(instruction.experiment.model, instruction.experiment.task)
    ArraysLayout.of(model).load(model, own.arrays.parameters, own.arrays.statistics)
    return coarsen(evaluate_model(compute.place(model), site, instruction.experiment, compute), policy.score_bins)


def _score_round(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> RecordDict:
    """The network is the bundle's: under FedBN without the site's own normalisation layers."""
    model, arrays = _model(instruction.experiment.model, instruction.experiment.task), _arrays_of(instruction)
    layout = ArraysLayout.of(model)
    layout.load(model, arrays.parameters, arrays.statistics)
    return pack_evaluation(count_patients(instruction, config, policy, model, layout.digest))


def evaluate_model(model: nn.Module, site: SiteData, experiment: ExperimentConfig, compute: Compute) -> Statistics:
    """Computes mergeable statistics of `model` on the site's validation patients; those of nothing where it has none.

    Args:
        model: on the device.
        site: the site's data.
        experiment: decides the task and how images are prepared.
        compute: device and precision.
    """
    if not len(site.validation.labels):
        return _no_statistics(experiment)
    probabilities = predict_cached(model, site.validation, compute, experiment, site.cache_dir)
    return Statistics.of(Predictions(probabilities, site.validation.labels, site.validation.patients), FEDERATED_GRID)


def _no_statistics(experiment: ExperimentConfig) -> Statistics:
    return Statistics.zero(class_number(experiment), FEDERATED_GRID)


def _answer(message: Message, context: Context, handler: Handler) -> Message:
    config: SiteConfig | None = None
    try:
        config = find_site_config(context.node_config, context.run_config)
        with site_log(config):
            return _handle(message, config, handler)
    except Exception as error:
        if config is None:
            logger.exception("the site's configuration cannot be used")
        return build_failure(error, config.name if config else None, message)


def _handle(message: Message, config: SiteConfig, handler: Handler) -> Message:
    try:
        instruction, work = read_request(message.content, message.metadata.message_type, config)
        return Message(answer_request(instruction, config, work, handler), reply_to=message)
    except Exception:
        logger.exception("a message of type %s could not be answered", message.metadata.message_type)
        raise


def _model_with(instruction: Instruction, config: SiteConfig, norms_before_round: int) -> tuple[nn.Module, ArraysLayout]:
    """Builds the experiment's model with the instruction's weights, and under FedBN the site's own norm layers of an earlier round."""
    experiment = instruction.experiment
    model = _model(experiment.model, experiment.task)
    layout = ArraysLayout.of(model)
    arrays = _arrays_of(instruction)
    if experiment.strategy.name == "fedbn":
        arrays = LocalNorms.of(config.work_dir, instruction.run, layout).restore(arrays, norms_before_round)
    layout.load(model, arrays.parameters, arrays.statistics)
    return model, layout


def _arrays_of(instruction: Instruction) -> ModelArrays:
    if instruction.arrays is None:
        raise MessageError("the instruction holds no arrays")
    return instruction.arrays


@lru_cache(maxsize=1)
def _model(cfg: ModelConfig, task: TaskName) -> nn.Module:
    """The network without its first weights, which come with each message. Kept for the process: building it costs 0.2 s."""
    return build_model(cfg.without_weights(), task, seed=0)
