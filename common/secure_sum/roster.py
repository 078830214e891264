"""The key roster: every site's public node key, signed by the federation's certificate authority when it is provisioned.

It comes to the sites through the coordinator, who cannot change it: each site has the authority's certificate from its own kit. So a site
that is added or revoked needs no new kit at the others. An older roster than one that was seen is refused (see `client.secure_sum.memory`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from pydantic import Field, ValidationError

from common.config_types import Section
from common.errors import ConfigError, SecureSumError
from common.secure_sum.steps import Site

DOMAIN = b"pneumofed key roster 1\n"
"""No certificate begins so: what the authority signs here can be taken for nothing else."""
SIGNATURE = ec.ECDSA(hashes.SHA384())


class RosterFile(Section):
    """`roster.json`."""

    federation: str
    serial: Annotated[int, Field(ge=1)]
    """Higher with each change."""
    keys: dict[Site, str]
    """OpenSSH lines."""
    signature: str

    def signed_bytes(self) -> bytes:
        told = {"federation": self.federation, "serial": self.serial, "keys": self.keys}
        return DOMAIN + json.dumps(told, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class KeyRoster:
    """A roster. `text` is the file as it travels."""

    text: str
    serial: int
    keys: Mapping[str, ec.EllipticCurvePublicKey]

    @cached_property
    def sites(self) -> frozenset[str]:
        return frozenset(self.keys)

    def key_of(self, site: str) -> ec.EllipticCurvePublicKey:
        """
        Raises:
            SecureSumError: the site is not in the roster.
        """
        if site not in self.keys:
            raise SecureSumError(
                f"{site} is not in the key roster; run `pneumofed provision` and give the coordinator its new kit"
            )
        return self.keys[site]


def issue_roster(federation: str, keys: Mapping[str, bytes], serial: int, authority: ec.EllipticCurvePrivateKey) -> str:
    """The text of a roster of `keys` (OpenSSH lines by site), signed by `authority`."""
    lines = {site: keys[site].decode("ascii").strip() for site in sorted(keys)}
    roster = RosterFile(federation=federation, serial=serial, keys=lines, signature="")
    signature = base64.b64encode(authority.sign(roster.signed_bytes(), SIGNATURE)).decode("ascii")
    return roster.model_copy(update={"signature": signature}).model_dump_json(indent=1) + "\n"


def read_roster(text: str, authority: ec.EllipticCurvePublicKey) -> KeyRoster:
    """The roster in `text`.

    Raises:
        SecureSumError: it is malformed, or `authority` did not sign it.
    """
    try:
        file = RosterFile.model_validate_json(text)
        authority.verify(base64.b64decode(file.signature, validate=True), file.signed_bytes(), SIGNATURE)
    except (ValidationError, InvalidSignature, ValueError):
        raise SecureSumError("the key roster is not one that the federation's certificate authority signed") from None
    return parse_roster(text)


def parse_roster(text: str) -> KeyRoster:
    """The roster in `text`, whoever signed it.

    Raises:
        SecureSumError: it is malformed.
    """
    try:
        file = RosterFile.model_validate_json(text)
        keys = {site: load_ssh_public_key(line.encode("ascii")) for site, line in file.keys.items()}
    except (ValidationError, ValueError):
        raise SecureSumError("the key roster is malformed") from None
    return KeyRoster(text, file.serial, {site: key for site, key in keys.items() if isinstance(key, ec.EllipticCurvePublicKey)})


def authority_key(path: Path) -> ec.EllipticCurvePublicKey:
    """The public key of the certificate authority whose certificate (PEM) lies at `path`.

    Raises:
        ConfigError: it cannot be read, or its key is of another kind.
    """
    try:
        key = x509.load_pem_x509_certificate(path.read_bytes()).public_key()
    except (OSError, ValueError):
        raise ConfigError(f"the certificate authority {path} cannot be read; take keys/ca.crt from the kit") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path}: expected a certificate with a P-384 key")
    return key
