"""What a run asks the hospitals once, when its rounds are over, about the model that was kept.

keep_hospital_reference   how their validation patients score in the suitability tests of the model
keep_alone                how a model does there that each hospital trained by itself, beside the kept one; what
                          `server.federation.cross_site` asks next rests on these models

What fails here is logged, and the run succeeds without. What came is kept in the run folder, and a resumed run asks only for the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from flwr.app import Message, MessageType

from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ClinicalConfig, ExperimentConfig
from pneumofed.common.errors import MessageError, PneumofedError
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.model_bundle.bundle import read_start_weights
from pneumofed.common.model_bundle.image_statistics import as_pictures, pixel_statistics
from pneumofed.common.model_bundle.pooled_scores import HospitalReference, pack_counts, unpack_counts
from pneumofed.common.model_bundle.suitability import Suitability, fit_suitability
from pneumofed.common.models.build import build_model
from pneumofed.common.models.features import compute_features
from pneumofed.common.models.fusion import ClinicalNetwork
from pneumofed.common.seeds import derive_seed
from pneumofed.common.wire.instructions import Instruction, pack_instruction, with_step
from pneumofed.common.wire.messages import ModelArrays, unpack_evaluation
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.cross_site import CrossSite
from pneumofed.server.federation.replies import read_personal
from pneumofed.server.federation.rounds import Coordinator
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import Metrics
from pneumofed.server.runs.summary_records import AloneComparisons, PersonalComparison
from pneumofed.server.secure_aggregation.rounds import SecureRounds

logger = logging.getLogger(__name__)
MOST_IMAGES = 2000
"""Central images that the densities are fitted on."""


def keep_hospital_reference(coordinator: Coordinator, folder: RunFolder, number: int) -> None:
    """Asks the sites once and keeps what they counted in the run folder. Whatever fails here is logged, and the run succeeds without.

    Args:
        coordinator: whose `kept` is the model of round `number`.
        folder: of the run; a resumed run asks only the sites whose answer it does not have.
        number: the best round.
    """
    if not coordinator.experiment.evaluation.hospital_reference:
        return
    try:
        before = folder.read_hospital_reference()
        found = _ask(coordinator, number, before if before is not None and before.round == number else None)
        if found is not None:
            folder.write_hospital_reference(found)
    except PneumofedError as error:
        logger.warning("no reference statistics of the hospitals: %s", error)


def _ask(coordinator: Coordinator, number: int, before: HospitalReference | None) -> HospitalReference | None:
    """What the sites counted, with what they had counted `before`; None where nobody counted anything new."""
    suitability = before.suitability if before else _fit(coordinator)
    if suitability is None:
        logger.warning("no reference statistics of the hospitals: the coordinator has no central images to fit the tests on")
        return None
    coordinator.messenger.collect_late()
    content = pack_instruction(
        Instruction(coordinator.experiment, coordinator.run_log.run, number, coordinator.kept, suitability=suitability)
    )
    known = dict(before.sites) if before else {}
    asked = [site for site in coordinator.enrolment.free_sites() if site not in known]
    nodes = coordinator.directory.nodes
    messages = {site: Message(content, dst_node_id=nodes[site], message_type=MessageType.EVALUATE) for site in asked}
    if coordinator.secure is None:
        found = _ask_each(coordinator, number, messages)
    else:  # a sum that is there stays: with another of nearly the same sites it would tell those of few
        found = {} if known else _ask_for_the_sum(coordinator.secure, coordinator.kept, number, suitability, messages)
    if not found:
        return None
    return HospitalReference(round=number, suitability=suitability, sites=dict(sorted({**known, **found}.items())))


def _ask_each(coordinator: Coordinator, number: int, messages: Mapping[str, Message]) -> dict[str, dict[str, list[int]]]:
    """What each site counted, by site."""
    found: dict[str, dict[str, list[int]]] = {}

    def take(site: str, message: Message) -> bool:
        try:
            answer = unpack_evaluation(message.content)
            counts = unpack_counts(answer.statistics, answer.num_examples)
        except MessageError as error:
            logger.warning("%s did not score: %s", site, error)
            return False
        if answer.num_examples:
            found[site] = pack_counts(counts)
        return True

    seconds = coordinator.experiment.strategy.round_timeout_sec
    for site, failure in coordinator.messenger.exchange(messages, "evaluate", number, seconds, take).items():
        logger.warning("%s did not score: %s", site, failure)
    return found


def _ask_for_the_sum(
    secure: SecureRounds, kept: ModelArrays, number: int, suitability: Suitability, messages: Mapping[str, Message]
) -> dict[str, dict[str, list[int]]]:
    """What all sites counted together, under a name that says how many they are."""

    def with_steps(steps: Mapping[str, str]) -> dict[str, Message]:
        return {site: with_step(messages[site], step) for site, step in steps.items()}

    counts, summed = secure.score(list(messages), number, kept, suitability, with_steps)
    return {f"{len(summed)} hospitals together": pack_counts(counts)}


def _fit(coordinator: Coordinator) -> Suitability | None:
    drawn, compute = coordinator.central_evaluator.reference(MOST_IMAGES), coordinator.central_evaluator.compute
    if drawn is None or not len(drawn):
        return None
    network = compute.place(coordinator.load_network())
    features = compute_features(network, drawn, compute, coordinator.experiment.model.in_channels)
    squares = as_pictures(np.asarray(drawn.pixels))
    return fit_suitability(squares, np.asarray(features), pixel_statistics(squares), patients=drawn.patients)


def keep_alone(coordinator: Coordinator, folder: RunFolder, number: int, threshold: float) -> dict[str, PersonalComparison]:
    """Has the sites train alone, and returns how their models do beside the kept one, by site.

    Args:
        coordinator: whose `kept` is the model of round `number`.
        folder: of the run.
        number: the best round.
        threshold: on the probability, at which both models are judged.
    """
    if not coordinator.experiment.evaluation.alone:
        return {}
    try:
        before = folder.read_alone()
        matrix = CrossSite.open(folder, coordinator.layout, number) if coordinator.experiment.evaluation.cross_site else None
    except PneumofedError as error:
        logger.warning("the hospitals are not asked to train alone: %s", error)
        return {}
    found = dict(before.sites) if before is not None and before.round == number else {}
    coordinator.messenger.collect_late()
    asked = [site for site in coordinator.enrolment.free_sites() if site not in found]
    experiment, kept, first = coordinator.experiment, coordinator.kept, first_arrays(coordinator.experiment)
    first.statistics[coordinator.layout.fixed_statistics] = kept.statistics[coordinator.layout.fixed_statistics]
    content = pack_instruction(Instruction(experiment, coordinator.run_log.run, number, kept, first=first))
    nodes = coordinator.directory.nodes
    messages = {site: Message(content, dst_node_id=nodes[site], message_type=MessageType.EVALUATE) for site in asked}

    def lost(site: str, reason: str) -> None:
        logger.warning("%s did not train alone: %s", site, reason)
        if matrix is not None:
            matrix.lacks(site, reason)

    def take(site: str, message: Message) -> bool:
        try:
            comparison = _read_comparison(message, len(classes_of(experiment.task)), number, threshold)
            if matrix is not None:  # before alone.json, since who stands there is not asked again
                matrix.take_model(site, message)
        except MessageError as error:
            lost(site, str(error))
            return False
        if comparison is not None:
            found[site] = comparison
            folder.write_alone(AloneComparisons(round=number, sites=dict(sorted(found.items()))))
        return True

    seconds = experiment.evaluation.alone_timeout_sec
    for site, failure in coordinator.messenger.exchange(messages, "evaluate", number, seconds, take).items():
        lost(site, str(failure))
    return dict(sorted(found.items()))


def _read_comparison(message: Message, classes: int, number: int, threshold: float) -> PersonalComparison | None:
    """What a site says of both models; None where it tells nothing."""
    evaluation = unpack_evaluation(message.content)
    shared = Statistics.from_numbers(evaluation.statistics, classes)
    own = read_personal(evaluation, shared)
    if own is None or not own.n:
        return None
    judged = (Metrics.model_validate(metrics(statistics, threshold)) for statistics in (own, shared))
    values = dict(zip(("personal", "shared"), judged, strict=True))
    return PersonalComparison(round=number, shared_round=number, **values)


def first_arrays(experiment: ExperimentConfig, stated: ClinicalConfig | None = None) -> ModelArrays:
    """Makes the weights that a run of `experiment` begins with.

    Args:
        experiment: of the run.
        stated: its clinical schema with the means and deviations that its data gave; None where none were asked for.

    Raises:
        BundleError: the bundle that it goes on from cannot be read.
    """
    seed, weights = derive_seed(experiment.seed, "initial weights"), read_start_weights(experiment.model)
    network = build_model(experiment.model, experiment.task, seed, weights=weights)
    if stated is not None and isinstance(network, ClinicalNetwork):
        network.fusion.restate(stated)
    return ModelArrays(*ArraysLayout.of(network).flatten(network))
