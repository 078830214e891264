"""The coordinator's side of one secure sum, without the exchange: what each step asks, what its replies must be, and the sum.

    steps = collector.advertise(sites)     {site: step}          collector.take_keys(site, content)
    steps = collector.share()                                    collector.take_parcels(site, content)
    steps = collector.mask()                                     collector.take_vector(site, content)      added on arrival, not kept
    steps = collector.confirm(least)                             collector.take_confirmation(site, content)
    steps = collector.unmask()                                   collector.take_shares(site, content)
    collector.finish()                     the sum

A step that fewer sites answered than the threshold asks for cannot be left behind: the next one raises `SecureSumError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import RecordDict

from pneumofed.common.config.experiment import SecureAggregationConfig
from pneumofed.common.errors import MessageError, SecureSumError
from pneumofed.common.secure_aggregation.key_agreement import (
    KeyDirectory,
    KeyPair,
    check_advertised_keys,
    commit,
    digest_keys,
    own_mask,
    pair_mask,
)
from pneumofed.common.secure_aggregation.masking import SumShape, SumVector, join_shares, neighbourhoods, threshold
from pneumofed.common.secure_aggregation.protocol import (
    Confirmation,
    SealedShares,
    Shares,
    SignedKeys,
    Stage,
    Step,
    SumSession,
    unpack_masked,
    unpack_reply,
)


@dataclass
class Collector:
    """One sum. `shape_for` gives the vectors' shape for the number of sites that may be in it and whether they hold statistics of the model
    that is trained on from; `subject` is the hash of their subject."""

    session: SumSession
    cfg: SecureAggregationConfig
    key_roster: KeyDirectory
    shape_for: Callable[[int, bool], SumShape]
    subject: str
    drawn: list[str] = field(default_factory=list)
    keys: dict[str, SignedKeys] = field(default_factory=dict)
    parcels: dict[str, SealedShares] = field(default_factory=dict)
    summed: list[str] = field(default_factory=list)
    signatures: dict[str, str] = field(default_factory=dict)
    shares: dict[str, Shares] = field(default_factory=dict)
    total: SumVector | None = None
    holders: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Who holds shares of each site's secrets."""

    def advertise(self, sites: Sequence[str]) -> dict[str, Step]:
        """Begins the sum: asks each of `sites` for its public keys."""
        self.drawn = list(sites)
        return {site: self._step("advertise", roster=self.key_roster.text) for site in sites}

    def take_keys(self, site: str, content: RecordDict) -> None:
        """Takes a site's public keys of this sum.

        Args:
            site: who was asked.
            content: its reply.

        Raises:
            MessageError, SecureSumError: no keys, or the site did not sign them; so too in the other `take_...`.
        """
        keys = unpack_reply(content, SignedKeys)
        if keys.site != site:
            raise MessageError("the reply names another site")
        check_advertised_keys(self.session, keys, self.key_roster.key_of(site))
        self.keys[site] = keys

    def share(self) -> dict[str, Step]:
        """Asks each site that sent keys for sealed shares of its secrets.

        Raises:
            SecureSumError: fewer sites than the threshold answered; so too in the steps after this one.
        """
        judging = self.session.purpose != "train"  # those that withhold their statistics say so now and are not counted
        self._require(len(self.keys), len(self.keys) if judging else len(self.drawn), "sent keys")
        keys = [self.keys[site] for site in sorted(self.keys)]
        self.holders = neighbourhoods(list(self.keys), self.cfg, digest_keys(self.session, keys))
        return {site: self._step("share", keys=keys) for site in self.keys}

    def take_parcels(self, site: str, content: RecordDict) -> None:
        """Takes a site's sealed shares for its neighbours.

        Args:
            site: who was asked.
            content: its reply.

        Raises:
            MessageError: no shares, or shares for others than the neighbours.
        """
        sealed = unpack_reply(content, SealedShares)
        if set(sealed.parcels) != set(self.holders[site]) - {site}:
            raise MessageError("shares for other sites than the neighbours")
        self.parcels[site] = sealed

    def mask(self) -> dict[str, Step]:
        """Asks each site that shared its secrets for its masked vector, and hands it the shares that are meant for it."""
        self._require(len(self.parcels), len(self.keys), "shared their secrets")
        senders = sorted(self.parcels)
        self.total = self.shape_for(len(self.keys), self.judged).zeros()
        return {site: self._step("mask", senders=senders, parcels=self._parcels_for(site)) for site in senders}

    @property
    def judged(self) -> bool:
        """Whether the vectors hold statistics of the model that is trained on from: where every site said that it adds some."""
        return all(keys.judges for keys in self.keys.values())

    def _parcels_for(self, site: str) -> dict[str, str]:
        senders = [other for other in self.holders[site] if other in self.parcels and other != site]
        return {sender: self.parcels[sender].parcels[site] for sender in senders}

    def take_vector(self, site: str, content: RecordDict) -> None:
        """Adds a site's masked vector to the sum.

        Args:
            site: who was asked.
            content: its reply.

        Raises:
            MessageError, SecureSumError: no vector, one of another shape, or none is expected yet.
        """
        total = self._sum()
        total.add(unpack_masked(content, total.shape))
        self.summed = sorted([*self.summed, site])

    def confirm(self, least: int) -> dict[str, Step]:
        """Asks each site in the sum to sign who is in it; `least` vectors are needed even where the threshold is lower."""
        self._require(len(self.summed), len(self.keys), "sent their masked vectors")
        if len(self.summed) < least:
            raise SecureSumError(f"{len(self.summed)} sites sent their masked vectors, {least} are needed (strategy.min_sites)")
        return {site: self._step("confirm", survivors=self.summed) for site in self.summed}

    def take_confirmation(self, site: str, content: RecordDict) -> None:
        """Takes a site's signature under the set of sites that sent their vectors.

        Args:
            site: who was asked.
            content: its reply. The sites check one another's signatures, so that the coordinator cannot name different sets.

        Raises:
            MessageError: no signature.
        """
        self.signatures[site] = unpack_reply(content, Confirmation).signature

    def unmask(self) -> dict[str, Step]:
        """Asks each site that signed for the shares that take the masks away."""
        self._require(len(self.signatures), len(self.keys), "confirmed the set of sites")
        return {site: self._step("unmask", signatures=self.signatures) for site in self.signatures}

    def take_shares(self, site: str, content: RecordDict) -> None:
        """Takes the shares that a site gives out: of the seeds of sites in the sum, of the mask keys of those that dropped out.

        Args:
            site: who was asked.
            content: its reply.

        Raises:
            MessageError: no shares, or shares of both secrets of one site, which together would lay its vector open.
        """
        shares = unpack_reply(content, Shares)
        if set(shares.seeds) & set(shares.keys):
            raise MessageError("shares of both secrets of one site")
        self.shares[site] = shares

    def finish(self) -> SumVector:
        """Computes the sum, with every mask taken away.

        Raises:
            SecureSumError: too few shares of a secret, or they do not give the one that its site bound itself to.
        """
        self._require(len(self.shares), len(self.keys), "helped to unmask")
        total = self._sum()
        for site in self.summed:
            seed = self._join(site, {holder: shares.seeds.get(site) for holder, shares in self.shares.items()})
            if commit(self.session, seed, site) != self.parcels[site].commitment:
                raise SecureSumError(f"the shares of {site}'s seed are not those that it gave out")
            total.add_mask(own_mask(self.session, seed, site), subtract=True)
        for site in sorted(set(self.parcels) - set(self.summed)):
            self._remove_pair_masks(total, site)
        return total

    def _remove_pair_masks(self, total: SumVector, dropped: str) -> None:
        """Takes away what the others' vectors hold of their masks with `dropped`, whose own half never came."""
        partners = [site for site in self.holders[dropped] if site in self.summed]
        if not partners:
            return
        private = self._join(dropped, {holder: shares.keys.get(dropped) for holder, shares in self.shares.items()})
        if KeyPair.of(private).public.hex() != self.keys[dropped].mask:
            raise SecureSumError(f"the shares of {dropped}'s mask key are not those that it gave out")
        for site in partners:
            key, dropped_subtracts = pair_mask(self.session, private, self.keys[dropped], self.keys[site], self.subject)
            total.add_mask(key, subtract=dropped_subtracts)  # where it would have subtracted, the other one added

    def _join(self, site: str, given: Mapping[str, str | None]) -> bytes:
        places = {name: place for place, name in enumerate(sorted(self.keys), start=1)}
        mine = {places[holder]: bytes.fromhex(share) for holder, share in given.items() if share and holder in self.holders[site]}
        return join_shares(mine, threshold(len(self.holders[site]), self.cfg.threshold))

    def _sum(self) -> SumVector:
        if self.total is None:
            raise SecureSumError("no vector is expected yet")
        return self.total

    def _require(self, count: int, of: int, deed: str) -> None:
        least = threshold(of, self.cfg.threshold)
        if count < least:
            raise SecureSumError(f"{count} of {of} sites {deed}, {least} are needed (secure_aggregation.threshold)")

    def _step(self, stage: Stage, **content: object) -> Step:
        session = {"stage": stage, "purpose": self.session.purpose, "identifier": self.session.identifier}
        return Step.model_validate({**session, **content})
