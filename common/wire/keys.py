"""Node keys and certificates: reading, writing, signing.

A node key is an ECDSA key on P-384 (RFC 5656) in OpenSSH's format, which Flower asks for.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pneumofed.common.errors import ConfigError
from pneumofed.common.files import atomic_write

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
SIGNATURE_ALGORITHM = ec.ECDSA(hashes.SHA384())
"""Of all signatures by node keys (FIPS 186-5, section 6.4)."""


@dataclass(frozen=True)
class NodeKey:
    """A site's key pair as file contents."""

    private: bytes
    public: bytes

    @classmethod
    def generate(cls, name: str) -> NodeKey:
        """Generates a new pair; `name` becomes the comment of the public part."""
        key = ec.generate_private_key(ec.SECP384R1())
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
        return cls(private, format_public_key(key.public_key(), name))


def write_node_key(folder: Path, name: str) -> Path:
    """Writes a new key pair as `node` (mode 0600) and `node.pub`.

    Args:
        folder: made if missing.
        name: the site's; becomes the comment of the public part.

    Returns:
        The path of the public part, which may travel.

    Raises:
        ConfigError: there is a key already; it is never overwritten.
    """
    private, public = folder / "node", folder / "node.pub"
    if private.exists():
        raise ConfigError(f"{private} exists; a new key would cut the site off, so move the old one away first")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = NodeKey.generate(name)
    for path, content in ((private, key.private), (public, key.public)):
        with atomic_write(path) as file:
            file.write(content)
    return public


def format_public_key(key: ec.EllipticCurvePublicKey, name: str) -> bytes:
    """Formats a public key as a line of OpenSSH.

    Args:
        key: on P-384.
        name: the line's comment; ASCII.
    """
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return line + b" " + name.encode("ascii") + b"\n"


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Reads the public node key in `path`.

    Raises:
        ConfigError: the file is missing, or holds something else than a P-384 public key in OpenSSH's format.
    """
    content = _read(path, "public key")
    if b"PRIVATE KEY" in content:
        raise ConfigError(f"{path} holds a PRIVATE key, which must not leave its site: make a new pair there and send node.pub")
    return parse_public_key(content, str(path))


def parse_public_key(content: bytes, source: str) -> ec.EllipticCurvePublicKey:
    """Parses a public node key.

    Args:
        content: a line in OpenSSH's format.
        source: where it came from; the error begins with it.

    Raises:
        ConfigError: it is no P-384 public key in OpenSSH's format.
    """
    expected = f"{source}: expected a P-384 key in OpenSSH's format (a line that starts with ecdsa-sha2-nistp384)"
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm, NotImplementedError):  # the last: a point in compressed form
        raise ConfigError(f"{expected}, got something else") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise ConfigError(f"{expected}, got a key of another kind")
    return key


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Reads the private node key in `path`.

    Raises:
        ConfigError: the file is missing or is no P-384 private key in OpenSSH's format.
    """
    return parse_private_key(_read(path, "private key"), str(path))


def parse_private_key(content: bytes, source: str) -> ec.EllipticCurvePrivateKey:
    """Parses a private node key.

    Args:
        content: PEM in OpenSSH's format, without a password.
        source: where it came from; the error begins with it.

    Raises:
        ConfigError: it is no P-384 private key in OpenSSH's format, or has a password.
    """
    try:
        key = serialization.load_ssh_private_key(content, None)
    except (ValueError, UnsupportedAlgorithm, TypeError):  # TypeError: it has a password
        raise ConfigError(f"{source}: expected a P-384 private key in OpenSSH's format without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise ConfigError(f"{source}: expected a P-384 private key, got one of another kind")
    return key


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Computes what two people compare on the telephone: `SHA256:...`, as `ssh-keygen -lf node.pub` shows it."""
    blob = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).split(b" ")[1]
    digest = hashlib.sha256(base64.b64decode(blob)).digest()
    return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")


def sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """Signs `content` by ECDSA with SHA-384 (FIPS 186-5, section 6.4).

    Args:
        key: on P-384.
        content: what is signed. It should begin with what it is for, so that a signature cannot be used for something else.

    Returns:
        The signature in DER, another one at each call.
    """
    return key.sign(content, SIGNATURE_ALGORITHM)


def is_signed(key: ec.EllipticCurvePublicKey, content: bytes, signature: bytes) -> bool:
    """Verifies an ECDSA signature with SHA-384.

    Args:
        key: the signer's public key.
        content: what was signed, byte for byte.
        signature: in DER, as `sign` gives it; anything else counts as wrong.

    Returns:
        Whether the private half of `key` gave `signature` for `content`.
    """
    try:
        key.verify(signature, content, SIGNATURE_ALGORITHM)
    except InvalidSignature:
        return False
    return True


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """Writes the key as PEM, the form in which Flower's SuperLink stores it."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Writes the key as PEM (PKCS #8), the form that TLS libraries read."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def certificate_validity(path: Path) -> tuple[datetime, datetime]:
    """Reads (not before, not after) of the first certificate in the PEM file `path`, with time zone.

    Raises:
        ConfigError: the file is missing or holds no certificate.
    """
    certificate = parse_certificate(_read(path, "certificate"), str(path))
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def parse_certificate(content: bytes, source: str) -> x509.Certificate:
    """Parses a certificate.

    Args:
        content: PEM; the first one counts.
        source: where it came from; the error begins with it.

    Raises:
        ConfigError: it is no certificate.
    """
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError:
        raise ConfigError(f"{source}: expected a certificate in PEM, got something else") from None


def parse_tls_key(content: bytes, source: str) -> PrivateKey:
    """Parses a private key as TLS libraries read it, see `private_pem`.

    Args:
        content: PEM (PKCS #8), without a password.
        source: where it came from; the error begins with it.

    Raises:
        ConfigError: it is no such key, or has a password.
    """
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, UnsupportedAlgorithm, TypeError):  # TypeError: it has a password
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{source}: expected a private key on P-384 in PEM without a password")
    return key


def _read(path: Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the {kind} {path} cannot be read: {error.strerror}") from error
