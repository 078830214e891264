"""The chain of releases: every released model's record in order, each hash over the one before, the whole signed by the coordinator.

A release is compared with the last link and with no other bundle, `--first` works while there is none, and losses add up along the
chain. For each set and metric the loss so far is how far the last release lies below the best one,

    loss_n = max(0, loss_(n-1) + old_n - new_n),

with the paired differences that each release was decided on (the cumulative sum of Page 1954, Biometrika 41:100). So a set that changes
in between does not reset it, and a model that is better pays back.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pneumofed.common.audit.log import CHAIN_START, RELEASE_EVENT, canonical, chain_hash, first_broken, read_entries
from pneumofed.common.config.experiment import Section
from pneumofed.common.errors import ReleaseError
from pneumofed.common.files import exclusive
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.release import Digest, ReleaseRecord, SignedRecord, mark_of, read_signed, require_release, write_signed
from pneumofed.common.wire.keys import PrivateKey, PublicKey

CHAIN_FILE = "releases.json"
Losses = Mapping[tuple[str, str, str], float]
"""Loss so far by (kind of set, its name, metric), at least 0."""


class ReleaseLink(Section):
    """One release, and the hash of its record after the link before."""

    record: ReleaseRecord
    hash: Digest


class ReleaseChain(SignedRecord):
    """All releases so far, the first one first."""

    domain: ClassVar[bytes] = b"pneumofed release chain 1\n"
    format: Literal[1] = 1
    links: tuple[ReleaseLink, ...] = ()

    @property
    def last(self) -> ReleaseRecord | None:
        """The record of the model that was released last."""
        return self.links[-1].record if self.links else None

    def extended(self, record: ReleaseRecord) -> ReleaseChain:
        """Returns the chain with one more release."""
        before = self.links[-1].hash if self.links else CHAIN_START
        return ReleaseChain(links=(*self.links, ReleaseLink(record=record, hash=chain_hash(_body(record), before))))

    def losses(self) -> dict[tuple[str, str, str], float]:
        """Computes how far the last release lies below the best one, by kind of set, its name, and metric."""
        found: dict[tuple[str, str, str], float] = {}
        for link in self.links:
            for place in link.record.places:
                for check in place.checks:
                    key = (place.kind, place.name, check.metric)
                    found[key] = max(0.0, found.get(key, 0.0) - (check.difference or 0.0))
        return found


def read_chain(path: Path, trusted: list[PublicKey] | None) -> ReleaseChain:
    """Reads the chain in `path`; an empty one where there is no file.

    Args:
        path: of the file, not trusted.
        trusted: keys of which one must have signed; None takes any signer.

    Raises:
        ReleaseError: it is damaged, signed by a stranger, or a link does not follow the one before.
    """
    if not path.exists():
        return ReleaseChain()
    chain, _ = read_signed(path, ReleaseChain, trusted)
    broken = first_broken((_body(link.record), link.hash) for link in chain.links)
    if broken is not None:
        raise ReleaseError(f"{path}: release {broken + 1} does not follow the one before it; restore the file from a backup")
    return chain


def continue_from(chain: ReleaseChain, old: Bundle, place: Path, trusted: list[PublicKey] | None) -> ReleaseChain:
    """Checks that `old` is the model that was released last, and returns the chain that ends with it.

    A chain that is empty, since releases were made before there were chains, begins with the signed mark beside the old bundle.

    Args:
        chain: as read.
        old: the bundle that the new model is compared with.
        place: where it lies, for its mark.
        trusted: keys of which one must have signed the mark.

    Raises:
        ReleaseError: another model was released last, or nothing shows that this one was released.
    """
    if chain.last is None:
        try:
            return chain.extended(require_release(old, mark_of(place), trusted))
        except ReleaseError as error:
            raise ReleaseError(f"nothing shows that {place} was released: {error}. Release it with --first before") from None
    last = chain.last
    if last.new.digest != old.digest:
        raise ReleaseError(
            f"{place} is not the model that was released last, which is {last.new.name} ({last.new.digest[:16]}, "
            f"{last.time:%Y-%m-%d}); give that one with --against"
        )
    return chain


def check_against_audit(chain: ReleaseChain, audit: Path) -> None:
    """Checks that the chain holds the last release that the coordinator's audit log knows of.

    Args:
        chain: what the next release continues; empty before a first one.
        audit: the log; one that does not exist knows of none.

    Raises:
        ReleaseError: the chain was removed, or is an older copy.
    """
    released = [
        entry for entry in read_entries(audit) if entry.event == RELEASE_EVENT and entry.facts.get("decision") == "released"
    ]
    if released and released[-1].facts.get("new") not in {link.record.new.digest for link in chain.links}:
        raise ReleaseError(
            f"the audit log knows of a release on {released[-1].time[:10]} ({str(released[-1].facts.get('new'))[:16]}) that is not in the "
            f"chain of releases: restore {CHAIN_FILE} from a backup, or give that bundle with --against"
        )


def append_release(path: Path, chain: ReleaseChain, record: ReleaseRecord, key: PrivateKey) -> None:
    """Writes the chain with one more release.

    Args:
        path: of the file; its folder is made.
        chain: what the decision continued, see `continue_from`.
        record: of the release.
        key: the coordinator's, which signs the whole.

    Raises:
        ReleaseError: another release was written meanwhile, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.parent):
            known = read_chain(path, None).links
            if known not in (chain.links, ()) or (not known and len(chain.links) > 1):
                raise ReleaseError(f"{path}: another model was released meanwhile; give the command again, against that one")
            write_signed(path, chain.extended(record), key)
    except OSError as error:
        raise ReleaseError(f"{path} cannot be written: {error.strerror}") from None


def _body(record: ReleaseRecord) -> bytes:
    return canonical(record.model_dump(mode="json"))
