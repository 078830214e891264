"""What the parties of a federation trust and what they are handed: its own certificate authority, and start-up kits on disk.

Certificates follow RFC 5280; all keys are ECDSA on P-384. The CA's private key never leaves `ca/` of the output folder. A kit is a folder,
and the same as one archive; files that are right already are not touched.
"""

from __future__ import annotations

import gzip
import io
import ipaddress
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pneumofed.common.errors import ConfigError
from pneumofed.common.files import atomic_write
from pneumofed.common.wire.keys import private_pem

PRIVATE_MODE, EXECUTABLE_MODE = 0o600, 0o700

CLOCK_SKEW = timedelta(hours=1)
"""Certificates begin this much earlier, for sites whose clocks are late."""
LOOPBACK_HOSTS = ("localhost", "127.0.0.1")
"""Also in the server certificate: the coordinator's own processes reach the SuperLink there."""


@dataclass(frozen=True)
class KitFile:
    """One file of a kit. With `keep`, one that its owner has changed stays as it is."""

    content: bytes
    mode: int = PRIVATE_MODE
    keep: bool = False


@dataclass(frozen=True)
class Kit:
    """What one party gets. `gone` names files of earlier kits that must not stay."""

    name: str
    files: Mapping[str, KitFile]
    gone: tuple[str, ...] = field(default=())


def write_kit(out: Path, kit: Kit) -> bool:
    """Writes the kit into `out/NAME/` and `out/NAME.tar.gz`, and returns whether anything changed.

    Args:
        out: folder of all kits.
        kit: what one party gets.
    """
    folder = out / kit.name
    changed = [_write(folder / name, file) for name, file in sorted(kit.files.items())]
    changed += [_remove(folder / name) for name in kit.gone]
    archive = KitFile(_archive(folder, kit))
    return _write(out / f"{kit.name}.tar.gz", archive) or any(changed)


def write_private(path: Path, content: bytes) -> bool:
    """Writes a file with mode 0600 unless it is there already, and returns whether it was not.

    Args:
        path: its folder is made with mode 0700 where it is missing.
        content: what it must hold.
    """
    return _write(path, KitFile(content))


def _write(path: Path, file: KitFile) -> bool:
    if path.is_file() and (file.keep or path.read_bytes() == file.content):
        path.chmod(file.mode)
        return False
    _make_private_folder(path.parent)
    with atomic_write(path) as output:
        os.fchmod(output.fileno(), file.mode)
        output.write(file.content)
    return True


def _make_private_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_private_folder(folder.parent)
        folder.mkdir(mode=0o700)


def _remove(path: Path) -> bool:
    there = path.is_file()
    path.unlink(missing_ok=True)
    return there


def _archive(folder: Path, kit: Kit) -> bytes:
    """The kit as `.tar.gz`, without time or user, so that the same kit gives the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, file in sorted(kit.files.items()):
            content = (folder / name).read_bytes()
            entry = tarfile.TarInfo(f"{kit.name}/{name}")
            entry.size, entry.mode = len(content), file.mode
            tar.addfile(entry, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)


@dataclass(frozen=True)
class Authority:
    """The CA of one federation."""

    federation: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue_server(self, key: ec.EllipticCurvePublicKey, hosts: Sequence[str], expires: datetime) -> bytes:
        """Issues the coordinator's certificate for `hosts` and the loopback interface, PEM.

        Args:
            key: the coordinator's public key.
            hosts: DNS names and IP addresses under which sites reach it; at least one, the first is the common name.
            expires: in UTC; no later than the authority itself.
        """
        names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys([*hosts, *LOOPBACK_HOSTS])])
        builder = self._builder(hosts[0], key, expires).add_extension(names, critical=False)
        return self._sign(builder, ExtendedKeyUsageOID.SERVER_AUTH)

    def issue_client(self, key: ec.EllipticCurvePublicKey, name: str, expires: datetime) -> bytes:
        """Issues a site's certificate for mutual TLS, PEM. Only its public key is needed.

        Args:
            key: the site's public key.
            name: of the site.
            expires: in UTC; no later than the authority itself.
        """
        return self._sign(self._builder(name, key, expires), ExtendedKeyUsageOID.CLIENT_AUTH)

    def _builder(self, name: str, key: ec.EllipticCurvePublicKey, expires: datetime) -> x509.CertificateBuilder:
        return _start(_subject(self.federation, name), self.certificate.subject, key, min(expires, self._expires))

    def _sign(self, builder: x509.CertificateBuilder, usage: x509.ObjectIdentifier) -> bytes:
        issuer = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        )
        return builder.sign(self.key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)

    @property
    def _expires(self) -> datetime:
        return self.certificate.not_valid_after_utc


def open_authority(folder: Path, federation: str, expires: datetime) -> Authority:
    """Opens the CA in `folder`, or makes a new one.

    Args:
        folder: holds `ca.crt` and `ca.key`, or nothing yet.
        federation: whose CA it must be.
        expires: when a new one ends, in UTC.

    Raises:
        ConfigError: `folder` holds the CA of another federation, an incomplete one, or one that has expired.
    """
    certificate, key = folder / "ca.crt", folder / "ca.key"
    if not certificate.exists() and not key.exists():
        return _make_authority(folder, federation, expires)
    authority = _read_authority(certificate, key)
    if authority.federation != federation:
        raise ConfigError(
            f"{folder} holds the certificate authority of the federation '{authority.federation}', not of '{federation}'; "
            "give another --out, it would be lost here and with it the trust of all its sites"
        )
    if authority.certificate.not_valid_after_utc <= datetime.now(UTC):
        raise ConfigError(f"the certificate authority in {folder} has expired; move the folder away and give out new kits")
    return authority


def new_key() -> ec.EllipticCurvePrivateKey:
    """Makes a new private key, ECDSA on P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def _make_authority(folder: Path, federation: str, expires: datetime) -> Authority:
    key = new_key()
    name = _subject(federation, f"{federation} CA")
    certificate = (
        _start(name, name, key.public_key(), expires)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    authority = Authority(federation, certificate, key)
    write_private(folder / "ca.key", private_pem(key))
    write_private(folder / "ca.crt", authority.pem)
    return authority


def _read_authority(certificate: Path, key: Path) -> Authority:
    try:
        read = x509.load_pem_x509_certificate(certificate.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the certificate authority in {certificate.parent} cannot be read: {error}") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.public_key() != read.public_key():
        raise ConfigError(f"{key} is not the key of {certificate}; put the right pair back from your backup")
    names = read.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return Authority(str(names[0].value) if names else "", read, private)


def _start(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, expires: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(datetime.now(UTC), expires) - CLOCK_SKEW)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _subject(federation: str, name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation), x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]
    )


def _key_usage(**used: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    more = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: used.get(name, False) for name in (*names, *more)})


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
