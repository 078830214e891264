"""Asynchronous rounds: FedBuff (Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek and Huba 2022, "Federated Learning with Buffered
Asynchronous Aggregation", algorithm 1), where `strategy.buffer` is K.

buffered.fill(number, messages, current, checks)    sends every free site on, and waits until K good updates are in the buffer
buffered.as_if_fresh(updates, current, ...)         those updates as the strategies take them, with their staleness
buffered.release()                                  after the last round: who is still at work is free again

A round is one application of the buffer. With w the weights before it, b_i those that site i began from, w_i what it made of them, tau_i
how many rounds lie between the two and n_i its images,

    w' = w + 1/N * sum over the buffer of n_i s(tau_i) (w_i - b_i),    N = sum of n_i,    s(tau) = 1 / sqrt(1 + tau)

The paper divides by K: that is the same where all sites have as many images. Each site's part goes to the strategy as the weights
w + s(tau_i) (w_i - b_i), so that server optimizers and robust strategies work on it as they are; an update of the current weights goes
as it came, so that a buffer of all sites is a synchronous round bit for bit. BatchNorm's statistics are measurements and no steps: a
stale site's move the share s(tau) of the way from the current ones to its own, which keeps variances above zero.

What differs from the paper: an update is as long as the learning rate of the round that it was begun in, and the paper's rate is
constant. Where the rate has fallen since, a stale update is brought to the rate of the round that it is applied in, before lengths are
compared and before s(tau); else one of the run's middle would undo its end. And a site whose update is in the buffer waits until that
is applied, and goes on from the result. So no site is in one buffer twice, or trains twice on the same weights, which would give the
same update again; its rounds count up, and it trains at most `rounds` times in a run, as the plan of its private noise says.

No round has a deadline. A buffer that nobody is left to fill, since all others failed, refused or were left out, is applied with what
it has, if that is `min_sites`. A site that is silent for `FORGET_AFTER_DEADLINES` times `round_timeout_sec` is given up and asked again.

Only what was applied is in the checkpoint. A run that is killed goes on from there: every site is asked for the next round. Updates
that were in the buffer are made again; trainings on older weights that were under way are lost, as are those that are under way when
the last buffer is applied. Each training that a site began is one in its ledger, whether its update counted or not.

In simulation a `VirtualClock` decides which update comes next, whatever the machine does: a hospital that trains takes one unit, or as
many as it is slow, and of two that are done at once the first by name comes first. Nothing else takes time there. So a run repeats bit
for bit on any engine and any number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import Message

from pneumofed.common.config.experiment import StrategyConfig
from pneumofed.common.errors import HeldModelError
from pneumofed.common.wire.messages import Failure, ModelArrays, Update, pack_arrays
from pneumofed.server.federation.messaging import FORGET_AFTER_DEADLINES, Messenger, pause
from pneumofed.server.federation.replies import UpdateChecks


def staleness_weight(staleness: int) -> float:
    """Computes 1 / sqrt(1 + tau), by which a stale update is scaled (Nguyen et al. 2022, section 5, after Xie et al. 2019).

    Args:
        staleness: tau, rounds between the weights that a site began from and those that its update is applied to; 0 or more.

    Returns:
        In (0, 1]; 1 of a fresh update.
    """
    return float(1.0 / np.sqrt(1.0 + staleness))


@dataclass
class VirtualClock:
    """The time of a simulation.

    Attributes:
        slow: by site, the units that it trains; one where it is not named.
        now: units since the run began.
    """

    slow: Mapping[str, float]
    now: float = 0.0

    def done_at(self, site: str) -> float:
        """Returns when a site is done that begins to train now."""
        return self.now + self.slow.get(site, 1.0)

    def wait_for(self, sites: Iterable[str]) -> None:
        """Moves to when the last of these sites is done that all begin now: a synchronous round."""
        self.now = max((self.done_at(site) for site in sites), default=self.now)


@dataclass(frozen=True)
class Training:
    """A site at work.

    Attributes:
        round: the one that it was asked in; it began from the weights before that.
        base: these weights.
        message: what it was asked.
        asked: time (monotonic) of that.
        done: when it is done by the virtual clock; 0 without one.
    """

    site: str
    round: int
    base: ModelArrays
    message: Message
    asked: float
    done: float


@dataclass
class BufferedRounds:
    """Takes the place of the exchange of training messages, from round to round.

    Attributes:
        rate: the sites' mean learning rate in a round, as a share of its peak.
        working: who is at work, by message id.
        buffered: by site, the training of each reply that came in this round.
        taking_part: sites that were at work in this round, or could not be asked; sorted.
    """

    messenger: Messenger
    cfg: StrategyConfig
    rate: Callable[[int], float] = lambda _: 1.0
    clock: VirtualClock | None = None
    working: dict[str, Training] = field(default_factory=dict)
    buffered: dict[str, Training] = field(default_factory=dict)
    taking_part: list[str] = field(default_factory=list)

    def fill(
        self, number: int, messages: Mapping[str, Message], current: ModelArrays, checks: UpdateChecks
    ) -> dict[str, Failure]:
        """Sends the free sites on and waits until K good updates are there, or nobody is at work any more.

        Args:
            number: the round.
            messages: one a free site; the others are at work still.
            current: the weights that these messages carry.
            checks: takes the updates.

        Returns:
            By site, sorted, why each that failed gave no update. It takes part again in the next round.
        """
        self.buffered = {}
        failures = self._ask(messages, number, current)
        self.taking_part = sorted({*messages, *self.messenger.at_work})
        last = time.monotonic()
        while self.working and not self._is_full(checks):
            arrived, asked = False, time.monotonic()
            for reply in self.messenger.pull(self._expected()):
                arrived, last = True, time.monotonic()
                failures |= self._take(reply, number, checks)
                if self._is_full(checks):
                    break
            failures |= self._give_up(number)
            if self.working and not arrived:
                pause(last, asked)
        return dict(sorted(failures.items()))

    def as_if_fresh(
        self, updates: Mapping[str, Update], current: ModelArrays, number: int, *, fixed_statistics: bool
    ) -> tuple[dict[str, Update], dict[str, int]]:
        """Scales stale updates and lets all begin at the current weights.

        Args:
            updates: by site, the good ones of the buffer.
            current: the weights that they are applied to.
            number: the round.
            fixed_statistics: whether BatchNorm's statistics stand still in this round (`training.batch_statistics_fraction`).

        Returns:
            The updates, and the staleness of each, by site.
        """
        fresh, staleness = {}, {}
        for site, update in updates.items():
            begun = self.buffered[site]
            staleness[site] = number - begun.round
            factor = self._rate_factor(begun, number)
            fresh[site] = rebase(update, begun.base, current, staleness[site], factor, fixed_statistics=fixed_statistics)
        return fresh, staleness

    @property
    def free(self) -> list[str]:
        """Those that took part in this round and are not at work any more."""
        return [site for site in self.taking_part if site not in self.messenger.busy]

    def release(self) -> None:
        """Forgets who is still at work: what they send is not taken any more."""
        self.working.clear()
        self._note_at_work()

    def _ask(self, messages: Mapping[str, Message], number: int, base: ModelArrays) -> dict[str, Failure]:
        waiting, failures = self.messenger.send(messages, "train", number, self._patience_sec)
        for identifier, site in waiting.items():
            done = self.clock.done_at(site) if self.clock else 0.0
            self.working[identifier] = Training(site, number, base, messages[site], time.monotonic(), done)
        self._note_at_work()
        return failures

    def _expected(self) -> list[str]:
        """Whose replies may be taken now: anyone's, or by the virtual clock that of the site which is done next."""
        if self.clock is None:
            return list(self.working)
        return [min(self.working, key=lambda identifier: (self.working[identifier].done, self.working[identifier].site))]

    def _take(self, reply: Message, number: int, checks: UpdateChecks) -> dict[str, Failure]:
        """Takes one reply; returns the site's failure where it is none."""
        training = self.working.pop(reply.metadata.reply_to_message_id)
        site, staleness = training.site, number - training.round
        seconds = time.monotonic() - training.asked
        failure = self.messenger.read_failure_in(reply, site, "train", number, seconds, staleness=staleness)
        lost = (
            failure is not None and failure.error == HeldModelError.__name__ and self.messenger.held.pop(site, None) is not None
        )
        if lost:  # the model that it was to have kept is sent whole
            waiting, failures = self.messenger.send({site: training.message}, "train", number, self._patience_sec)
            self.working |= {identifier: replace(training, asked=time.monotonic()) for identifier in waiting}
            self._note_at_work()
            return failures
        self._note_at_work()
        if self.clock:
            self.clock.now = max(self.clock.now, training.done)
        if failure is not None:
            self.messenger.note_failure(failure, site, "train", number)
            return {site: failure}
        self.buffered[site] = training
        checks.take(site, reply, training.base, self._rate_factor(training, number))
        return {}

    def _rate_factor(self, training: Training, number: int) -> float:
        """By how much the learning rate has fallen since the training was begun; 1 where it has not."""
        return min(1.0, self.rate(number) / self.rate(training.round)) if training.round != number else 1.0

    def _is_full(self, checks: UpdateChecks) -> bool:
        return len(checks.updates) >= (self.cfg.buffer or 1) and len(checks.close()[0]) >= (self.cfg.buffer or 1)

    def _give_up(self, number: int) -> dict[str, Failure]:
        """Those who have been silent for too long."""
        failures = {}
        for identifier, training in list(self.working.items()):
            waited = time.monotonic() - training.asked
            if waited >= self._patience_sec:
                del self.working[identifier]
                failures[training.site] = Failure(training.site, "Timeout", f"no reply within {waited:.3g} s")
                self.messenger.note_failure(failures[training.site], training.site, "train", number)
        self._note_at_work()
        return failures

    @property
    def _patience_sec(self) -> float:
        return FORGET_AFTER_DEADLINES * self.cfg.round_timeout_sec

    def _note_at_work(self) -> None:
        self.messenger.at_work = {training.site for training in self.working.values()}


def rebase(
    update: Update,
    base: ModelArrays,
    current: ModelArrays,
    staleness: int,
    rate_factor: float = 1.0,
    *,
    fixed_statistics: bool = False,
) -> Update:
    """Turns an update of earlier weights into one of the current weights; a fresh one stays as it is (see the module).

    Args:
        update: what the site sent.
        base: the weights that it began from.
        current: the weights that it is applied to; the same as `base` where `staleness` is 0.
        staleness: tau.
        rate_factor: what the step is multiplied by besides s(tau), in (0, 1].
        fixed_statistics: whether the current statistics stay as they are.
    """
    if not staleness:
        return update
    weight, own = staleness_weight(staleness), update.arrays
    parameters = current.parameters + np.float32(weight * rate_factor) * (own.parameters - base.parameters)
    statistics = current.statistics
    if not fixed_statistics:
        statistics = np.float32(1.0 - weight) * statistics + np.float32(weight) * own.statistics
    return replace(update, record=pack_arrays(ModelArrays(parameters, statistics)))
