"""Keys of a secure sum: made anew for each sum, signed by the sites' node keys, agreed on in pairs; and the roster of node keys.

Each site has two X25519 pairs (RFC 7748) a sum, as in Bonawitz et al. 2017, figure 4: `channel` for what sites send each other through
the coordinator, `mask` for the masks. The node key (P-384, from provisioning) signs the public halves together with the session, so that a
coordinator that puts its own keys in their place, or keys of another sum, is noticed by each site that checks against the key roster.

The key roster (`KeyDirectory`) is every site's public node key, signed by the federation's certificate authority when it is provisioned.
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
SIGNATURE_SCHEME = ec.ECDSA(hashes.SHA384())


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


def sign_keys(
    session: SumSession,
    site: str,
    channel: bytes,
    mask: bytes,
    node_key: ec.EllipticCurvePrivateKey,
    *,
    metrics: bool = True,
    judges: bool = False,
) -> SignedKeys:
    """Signs a site's public keys of one sum with its node key.

    Args:
        session: of the sum.
        site: name of the site.
        channel: X25519 public key for parcels, 32 bytes.
        mask: X25519 public key for masks, 32 bytes.
        node_key: P-384 private key of the site.
        metrics: whether the site's vector will hold loss and accuracy of its training; else none may.
        judges: whether it will hold statistics of the model that the site trains on from; else none may.
    """
    signature = node_key.sign(_signed_keys(session, site, channel, mask, metrics, judges), SIGNATURE_SCHEME)
    public = {"channel": channel.hex(), "mask": mask.hex()}
    return SignedKeys(site=site, **public, metrics=metrics, judges=judges, signature=signature.hex())


def check_advertised_keys(session: SumSession, keys: SignedKeys, node_key: ec.EllipticCurvePublicKey) -> None:
    """Checks that a site signed its keys for this sum.

    Args:
        session: of the sum.
        keys: as the coordinator passed them on.
        node_key: the site's public key from the roster.

    Raises:
        SecureSumError: `node_key` did not sign these keys for this site and session.
    """
    signed = _signed_keys(session, keys.site, bytes.fromhex(keys.channel), bytes.fromhex(keys.mask), keys.metrics, keys.judges)
    _check_signature(node_key, keys.signature, signed, f"the keys of {keys.site} are not those that it signed for this sum")


def _signed_keys(session: SumSession, site: str, channel: bytes, mask: bytes, metrics: bool, judges: bool) -> bytes:
    said = ("metrics" if metrics else "no metrics", "judges" if judges else "judges nothing")
    return session.bind("keys", site, channel, mask, *said)


def digest_keys(session: SumSession, keys: Collection[SignedKeys]) -> bytes:
    """Computes the SHA-256 over all sites' public keys of the sum; holds what no single party chose.

    Args:
        session: of the sum.
        keys: of all sites, in any order.

    Returns:
        32 bytes.
    """
    digest = hashes.Hash(hashes.SHA256())
    ordered = sorted(keys, key=lambda keys: keys.site)
    parts = [
        part for signed in ordered for part in (signed.site, signed.channel, signed.mask, str(signed.metrics), str(signed.judges))
    ]
    digest.update(session.bind("all keys", *parts))
    return digest.finalize()


def sign_survivors(session: SumSession, all_keys: bytes, survivors: Collection[str], node_key: ec.EllipticCurvePrivateKey) -> str:
    """Signs a site's statement that it saw these and no other sites as those whose vectors are summed.

    Args:
        session: of the sum.
        all_keys: `digest_keys` of the sum.
        survivors: names of the sites in the sum, in any order.
        node_key: P-384 private key of the signing site.

    Returns:
        The signature in hexadecimal.
    """
    return node_key.sign(session.bind("survivors", all_keys, *sorted(survivors)), SIGNATURE_SCHEME).hex()


def survivors_confirmed(
    session: SumSession, all_keys: bytes, survivors: Collection[str], signature: str, node_key: ec.EllipticCurvePublicKey
) -> bool:
    """Checks whether `signature` is `sign_survivors` of the holder of `node_key`.

    Args:
        session: of the sum.
        all_keys: `digest_keys` of the sum.
        survivors: as the checking site saw them.
        signature: in hexadecimal.
        node_key: the signer's public key from the roster.
    """
    try:
        _check_signature(node_key, signature, session.bind("survivors", all_keys, *sorted(survivors)), "")
    except SecureSumError:
        return False
    return True


def agree(private: bytes, public: bytes) -> bytes:
    """Computes the 32 bytes that two sites share; never a key itself, see `SumSession.derive`.

    Args:
        private: own X25519 private key, 32 bytes.
        public: the other site's X25519 public key, 32 bytes.

    Raises:
        SecureSumError: the public key gives the same secret to everyone (RFC 7748, section 6.1).
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SecureSumError("a site's public key is no key") from None


def pair_mask(session: SumSession, private: bytes, own: SignedKeys, other: SignedKeys, model: str) -> tuple[bytes, bool]:
    """Derives the mask of a pair of sites: the lesser name adds what the other subtracts.

    Masks of two sites that were given different weights do not cancel, so that nobody learns one update by making those of the
    others known (Pasquini et al. 2022, "Eluding secure aggregation in federated learning via model inconsistency", section 6).

    Args:
        session: of the sum.
        private: private half of `own.mask`, 32 bytes.
        own: this site's keys.
        other: the other site's keys, checked.
        model: hash of the weights that the vector is about.

    Returns:
        (key of the mask, whether `own` subtracts it).
    """
    first, second = sorted((own, other), key=lambda keys: keys.site)
    names = (first.site, second.site, bytes.fromhex(first.mask), bytes.fromhex(second.mask))
    secret = agree(private, bytes.fromhex(other.mask))
    return session.derive(secret, "pair mask", *names, model), own.site == second.site


def own_mask(session: SumSession, seed: bytes, site: str) -> bytes:
    """Derives the key of the site's own mask, which hides its vector even where it dropped too late and its pair masks were taken
    away.

    Args:
        session: of the sum.
        seed: the site's secret of this sum, 32 random bytes.
        site: name of the site.
    """
    return session.derive(seed, "own mask", site)


def commit(session: SumSession, seed: bytes, site: str) -> str:
    """Computes a commitment that binds the site to its seed and says nothing of it, since the seed is 32 random bytes.

    Args:
        session: of the sum.
        seed: the site's secret of this sum.
        site: name of the site.

    Returns:
        32 bytes in hexadecimal.
    """
    return session.derive(seed, "commitment", site).hex()


def encrypt_for(session: SumSession, private: bytes, sender: SignedKeys, receiver: SignedKeys, content: bytes) -> bytes:
    """Encrypts `content` for `receiver` only, under ChaCha20-Poly1305 (RFC 8439).

    Args:
        session: of the sum.
        private: private half of `sender.channel`, 32 bytes.
        sender: this site's keys.
        receiver: the other site's keys, checked.
        content: of any length.

    Returns:
        Nonce, ciphertext and tag.
    """
    key, associated = _channel(session, private, receiver.channel, sender, receiver)
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, associated)


def unseal(session: SumSession, private: bytes, sender: SignedKeys, receiver: SignedKeys, sealed: bytes) -> bytes:
    """Decrypts what `encrypt_for` encrypted.

    Args:
        session: of the sum.
        private: private half of `receiver.channel`, 32 bytes.
        sender: the other site's keys, checked.
        receiver: this site's keys.
        sealed: nonce, ciphertext and tag.

    Raises:
        SecureSumError: it was changed on the way, or is of another sender, receiver or session.
    """
    key, associated = _channel(session, private, sender.channel, sender, receiver)
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], associated)
    except (InvalidTag, ValueError):
        raise SecureSumError(f"what {sender.site} sent to {receiver.site} was changed on the way") from None


def _channel(session: SumSession, private: bytes, public: str, sender: SignedKeys, receiver: SignedKeys) -> tuple[bytes, bytes]:
    """(key of this direction, associated data)"""
    names = (sender.site, receiver.site, bytes.fromhex(sender.channel), bytes.fromhex(receiver.channel))
    key = session.derive(agree(private, bytes.fromhex(public)), "channel", *names)
    return key, session.bind("shares", *names)


def _check_signature(key: ec.EllipticCurvePublicKey, signature: str, signed: bytes, complaint: str) -> None:
    try:
        key.verify(bytes.fromhex(signature), signed, SIGNATURE_SCHEME)
    except InvalidSignature:
        raise SecureSumError(complaint) from None


ROSTER_DOMAIN = b"pneumofed key roster 1\n"
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
        values = {"federation": self.federation, "serial": self.serial, "keys": self.keys}
        return ROSTER_DOMAIN + json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


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
    """Writes the text of a key roster, signed by the certificate authority.

    Args:
        federation: its name.
        keys: public node keys by site, as OpenSSH lines.
        serial: at least 1, and higher than that of every roster before.
        authority: private key of the federation's certificate authority.
    """
    lines = {site: keys[site].decode("ascii").strip() for site in sorted(keys)}
    roster = RosterFile(federation=federation, serial=serial, keys=lines, signature="")
    signature = base64.b64encode(authority.sign(roster.signed_bytes(), SIGNATURE_SCHEME)).decode("ascii")
    return roster.model_copy(update={"signature": signature}).model_dump_json(indent=1) + "\n"


def read_roster(text: str, authority: ec.EllipticCurvePublicKey) -> KeyDirectory:
    """Reads a roster and checks its signature.

    Args:
        text: the file as it travelled, not trusted.
        authority: public key of the certificate authority, from the site's own kit.

    Raises:
        SecureSumError: it is malformed, or `authority` did not sign it.
    """
    try:
        file = RosterFile.model_validate_json(text)
        authority.verify(base64.b64decode(file.signature, validate=True), file.signed_bytes(), SIGNATURE_SCHEME)
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
