"""Who takes part in a federation, as its file says, and who holds which key or token, as the output folder remembers it.

The federation file is what `pneumofed provision` turns into start-up kits (`read_federation`). `Identities` also knows which keys are
refused for good:

ca/sites/NAME.pub         public node key of each site
ca/auditors/NAME.sha256   SHA-256 of each auditor's token
ca/revoked                fingerprints of keys that no site may use again
ca/roster.json            the key roster as it was last signed (`common.secure_aggregation.key_agreement`)
"""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, model_validator

from pneumofed.common.config.experiment import Section
from pneumofed.common.config.reader import build_config, read_yaml
from pneumofed.common.errors import ConfigError, SecureSumError
from pneumofed.common.secure_aggregation.key_agreement import issue_roster, read_roster
from pneumofed.common.wire.keys import NodeKey, format_public_key, key_fingerprint, read_private_key, read_public_key
from pneumofed.server.operations.settings import Host, LoopbackPorts, Name, Port
from pneumofed.server.provisioning.authority import Authority, write_private

RESERVED_NAMES = frozenset({"ca", "coordinator"})
Contact = Annotated[str, Field(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]


class CoordinatorParty(Section):
    """The coordinator: how sites and auditors reach it."""

    hosts: Annotated[list[Host], Field(min_length=1)]
    """DNS names and IPv4 addresses; all are in the server certificate, the first one is in the kits."""
    port: Port = 9443
    page_port: Port | None = None
    """Where auditors read the live page; needed as soon as there is an auditor."""
    contact: Contact = ""
    loopback: LoopbackPorts = LoopbackPorts()


class SiteParty(Section):
    """One hospital."""

    name: Name
    contact: Contact = ""
    public_key: str | None = None
    """The public key (`node.pub`) that the hospital sent, relative to this file. Unset, the one that was admitted last
    (`pneumofed provision --admit`)."""
    revoked: bool = False
    """The site's key is refused from the next `pneumofed provision` and start on, for good: a site that comes back gets a new key."""


class AuditorParty(Section):
    """Somebody who may read the live page and nothing else."""

    name: Name
    contact: Contact = ""
    revoked: bool = False


class FederationConfig(Section):
    """A federation: the coordinator, the hospitals, and the auditors."""

    name: Name
    coordinator: CoordinatorParty
    sites: list[SiteParty] = Field(default_factory=list)
    auditors: list[AuditorParty] = Field(default_factory=list)
    validity_days: Annotated[int, Field(ge=1, le=3650)] = 397
    """Of the server's and the sites' certificates."""
    renew_before_days: Annotated[int, Field(ge=0)] = 30
    """A certificate with fewer days left is made anew by the next `pneumofed provision`."""
    ca_validity_days: Annotated[int, Field(ge=1, le=7300)] = 3650
    mutual_tls: bool = False
    """Whether the gateway asks each site for a certificate in addition to its signed requests."""

    @model_validator(mode="after")
    def _check_together(self) -> FederationConfig:
        for kind, names in (("site", [s.name for s in self.sites]), ("auditor", [a.name for a in self.auditors])):
            if taken := [name for name in names if name.lower() in RESERVED_NAMES or name.lower().startswith("auditor-")]:
                raise ValueError(f"the name '{taken[0]}' of a {kind} is kept for a folder of the kits; choose another")
            # folders of some systems do not distinguish upper case from lower
            if twice := [name for name, count in Counter(name.lower() for name in names).items() if count > 1]:
                raise ValueError(f"two {kind}s are called '{twice[0]}'; names must differ by more than their case")
        if any(not auditor.revoked for auditor in self.auditors) and self.coordinator.page_port is None:
            raise ValueError("coordinator.page_port is needed, since auditors read the live page there, e.g. 9444")
        if self.renew_before_days >= self.validity_days:
            raise ValueError("renew_before_days must be smaller than validity_days")
        if self.coordinator.page_port == self.coordinator.port:
            raise ValueError("coordinator.page_port must differ from coordinator.port")
        return self


def read_federation(path: Path) -> FederationConfig:
    """Reads the federation in the YAML file `path`, with paths of public keys resolved against its folder.

    Raises:
        ConfigError: the file is missing or wrong, or names a public key that is not there.
    """
    config = build_config(FederationConfig, read_yaml(path), str(path))
    sites = [_resolve(site, path.parent) for site in config.sites]
    return config.model_copy(update={"sites": sites})


def _resolve(site: SiteParty, folder: Path) -> SiteParty:
    if site.public_key is None:
        return site
    path = (folder / site.public_key).resolve()
    if not site.revoked and not path.is_file():
        raise ConfigError(f"site {site.name}: the public key {path} does not exist; ask the hospital for its keys/node.pub")
    return site.model_copy(update={"public_key": str(path)})


@dataclass(frozen=True)
class SiteIdentity:
    """A site's key. `private` is None where it is not here, as it should be: the hospital made it, or took its kit away."""

    name: str
    key: ec.EllipticCurvePublicKey
    private: bytes | None

    @property
    def public(self) -> bytes:
        return format_public_key(self.key, self.name)

    @property
    def fingerprint(self) -> str:
        return key_fingerprint(self.key)


@dataclass(frozen=True)
class AuditorToken:
    """An auditor's bearer token; `value` is None where it is not here, since the kit was taken away."""

    sha256: str
    value: str | None


class Identities:
    """The keys and tokens of the federation whose kits lie in `out`."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._ca = out / "ca"

    def site(self, site: SiteParty, admitted: Path | None = None, *, with_keys: bool = False) -> SiteIdentity | None:
        """Finds the site's key; None where the hospital has not sent one yet.

        Args:
            site: as the federation file has it.
            admitted: the public key that the hospital sent just now.
            with_keys: make a pair here where there is none yet, whose private half travels in the kit.

        Raises:
            ConfigError: the key that the hospital sent cannot be read, was revoked, or is another site's.
        """
        sent = admitted or site.public_key
        return self._sent(site, Path(sent)) if sent else self._known_or_made(site.name, with_keys)

    def revoke_site(self, name: str) -> None:
        """Refuses the site's present key for good."""
        known = self._site_file(name)
        if known.is_file():
            self._remember_revoked(read_public_key(known))
            known.unlink()

    def auditor(self, auditor: AuditorParty) -> AuditorToken:
        """Finds the auditor's token; makes a new one where there is none yet."""
        known, here = self._auditor_file(auditor.name), self._out / f"auditor-{auditor.name}" / "token"
        if known.is_file():
            sha256 = known.read_text(encoding="ascii").strip()
            value = here.read_text(encoding="ascii").strip() if here.is_file() else None
            if value is None or _sha256(value) == sha256:
                return AuditorToken(sha256, value)
        value = secrets.token_urlsafe(32)
        write_private(known, f"{_sha256(value)}\n".encode())
        return AuditorToken(_sha256(value), value)

    def revoke_auditor(self, name: str) -> None:
        """Forgets the auditor's token; one who comes back gets a new one."""
        self._auditor_file(name).unlink(missing_ok=True)

    def key_roster(self, sites: Mapping[str, SiteIdentity], authority: Authority) -> bytes:
        """Returns the signed roster of the sites' public keys: the last one while it is still right, else a new one with the
        next serial.

        Args:
            sites: every site that is not revoked, by name.
            authority: signs it.

        Raises:
            ConfigError: the last one cannot be read, so that its serial is not known.
        """
        path, keys, serial = self._ca / "roster.json", {name: identity.public for name, identity in sites.items()}, 0
        if path.is_file():
            try:
                last = read_roster(path.read_text(encoding="utf-8"), authority.key.public_key())
            except SecureSumError as error:
                raise ConfigError(f"{path}: {error}; put it back from your backup") from error
            if {name: format_public_key(key, name) for name, key in last.keys.items()} == keys:
                return path.read_bytes()
            serial = last.serial
        content = issue_roster(authority.federation, keys, serial + 1, authority.key).encode("utf-8")
        write_private(path, content)
        return content

    def known_sites(self) -> set[str]:
        """Lists the sites that have a key."""
        return {path.stem for path in (self._ca / "sites").glob("*.pub")}

    def known_auditors(self) -> set[str]:
        """Lists the auditors that have a token."""
        return {path.stem for path in (self._ca / "auditors").glob("*.sha256")}

    def _known_or_made(self, name: str, with_keys: bool) -> SiteIdentity | None:
        known, private = self._site_file(name), self._out / name / "keys" / "node"
        if known.is_file():
            key = read_public_key(known)
            if private.is_file() and read_private_key(private).public_key() == key:
                return SiteIdentity(name, key, private.read_bytes())
            if not private.is_file() or not with_keys:
                return SiteIdentity(name, key, None)
        if not with_keys:
            return None
        pair = NodeKey.generate(name)
        write_private(known, pair.public)
        return SiteIdentity(name, read_public_key(known), pair.private)

    def _sent(self, site: SiteParty, path: Path) -> SiteIdentity:
        key = read_public_key(path)
        self._check_usable(site.name, key, path)
        known = self._site_file(site.name)
        if known.is_file() and (old := read_public_key(known)) != key:
            self._remember_revoked(old)
        write_private(known, format_public_key(key, site.name))
        return SiteIdentity(site.name, key, None)

    def _check_usable(self, name: str, key: ec.EllipticCurvePublicKey, path: Path) -> None:
        if key_fingerprint(key) in self._revoked():
            raise ConfigError(f"site {name}: the key {path} was revoked and is never taken again; ask the hospital for a new one")
        for other in self.known_sites() - {name}:
            if read_public_key(self._site_file(other)) == key:
                raise ConfigError(f"site {name}: the key {path} is the one of site {other}; each site needs a key of its own")

    def _revoked(self) -> set[str]:
        path = self._ca / "revoked"
        return {line.split()[0] for line in path.read_text(encoding="ascii").splitlines()} if path.is_file() else set()

    def _remember_revoked(self, key: ec.EllipticCurvePublicKey) -> None:
        lines = sorted(self._revoked() | {key_fingerprint(key)})
        write_private(self._ca / "revoked", "".join(f"{line}\n" for line in lines).encode("ascii"))

    def _site_file(self, name: str) -> Path:
        return self._ca / "sites" / f"{name}.pub"

    def _auditor_file(self, name: str) -> Path:
        return self._ca / "auditors" / f"{name}.sha256"


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode("ascii")).hexdigest()
