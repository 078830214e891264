"""From a federation file to start-up kits, the contents of each party's kit; again and again, without touching the parties that did not
change.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pneumofed.common.config.reader import format_yaml
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import write_file
from pneumofed.common.ops.render import default_policy, render
from pneumofed.common.wire.keys import parse_private_key, private_pem, public_pem, read_private_key
from pneumofed.server.operations.gateway import render_gateway
from pneumofed.server.operations.settings import AuditorAccess, CoordinatorSettings
from pneumofed.server.provisioning.authority import EXECUTABLE_MODE, Authority, Kit, KitFile, new_key, open_authority, write_kit
from pneumofed.server.provisioning.identities import (
    AuditorParty,
    AuditorToken,
    FederationConfig,
    Identities,
    SiteIdentity,
    SiteParty,
)
from pneumofed.server.provisioning.software import LOCK_FILE, SITE_CHECK, page_check, tested_versions, write_containerfile

Outcome = Literal["written", "unchanged", "handed over", "revoked"]
NO_KEY = "no key yet; admit the one that the hospital sends: pneumofed provision ... --admit {0}={0}.pub"
HOLDS_KEY = "; the kit holds the site's PRIVATE key: whoever reads it can act as this site"


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
        "party": "coordinator",
        "port": settings.port,
        "page_port": settings.page_port,
        "health": page_check(settings.loopback.page),
        "version": version("pneumofed"),
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
        "README.md": _text("coordinator/README.md", words),
        **_software_files(out, words, nginx=True),
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
        "party": "site",
        "site": site,
        "host": config.coordinator.hosts[0],
        "port": config.coordinator.port,
        "health": SITE_CHECK,
        "version": version("pneumofed"),
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
        "README.md": _text("site/README.md", words),
        **_software_files(out, words, nginx=False),
    }
    if identity is None:
        return Kit(site.name, files, gone=("keys/client.crt", "keys/node.pub"))
    files["keys/node.pub"] = KitFile(identity.public)
    files |= _secrets_of(config, site, identity, authority, out)
    return Kit(site.name, files, gone=_outdated(identity, out / site.name / "keys"))


def _software_files(out: Path, words: Mapping[str, Any], *, nginx: bool) -> dict[str, KitFile]:
    """What compose.yaml builds its image from, and the list of the wheelhouse where there is one, whose hashes travel with the kit."""
    image = write_containerfile(words["party"], nginx=nginx, command=[f"/{words['party']}/start.sh"], health=words["health"])
    texts = {"Containerfile": image, "constraints.txt": tested_versions(), ".dockerignore": render(__package__, "dockerignore")}
    lock = out / LOCK_FILE
    files = {name: KitFile(text.encode()) for name, text in texts.items()}
    return files | ({LOCK_FILE: KitFile(lock.read_bytes())} if lock.is_file() else {})


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
    return format_yaml(settings.model_dump(include=settings.model_fields_set)).rstrip("\n")


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
        known = [path.read_bytes() for path in (keys / "client.crt", _last_issued(out, site.name)) if path.is_file()]
        files["keys/client.crt"] = KitFile(next((old for old in known if _still_good(old, fresh, config)), fresh))
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


@dataclass(frozen=True)
class PartyReport:
    """What happened to one party's kit. `note` holds a key's fingerprint or an expiry, never a secret."""

    name: str
    outcome: Outcome
    note: str = ""


def provision(
    config: FederationConfig, out: Path, admitted: Mapping[str, Path] | None = None, *, with_keys: bool = False
) -> list[PartyReport]:
    """Writes the kits of `config` into `out`, and reports what happened to each.

    No private key of a site is made here unless `with_keys`: `pneumofed site init` makes it at the hospital. A kit that is no longer in
    `out` was handed over: it is left alone until the site's key changes or its certificate is due.

    Args:
        config: of the federation; a party is never left out of it, only marked as revoked.
        out: folder of the kits and, in `ca/`, of the certificate authority.
        admitted: public keys that hospitals sent, by site; each is the site's from now on, and its old one is refused.
        with_keys: make the keys of sites that have none here, so that whoever holds `out` or a kit can act as the site.

    Returns:
        One report a party: coordinator, sites, auditors, then those that are revoked.

    Raises:
        ConfigError: `out` belongs to another federation, a known party is missing in `config`, or a key cannot be used.
    """
    admitted = admitted or {}
    _check_admitted(config, admitted)
    authority = open_authority(out / "ca", config.name, datetime.now(UTC) + timedelta(days=config.ca_validity_days))
    identities = Identities(out)
    _check_none_vanished(config, identities)
    revoked = _revoke(config, identities, out)
    present = [site for site in config.sites if not site.revoked]
    found = {site.name: identities.site(site, admitted.get(site.name), with_keys=with_keys) for site in present}
    sites = {name: identity for name, identity in found.items() if identity is not None}
    tokens = {auditor.name: identities.auditor(auditor) for auditor in config.auditors if not auditor.revoked}
    key_roster = identities.key_roster(sites, authority)
    reports = [_report(out, coordinator_kit(config, authority, sites, tokens, out, key_roster), "holds no site's private key")]
    for site in present:
        handed_over = site.public_key is None and site.name not in admitted and not (out / site.name).is_dir()
        reports.append(_provision_site(config, site, found[site.name], authority, out, handed_over))
    reports += [_provision_auditor(config, a, tokens[a.name], authority, out) for a in config.auditors if a.name in tokens]
    return reports + revoked


def _provision_site(
    config: FederationConfig, site: SiteParty, identity: SiteIdentity | None, authority: Authority, out: Path, handed_over: bool
) -> PartyReport:
    kit = site_kit(config, site, identity, authority, out)
    if identity is None:
        return _report(out, kit, NO_KEY.format(site.name))
    certificate, last = kit.files.get("keys/client.crt"), _last_issued(out, site.name)
    is_new = certificate is not None and not (last.is_file() and last.read_bytes() == certificate.content)
    if identity.private is None and handed_over and not is_new:
        return PartyReport(site.name, "handed over", identity.fingerprint)
    report = _report(out, kit, identity.fingerprint + (HOLDS_KEY if identity.private is not None else ""))
    if certificate is not None and is_new:
        last.parent.mkdir(mode=0o700, exist_ok=True)
        write_file(last, certificate.content)
    return report


def _last_issued(out: Path, site: str) -> Path:
    """Copy of the certificate that a site's last kit held: the kit may be handed over and gone when the certificate is due."""
    return out / "ca" / "clients" / f"{site}.crt"


def _check_admitted(config: FederationConfig, admitted: Mapping[str, Path]) -> None:
    present = {site.name: site for site in config.sites if not site.revoked}
    for name in admitted:
        if name not in present:
            raise ConfigError(f"the key of '{name}' cannot be admitted: the federation file has no such site, or it is revoked")
        if present[name].public_key is not None:
            raise ConfigError(
                f"site {name}: the federation file names its public_key; change it there, or take it away to admit one"
            )


def _provision_auditor(
    config: FederationConfig, auditor: AuditorParty, token: AuditorToken, authority: Authority, out: Path
) -> PartyReport:
    if token.value is None:
        return PartyReport(f"auditor-{auditor.name}", "handed over")
    return _report(out, auditor_kit(config, auditor, token.value, authority), "reads the live page")


def _report(out: Path, kit: Kit, note: str) -> PartyReport:
    return PartyReport(kit.name, "written" if write_kit(out, kit) else "unchanged", note)


def _revoke(config: FederationConfig, identities: Identities, out: Path) -> list[PartyReport]:
    """Refuses the keys and tokens of revoked parties, and takes away their archives, which would be given out by mistake."""
    reports = []
    for site in (site for site in config.sites if site.revoked):
        identities.revoke_site(site.name)
        reports.append(_revoked(out, site.name))
    for auditor in (auditor for auditor in config.auditors if auditor.revoked):
        identities.revoke_auditor(auditor.name)
        reports.append(_revoked(out, f"auditor-{auditor.name}"))
    return reports


def _revoked(out: Path, name: str) -> PartyReport:
    (out / f"{name}.tar.gz").unlink(missing_ok=True)
    return PartyReport(name, "revoked", f"the folder {name}/ is void; delete it" if (out / name).is_dir() else "")


def _check_none_vanished(config: FederationConfig, identities: Identities) -> None:
    """A line that is lost by accident must not cut a hospital off, nor leave one in that was meant to go."""
    named: Sequence[tuple[str, set[str], set[str]]] = (
        ("site", identities.known_sites(), {site.name for site in config.sites}),
        ("auditor", identities.known_auditors(), {auditor.name for auditor in config.auditors}),
    )
    for kind, known, wanted in named:
        if missing := sorted(known - wanted):
            raise ConfigError(
                f"the {kind} '{missing[0]}' has a kit but is not in the federation file; to end its part, keep it there and add "
                "`revoked: true`"
            )
