"""One secure sum over the network: five exchanges, each with its own deadline, and who fell out where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict

from common.errors import MessageError, RoundError, SecureSumError
from common.messages import Failure, content_bytes, unpack_presence
from common.secure_sum.graph import threshold
from common.secure_sum.masks import SumVector
from common.secure_sum.steps import Stage, Step
from server.activity import Kind
from server.exchange import Post, Task
from server.records import SecureSumRecord
from server.secure_sum.collector import Collector

Compose = Callable[[str, Step], Message]
"""(site, step) -> the message that asks it."""

TASKS: Mapping[Stage, Task] = {"advertise": "keys", "share": "shares", "confirm": "confirmation", "unmask": "unmasking"}


@dataclass(frozen=True)
class Dropped:
    """A site that gave no good answer to a step, and why."""

    stage: Stage
    failure: Failure


@dataclass
class Outcome:
    """A sum that came about. Sites that dropped out after they sent their vector are in `summed` all the same."""

    total: SumVector
    participants: list[str]
    """Those whose keys were agreed on, which sets the quantisation."""
    summed: list[str]
    dropped: dict[str, Dropped]
    heads: dict[str, str]
    bytes_up: int

    @property
    def lost(self) -> dict[str, Failure]:
        """Those that are not in the sum, with the reason."""
        return {site: dropped.failure for site, dropped in self.dropped.items() if site not in self.summed}

    def record(self) -> SecureSumRecord:
        """For the history: names and stages only."""
        dropped = {site: dropped.stage for site, dropped in sorted(self.dropped.items())}
        return SecureSumRecord(summed=tuple(self.summed), dropped=dropped)


@dataclass
class SumExchange:
    """Runs `collector` over `post`. `compose_vector` asks for the vector, `compose` for all else."""

    post: Post
    collector: Collector
    compose: Compose
    compose_vector: Callable[[Mapping[str, Step]], Mapping[str, Message]]
    deadline_sec: float
    """Of the vectors."""
    least: int
    """Fewer vectors than this fail the round even where the threshold would allow them."""
    enough: int | None = None
    dropped: dict[str, Dropped] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    bytes_up: int = 0

    def run(self, sites: Sequence[str]) -> Outcome:
        """The sum over those of `sites` that stay until they sent their vectors.

        Raises:
            RoundError: fewer than the threshold stayed; says who fell out, where and why.
        """
        collector = self.collector
        try:
            self._ask("advertise", collector.advertise(sites), collector.take_keys)
            self._ask("share", collector.share(), collector.take_parcels)
            self._ask_vectors(collector.mask())
            self._ask("confirm", collector.confirm(self.least), collector.take_confirmation, patient=False)
            self._ask("unmask", collector.unmask(), collector.take_shares, patient=False)
            total = collector.finish()
        except SecureSumError as error:
            raise RoundError(f"round {collector.session.round}: the secure sum failed: {error}. {self._reasons()}") from error
        return Outcome(total, sorted(collector.keys), collector.summed, self.dropped, self.heads, self.bytes_up)

    def _ask(
        self, stage: Stage, steps: Mapping[str, Step], take: Callable[[str, RecordDict], None], *, patient: bool = True
    ) -> None:
        """With `patient` all are waited for until the deadline; else, once the threshold is reached, only a little longer."""
        cfg, collector = self.collector.cfg, self.collector
        messages = {site: self.compose(site, step) for site, step in steps.items()}
        full = all(len(holders) == len(collector.keys) for holders in collector.holders.values())
        enough = None if patient or not full else threshold(len(collector.keys), cfg.threshold)
        failures = self.post.exchange(
            messages,
            TASKS[stage],
            collector.session.round,
            cfg.stage_timeout_sec,
            self._taker(stage, take),
            enough,
            cfg.grace_sec,
        )
        self.dropped |= {site: Dropped(stage, failure) for site, failure in failures.items()}

    def _ask_vectors(self, steps: Mapping[str, Step]) -> None:
        collector = self.collector
        enough = max(self.enough, threshold(len(collector.keys), collector.cfg.threshold)) if self.enough else None
        session, take = collector.session, self._taker("mask", collector.take_vector)
        failures = self.post.exchange(self.compose_vector(steps), session.purpose, session.round, self.deadline_sec, take, enough)
        self.dropped |= {site: Dropped("mask", failure) for site, failure in failures.items()}

    def _taker(self, stage: Stage, take: Callable[[str, RecordDict], None]) -> Callable[[str, Message], bool]:
        def taker(site: str, message: Message) -> bool:
            try:
                presence = unpack_presence(message.content)
                take(site, message.content)
            except (MessageError, SecureSumError) as error:
                failure = Failure(site, type(error).__name__, str(error))
                self.dropped[site] = Dropped(stage, failure)
                self.post.activity.note(Kind.LEFT_OUT, round=self.collector.session.round, site=site, reason=failure.sentence)
                return False
            if presence.audit_head:
                self.heads[site] = presence.audit_head
            self.bytes_up += content_bytes(message.content)
            return True

        return taker

    def _reasons(self) -> str:
        told = (f"{site} ({dropped.stage}): {dropped.failure}" for site, dropped in sorted(self.dropped.items()))
        return "; ".join(told) or "No site said why."
