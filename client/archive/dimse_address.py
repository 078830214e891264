"""Where an archive of the classic protocol is, and under which names both sides speak (DICOM PS3.8, 9.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from common.errors import ConfigError


@dataclass(frozen=True)
class DimseAddress:
    """Where an archive listens, the AE titles of both sides, and how images come back."""

    host: str
    port: int
    called_ae_title: str
    ae_title: str = "PNEUMOFED"
    retrieve: Literal["get", "move"] = "get"
    listen_host: str = "0.0.0.0"
    listen_port: int = 11112
    """Of C-MOVE alone: where the archive sends images to. It has to know this port under `ae_title`."""
    tls: bool = False
    ca: str | None = None

    def __post_init__(self) -> None:
        """Refuses AE titles and ports that cannot be.

        Raises:
            ConfigError: an AE title is not 1 to 16 printable characters (PS3.5, 6.2: AE), or a port is out of range.
        """
        for title in (self.called_ae_title, self.ae_title):
            if not (1 <= len(title.strip()) <= 16 and title.isascii() and title.isprintable() and "\\" not in title):
                raise ConfigError(f"AE title '{title}': expected 1 to 16 printable characters")
        if not (0 < self.port < 2**16 and 0 < self.listen_port < 2**16):
            raise ConfigError(f"ports: expected 1 to 65535, got {self.port} and {self.listen_port}")
