"""The ClientApp: what a hospital answers to each message of the coordinator.

Each handler is a function (instruction, site configuration, policy) -> reply content; `_answer` gives it the site and turns every
failure into a reply without details, so that a site that fails is named and the run goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from pneumofed.client.federation.clinical_sums import answer_clinical_sums
from pneumofed.client.federation.correction import SiteCorrection
from pneumofed.client.federation.ditto import prepare_personal
from pneumofed.client.federation.held_model import keep_models
from pneumofed.client.federation.judging import evaluate_round, judge_before_training, judge_under_masks, would_judge
from pneumofed.client.federation.network import LocalNorms, empty_network, own_network
from pneumofed.client.federation.requests import Disclosure, Handler, answer_request, open_site_data, read_request
from pneumofed.client.federation.site_data import SiteData, class_number, find_site_config, site_log
from pneumofed.client.federation.survey import answer_survey
from pneumofed.client.federation.training import RoundPlan, TrainingResult, build_setup, choose_examples, train_locally
from pneumofed.client.secure_aggregation.participant import MaskPlan, answer_step, masking
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.errors import EmptySiteError
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.models.compute import build_compute
from pneumofed.common.secure_aggregation.masking import SumVector
from pneumofed.common.secure_aggregation.protocol import pack_masked, pack_reply
from pneumofed.common.secure_aggregation.quantization import TrainingSums, UpdateCodec
from pneumofed.common.seeds import numpy_generator
from pneumofed.common.wire.instructions import Instruction
from pneumofed.common.wire.messages import (
    Evaluation,
    ModelArrays,
    Presence,
    Update,
    attach_evaluation,
    attach_held,
    attach_not_judged,
    build_failure,
    decode_update,
    encode_update,
    pack_presence,
    pack_update,
    record_bytes,
    unpack_arrays,
)
from pneumofed.common.wire.parameter_layout import ArraysLayout

logger = logging.getLogger(__name__)

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answers an enrolment request, a survey, or a step of secure aggregation.

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
    return _answer(message, context, answer_evaluation)


def answer_query(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> RecordDict:
    """Answers what needs no training: enrolment, a survey, sums of clinical numbers, or a step of secure aggregation.

    Args:
        instruction: what the coordinator asks.
        config: the site's own.
        policy: the site's, as it stood when the message came.
    """
    if instruction.step:
        reply = answer_step(instruction, config, policy, lambda purpose: would_judge(instruction, config, policy, purpose))
        return pack_reply(Presence(config.name, ""), reply)
    if instruction.survey:
        return answer_survey(instruction, config, policy)
    if instruction.clinical:
        return answer_clinical_sums(instruction, config, policy)
    return answer_enrolment(instruction, config, policy)


def answer_evaluation(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> RecordDict:
    """Judges the global model on the site's validation patients, and where it is asked for one that the site trains by itself; or the
    model of another site in its place.

    Args:
        instruction: what the coordinator asks.
        config: the site's own.
        policy: the site's, as it stood when the message came.
    """
    if instruction.other is not None or instruction.first is not None:
        from pneumofed.client.federation.alone import compare_alone, evaluate_other  # once a run at most

        if instruction.other is not None:
            return evaluate_other(instruction, config, policy, instruction.other)
        return compare_alone(instruction, config, policy)
    return evaluate_round(instruction, config, policy)


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
    layout = ArraysLayout.of(empty_network(instruction.experiment.model, instruction.experiment.task))
    return pack_presence(Disclosure.of(site, instruction.experiment, policy).presence(layout.digest))


def train_round(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> RecordDict:
    """Trains the global model on the site's training patients for one round, after judging it where the run asks for both at once.

    Args:
        instruction: what the coordinator asks, with the global weights.
        config: the site's own.
        policy: the site's, as it stood when the message came.

    Returns:
        The update with its counts, and what judging found; in secure aggregation one vector of the former two, under masks.

    Raises:
        EmptySiteError: the site has no training image.
        PolicyError, BudgetError: policy or ledger refuse the round; nothing was trained.
    """
    with masking(instruction, config, policy, "train") as plan:
        if plan is not None:
            summed = judge_under_masks(instruction, config, policy, plan)
            trained = _train(instruction, config, policy)
            return pack_masked(trained.releases.presence(trained.layout.digest), trained.masked(plan, instruction, summed))
        judged = judge_before_training(instruction, config, policy)
        trained = _train(instruction, config, policy)
    presence = trained.releases.presence(trained.layout.digest)
    travelling = _travelling(trained.arrays, instruction, trained.site.name)
    if trained.correction is not None:
        precision = instruction.experiment.strategy.update_precision
        sent = unpack_arrays(decode_update(travelling, instruction.weights, precision))
        trained.correction.keep(sent.parameters, trained.releases.train)
    content = pack_update(Update(presence, travelling, trained.releases.train, trained.metrics, record_bytes(travelling)))
    if isinstance(judged, Evaluation):
        attach_evaluation(content, judged)
    elif judged is not None:
        attach_not_judged(content, judged)
    return content


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

    def masked(self, plan: MaskPlan, instruction: Instruction, judged: Statistics | None) -> SumVector:
        """Encodes the update, its counts and what judging found as one vector under the site's masks.

        Args:
            plan: the masks that the sites agreed on for this round.
            instruction: what the coordinator asked, with the weights that the round started from.
            judged: statistics of these weights, where all sites' vectors hold some.
        """
        experiment, base, result = instruction.experiment, instruction.weights, self.result
        classes = self.site.class_counts(class_number(experiment))
        sizes = self.layout.parameter_count, self.layout.statistic_count, len(classes)
        codec = UpdateCodec(experiment.secure_aggregation, *sizes, plan.sites, judged is not None)
        difference = ModelArrays(self.arrays.parameters - base.parameters, self.arrays.statistics - base.statistics)
        sums = TrainingSums(sum(classes), 0, 0, 0.0, classes)
        if result.images and plan.metrics and "train_loss" in self.metrics:  # else not even their sum may leave
            right = round(result.accuracy * result.images)
            sums = TrainingSums(sum(classes), result.images, right, result.loss * result.images, classes)
        vector = codec.encode(difference, sums, judged)
        plan.hide(vector)
        return vector


def _train(instruction: Instruction, config: SiteConfig, policy: SitePolicy) -> LocalTraining:
    experiment = instruction.experiment
    compute = build_compute(config.device, experiment.training.precision, config.threads)
    site = open_site_data(instruction, config, policy, "train")
    if not len(site.train.labels):
        raise EmptySiteError(f"{site.name}: no training image")
    releases = Disclosure.of(site, experiment, policy)
    model, layout = own_network(instruction, config, norms_before_round=instruction.round)
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
        from pneumofed.client.privacy.dp_sgd import train_privately  # Opacus costs a second to import

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
    return encode_update(arrays, instruction.weights, experiment.strategy.update_precision, generator)


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
        judged = [arrays for arrays in (instruction.arrays, instruction.latest) if arrays is not None and work == "evaluate"]
        held = keep_models(config, instruction.run, instruction.round, *judged) if judged else []
        content = answer_request(instruction, config, work, handler)
        attach_held(content, held)
        return Message(content, reply_to=message)
    except Exception:
        logger.exception("a message of type %s could not be answered", message.metadata.message_type)
        raise
