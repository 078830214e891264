"""The coordinator folder: its settings (`coordinator.yaml`) and where each file in it lies.

COORDINATOR/
  coordinator.yaml                         the settings below
  keys/ca.crt server.crt server.key superexec.secret roster.json
  sites/NAME.pub                           public node key of each site
  nginx.conf                               the gateway, written anew at each start (see `server.operations.gateway`)
  state/                                   SuperLink database and parts of its messages, pid files, logs, FLWR_HOME
  runs/NAME/                               run folders
  release.yaml                             what a model must reach to be released (see `server.release.gate`); may be missing
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from pneumofed.common.config.experiment import Section
from pneumofed.common.config.parties import SetName, check_reference_sets
from pneumofed.common.config.reader import build_config, merge, read_yaml

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Port = Annotated[int, Field(ge=1, le=65535)]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$", max_length=253)]
"""A DNS name or an IPv4 address."""


class AuditorAccess(Section):
    """Who may read the live page: the SHA-256 of the bearer token; the token itself is only in the auditor's kit."""

    name: Name
    token_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LoopbackPorts(Section):
    """Ports on 127.0.0.1; nothing of them is reachable from outside."""

    superlink: Port = 9091
    superlink_health: Port = 9092
    superexec_health: Port = 9093
    page: Port = 9094
    """Where the live page listens; the gateway shows it outside at `page_port`."""


class CoordinatorSettings(Section):
    """`coordinator.yaml` with `local.yaml` laid over it."""

    _reference_sets = model_validator(mode="after")(check_reference_sets)

    federation: Name
    hosts: Annotated[list[Host], Field(min_length=1)]
    """Names and addresses under which sites reach the coordinator; the server certificate holds them. The first is in the kits."""
    port: Port = 9443
    """The gateway: the only port that hospitals need."""
    page_port: Port | None = None
    """The live page for auditors, over TLS and with a bearer token; unset, it is not shown outside."""
    mutual_tls: bool = False
    """Whether the gateway also asks for the site's certificate."""
    revoked: list[Name] = Field(default_factory=list)
    """Sites whose key is no longer accepted, even where `sites/NAME.pub` lies here."""
    auditors: list[AuditorAccess] = Field(default_factory=list)
    loopback: LoopbackPorts = LoopbackPorts()
    test_manifest: str | None = None
    """Held-out test set that runs are evaluated on; relative to this folder, as those below."""
    external_manifest: str | None = None
    """Held-out set of another place."""
    held_out: dict[SetName, str] = Field(default_factory=dict)
    """Manifest of each further held-out set by its name, e.g. `adults`."""
    reference_sets: list[str] = Field(default_factory=list)
    """As in `common.config.parties.CoordinatorConfig`."""
    cache_dir: str = "state/cache"
    """Decoded images of these sets."""
    device: str = "auto"
    """Where the coordinator evaluates: `auto`, `cpu`, `cuda` or `cuda:N`."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of the coordinator's evaluation; 0 leaves torch's choice."""
    registry: str | None = None
    """Database of sites and runs as a URL, e.g. postgresql://USER@HOST/NAME; unset it is SQLite in `state/registry.db`."""


@dataclass(frozen=True)
class CoordinatorFolder:
    """Paths in the coordinator folder."""

    path: Path

    @property
    def settings_file(self) -> Path:
        return self.path / "coordinator.yaml"

    @property
    def local_settings_file(self) -> Path:
        """What the coordinator sets itself, laid over `coordinator.yaml`; no new kit overwrites it."""
        return self.path / "local.yaml"

    @property
    def ca(self) -> Path:
        return self.path / "keys" / "ca.crt"

    @property
    def certificate(self) -> Path:
        return self.path / "keys" / "server.crt"

    @property
    def key(self) -> Path:
        return self.path / "keys" / "server.key"

    @property
    def key_roster(self) -> Path:
        """The sites' public node keys under the signature of the certificate authority, for secure aggregation."""
        return self.path / "keys" / "roster.json"

    @property
    def superexec_secret(self) -> Path:
        return self.path / "keys" / "superexec.secret"

    @property
    def sites(self) -> Path:
        return self.path / "sites"

    @property
    def gateway_config(self) -> Path:
        """Of nginx."""
        return self.path / "nginx.conf"

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def flower_home(self) -> Path:
        return self.state / "flwr"

    @property
    def release_policy(self) -> Path:
        return self.path / "release.yaml"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def settings(self) -> CoordinatorSettings:
        """Reads the settings in this folder.

        Raises:
            ConfigError: the file is missing or wrong.
        """
        values = read_yaml(self.settings_file)
        if self.local_settings_file.is_file():
            values = merge(values, read_yaml(self.local_settings_file))
        return build_config(CoordinatorSettings, values, str(self.settings_file))

    def site_keys(self) -> dict[str, Path]:
        """Lists the public key files of the sites that may take part, by name."""
        revoked = set(self.settings().revoked)
        return {path.stem: path for path in sorted(self.sites.glob("*.pub")) if path.stem not in revoked}
