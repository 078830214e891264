"""From a federation file to start-up kits; again and again, without touching the parties that did not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pneumofed.common.errors import ConfigError
from pneumofed.server.provisioning.authority import Authority, open_authority
from pneumofed.server.provisioning.identities import AuditorToken, Identities, SiteIdentity
from pneumofed.server.provisioning.kit import Kit, write_kit
from pneumofed.server.provisioning.parties import auditor_kit, coordinator_kit, site_kit
from pneumofed.server.provisioning.schema import AuditorParty, FederationConfig, SiteParty

Outcome = Literal["written", "unchanged", "handed over", "revoked"]
NO_KEY = "no key yet; admit the one that the hospital sends: pneumofed provision ... --admit {0}={0}.pub"
HOLDS_KEY = "; the kit holds the site's PRIVATE key: whoever reads it can act as this site"


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
    `out` was handed over: it is left alone until the site's key changes.

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
    if identity.private is None and handed_over:
        return PartyReport(site.name, "handed over", identity.fingerprint)
    return _report(out, kit, identity.fingerprint + (HOLDS_KEY if identity.private is not None else ""))


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
