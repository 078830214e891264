"""The site folder: what lies where, and its files read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pneumofed.client.federation.policy import read_policy
from pneumofed.client.federation.site_data import read_connection, read_site_config
from pneumofed.common.audit.log import AuditLog
from pneumofed.common.config.parties import ConnectionConfig, SiteConfig, SitePolicy
from pneumofed.common.errors import ConfigError

APP_VARIABLE, COORDINATOR_VARIABLE = "PNEUMOFED_APP", "PNEUMOFED_COORDINATOR"
"""In the environment of the app: which bundle it is, set by the code gate (`client.site.code_gate`), and the address of the coordinator
that it works for, set by `pneumofed site start`.
"""


@dataclass(frozen=True)
class SiteFolder:
    """A hospital's folder, as `pneumofed site init` makes it."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> SiteFolder:
        """Opens the folder at `path`.

        Raises:
            ConfigError: it holds no site.yaml.
        """
        if not (path / "site.yaml").is_file():
            raise ConfigError(
                f"{path} is no site folder: it holds no site.yaml; give another folder, or make one with `pneumofed site init {path}`"
            )
        return cls(path.resolve())

    @property
    def site_file(self) -> Path:
        return self.path / "site.yaml"

    @property
    def connection_file(self) -> Path:
        return self.path / "connection.yaml"

    @cached_property
    def config(self) -> SiteConfig:
        return read_site_config(self.site_file)

    @cached_property
    def connection(self) -> ConnectionConfig:
        """How the coordinator is reached, with absolute paths."""
        return read_connection(self.connection_file)

    @property
    def policy_file(self) -> Path:
        """The policy, without which a site does not start.

        Raises:
            ConfigError: site.yaml names none.
        """
        if self.config.policy is None:
            raise ConfigError(f"{self.site_file} names no policy; add the line `policy: policy.yaml`")
        return Path(self.config.policy)

    @property
    def policy(self) -> SitePolicy:
        return read_policy(self.policy_file)

    @property
    def manifest(self) -> Path:
        return Path(self.config.manifest)

    @property
    def data(self) -> Path:
        """Holds the manifest, the key of the pseudonyms and the images from the archive."""
        return self.manifest.parent

    @property
    def images(self) -> Path:
        """Copies that the site itself wrote, on an import from the archive."""
        return self.data / "images"

    def delete_copy(self, path: Path) -> bool:
        """Deletes the image and returns True if the site itself wrote it, on an import from the archive."""
        path = path.resolve()
        if not path.is_relative_to(self.images.resolve()) or not path.exists():
            return False
        path.unlink()
        return True

    @property
    def work(self) -> Path:
        return Path(self.config.work_dir)

    @property
    def audit(self) -> AuditLog:
        return AuditLog(self.work / "audit.jsonl", self.config.name)
