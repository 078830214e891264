"""Cross-site evaluation: every hospital's own model, and the global one, on every hospital's validation patients (`evaluation.cross_site`).

    CrossSite.open(folder, layout, number)            the matrix as far as it is known; each change is on the disk at once
    CrossSite.take_model(site, message)               the model that a site trained alone, from its answer to `evaluation.alone`
    keep_cross_site(coordinator, folder, line, alone)  after the last round: the sites judge the models, one after the other

A hospital's own model is the one that it trained alone, on its own images only: what it would have without the others. A local model of the
last round began that round as everybody's average, so that its row would say little of the hospital whose name it bears.

Models lie in the run folder (mode 0600) from the moment they come until all sites were asked, so that a run that was killed asks nobody to
train again; then they are removed. Judges are not told whose model they judge. A cell that is known already is not asked for: a hospital's
answer to `evaluation.alone` holds its own model and the global one at home, and the history the global one elsewhere.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Message, MessageType

from pneumofed.common.config.classes import classes_of
from pneumofed.common.errors import MessageError, PneumofedError
from pneumofed.common.evaluation.metrics import metrics
from pneumofed.common.evaluation.statistics import Statistics
from pneumofed.common.files import atomic_write
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import ARRAYS, ModelArrays, unpack_arrays, unpack_evaluation
from pneumofed.common.wire.parameter_layout import ArraysLayout
from pneumofed.server.federation.replies import check_values
from pneumofed.server.federation.rounds import Coordinator
from pneumofed.server.runs.events import Kind, kind_of_failure
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.records import Metrics, RoundRecord
from pneumofed.server.runs.summary_records import CrossSiteMatrix, PersonalComparison

logger = logging.getLogger(__name__)

NOT_SHARED = "its policy does not give it away (share_own_model), or no statistics of it may leave"
NOTHING_LEAVES = "no statistics of its validation patients may leave"
LOST = "its model cannot be read from the run folder any more"


@dataclass
class CrossSite:
    """The matrix of a run as it grows.

    Attributes:
        folder: of the run, which holds the matrix and the models.
        layout: of the run's network.
        found: what is known so far.
    """

    folder: RunFolder
    layout: ArraysLayout
    found: CrossSiteMatrix

    @classmethod
    def open(cls, folder: RunFolder, layout: ArraysLayout, number: int) -> CrossSite:
        """Opens what an earlier attempt at the run knew, or begins anew.

        Args:
            folder: of the run.
            layout: of the run's network.
            number: the round whose global model was kept; cells of another one are not taken.

        Raises:
            CheckpointError: the file is damaged.
        """
        before = folder.read_cross_site()
        return cls(folder, layout, before if before is not None and before.round == number else CrossSiteMatrix(round=number))

    def take_model(self, site: str, message: Message) -> None:
        """Keeps the model in a site's answer, or the reason why there is none; a bad one costs that site its row and nothing else.

        Args:
            site: who answers.
            message: its reply to the request to train alone.
        """
        if ARRAYS not in message.content.array_records:
            self.lacks(site, NOT_SHARED)
            return
        try:
            arrays = unpack_arrays(message.content.array_records[ARRAYS])
            check_values(arrays, self.layout)
        except MessageError as error:
            self.lacks(site, f"its model is refused: {error}")
            return
        self.folder.own_models.mkdir(mode=0o700, exist_ok=True)
        with atomic_write(self._path(site), synced=True) as file:
            np.save(file, arrays.parameters, allow_pickle=False)
            np.save(file, arrays.statistics, allow_pickle=False)
        others = {name: reason for name, reason in self.found.not_given.items() if name != site}
        self._keep(own={**self.found.own, site: self.found.own.get(site, {})}, not_given=others)

    def lacks(self, site: str, reason: str) -> None:
        """Notes that a site's own model is not to be had.

        Args:
            site: whose it is.
            reason: a sentence for the log, the file and the report.
        """
        logger.warning("cross-site evaluation without the model of %s: %s", site, reason)
        self._keep(not_given=dict(sorted({**self.found.not_given, site: reason}.items())))

    def read_model(self, site: str) -> ModelArrays | None:
        """Reads a model back; None where it is not there or damaged.

        Args:
            site: whose it is.
        """
        try:
            with self._path(site).open("rb") as file:
                arrays = ModelArrays(np.load(file, allow_pickle=False), np.load(file, allow_pickle=False))
            self.layout.check(arrays.parameters, arrays.statistics)
            check_values(arrays, self.layout)
        except (OSError, ValueError, EOFError, MessageError):
            return None
        return arrays

    def cells(self, owner: str | None) -> Mapping[str, Metrics]:
        """Returns what is known of a model, by judging site.

        Args:
            owner: the site that trained it; None is the global model.
        """
        return self.found.shared if owner is None else self.found.own.get(owner, {})

    def put(self, owner: str | None, cells: Mapping[str, Metrics]) -> None:
        """Keeps what sites said of a model; what is known already stays.

        Args:
            owner: the site that trained it; None is the global model.
            cells: by judging site.
        """
        row = dict(sorted({**cells, **self.cells(owner)}.items()))
        if owner is None:
            self._keep(shared=row)
        else:
            self._keep(own=dict(sorted({**self.found.own, owner: row}.items())))

    def close(self, reasons: Mapping[str, str]) -> CrossSiteMatrix:
        """Removes the models and returns the matrix.

        Args:
            reasons: why a site did not judge a model, by site; those who judged all in the end are left out.
        """
        rows = [self.found.shared, *self.found.own.values()]
        lacking = {site: reason for site, reason in sorted(reasons.items()) if not all(site in row for row in rows)}
        self._keep(not_judged=lacking)
        shutil.rmtree(self.folder.own_models, ignore_errors=True)
        return self.found

    def _keep(self, **parts: object) -> None:
        self.found = self.found.updated(**parts)
        self.folder.write_cross_site(self.found)

    def _path(self, site: str) -> Path:
        return self.folder.own_models / f"{site}.npy"


def keep_cross_site(
    coordinator: Coordinator, folder: RunFolder, line: RoundRecord, alone: Mapping[str, PersonalComparison]
) -> CrossSiteMatrix | None:
    """Has every site judge every model that it did not judge yet, and returns the matrix; None where the run asks for none.

    Args:
        coordinator: whose `kept` is the model of the round of `line`.
        folder: of the run, with the models that sites gave.
        line: of the round whose model was kept, with the threshold at which all are judged.
        alone: what the sites said of their own and of the global model, by site.
    """
    if not coordinator.experiment.evaluation.cross_site:
        return None
    try:
        matrix = CrossSite.open(folder, coordinator.layout, line.round)
    except PneumofedError as error:
        logger.warning("no cross-site evaluation: %s", error)
        return None
    asking = _Asking(coordinator, matrix, line)
    matrix.put(None, _known_shared(line, alone))
    asking.judge(None, coordinator.kept)
    for owner in sorted(matrix.found.own):
        if owner in alone:
            matrix.put(owner, {owner: alone[owner].personal})
        arrays = matrix.read_model(owner) if asking.lacking(owner) else None
        if arrays is not None:
            asking.judge(owner, arrays)
        elif asking.lacking(owner):
            matrix.lacks(owner, LOST)
    return matrix.close(asking.reasons)


def _known_shared(line: RoundRecord, alone: Mapping[str, PersonalComparison]) -> dict[str, Metrics]:
    """The global model at the sites who judged it: beside their own one, on the same images, or else in its round."""
    rounds = {site: part.validation for site, part in line.sites.items() if part.validation is not None and part.validation.n}
    judged = {site: Metrics.model_validate(found.without("evaluate_sec").to_json()) for site, found in rounds.items()}
    return {**judged, **{site: both.shared for site, both in alone.items()}}


class _Asking:
    """Who is asked for which cell, and who is asked no more.

    Attributes:
        reasons: why a site did not judge the last model that it was asked about.
        silent: sites whose policy refuses, of whom no statistics may leave, or whose answer was no answer: the next model would meet the
            same, and only add a line to their audit logs.
    """

    def __init__(self, coordinator: Coordinator, matrix: CrossSite, line: RoundRecord) -> None:
        self._coordinator, self._matrix = coordinator, matrix
        self._number, self._threshold = line.round, line.threshold.value if line.threshold else 0.5
        self.reasons: dict[str, str] = {}
        self.silent: set[str] = set()

    def lacking(self, owner: str | None) -> list[str]:
        """Lists the sites that could be asked about the model of `owner` now: they are there, free, and did not judge it."""
        self._coordinator.messenger.collect_late()
        known = {*self._matrix.cells(owner), *self.silent, *((owner,) if owner else ())}
        return [site for site in self._coordinator.enrolment.free_sites() if site not in known]

    def judge(self, owner: str | None, arrays: ModelArrays) -> None:
        """Asks those who did not judge a model yet, and keeps each answer as it comes.

        Args:
            owner: the site that trained it; None is the global model.
            arrays: its weights.
        """
        judges, coordinator = self.lacking(owner), self._coordinator
        shared, other = (arrays, None) if owner is None else (None, arrays)
        asked = Instruction(coordinator.experiment, coordinator.run_log.run, self._number, shared, other=other)
        if not judges:
            return
        content, nodes = pack_instruction(asked), coordinator.directory.nodes
        messages = {site: Message(content, dst_node_id=nodes[site], message_type=MessageType.EVALUATE) for site in judges}

        def take(site: str, message: Message) -> bool:
            try:
                found = _read_cell(site, message, len(classes_of(coordinator.experiment.task)), self._threshold)
            except MessageError as error:
                coordinator.run_log.activity.note(Kind.FAILED, round=self._number, site=site, task="evaluate", reason=str(error))
                self._give_up(owner, site, f"MessageError: {error}", ends=True)
                return False
            if found is None:
                self._give_up(owner, site, NOTHING_LEAVES, ends=True)
                return False
            self._matrix.put(owner, {site: found})
            return True

        seconds = coordinator.experiment.strategy.round_timeout_sec
        for site, failure in coordinator.messenger.exchange(messages, "evaluate", self._number, seconds, take).items():
            self._give_up(owner, site, str(failure), ends=kind_of_failure(failure.error) is Kind.REFUSED)

    def _give_up(self, owner: str | None, site: str, reason: str, ends: bool) -> None:
        logger.warning("%s did not judge %s: %s", site, f"the model of {owner}" if owner else "the global model", reason)
        self.reasons[site] = reason
        if ends:
            self.silent.add(site)


def _read_cell(site: str, message: Message, classes: int, threshold: float) -> Metrics | None:
    """What a site says of one model; None where it may say nothing."""
    evaluation = unpack_evaluation(message.content)
    if evaluation.presence.site != site:
        raise MessageError("the reply names another site")
    statistics = Statistics.from_numbers(evaluation.statistics, classes)
    if statistics.n != evaluation.num_examples:
        raise MessageError(f"statistics of {statistics.n} images, but {evaluation.num_examples} were announced")
    return Metrics.model_validate(metrics(statistics, threshold)) if statistics.n else None
