"""Messages of a secure sum between coordinator and sites, as JSON in Flower's messages; binary values are hexadecimal.

step       coordinator -> site                                    site -> coordinator
advertise  the key roster                                         SignedKeys: its public keys of this sum
share      everyone's SignedKeys                                  SealedShares: shares of its secrets, one sealed parcel a neighbour
mask       the parcels for this site (and the model)              its masked vector, as arrays {body, tail}
confirm    names of those whose vectors arrived                   Confirmation: its signature on these names
unmask     the signatures                                         Shares: of each one's seed, or of a dropped site's mask key

`SumSession` says which sum a key, a mask or a signature belongs to: none of one sum is of any use in another. `Step` is what the
coordinator asks for; it travels in `common.wire.messages.Instruction`. `pack_reply` and `pack_masked` put a site's replies into records.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from pydantic import Field, ValidationError

from pneumofed.common.audit.log import hash_arrays
from pneumofed.common.config.experiment import Section
from pneumofed.common.errors import MessageError
from pneumofed.common.model_bundle.suitability import Suitability
from pneumofed.common.secure_aggregation.masking import SumShape, SumVector
from pneumofed.common.wire.fields import array_values, bounded_text, pack_values
from pneumofed.common.wire.messages import ModelArrays, Presence, pack_presence

Purpose = Literal["train", "evaluate", "score"]
"""What the vectors come from: training, the statistics of an evaluation, or the scores in the suitability tests."""
SUM_DOMAIN = b"pneumofed secure sum 1"
KEY_BYTES = 32


@dataclass(frozen=True)
class SumSession:
    """One secure sum of one round.

    Attributes:
        identifier: 32 hexadecimal digits, drawn anew for each: a repeated round is another sum.
        settings: hash of the experiment: sites that were sent different ones, or one that is sent another later, have no sum in common.
    """

    run: str
    round: int
    purpose: Purpose
    identifier: str
    settings: str

    @classmethod
    def begin(cls, run: str, round_number: int, purpose: Purpose, settings: str) -> SumSession:
        """Begins a new sum with an identifier of its own, drawn at random.

        Args:
            run: the run's random name.
            round_number: of the run, from 1.
            purpose: what the vectors come from.
            settings: hash of the experiment.
        """
        return cls(run, round_number, purpose, secrets.token_hex(16), settings)

    def bind(self, label: str, *parts: str | bytes) -> bytes:
        """Makes bytes that differ for any other session, label or parts: each piece is preceded by its length.

        Args:
            label: says what the bytes are for.
            parts: what they are about; text counts as its UTF-8 bytes.
        """
        pieces = [SUM_DOMAIN, self.run, str(self.round), self.purpose, self.identifier, self.settings, label, *parts]
        encoded = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
        return b"".join(len(piece).to_bytes(8, "big") + piece for piece in encoded)

    def derive(self, secret: bytes, label: str, *parts: str | bytes) -> bytes:
        """Derives a key of 32 bytes for this session, label and parts only (HKDF-SHA256, RFC 5869).

        Args:
            secret: uniform or from a key agreement; may serve for several labels.
            label: says what the key is for.
            parts: what it is about.
        """
        return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=self.bind(label, *parts)).derive(secret)


def hash_subject(arrays: ModelArrays, suitability: Suitability | None = None, rate_factor: float = 1.0) -> str:
    """Hashes what the vectors of a sum are about, which masks are bound to: vectors about different things have no sum.

    It holds all of an instruction that changes a vector and that the session does not say. A rate factor of nearly zero, sent to all
    sites but one, would otherwise make the sum that one's update.

    Args:
        arrays: the weights that the sites were sent.
        suitability: the tests that scores are asked of.
        rate_factor: on the learning rate of the round.

    Returns:
        SHA-256 in hexadecimal.
    """
    tests = suitability.model_dump_json() if suitability else ""
    return hashlib.sha256(f"{hash_arrays(arrays)} {rate_factor!r} {tests}".encode()).hexdigest()


MOST_SITES = 10_000

Stage = Literal["advertise", "share", "mask", "confirm", "unmask"]
Site = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[str, Field(pattern=r"^[0-9a-f]{66}$")]
Signature = Annotated[str, Field(pattern=r"^([0-9a-f]{2}){8,128}$")]
Parcel = Annotated[str, Field(pattern=r"^([0-9a-f]{2}){28,200}$")]


class SignedKeys(Section):
    """A site's two public keys of one sum, and what else will be in its vector: loss and accuracy of its training (`metrics`), and
    statistics of the model that it trains on from (`judges`)."""

    site: Site
    channel: Key
    mask: Key
    metrics: bool = True
    judges: bool = False
    signature: Signature


class Step(Section):
    """One step that the coordinator asks for; which fields are set depends on `stage`."""

    stage: Stage
    purpose: Purpose
    identifier: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    roster: str | None = None
    keys: Annotated[list[SignedKeys], Field(max_length=MOST_SITES, default_factory=list)]
    parcels: dict[Site, Parcel] = Field(default_factory=dict)
    """By sender."""
    senders: Annotated[list[Site], Field(max_length=MOST_SITES, default_factory=list)]
    """Who sent parcels, to anyone."""
    survivors: Annotated[list[Site], Field(max_length=MOST_SITES, default_factory=list)]
    signatures: dict[Site, Signature] = Field(default_factory=dict)
    """On the survivors, by signer."""

    def session(self, run: str, round_number: int, settings: str) -> SumSession:
        """Reads the session that the step belongs to, in which a site trusts only its own view of run, round and settings.

        Args:
            run: name of the run, from the message that brought the step.
            round_number: from the same message.
            settings: hash of the experiment as the site received it.
        """
        return SumSession(run, round_number, self.purpose, self.identifier, settings)


class SealedShares(Section):
    """A site's secrets in shares, by receiver, and the commitment to its seed."""

    parcels: dict[Site, Parcel]
    commitment: Key


class Confirmation(Section):
    """A site's signature on the set of sites in the sum, see `sign_survivors`."""

    signature: Signature


class Shares(Section):
    """Shares that one site holds: of the seeds of those in the sum, of the mask keys of those who dropped out. Never both of one."""

    seeds: dict[Site, Share]
    keys: dict[Site, Share]


def read_step(text: str) -> Step:
    """The coordinator's step.

    Raises:
        MessageError: it is malformed.
    """
    try:
        return Step.model_validate_json(text)
    except ValidationError:
        raise MessageError("a step of a secure sum is malformed; install the same version on both sides") from None


REPLY_RECORD, MASKED_RECORD = "secure", "masked"
"""Names of the records in which a reply and a masked vector travel."""
BODY_ARRAY, TAIL_ARRAY = "body", "tail"

Reply = TypeVar("Reply", SignedKeys, SealedShares, Confirmation, Shares)


def pack_reply(presence: Presence, reply: Section) -> RecordDict:
    """Packs a site's answer to a step.

    Args:
        presence: who answers.
        reply: one of `SignedKeys`, `SealedShares`, `Confirmation` and `Shares`.
    """
    content = pack_presence(presence)
    content[REPLY_RECORD] = ConfigRecord({"reply": reply.model_dump_json()})
    return content


def unpack_reply(content: RecordDict, kind: type[Reply]) -> Reply:
    """Reads a site's answer to a step.

    Args:
        content: of the site's message, not trusted.
        kind: class of the reply that the step asks for.

    Raises:
        MessageError: it is missing or malformed.
    """
    try:
        return kind.model_validate_json(bounded_text(content.config_records[REPLY_RECORD]["reply"], "reply"))
    except (KeyError, ValidationError):
        raise MessageError(f"expected a reply with {kind.__name__}, got something else") from None


def pack_masked(presence: Presence, vector: SumVector) -> RecordDict:
    """Packs a site's masked vector.

    Args:
        presence: who answers.
        vector: with all masks added.
    """
    content = pack_presence(presence)
    content[MASKED_RECORD] = ArrayRecord({BODY_ARRAY: pack_values(vector.body), TAIL_ARRAY: pack_values(vector.tail)})
    return content


def unpack_masked(content: RecordDict, shape: SumShape) -> SumVector:
    """Reads a site's masked vector, where it lies in the message: it can be added, and not written to.

    Args:
        content: of the site's message, not trusted.
        shape: as all parties agreed.

    Raises:
        MessageError: it is missing, or of another shape or number type.
    """
    record = content.array_records.get(MASKED_RECORD)
    if record is None or set(record) != {BODY_ARRAY, TAIL_ARRAY}:
        raise MessageError("the reply holds no masked vector")
    vector = SumVector(array_values(record[BODY_ARRAY], BODY_ARRAY), array_values(record[TAIL_ARRAY], TAIL_ARRAY))
    for words, wanted in ((vector.body, shape.zeros().body), (vector.tail, shape.zeros().tail)):
        if words.dtype != wanted.dtype or words.shape != wanted.shape:
            raise MessageError(f"masked vector: expected {wanted.dtype} {list(wanted.shape)}, got {words.dtype}")
    return vector
