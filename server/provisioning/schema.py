"""The federation file: who takes part. `pneumofed provision` turns it into start-up kits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from pneumofed.common.config.experiment import Section
from pneumofed.common.config.reader import build_config, read_yaml
from pneumofed.common.errors import ConfigError
from pneumofed.server.operations.settings import Host, LoopbackPorts, Name, Port

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
