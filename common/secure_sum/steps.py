"""What coordinator and sites tell each other in a secure sum, as JSON in Flower's messages; binary values are hexadecimal.

step       coordinator -> site                                    site -> coordinator
advertise  the key roster                                         SignedKeys: its public keys of this sum
share      everyone's SignedKeys                                  SealedShares: shares of its secrets, one sealed parcel a neighbour
mask       the parcels for this site (and the model)              its masked vector, as arrays {body, tail}
confirm    names of those whose vectors arrived                   Confirmation: its signature on these names
unmask     the signatures                                         Shares: of each one's seed, or of a dropped site's mask key
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError

from common.config_types import Section
from common.errors import MessageError
from common.secure_sum.session import Purpose, Session

MOST_SITES = 10_000

Stage = Literal["advertise", "share", "mask", "confirm", "unmask"]
Site = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[str, Field(pattern=r"^[0-9a-f]{66}$")]
Signature = Annotated[str, Field(pattern=r"^([0-9a-f]{2}){8,128}$")]
Parcel = Annotated[str, Field(pattern=r"^([0-9a-f]{2}){28,200}$")]


class SignedKeys(Section):
    """A site's two public keys of one sum."""

    site: Site
    channel: Key
    mask: Key
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

    def session(self, run: str, round_number: int, settings: str) -> Session:
        return Session(run, round_number, self.purpose, self.identifier, settings)


class SealedShares(Section):
    """A site's secrets in shares, by receiver, and the commitment to its seed."""

    parcels: dict[Site, Parcel]
    commitment: Key


class Confirmation(Section):
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
