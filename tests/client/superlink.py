"""A real SuperLink with TLS and node authentication on loopback, for tests of a site."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from pneumofed.common.ops.processes import flower_environment, flower_tool, free_port, stop_group
from pneumofed.common.wire.keys import private_pem
from pneumofed.server.provisioning.authority import Authority, open_authority


@dataclass(frozen=True)
class Link:
    """A running SuperLink: where it is and how its own commands reach it."""

    folder: Path
    port: int
    environment: Mapping[str, str]

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    def flwr(self, *words: str) -> str:
        """What `flwr ...` says; fails the test where it fails."""
        done = subprocess.run(
            [flower_tool("flwr"), *words], env=dict(self.environment), cwd=self.folder, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"flwr {' '.join(words)}: {done.stdout[-600:]} {done.stderr[-600:]}")
        return done.stdout

    def run(self, app: Path, config: Mapping[str, Any], patience_sec: float = 180.0) -> str:
        """Runs the Flower app in `app` and returns its status in the end."""
        settings = self.folder / "run.toml"
        settings.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in config.items()))
        self.flwr("run", str(app), "test", "--run-config", str(settings))
        deadline = time.monotonic() + patience_sec
        status = "unknown"
        while time.monotonic() < deadline and not status.startswith("finished"):
            time.sleep(1.0)
            status = json.loads(self.flwr("list", "test", "--format", "json"))["runs"][0]["status"]
        return str(status)


def issue(folder: Path, authority: Authority | None = None, days: float = 300) -> Authority:
    """Writes ca.crt, server.crt and server.key for localhost into `folder`."""
    expires = datetime.now(UTC) + timedelta(days=days)
    authority = authority or open_authority(folder / "ca", "test", datetime.now(UTC) + timedelta(days=3650))
    key = ec.generate_private_key(ec.SECP384R1())
    (folder / "ca.crt").write_bytes(authority.pem)
    (folder / "server.crt").write_bytes(authority.issue_server(key.public_key(), ["localhost"], expires))
    (folder / "server.key").write_bytes(private_pem(key))
    return authority


@contextmanager
def superlink(folder: Path) -> Iterator[Link]:
    """Starts the SuperLink in `folder` and stops it with its children."""
    folder.mkdir(parents=True, exist_ok=True)
    issue(folder)
    port = free_port()
    environment = flower_environment(folder / "flower")
    (folder / "flower").mkdir()
    (folder / "flower" / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "localhost:{port}"\nroot-certificates = "{folder / "ca.crt"}"\n'
    )
    command = [
        flower_tool("flower-superlink"), "--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.crt", "--ssl-keyfile", "server.key",
        "--enable-supernode-auth", "--host", "127.0.0.1", "--port", str(port), "--database", "state.db",
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    with (folder / "superlink.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield Link(folder, port, environment)
        finally:
            stop_group(process)
