"""Signed JSON files: of a release decision, and of a hospital's own operating point.

- `ReleaseRecord`: the decision. Beside a bundle it is the mark without which a reading room may refuse the model (`require_release`).
- `SiteVerdict`: a site's comparison of a new model with the old one, in counts, differences and variances on its own validation patients.
- `SitePoint`: where a hospital's own patients put the threshold of a bundle; `use_site_point` makes the bundle decide by it.
- `write_signed`, `read_signed`: a JSON file with the signature of a party's P-384 key beside its content.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationError

from pneumofed.common.audit.log import canonical
from pneumofed.common.config.experiment import Section
from pneumofed.common.errors import ConfigError, ReleaseError
from pneumofed.common.evaluation.class_comparison import ClassesComparison
from pneumofed.common.evaluation.comparison import Margins, ModelComparison, NonInferiority
from pneumofed.common.files import atomic_write
from pneumofed.common.model_bundle.bundle import Bundle
from pneumofed.common.model_bundle.manifest import OperatingPoint
from pneumofed.common.model_bundle.population import IntervalEstimate
from pneumofed.common.wire.keys import (
    PrivateKey,
    PublicKey,
    format_public_key,
    is_signed,
    key_fingerprint,
    parse_public_key,
    sign,
)

RELEASE_SUFFIX = ".release.json"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Kind = Literal["held-out set", "site"]


class SignedRecord(Section):
    """What a party signs. `domain` says what it is, and precedes it, so that the signature can be taken for nothing else."""

    domain: ClassVar[bytes]


class ReleasedModel(Section):
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
    verdict: NonInferiority
    needed: tuple[int, int] | None = None
    """Patients with pneumonia and without that would be needed, where there are too few; None where no number would help."""


class Place(Section):
    """A set on which the two models were compared."""

    name: str
    kind: Kind
    comparison: ClassesComparison | ModelComparison
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.verdict is NonInferiority.NOT_WORSE for check in self.checks)


class ReleaseRecord(SignedRecord):
    """What was decided, on which numbers, by which margins."""

    domain: ClassVar[bytes] = b"pneumofed release record 1\n"
    format: Literal[1] = 1
    time: datetime
    decision: Literal["released", "refused"]
    new: ReleasedModel
    old: ReleasedModel | None
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


def read_record(path: Path, trusted: Sequence[PublicKey] | None) -> ReleaseRecord:
    """Reads the record of a release decision.

    Args:
        path: of the file, not trusted.
        trusted: keys of which one must have signed; None takes any signer.

    Raises:
        ReleaseError: it is missing, damaged or signed by a stranger.
    """
    return read_signed(path, ReleaseRecord, trusted)[0]


def mark_of(bundle: Path) -> Path:
    """Where the mark of the bundle at `bundle` (folder or archive) lies: beside it, since nothing may be added to a sealed folder."""
    name = bundle.stem if bundle.suffix in (".zip", ".tar") else bundle.name
    return bundle.resolve().with_name(name + RELEASE_SUFFIX)


def require_release(bundle: Bundle, mark: Path, trusted: Sequence[PublicKey] | None) -> ReleaseRecord:
    """Reads the record that releases a bundle.

    Args:
        bundle: opened, hence checked.
        mark: file of the record, see `mark_of`.
        trusted: keys of which one must have signed the record; None takes any signer.

    Raises:
        ReleaseError: there is none, it is of another bundle, it refuses this one, or a stranger signed it.
    """
    record = read_record(mark, trusted)
    if record.new.digest != bundle.digest:
        raise ReleaseError(f"{mark} is about another model ({record.new.digest[:12]}), not about this one ({bundle.digest[:12]})")
    if not record.released:
        raise ReleaseError(f"{mark}: this model was not released: {'; '.join(record.reasons)}")
    return record


class SiteVerdict(SignedRecord):
    """What a site reports; no image and no patient, but how both models do on its validation set, which may be small."""

    domain: ClassVar[bytes] = b"pneumofed site verdict 1\n"
    format: Literal[1] = 1
    site: SiteName
    time: datetime
    old: Digest
    """Digests of the two bundles."""
    new: Digest
    comparison: ModelComparison


def read_verdict(path: Path, keys: Mapping[str, PublicKey]) -> SiteVerdict:
    """Reads a site's verdict, which must be signed with the very key that is known for the site.

    Args:
        path: of the file, not trusted.
        keys: public node keys by site.

    Raises:
        ReleaseError: it is damaged, of a site that is not known, or signed by another.
    """
    claimed, _ = read_signed(path, SiteVerdict, None)
    if claimed.site not in keys:
        raise ReleaseError(f"{path}: no key of {claimed.site} is known; give the coordinator folder, whose sites/ holds it")
    return read_signed(path, SiteVerdict, [keys[claimed.site]])[0]


class SitePoint(SignedRecord):
    """A bundle's operating point for one hospital, chosen on its own patients, none of whom the model was trained on: counts and rates."""

    domain: ClassVar[bytes] = b"pneumofed site operating point 1\n"
    format: Literal[1] = 1
    site: SiteName
    time: datetime
    bundle: Digest
    point: OperatingPoint
    images: Annotated[int, Field(ge=1)]
    """That were judged."""
    patients: tuple[int, int]
    """With pneumonia, and without."""
    refused: Annotated[int, Field(ge=0)]
    """Images that the bundle cannot judge, or that can no longer be read; they are not among `images`."""
    auroc: IntervalEstimate
    at_bundle: dict[str, IntervalEstimate]
    """`sensitivity` and `specificity` at the bundle's threshold, with the 95 % interval of what new patients may expect (`rates_at`)."""
    at_own: dict[str, IntervalEstimate]
    """The same at the hospital's own."""


def use_site_point(bundle: Bundle, path: Path) -> Bundle:
    """Returns the bundle as it decides at a hospital's own operating point; digest, probabilities and checks are the same.

    Args:
        bundle: opened, hence checked.
        path: file of the operating point.

    Raises:
        ReleaseError: it is missing, damaged, changed, or of another bundle.
    """
    point, _ = read_signed(path, SitePoint, None)
    if point.bundle != bundle.digest:
        raise ReleaseError(
            f"{path} is of another model ({point.bundle[:12]}), not of this one ({bundle.digest[:12]}); the hospital makes one for it with "
            "`pneumofed site operating-point`"
        )
    return bundle.deciding_at(point.point)


MAX_FILE_BYTES = 2**24
Record = TypeVar("Record", bound=SignedRecord)


class Envelope(Section):
    """The file: what is signed, by whose key (an OpenSSH line), and the signature of its canonical JSON."""

    content: dict[str, Any]
    key: str
    signature: str


def write_signed(path: Path, content: SignedRecord, key: PrivateKey) -> None:
    """Writes `content` and its signature as one JSON file.

    Args:
        path: of the file; its folder is made.
        content: the record.
        key: P-384 key of the signing party.

    Raises:
        ReleaseError: the file cannot be written.
    """
    values = content.model_dump(mode="json")
    public = format_public_key(key.public_key(), "").decode("ascii").strip()
    signature = base64.b64encode(sign(key, content.domain + canonical(values))).decode("ascii")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(Envelope(content=values, key=public, signature=signature).model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise ReleaseError(f"{path} cannot be written: {error.strerror}") from None


def read_signed(path: Path, kind: type[Record], trusted: Sequence[PublicKey] | None) -> tuple[Record, str]:
    """Reads a signed file.

    Args:
        path: of the file, not trusted.
        kind: class of the record.
        trusted: keys of which one must have signed; None takes any signer.

    Returns:
        (content, fingerprint of the signer).

    Raises:
        ReleaseError: it is missing, damaged, changed, not of this kind, or signed by a stranger.
    """
    try:
        with path.open("rb") as file:
            envelope = Envelope.model_validate_json(file.read(MAX_FILE_BYTES))
        key = parse_public_key(envelope.key.encode(), str(path))
        signature = base64.b64decode(envelope.signature, validate=True)
        whole = is_signed(key, kind.domain + canonical(envelope.content), signature)
    except OSError as error:
        raise ReleaseError(f"{path} cannot be read: {error.strerror}") from None
    except (ValidationError, ConfigError, binascii.Error, ValueError):
        raise ReleaseError(f"{path} is damaged or is something else; get it again from who signed it") from None
    if not whole:
        raise ReleaseError(f"{path} was changed after it was signed, or is something else; get it again from who signed it")
    signer = key_fingerprint(key)
    if trusted is not None and signer not in {key_fingerprint(known) for known in trusted}:
        raise ReleaseError(f"{path} is signed by {signer}, whom this place does not trust")
    try:
        return kind.model_validate_json(canonical(envelope.content)), signer
    except ValidationError as error:
        first = error.errors()[0]
        raise ReleaseError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; another version wrote it") from None
