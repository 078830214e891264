"""The contents of each party's kit."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pneumofed.common.ops.render import default_policy, render
from pneumofed.common.wire.keys import parse_private_key, private_pem, public_pem, read_private_key
from pneumofed.server.operations.gateway import render_gateway
from pneumofed.server.operations.settings import AuditorAccess, CoordinatorSettings
from pneumofed.server.provisioning.authority import Authority, new_key
from pneumofed.server.provisioning.identities import AuditorToken, SiteIdentity
from pneumofed.server.provisioning.kit import EXECUTABLE_MODE, Kit, KitFile
from pneumofed.server.provisioning.schema import AuditorParty, FederationConfig, SiteParty


def coordinator_kit(
    config: FederationConfig,
    authority: Authority,
    sites: Mapping[str, SiteIdentity],
    tokens: Mapping[str, AuditorToken],
    out: Path,
    key_roster: bytes,
) -> Kit:
    """Builds the coordinator's kit: settings, gateway, server certificate, secrets of its own, the sites' public keys and their
    signed roster.

    Args:
        config: of the federation.
        authority: issues the server certificate.
        sites: every site that is not revoked, by name.
        tokens: every auditor's token that is not revoked, by name.
        out: folder of all kits; a server key and certificate that lie there are kept while they are good.
        key_roster: the signed roster of the sites' keys.
    """
    settings = _settings(config, tokens)
    certificate, key = _server_pair(config, authority, out / "coordinator" / "keys")
    words = {
        "federation": config.name,
        "port": settings.port,
        "page_port": settings.page_port,
        "expires": f"{x509.load_pem_x509_certificate(certificate).not_valid_after_utc:%Y-%m-%d}",
    }
    files = {
        "coordinator.yaml": _text("coordinator/coordinator.yaml", {**words, "settings": _yaml(settings)}),
        "local.example.yaml": _text("coordinator/local.example.yaml", words),
        "nginx.conf": KitFile(render_gateway(settings, {name: public_pem(sites[name].key) for name in sorted(sites)}).encode()),
        "keys/ca.crt": KitFile(authority.pem),
        "keys/server.crt": KitFile(certificate),
        "keys/server.key": KitFile(key),
        "keys/roster.json": KitFile(key_roster),
        "keys/superexec.secret": KitFile(secrets.token_hex(32).encode(), keep=True),
        "start.sh": _text("coordinator/start.sh", words, EXECUTABLE_MODE),
        "pneumofed-coordinator.service": _text("coordinator/pneumofed-coordinator.service", words),
        "compose.yaml": _text("coordinator/compose.yaml", words),
        ".dockerignore": _text("dockerignore", words),
        "README.md": _text("coordinator/README.md", words),
    }
    files |= {f"sites/{name}.pub": KitFile(identity.public) for name, identity in sites.items()}
    return Kit("coordinator", files, gone=tuple(f"sites/{site.name}.pub" for site in config.sites if site.revoked))


def site_kit(config: FederationConfig, site: SiteParty, identity: SiteIdentity | None, authority: Authority, out: Path) -> Kit:
    """Builds a hospital's kit; without a private key where the hospital makes its own.

    Args:
        config: of the federation.
        site: the hospital.
        identity: its key; None before it has sent one.
        authority: issues its certificate where mutual TLS is on.
        out: folder of all kits; a certificate that lies there is kept while it is good.
    """
    words = {
        "federation": config.name,
        "site": site,
        "host": config.coordinator.hosts[0],
        "port": config.coordinator.port,
        "contact": config.coordinator.contact,
        "mutual_tls": config.mutual_tls,
        "own_key": identity is None or identity.private is None,
        "fingerprint": identity.fingerprint if identity else "",
    }
    files = {
        "site.yaml": _text("site/site.yaml", words, keep=True),
        "policy.yaml": KitFile(default_policy().encode(), keep=True),
        "connection.yaml": _text("site/connection.yaml", words),
        "keys/ca.crt": KitFile(authority.pem),
        "start.sh": _text("site/start.sh", words, EXECUTABLE_MODE),
        f"pneumofed-{site.name}.service": _text("site/pneumofed-site.service", words),
        "compose.yaml": _text("site/compose.yaml", words),
        ".dockerignore": _text("dockerignore", words),
        "README.md": _text("site/README.md", words),
    }
    if identity is None:
        return Kit(site.name, files, gone=("keys/client.crt", "keys/node.pub"))
    files["keys/node.pub"] = KitFile(identity.public)
    files |= _secrets_of(config, site, identity, authority, out)
    return Kit(site.name, files, gone=_outdated(identity, out / site.name / "keys"))


def auditor_kit(config: FederationConfig, auditor: AuditorParty, token: str, authority: Authority) -> Kit:
    """Builds an auditor's kit: a token for the live page, and the certificate to know the coordinator by.

    Args:
        config: of the federation.
        auditor: who gets it.
        token: the bearer token, which is nowhere else.
        authority: whose certificate the auditor trusts.
    """
    words = {
        "federation": config.name,
        "auditor": auditor,
        "host": config.coordinator.hosts[0],
        "page_port": config.coordinator.page_port,
        "contact": config.coordinator.contact,
    }
    files = {
        "token": KitFile(f"{token}\n".encode()),
        "ca.crt": KitFile(authority.pem),
        "README.md": _text("auditor/README.md", words),
    }
    return Kit(f"auditor-{auditor.name}", files)


def _settings(config: FederationConfig, tokens: Mapping[str, AuditorToken]) -> CoordinatorSettings:
    return CoordinatorSettings(
        federation=config.name,
        hosts=config.coordinator.hosts,
        port=config.coordinator.port,
        page_port=config.coordinator.page_port,
        mutual_tls=config.mutual_tls,
        revoked=sorted(site.name for site in config.sites if site.revoked),
        auditors=[AuditorAccess(name=name, token_sha256=token.sha256) for name, token in sorted(tokens.items())],
        loopback=config.coordinator.loopback,
    )


def _yaml(settings: CoordinatorSettings) -> str:
    """What was set above; the rest belongs into `local.yaml`, which is the coordinator's own."""
    return yaml.safe_dump(settings.model_dump(include=settings.model_fields_set), sort_keys=False).rstrip("\n")


def _server_pair(config: FederationConfig, authority: Authority, keys: Path) -> tuple[bytes, bytes]:
    """(certificate, key) of the coordinator: those in `keys` while they last and name the right hosts, else new ones."""
    key = _read_key(keys / "server.key") or new_key()
    old = keys / "server.crt"
    fresh = authority.issue_server(key.public_key(), config.coordinator.hosts, _expiry(config))
    certificate = old.read_bytes() if old.is_file() and _still_good(old.read_bytes(), fresh, config) else fresh
    return certificate, private_pem(key)


def _secrets_of(
    config: FederationConfig, site: SiteParty, identity: SiteIdentity, authority: Authority, out: Path
) -> dict[str, KitFile]:
    files: dict[str, KitFile] = {}
    keys = out / site.name / "keys"
    if identity.private is not None:
        files["keys/node"] = KitFile(identity.private)
    if config.mutual_tls:
        fresh = authority.issue_client(identity.key, site.name, _expiry(config))
        old = keys / "client.crt"
        files["keys/client.crt"] = KitFile(
            old.read_bytes() if old.is_file() and _still_good(old.read_bytes(), fresh, config) else fresh
        )
        if identity.private is not None:
            files["keys/client.key"] = KitFile(private_pem(parse_private_key(identity.private, site.name)))
    return files


def _outdated(identity: SiteIdentity, keys: Path) -> tuple[str, ...]:
    """The private key that was made here before the hospital sent its own; never the one that fits, were it to lie here."""
    node = keys / "node"
    if identity.private is not None or not node.is_file() or read_private_key(node).public_key() == identity.key:
        return ()
    return ("keys/client.key", "keys/node")


def _still_good(old: bytes, fresh: bytes, config: FederationConfig) -> bool:
    """Whether the certificate `old` says the same as `fresh` would, and lasts longer than `renew_before_days`."""
    try:
        known, wanted = x509.load_pem_x509_certificate(old), x509.load_pem_x509_certificate(fresh)
    except ValueError:
        return False
    last = datetime.now(UTC) + timedelta(days=config.renew_before_days)
    return known.not_valid_after_utc > last and _claims(known) == _claims(wanted)


def _claims(certificate: x509.Certificate) -> tuple[Any, ...]:
    extensions = sorted(certificate.extensions, key=lambda extension: extension.oid.dotted_string)
    return certificate.subject, certificate.issuer, certificate.public_key(), [(e.oid, e.critical, e.value) for e in extensions]


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    if not path.is_file():
        return None
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def _expiry(config: FederationConfig) -> datetime:
    return datetime.now(UTC) + timedelta(days=config.validity_days)


def _text(template: str, words: Mapping[str, Any], mode: int = 0o600, keep: bool = False) -> KitFile:
    return KitFile(render(__package__, template, **words).encode("utf-8"), mode, keep)
