"""The rounds: who is there, train, check, aggregate, judge, remember.

coordinator.assemble()                       roll call until enough sites are there
for each round:
    line = coordinator.run_round(round)      the ten visible steps of a round, and the line that tells of it
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from torch import nn

from common.config import ExperimentConfig
from common.data.manifest import CLASSES
from common.errors import MessageError, RoundError
from common.evaluation.metrics import metrics
from common.evaluation.statistics import FEDERATED_GRID, Statistics
from common.evaluation.thresholds import ChosenThreshold, choose_threshold
from common.layout import ArraysLayout
from common.messages import (
    ARRAYS,
    CONFIG,
    Evaluation,
    Failure,
    Instruction,
    ModelArrays,
    Update,
    pack_instruction,
    unpack_evaluation,
    unpack_presence,
)
from server.checks import check_updates
from server.exchange import Replies, exchange
from server.judge import Judge
from server.roster import Roster
from server.strategies import SiteStrategy, aggregate, draw_sites

logger = logging.getLogger(__name__)

ASK_AGAIN = ("Timeout", "Unreachable")
"""A node that was absent for such a reason is asked again before each round; the others gave an answer that will not change."""


@dataclass
class Coordinator:
    """One run in progress. `arrays` are the global weights; `network` is a scratch model that they are loaded into."""

    grid: Grid
    experiment: ExperimentConfig
    run: str
    strategy: SiteStrategy
    arrays: ModelArrays
    network: nn.Module
    judge: Judge
    roster: Roster = field(init=False)
    layout: ArraysLayout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = ArraysLayout.of(self.network)
        self.roster = Roster(self.layout.digest)

    def assemble(self) -> None:
        """Waits for the sites that the experiment expects and calls the roll.

        Raises:
            RoundError: fewer than `min_sites` sites are there after `wait_timeout_sec`.
        """
        cfg = self.experiment.strategy
        wanted, deadline = max(cfg.wait_for_sites, cfg.replies_needed), time.monotonic() + cfg.wait_timeout_sec
        while len(list(self.grid.get_node_ids())) < wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        self._call_roll()
        if len(self.roster.names) < cfg.replies_needed:
            raise RoundError(
                f"{len(self.roster.names)} sites are ready, {cfg.replies_needed} are needed (strategy.min_sites). "
                + _tell(self.roster.absences(), nobody="No other node is connected; start the sites' SuperNodes.")
            )

    def run_round(self, number: int) -> dict[str, Any]:
        """Runs one round, moves `arrays` on, and returns the history line.

        Raises:
            RoundError: fewer than `min_sites` good updates; `arrays` stay as they were.
        """
        clock = Clock()
        sites = self._sites_now()
        drawn = draw_sites(sites, self.experiment.strategy.fraction_train, self.experiment.seed, number)
        replies = self._train(drawn, number)
        answered = len(replies.answers)
        updates, left_out = self._check(replies, number)
        replies.answers.clear()  # 45 MB a site, unpacked by now
        seconds = {"train": clock.lap()}
        self.arrays = aggregate(self.strategy, number, list(updates.values()))
        seconds["aggregate"] = clock.lap()
        judges = draw_sites(sites, self.experiment.evaluation.fraction_sites, self.experiment.seed, number)
        evaluations, silent = self._evaluate(judges, number)
        threshold, line = self._validation(evaluations)
        seconds["evaluate"] = clock.lap()
        line.update(self._central(number, threshold))
        seconds["central"] = clock.lap()
        seconds["total"] = clock.total()
        failures = {**replies.failures, **silent}
        return {
            "round": number,
            "drawn": drawn,
            "failures": {site: str(failure) for site, failure in failures.items()},
            "left_out": {site: failure.sentence for site, failure in left_out.items()},
            **line,
            "sites": _site_lines(updates, evaluations, threshold.value),
            "absent": self.roster.absences(),
            "seconds": seconds,
            "bytes": self._bytes(len(drawn) + len(judges), answered),
        }

    def _sites_now(self) -> list[str]:
        self._call_roll()
        return self.roster.keep_connected(list(self.grid.get_node_ids()))

    def _call_roll(self) -> None:
        """Asks every node that was not asked yet, or did not answer in time, which site it is."""
        for node in [node for node, failure in self.roster.absent.items() if failure.error in ASK_AGAIN]:
            del self.roster.absent[node]
        asked = {str(node): node for node in self.roster.unknown(list(self.grid.get_node_ids()))}
        content = pack_instruction(Instruction(self.experiment, self.run, 0))
        messages = {name: Message(content, dst_node_id=node, message_type=MessageType.QUERY) for name, node in asked.items()}
        replies = exchange(self.grid, messages, self.experiment.strategy.round_timeout_sec) if messages else Replies()
        for name, message in replies.answers.items():
            try:
                self.roster.admit(asked[name], unpack_presence(message.content))
            except MessageError as error:
                self.roster.refuse(asked[name], Failure(None, "MessageError", str(error)))
        for name, failure in replies.failures.items():
            named = failure.site if failure.site != name else None
            self.roster.refuse(asked[name], Failure(named, failure.error, failure.sentence))

    def _train(self, drawn: Sequence[str], number: int) -> Replies:
        content = self._instruct(number)
        self.strategy.drawn_nodes = [self.roster.nodes[site] for site in drawn]
        messages = self.strategy.configure_train(number, content.array_records[ARRAYS], content.config_records[CONFIG], self.grid)
        return exchange(self.grid, dict(zip(drawn, messages, strict=True)), self.experiment.strategy.round_timeout_sec)

    def _check(self, replies: Replies, number: int) -> tuple[dict[str, Update], dict[str, Failure]]:
        cfg = self.experiment.strategy
        updates, left_out = check_updates(
            replies.answers, self.arrays, self.layout, self.roster.presences, cfg.max_update_norm_factor
        )
        for site, failure in {**replies.failures, **left_out}.items():
            logger.warning("round %d: %s is left out: %s", number, site, failure)
        if len(updates) < cfg.replies_needed:
            reasons = {site: str(failure) for site, failure in {**replies.failures, **left_out}.items()}
            raise RoundError(
                f"round {number}: {len(updates)} good updates, {cfg.replies_needed} are needed (strategy.min_sites). "
                + _tell({**reasons, **self.roster.absences()}, nobody="No site was connected.")
            )
        return updates, left_out

    def _evaluate(
        self, judges: Sequence[str], number: int
    ) -> tuple[dict[str, tuple[Evaluation, Statistics]], dict[str, Failure]]:
        content = self._instruct(number)
        messages = {site: _message(content, self.roster.nodes[site], MessageType.EVALUATE) for site in judges}
        replies = exchange(self.grid, messages, self.experiment.strategy.round_timeout_sec)
        good, bad = {}, dict(replies.failures)
        for site, message in replies.answers.items():
            try:
                evaluation = unpack_evaluation(message.content)
                good[site] = evaluation, Statistics.from_numbers(evaluation.statistics, len(CLASSES[self.experiment.task]))
            except MessageError as error:
                bad[site] = Failure(site, "MessageError", str(error))
        for site, failure in bad.items():
            logger.warning("round %d: %s did not judge: %s", number, site, failure)
        return good, bad

    def _validation(self, evaluations: Mapping[str, tuple[Evaluation, Statistics]]) -> tuple[ChosenThreshold, dict[str, Any]]:
        pooled = sum(
            (statistics for _, statistics in evaluations.values()),
            Statistics.zero(len(CLASSES[self.experiment.task]), FEDERATED_GRID),
        )
        cfg = self.experiment.evaluation
        threshold = choose_threshold(pooled, cfg.threshold_policy, cfg.target)
        return threshold, {"threshold": vars(threshold), "validation": metrics(pooled, threshold.value)}

    def _central(self, number: int, threshold: ChosenThreshold) -> dict[str, Any]:
        cfg = self.experiment
        if number % cfg.evaluation.every_rounds and number != cfg.rounds:
            return {}
        return dict(self.judge.results(self.judge.predict(self.load_network()), threshold.value))

    def load_network(self) -> nn.Module:
        """The scratch network with the global weights."""
        self.layout.load(self.network, self.arrays.parameters, self.arrays.statistics)
        return self.network

    def _instruct(self, number: int) -> RecordDict:
        return pack_instruction(Instruction(self.experiment, self.run, number, self.arrays))

    def _bytes(self, sent: int, answered: int) -> dict[str, int]:
        """Bytes of weights on the wire in this round, from the coordinator (`down`) and to it (`up`)."""
        return {"down": self.arrays.nbytes * sent, "up": self.arrays.nbytes * answered}


class Clock:
    """Seconds since the last lap and since the start."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def total(self) -> float:
        return time.perf_counter() - self._start


def _message(content: RecordDict, node: int, kind: str) -> Message:
    return Message(content, dst_node_id=node, message_type=kind)


def _site_lines(
    updates: Mapping[str, Update], evaluations: Mapping[str, tuple[Evaluation, Statistics]], threshold: float
) -> dict[str, dict[str, Any]]:
    """Each site's own numbers of the round."""
    lines: dict[str, dict[str, Any]] = {site: {} for site in sorted({*updates, *evaluations})}
    for site, update in updates.items():
        lines[site]["train"] = {"num_examples": update.num_examples, **update.metrics}
    for site, (evaluation, statistics) in evaluations.items():
        lines[site]["validation"] = {**metrics(statistics, threshold), **evaluation.metrics}
    return lines


def _tell(reasons: Mapping[str, str], nobody: str) -> str:
    return "; ".join(f"{site}: {reason}" for site, reason in reasons.items()) or nobody
