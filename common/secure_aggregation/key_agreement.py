"""Keys for one sum: made anew, signed by the sites' node keys, agreed on in pairs.

Each site has two X25519 pairs (RFC 7748) a sum, as in Bonawitz et al. 2017, figure 4: `channel` for what sites send each other through
the coordinator, `mask` for the masks. The node key (P-384, from provisioning) signs the public halves together with the session, so that a
coordinator that puts its own keys in their place, or keys of another sum, is noticed by each site that checks against the key roster.

The key roster: every site's public node key, signed by the federation's certificate authority when it is provisioned.

It comes to the sites through the coordinator, who cannot change it: each site has the authority's certificate from its own kit. So a site
that is added or revoked needs no new kit at the others. An older roster than one that was seen is refused (see
`client.secure_aggregation.memory`).
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from pydantic import Field, ValidationError

from pneumofed.common.config.experiment import Section
from pneumofed.common.errors import ConfigError, SecureSumError
from pneumofed.common.secure_aggregation.protocol import SignedKeys, Site, SumSession

NONCE_BYTES = 12
SIGNATURE = ec.ECDSA(hashes.SHA384())


@dataclass(frozen=True)
class KeyPair:
    """An X25519 pair as raw bytes, 32 each."""

    private: bytes
    public: bytes

    @classmethod
    def generate(cls) -> KeyPair:
        return cls.of(X25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def of(cls, private: bytes) -> KeyPair:
        return cls(private, X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw())


def sign_keys(session: SumSession, site: str, channel: bytes, mask: bytes, node_key: ec.EllipticCurvePrivateKey) -> SignedKeys:
    """The site's public keys of this sum under its node key."""
    signature = node_key.sign(session.bind("keys", site, channel, mask), SIGNATURE)
    return SignedKeys(site=site, channel=channel.hex(), mask=mask.hex(), signature=signature.hex())


def check_advertised_keys(session: SumSession, keys: SignedKeys, node_key: ec.EllipticCurvePublicKey) -> None:
    """
    Raises:
        SecureSumError: `node_key` did not sign these keys for this site and session.
    """
    told = session.bind("keys", keys.site, bytes.fromhex(keys.channel), bytes.fromhex(keys.mask))
    _check_signature(node_key, keys.signature, told, f"the keys of {keys.site} are not those that it signed for this sum")


def digest_keys(session: SumSession, keys: Collection[SignedKeys]) -> bytes:
    """SHA-256 over all sites' public keys of the sum, in any order; holds what no single party chose."""
    digest = hashes.Hash(hashes.SHA256())
    parts = [part for signed in sorted(keys, key=lambda keys: keys.site) for part in (signed.site, signed.channel, signed.mask)]
    digest.update(session.bind("all keys", *parts))
    return digest.finalize()


def sign_survivors(session: SumSession, all_keys: bytes, survivors: Collection[str], node_key: ec.EllipticCurvePrivateKey) -> str:
    """A site's word that it saw these and no other sites as those whose vectors are summed, in hexadecimal."""
    return node_key.sign(session.bind("survivors", all_keys, *sorted(survivors)), SIGNATURE).hex()


def survivors_confirmed(
    session: SumSession, all_keys: bytes, survivors: Collection[str], signature: str, node_key: ec.EllipticCurvePublicKey
) -> bool:
    """Whether `signature` is `sign_survivors` of the holder of `node_key`."""
    try:
        _check_signature(node_key, signature, session.bind("survivors", all_keys, *sorted(survivors)), "")
    except SecureSumError:
        return False
    return True


def agree(private: bytes, public: bytes) -> bytes:
    """The 32 bytes that two sites share; never a key itself, see `Session.derive`.

    Raises:
        SecureSumError: the public key gives the same secret to everyone (RFC 7748, section 6.1).
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SecureSumError("a site's public key is no key") from None


def pair_mask(session: SumSession, private: bytes, own: SignedKeys, other: SignedKeys, model: str) -> tuple[bytes, bool]:
    """(key of the mask that `own` has with `other`, whether `own` subtracts it): the one adds what the other subtracts.

    The lesser name adds. `private` is that of `own.mask`, `model` the hash of the weights that the vector is about: masks of two sites
    that were given different weights do not cancel, so that nobody learns one update by making those of the others known (Pasquini et al.
    2022, "Eluding secure aggregation in federated learning via model inconsistency", section 6).
    """
    first, second = sorted((own, other), key=lambda keys: keys.site)
    names = (first.site, second.site, bytes.fromhex(first.mask), bytes.fromhex(second.mask))
    secret = agree(private, bytes.fromhex(other.mask))
    return session.derive(secret, "pair mask", *names, model), own.site == second.site


def own_mask(session: SumSession, seed: bytes, site: str) -> bytes:
    """Key of the site's own mask, which hides its vector even where it dropped too late and its pair masks were taken away."""
    return session.derive(seed, "own mask", site)


def commit(session: SumSession, seed: bytes, site: str) -> str:
    """Binds the site to its seed and says nothing of it, since the seed is 32 random bytes."""
    return session.derive(seed, "commitment", site).hex()


def encrypt_for(session: SumSession, private: bytes, sender: SignedKeys, receiver: SignedKeys, content: bytes) -> bytes:
    """`content` for `receiver` alone, under ChaCha20-Poly1305 (RFC 8439); `private` is that of `sender.channel`."""
    key, told = _channel(session, private, receiver.channel, sender, receiver)
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, told)


def unseal(session: SumSession, private: bytes, sender: SignedKeys, receiver: SignedKeys, sealed: bytes) -> bytes:
    """The inverse of `seal`; `private` is that of `receiver.channel`.

    Raises:
        SecureSumError: it was changed on the way, or is of another sender, receiver or session.
    """
    key, told = _channel(session, private, sender.channel, sender, receiver)
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], told)
    except (InvalidTag, ValueError):
        raise SecureSumError(f"what {sender.site} sent to {receiver.site} was changed on the way") from None


def _channel(session: SumSession, private: bytes, public: str, sender: SignedKeys, receiver: SignedKeys) -> tuple[bytes, bytes]:
    """(key of this direction, associated data)"""
    names = (sender.site, receiver.site, bytes.fromhex(sender.channel), bytes.fromhex(receiver.channel))
    key = session.derive(agree(private, bytes.fromhex(public)), "channel", *names)
    return key, session.bind("shares", *names)


def _check_signature(key: ec.EllipticCurvePublicKey, signature: str, told: bytes, complaint: str) -> None:
    try:
        key.verify(bytes.fromhex(signature), told, SIGNATURE)
    except InvalidSignature:
        raise SecureSumError(complaint) from None


DOMAIN = b"pneumofed key roster 1\n"
"""No certificate begins so: what the authority signs here can be taken for nothing else."""


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
class KeyDirectory:
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


def read_roster(text: str, authority: ec.EllipticCurvePublicKey) -> KeyDirectory:
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


def parse_roster(text: str) -> KeyDirectory:
    """The roster in `text`, whoever signed it.

    Raises:
        SecureSumError: it is malformed.
    """
    try:
        file = RosterFile.model_validate_json(text)
        keys = {site: load_ssh_public_key(line.encode("ascii")) for site, line in file.keys.items()}
    except (ValidationError, ValueError):
        raise SecureSumError("the key roster is malformed") from None
    return KeyDirectory(
        text, file.serial, {site: key for site, key in keys.items() if isinstance(key, ec.EllipticCurvePublicKey)}
    )


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
