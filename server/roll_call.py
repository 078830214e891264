"""The roll call: which node is which site, asked before the first round and again of each newcomer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.config import ExperimentConfig
from common.errors import MessageError, RoundError
from common.messages import Failure, Instruction, pack_instruction, unpack_presence
from server.activity import Kind
from server.chronicle import Chronicle
from server.exchange import Post
from server.roster import Roster

ASK_AGAIN = ("Timeout", "Unreachable")
"""A node that was absent for such a reason is asked again before each round; the others gave an answer that will not change."""


@dataclass(frozen=True)
class RollCall:
    """Keeps `roster` true to the nodes of `grid`."""

    grid: Grid
    experiment: ExperimentConfig
    chronicle: Chronicle
    post: Post
    roster: Roster

    def assemble(self) -> None:
        """Waits for the sites that the experiment expects and calls the roll.

        Raises:
            RoundError: fewer than `min_sites` sites are there after `wait_timeout_sec`.
        """
        cfg = self.experiment.strategy
        wanted, deadline = max(cfg.wait_for_sites, cfg.replies_needed), time.monotonic() + cfg.wait_timeout_sec
        while len(list(self.grid.get_node_ids())) < wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        self._call()
        if len(self.roster.names) < cfg.replies_needed:
            raise RoundError(
                f"{len(self.roster.names)} sites are ready, {cfg.replies_needed} are needed (strategy.min_sites). "
                + tell_reasons(self.roster.absences(), nobody="No other node is connected; start the sites' SuperNodes.")
            )

    def free_sites(self) -> list[str]:
        """Names of the sites that are connected and not at work on an earlier round, sorted; newcomers are asked first."""
        self._call()
        connected = self.roster.keep_connected(list(self.grid.get_node_ids()))
        return [site for site in connected if site not in self.post.busy]

    def _call(self) -> None:
        """Asks every node that was not asked yet, or did not answer in time, which site it is."""
        connected = list(self.grid.get_node_ids())
        self.roster.forget_absent(ASK_AGAIN)
        asked = {str(node): node for node in self.roster.unknown(connected)}
        if not asked:
            return
        content = pack_instruction(Instruction(self.experiment, self.chronicle.run, 0))
        messages = {name: Message(content, dst_node_id=node, message_type=MessageType.QUERY) for name, node in asked.items()}

        def admit(name: str, message: Message) -> bool:
            try:
                self.roster.admit(asked[name], unpack_presence(message.content), connected)
            except MessageError as error:
                self.roster.refuse(asked[name], Failure(None, "MessageError", str(error)))
                return False
            return True

        failures = self.post.exchange(messages, "roll call", 0, self.experiment.strategy.round_timeout_sec, admit)
        for name, failure in failures.items():
            named = failure.site if failure.site != name else None
            self.roster.refuse(asked[name], Failure(named, failure.error, failure.sentence))
        self._note(set(asked.values()))

    def _note(self, asked: set[int]) -> None:
        for site, node in self.roster.nodes.items():
            if node in asked:
                self.chronicle.activity.note(Kind.JOINED, round=0, site=site)
        for node, failure in self.roster.absent.items():
            if node in asked:
                self.chronicle.activity.note(Kind.ABSENT, round=0, site=failure.site or f"node {node}", reason=str(failure))


def tell_reasons(reasons: Mapping[str, str], nobody: str) -> str:
    """`site: reason; site: reason`, or `nobody` where there are none."""
    return "; ".join(f"{site}: {reason}" for site, reason in reasons.items()) or nobody
