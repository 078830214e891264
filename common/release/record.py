"""The signed record of a release decision. Beside a bundle it is the mark without which a reading room may refuse the model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from common.config_types import Section
from common.errors import ReleaseError
from common.evaluation.comparison import Comparison, Margins
from common.evaluation.noninferiority import Verdict
from common.keys import PrivateKey, PublicKey
from common.model_bundle.bundle import Bundle
from common.release.signed import read_signed, write_signed
from common.release.verdict import Digest

DOMAIN = b"pneumofed release record 1\n"
SUFFIX = ".release.json"

Kind = Literal["held-out set", "site"]


class Model(Section):
    """A bundle, by name and digest."""

    name: str
    digest: Digest


class Check(Section):
    """One metric on one set against its margin; None for what cannot be computed."""

    metric: str
    difference: float | None
    """New minus old."""
    lower: float
    """One-sided lower confidence bound of the difference."""
    margin: float
    verdict: Verdict
    needed: tuple[int, int] | None = None
    """Patients with pneumonia and without that would be needed, where there are too few; None where no number would help."""


class Place(Section):
    """A set on which the two models were compared."""

    name: str
    kind: Kind
    comparison: Comparison
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.verdict is Verdict.NOT_WORSE for check in self.checks)


class ReleaseRecord(Section):
    """What was decided, on which numbers, by which margins."""

    format: Literal[1] = 1
    time: datetime
    decision: Literal["released", "refused"]
    new: Model
    old: Model | None
    """None for a first model, which nothing can be compared with."""
    margins: Margins
    """On the coordinator's held-out sets."""
    site_margins: Margins
    places: tuple[Place, ...] = ()
    reasons: tuple[str, ...] = ()
    """Why it was refused; or that it is a first model."""

    @property
    def released(self) -> bool:
        return self.decision == "released"


def write_record(path: Path, record: ReleaseRecord, key: PrivateKey) -> None:
    """Writes the record, signed with the coordinator's key.

    Raises:
        ReleaseError: the file cannot be written.
    """
    write_signed(path, DOMAIN, record, key)


def read_record(path: Path, trusted: Sequence[PublicKey] | None) -> ReleaseRecord:
    """The record at `path`; with `trusted` only if one of these signed it.

    Raises:
        ReleaseError: it is missing, damaged or signed by a stranger.
    """
    return read_signed(path, DOMAIN, ReleaseRecord, trusted)[0]


def mark_of(bundle: Path) -> Path:
    """Where the mark of the bundle at `bundle` (folder or archive) lies: beside it, since nothing may be added to a sealed folder."""
    name = bundle.stem if bundle.suffix in (".zip", ".tar") else bundle.name
    return bundle.resolve().with_name(name + SUFFIX)


def require_release(bundle: Bundle, mark: Path, trusted: Sequence[PublicKey] | None) -> ReleaseRecord:
    """The record that releases `bundle`, read from `mark` (see `mark_of`).

    Raises:
        ReleaseError: there is none, it is of another bundle, it refuses this one, or a stranger signed it.
    """
    record = read_record(mark, trusted)
    if record.new.digest != bundle.digest:
        raise ReleaseError(f"{mark} is about another model ({record.new.digest[:12]}), not about this one ({bundle.digest[:12]})")
    if not record.released:
        raise ReleaseError(f"{mark}: this model was not released: {'; '.join(record.reasons)}")
    return record
