"""Enrolment: which node is which site, asked before the first round and again of each newcomer.

`Enrolment` asks every node that it does not know yet to name its site (the event lines call this task "roll call"). `SiteDirectory`
keeps the answers: node and presence of each site of the run, and why each other node is none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from pneumofed.common.config.classes import classes_of
from pneumofed.common.config.experiment import ClinicalConfig, ExperimentConfig
from pneumofed.common.errors import ConfigError, MessageError, RoundError
from pneumofed.common.wire.clinical_sums import ColumnSums, asked_columns, standardize, unpack_sums
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import Failure, Presence, unpack_presence
from pneumofed.server.federation.messaging import Messenger
from pneumofed.server.runs.events import Kind, RunLog

logger = logging.getLogger(__name__)
ASK_AGAIN = ("Timeout", "Unreachable")
"""A node that was absent for such a reason is asked again before each round; the others gave an answer that will not change."""


@dataclass(frozen=True)
class Enrolment:
    """Keeps `directory` in step with the nodes of `grid`."""

    grid: Grid
    experiment: ExperimentConfig
    run_log: RunLog
    messenger: Messenger
    directory: SiteDirectory

    def assemble(self) -> None:
        """Waits for the sites that the experiment expects and asks each connected node which site it is.

        Raises:
            RoundError: fewer than `min_sites` sites are there after `wait_timeout_sec`.
        """
        cfg = self.experiment.strategy
        wanted, deadline = max(cfg.wait_for_sites, cfg.replies_needed), time.monotonic() + cfg.wait_timeout_sec
        while len(list(self.grid.get_node_ids())) < wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        self._ask_newcomers()
        if len(self.directory.names) < cfg.replies_needed:
            raise RoundError(
                f"{len(self.directory.names)} sites are ready, {cfg.replies_needed} are needed (strategy.min_sites). "
                + list_reasons(self.directory.absences(), nobody="No other node is connected; start the sites' SuperNodes.")
            )

    def standardize_clinical(self) -> ClinicalConfig | None:
        """Asks every enrolled site for sums of its clinical numbers, and states mean and deviation of each in the schema.

        Returns:
            The schema; a column of which too few patients are known, or no site tells, states neither. None where the experiment does not
            ask (`ExperimentConfig.asks_clinical_sums`).
        """
        schema = self.experiment.clinical
        if schema is None or not self.experiment.asks_clinical_sums:
            if schema is not None:
                logger.info(
                    "clinical numbers are standardised by what the schema states; no site was asked, and no privacy is spent"
                )
            return None
        content = pack_instruction(Instruction(self.experiment, self.run_log.run, 0, clinical=True))
        nodes = self.directory.nodes
        messages = {
            site: Message(content, dst_node_id=nodes[site], message_type=MessageType.QUERY) for site in self.directory.names
        }
        answers: dict[str, dict[str, ColumnSums]] = {}

        def take(site: str, message: Message) -> bool:
            try:
                answers[site] = unpack_sums(message.content, schema)[1]
            except MessageError as error:
                logger.warning("%s: clinical sums cannot be used: %s", site, error)
            return site in answers

        failures = self.messenger.exchange(messages, "clinical sums", 0, self.experiment.strategy.round_timeout_sec, take)
        for site, failure in failures.items():
            logger.info("%s tells no clinical sums and takes part all the same: %s", site, failure)
        stated = standardize(schema, [answers[site] for site in sorted(answers)])
        for column in asked_columns(stated):
            logger.warning("'%s' is known of too few patients: it is standardised by its range", column.name)
        return stated

    def check_classes(self) -> None:
        """Refuses a task of own classes of which one has no image at any site that joined, as far as all of them tell their counts.

        Raises:
            ConfigError: there is such a class.
        """
        reports = [presence.report for presence in self.directory.presences.values()]
        if all(isinstance(report.get("classes"), Mapping) and "count_noise" not in report for report in reports):
            counts = [sum(int(report["classes"].get(name, 0)) for report in reports) for name in classes_of(self.experiment.task)]
            refuse_missing_classes(self.experiment, counts, self.directory.names)

    def free_sites(self) -> list[str]:
        """Lists the sites that are connected and not at work on an earlier round, sorted; newcomers are enrolled first."""
        self._ask_newcomers()
        connected = self.directory.keep_connected(list(self.grid.get_node_ids()))
        return [site for site in connected if site not in self.messenger.busy]

    def _ask_newcomers(self) -> None:
        """Asks every node that was not asked yet, or did not answer in time, which site it is."""
        connected = list(self.grid.get_node_ids())
        self.directory.forget_absent(ASK_AGAIN)
        asked = {str(node): node for node in self.directory.unknown(connected)}
        if not asked:
            return
        content = pack_instruction(Instruction(self.experiment, self.run_log.run, 0))
        messages = {name: Message(content, dst_node_id=node, message_type=MessageType.QUERY) for name, node in asked.items()}

        def admit(name: str, message: Message) -> bool:
            try:
                self.directory.admit(asked[name], unpack_presence(message.content), connected)
            except MessageError as error:
                self.directory.refuse(asked[name], Failure(None, "MessageError", str(error)))
                return False
            return True

        failures = self.messenger.exchange(messages, "roll call", 0, self.experiment.strategy.round_timeout_sec, admit)
        for name, failure in failures.items():
            named = failure.site if failure.site != name else None
            self.directory.refuse(asked[name], Failure(named, failure.error, failure.sentence))
        self._note_answers(set(asked.values()))

    def _note_answers(self, asked: set[int]) -> None:
        for site, node in self.directory.nodes.items():
            if node in asked:
                self.run_log.activity.note(Kind.JOINED, round=0, site=site)
        for node, failure in self.directory.absent.items():
            if node in asked:
                self.run_log.activity.note(Kind.ABSENT, round=0, site=failure.site or f"node {node}", reason=str(failure))


@dataclass
class SiteDirectory:
    """Sites by name. Everything that depends on an order uses `names`, since node ids differ from run to run.

    Attributes:
        expected_layout: digest of the model's layout at the coordinator; a site with another one cannot take part.
        absent: node -> why it is not a site of this run.
    """

    expected_layout: str
    nodes: dict[str, int] = field(default_factory=dict)
    presences: dict[str, Presence] = field(default_factory=dict)
    absent: dict[int, Failure] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return sorted(self.nodes)

    def unknown(self, node_ids: list[int]) -> list[int]:
        """Lists those of `node_ids` that were not asked yet."""
        known = set(self.nodes.values()) | set(self.absent)
        return [node for node in node_ids if node not in known]

    def keep_connected(self, node_ids: list[int]) -> list[str]:
        """Lists the names of the sites that are connected now, sorted."""
        connected = set(node_ids)
        return [name for name in self.names if self.nodes[name] in connected]

    def forget_absent(self, errors: Collection[str]) -> None:
        """Lets those who are absent for one of these reasons be asked again."""
        self.absent = {node: failure for node, failure in self.absent.items() if failure.error not in errors}

    def admit(self, node: int, presence: Presence, connected: Collection[int]) -> None:
        """Takes a site in, or notes why not: another model layout, or a name that a connected node already has. A site that
        comes back as another node takes its own place again.

        Args:
            node: Flower's number of the node that answered.
            presence: what it answered: its site's name, model layout and counts.
            connected: nodes that are connected now.
        """
        if presence.layout != self.expected_layout:
            self.absent[node] = Failure(presence.site, "MessageError", "the site builds another model; install the same version")
        elif self.nodes.get(presence.site) in connected:
            self.absent[node] = Failure(presence.site, "MessageError", "another node already answers under this site's name")
        else:
            self.nodes[presence.site] = node
            self.presences[presence.site] = presence

    def refuse(self, node: int, failure: Failure) -> None:
        """Notes that a node is not a site of this run.

        Args:
            node: Flower's number of it.
            failure: why; a node that is absent for one of the reasons in `ASK_AGAIN` is asked again.
        """
        self.absent[node] = failure

    def absences(self) -> Mapping[str, str]:
        """Lists why each other node, by site or node, is not a site of this run."""
        return {failure.site or f"node {node}": str(failure) for node, failure in sorted(self.absent.items())}


def refuse_missing_classes(experiment: ExperimentConfig, counts: Sequence[int], sites: Sequence[str]) -> None:
    """Refuses to train a class that no site has. The named tasks are trained all the same, as they always were.

    Args:
        experiment: of the run.
        counts: images of each class at all `sites` together.
        sites: names of those who were counted.

    Raises:
        ConfigError: a class of an own list has none.
    """
    missing = [name for name, count in zip(classes_of(experiment.task), counts, strict=True) if not count]
    if missing and isinstance(experiment.task, tuple):
        names = ", ".join(f"'{name}'" for name in missing)
        raise ConfigError(
            f"task: no image of the class{'es' if len(missing) > 1 else ''} {names} at any of the {len(sites)} sites that joined "
            f"({', '.join(sites)}), so that the network could not learn it; take it out of the task, check how the sites' label words are "
            "mapped (label_words in site.yaml), or wait for a site that has it (strategy.wait_for_sites)"
        )


def list_reasons(reasons: Mapping[str, str], nobody: str) -> str:
    """Joins reasons to `site: reason; site: reason`, or gives `nobody` where there are none.

    Args:
        reasons: by site, or node.
        nobody: the sentence for when the list is empty.
    """
    return "; ".join(f"{site}: {reason}" for site, reason in reasons.items()) or nobody
