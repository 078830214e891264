"""A site's answers to the steps of a secure sum, as in Bonawitz et al. 2017, figure 4, with the neighbours of Bell et al. 2020.

    advertise -> SignedKeys        new keys, signed
    share     -> SealedShares      the others' keys checked; own secrets in shares, one parcel a neighbour
    begin_masking -> MaskPlan      parcels opened; which masks hide the vector that comes next
    confirm   -> Confirmation      the set of those in the sum, signed: a coordinator cannot name two sets
    unmask    -> Shares            once enough neighbours confirmed that very set

Each step needs the one before it and is done once. Whatever is not as agreed raises `SecureSumError`, whatever the hospital's policy does
not accept (`client.federation.sum_terms`) `PolicyError`, and nothing leaves. A site that would send nothing (`withhold`) takes no part: one
that is counted and adds zeros makes the sum that of the others. `answer_step` takes all steps but masking, which comes with a model.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from pneumofed.client.federation.policy import UNRESTRICTED
from pneumofed.client.federation.requests import shows_statistics
from pneumofed.client.federation.sum_terms import Broken, broken_term, too_few
from pneumofed.client.secure_aggregation.memory import HeldShares, Identity, Memory, MemoryFolder
from pneumofed.common.audit.log import hash_experiment
from pneumofed.common.config.experiment import Section, SecureAggregationConfig
from pneumofed.common.config.parties import SiteConfig, SitePolicy
from pneumofed.common.errors import MessageError, PolicyError, SecureSumError
from pneumofed.common.secure_aggregation.key_agreement import (
    KeyPair,
    check_advertised_keys,
    commit,
    digest_keys,
    encrypt_for,
    own_mask,
    pair_mask,
    read_roster,
    sign_keys,
    sign_survivors,
    survivors_confirmed,
    unseal,
)
from pneumofed.common.secure_aggregation.masking import SHARE_BYTES, SumVector, neighbourhoods, split_secret, threshold
from pneumofed.common.secure_aggregation.protocol import (
    KEY_BYTES,
    Confirmation,
    Purpose,
    SealedShares,
    Shares,
    SignedKeys,
    Step,
    SumSession,
    hash_subject,
    read_step,
)
from pneumofed.common.wire.instructions import Instruction


@dataclass(frozen=True)
class MaskPlan:
    """What hides a site's vector. `sites` is how many vectors may be in the sum, which sets the quantisation."""

    sites: int
    masks: tuple[tuple[bytes, bool], ...]
    """(key, whether it is subtracted)"""
    metrics: bool = True
    """Whether loss and accuracy of training may be in the vector: only if they are in everyone's, or the sum would be that of few."""
    judges: bool = False
    """Whether statistics of the model that the site trains on from must be in it: where they are in everyone's."""

    def hide(self, vector: SumVector) -> None:
        """Adds all masks in place."""
        for key, subtract in self.masks:
            vector.add_mask(key, subtract=subtract)


@dataclass(frozen=True)
class Participant:
    """One site in one secure sum."""

    identity: Identity
    folder: MemoryFolder
    cfg: SecureAggregationConfig
    session: SumSession
    policy: SitePolicy = UNRESTRICTED

    @property
    def site(self) -> str:
        return self.identity.site

    def advertise(self, step: Step, *, judges: bool = False) -> SignedKeys:
        """Begins the sum: makes this site's keys and signs them.

        Args:
            step: with the key roster.
            judges: whether this site will add statistics of the model that it trains on from.

        Raises:
            SecureSumError: the roster is not the authority's or too old, or the sum was begun before.
            PolicyError: the hospital does not accept the sum's terms.
        """
        _accept(broken_term(self.policy, self.cfg))
        roster = self.identity.check_roster(step.roster)
        session, channel, mask = self.session, KeyPair.generate(), KeyPair.generate()
        with self.folder.begin(session, roster):
            metrics = "training_metrics" not in self.policy.withhold and shows_statistics(self.policy)
            keys = sign_keys(
                session, self.site, channel.public, mask.public, self.identity.node_key, metrics=metrics, judges=judges
            )
            names = asdict(session)
            secret = {"channel": channel.private.hex(), "mask": mask.private.hex()}
            self.folder.keep(Memory(**names, **secret, progress="advertised", roster=roster.text, keys=[keys]))  # type: ignore[arg-type]
        return keys

    def share(self, step: Step) -> SealedShares:
        """Checks all sites' keys and splits this site's secrets into shares, one encrypted parcel a neighbour.

        Raises:
            SecureSumError: the step is not due, keys are not those that were signed, or there are too few sites.
            PolicyError: the hospital does not accept the terms for so many sites.
        """
        with self.folder.step(self.session, "advertised") as memory:
            self._check_all_keys(step.keys, memory)
            _accept(broken_term(self.policy, self.cfg, len(step.keys)))
            holders = self._holders(step.keys)
            places, least = _places(step.keys), threshold(len(holders), self.cfg.threshold)
            seed, mask = secrets.token_bytes(KEY_BYTES), bytes.fromhex(_needed(memory.mask))
            seeds = split_secret(seed, [places[holder] for holder in holders], least)
            masks = split_secret(mask, [places[holder] for holder in holders], least)
            both = {holder: seeds[places[holder]] + masks[places[holder]] for holder in holders}
            self.folder.keep(
                memory.model_copy(
                    update={
                        "progress": "shared",
                        "seed": seed.hex(),
                        "keys": sorted(step.keys, key=lambda keys: keys.site),
                        "held": {self.site: _held(both.pop(self.site))},
                    }
                )
            )
        by_site, channel = _by_site(step.keys), bytes.fromhex(_needed(memory.channel))
        parcels = {
            holder: encrypt_for(self.session, channel, by_site[self.site], by_site[holder], content).hex()
            for holder, content in both.items()
        }
        return SealedShares(parcels=parcels, commitment=commit(self.session, seed, self.site))

    def begin_masking(self, step: Step, subject: str) -> MaskPlan:
        """Opens the parcels and derives the masks of the vector about what has the hash `subject`.

        Asked for before there is a vector: what was begun is not begun again, even where training then fails.

        Args:
            step: of stage `mask`, with the senders and the parcels for this site.
            subject: of what the site was sent; see `hash_subject`.

        Raises:
            SecureSumError: the step is not due, the senders are strangers or too few, or a parcel was changed.
        """
        with self.folder.step(self.session, "shared") as memory:
            by_site = _by_site(memory.keys)
            senders = self._check_set(step.senders, by_site, memory)
            partners = [site for site in self._holders(memory.keys) if site in senders and site != self.site]
            if set(step.parcels) != set(partners):
                raise SecureSumError("the parcels are not those of this site's neighbours")
            channel, mask = bytes.fromhex(_needed(memory.channel)), bytes.fromhex(_needed(memory.mask))
            held, own = dict(memory.held), by_site[self.site]
            for site in partners:
                held[site] = _held(unseal(self.session, channel, by_site[site], own, bytes.fromhex(step.parcels[site])))
            masks = [pair_mask(self.session, mask, own, by_site[site], subject) for site in partners]
            masks.append((own_mask(self.session, bytes.fromhex(_needed(memory.seed)), self.site), False))
            done = {"progress": "masked", "channel": None, "mask": None, "seed": None}
            self.folder.keep(memory.model_copy(update={**done, "senders": senders, "held": held}))
        return MaskPlan(
            len(by_site),
            tuple(masks),
            *(all(said) for said in zip(*((keys.metrics, keys.judges) for keys in memory.keys), strict=True)),
        )

    def confirm(self, step: Step) -> Confirmation:
        """Signs the set of sites whose vectors are summed.

        Raises:
            SecureSumError: the step is not due, or the set holds strangers, lacks this site or is too small.
        """
        with self.folder.step(self.session, "masked") as memory:
            survivors = self._check_set(step.survivors, memory.senders, memory)
            self.folder.keep(memory.model_copy(update={"progress": "confirmed", "survivors": survivors}))
        signature = sign_survivors(self.session, digest_keys(self.session, memory.keys), survivors, self.identity.node_key)
        return Confirmation(signature=signature)

    def unmask(self, step: Step) -> Shares:
        """Gives the shares that unmask the sum, and forgets it: of a site in the sum its seed, of one that dropped its mask key.

        Raises:
            SecureSumError: the step is not due, or too few neighbours confirmed this site's set.
        """
        with self.folder.step(self.session, "confirmed") as memory:
            self._check_confirmed(step, memory)
            self.folder.forget()
        survivors = set(memory.survivors)
        return Shares(
            seeds={site: held.seed for site, held in memory.held.items() if site in survivors},
            keys={site: held.key for site, held in memory.held.items() if site not in survivors},
        )

    def _check_all_keys(self, keys: Collection[SignedKeys], memory: Memory) -> None:
        """Refuses keys that their site did not sign for this sum, two of one site, and other keys for this site."""
        roster = read_roster(memory.roster, self.identity.authority)
        by_site = _by_site(keys)
        if len(by_site) != len(keys) or by_site.get(self.site) != memory.keys[0]:
            raise SecureSumError("the list of keys names a site twice, or has other keys for this one")
        for signed in keys:
            check_advertised_keys(self.session, signed, roster.key_of(signed.site))
        if len({key for signed in keys for key in (signed.channel, signed.mask)}) != 2 * len(keys):
            raise SecureSumError("two sites have the same key")
        self._require(len(keys), threshold(len(keys), self.cfg.threshold))

    def _check_set(self, sites: Collection[str], allowed: Collection[str], memory: Memory) -> list[str]:
        """`sites`, sorted: with this one, out of `allowed`, and enough of them, also among its neighbours."""
        chosen = set(sites)
        if len(chosen) != len(sites) or not chosen <= set(allowed) or self.site not in chosen:
            raise SecureSumError("the set of sites holds strangers, or not this site itself")
        self._require(len(chosen), threshold(len(memory.keys), self.cfg.threshold))
        _accept(too_few(self.policy, len(chosen)))
        holders = self._holders(memory.keys)
        self._require(len(chosen & set(holders)), threshold(len(holders), self.cfg.threshold))
        return sorted(chosen)

    def _check_confirmed(self, step: Step, memory: Memory) -> None:
        roster, all_keys = read_roster(memory.roster, self.identity.authority), digest_keys(self.session, memory.keys)
        holders = self._holders(memory.keys)
        agreed = [
            site
            for site in holders
            if site in memory.survivors
            and site in step.signatures
            and survivors_confirmed(self.session, all_keys, memory.survivors, step.signatures[site], roster.key_of(site))
        ]
        self._require(len(agreed), threshold(len(holders), self.cfg.threshold))

    def _holders(self, keys: Collection[SignedKeys]) -> list[str]:
        """Who holds shares of this site's secrets: its neighbours and itself."""
        return neighbourhoods([signed.site for signed in keys], self.cfg, digest_keys(self.session, keys))[self.site]

    def _require(self, count: int, least: int) -> None:
        if count < least:
            raise SecureSumError(f"{count} sites, {least} are needed (secure_aggregation.threshold, and never fewer than 3)")


def answer_step(instruction: Instruction, config: SiteConfig, policy: SitePolicy, judges: Callable[[Purpose], bool]) -> Section:
    """Answers `advertise`, `share`, `confirm` or `unmask`; no data is read for it, but by `judges`.

    Args:
        instruction: the coordinator's message, with the step and the experiment.
        config: of the site, with the connection whose keys sign.
        policy: the site's, as it stood when the message came.
        judges: says whether the site will add statistics of the model that it trains on from; raises where the sum is of such
            numbers alone and it has none to add.

    Raises:
        SecureSumError: the step is not what the protocol allows.
        PolicyError: the hospital does not accept the terms of the sum, or would add nothing to it.
        EmptySiteError: the site has nothing to add.
        ConfigError: the site has no node key, or no certificate of the authority.
    """
    step = _step_of(instruction)
    participant = _participant(instruction, step, config, policy)
    match step.stage:
        case "advertise":
            return participant.advertise(step, judges=judges(step.purpose))
        case "share":
            return participant.share(step)
        case "confirm":
            return participant.confirm(step)
        case "unmask":
            return participant.unmask(step)
    raise MessageError("masking is asked for with training or evaluation, not by itself")


@contextmanager
def masking(instruction: Instruction, config: SiteConfig, policy: SitePolicy, purpose: Purpose) -> Iterator[MaskPlan | None]:
    """Derives the masks that hide the vector which the block makes for `instruction`; None outside secure sums.

    Where the block fails, the site is not in the sum: what it held of the others' secrets is forgotten.

    Args:
        instruction: the coordinator's message to train or evaluate, with a step of stage `mask`.
        config: of the site, with the connection whose keys sign.
        policy: the site's, as it stood when the message came.
        purpose: what the site is about to do, which the step must be for.

    Raises:
        SecureSumError: no step of a secure sum for `purpose`, or one that the protocol does not allow now.
        PolicyError: too few sites are left.
        MessageError: the instruction holds no arrays.
        ConfigError: the site has no node key, or no certificate of the authority.
    """
    if not instruction.experiment.secure_aggregation.enabled and instruction.step is None:
        yield None
        return
    step = _step_of(instruction)
    if step.stage != "mask" or step.purpose != purpose:
        raise SecureSumError(f"a step '{step.stage}' for '{step.purpose}' came with a message to {purpose}")
    participant = _participant(instruction, step, config, policy)
    plan = participant.begin_masking(step, hash_subject(instruction.weights, instruction.suitability, instruction.rate_factor))
    try:
        yield plan
    except BaseException:
        participant.folder.leave(participant.session)
        raise


def _step_of(instruction: Instruction) -> Step:
    if not instruction.experiment.secure_aggregation.enabled or instruction.step is None:
        raise SecureSumError("the experiment and the message disagree on secure aggregation; nothing is sent in the clear")
    return read_step(instruction.step)


def _participant(instruction: Instruction, step: Step, config: SiteConfig, policy: SitePolicy) -> Participant:
    session = step.session(instruction.run, instruction.round, hash_experiment(instruction.experiment))
    terms = instruction.experiment.secure_aggregation
    return Participant(Identity.of(config), MemoryFolder(config.work_dir), terms, session, policy)


def _accept(broken: Broken | None) -> None:
    if broken:
        raise PolicyError(*broken)


def _by_site(keys: Collection[SignedKeys]) -> dict[str, SignedKeys]:
    return {signed.site: signed for signed in keys}


def _places(keys: Collection[SignedKeys]) -> dict[str, int]:
    """Each site's place in the secret sharing, from 1."""
    return {site: place for place, site in enumerate(sorted(signed.site for signed in keys), start=1)}


def _held(content: bytes) -> HeldShares:
    if len(content) != 2 * SHARE_BYTES:
        raise SecureSumError("a parcel of shares has another length than agreed")
    return HeldShares(seed=content[:SHARE_BYTES].hex(), key=content[SHARE_BYTES:].hex())


def _needed(secret: str | None) -> str:
    if secret is None:
        raise SecureSumError("this sum's secrets were forgotten already")
    return secret
