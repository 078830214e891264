"""Start-up kits of a hospital, good and bad, as archives."""

from __future__ import annotations

import io
import tarfile
import tempfile
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from pneumofed.client.site.init import START_SCRIPT
from pneumofed.common.wire.keys import NodeKey
from pneumofed.server.provisioning.authority import open_authority


def archive(path: Path, members: dict[str, Any]) -> Path:
    """A .tar.gz of texts, or of `TarInfo` as they are."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o700 if name.endswith(".sh") else 0o644
            tar.addfile(info, io.BytesIO(content.encode()))
    return path


@lru_cache(maxsize=1)
def _made_once() -> tuple[NodeKey, str]:
    with tempfile.TemporaryDirectory() as folder:
        authority = open_authority(Path(folder) / "ca", "test", datetime.now(UTC) + timedelta(days=30))
    return NodeKey.generate("north"), authority.pem.decode()


def kit_files(top: str = "north/", with_key: bool = True) -> dict[str, Any]:
    """The files of a kit for the site north; `with_key` as `pneumofed provision --with-keys` makes it."""
    key, certificate = _made_once()
    files = {
        f"{top}site.yaml": "name: north\nmanifest: data/manifest.csv\nwork_dir: work\npolicy: policy.yaml\n",
        f"{top}connection.yaml": "coordinator: example.org:9443\n",
        f"{top}policy.yaml": "min_patients: 30\n",
        f"{top}keys/ca.crt": certificate,
        f"{top}start.sh": "\n".join(["#!/bin/sh", *START_SCRIPT, ""]),
    }
    if with_key:
        files |= {f"{top}keys/node": key.private.decode(), f"{top}keys/node.pub": key.public.decode()}
    return files


def special(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    """A link or a device."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info
