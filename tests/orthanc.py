"""A real archive for tests: Orthanc on loopback, with its DICOMweb plugin and a DICOM port, in a temporary folder."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pneumofed.common.ops.processes import free_ports

PLUGINS = ("/usr/share/orthanc/plugins/libOrthancDicomWeb.so", "/usr/lib/orthanc/plugins/libOrthancDicomWeb.so")
AE_TITLE = "ARCHIVE"
SITE_AE_TITLE = "PNEUMOFED"
_START_SEC = 30


@dataclass(frozen=True)
class Orthanc:
    """A running server.

    Attributes:
        http_port: of the REST interface and of DICOMweb.
        dicom_port: of the classic protocol, under the AE title `AE_TITLE`.
        move_port: where C-MOVE sends what `SITE_AE_TITLE` asks for.
        user: (name, password) where the server wants one.
    """

    http_port: int
    dicom_port: int
    move_port: int
    user: tuple[str, str] | None = None
    process: Any = field(default=None, repr=False)

    @property
    def dicomweb(self) -> str:
        """Address of the DICOMweb service."""
        return f"http://127.0.0.1:{self.http_port}/dicom-web"

    @property
    def dimse(self) -> str:
        """HOST:PORT of the classic protocol."""
        return f"127.0.0.1:{self.dicom_port}"

    def upload(self, data: bytes) -> None:
        """Puts a DICOM file into the archive."""
        self.ask("/instances", data)

    def ask(self, path: str, data: bytes | None = None) -> Any:
        """The answer of the REST interface to GET, or to POST of `data`."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", data=data)
        if self.user:
            request.add_header("Authorization", "Basic " + base64.b64encode(":".join(self.user).encode()).decode())
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.loads(response.read() or b"null")


@contextmanager
def run_orthanc(folder: Path, user: tuple[str, str] | None = None) -> Iterator[Orthanc]:
    """A server with its files in `folder`; skips the test where Orthanc or its DICOMweb plugin is not installed."""
    program = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
    plugin = next(filter(lambda path: Path(path).exists(), PLUGINS), None)
    if program is None or plugin is None:
        pytest.skip("needs Orthanc and its DICOMweb plugin (Debian: orthanc, orthanc-dicomweb)")
    http, dicom, move = free_ports(3)
    server = Orthanc(http, dicom, move, user)
    configuration = folder / "orthanc.json"
    configuration.write_text(json.dumps(_configure(server, folder, plugin)))
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([program, str(configuration)], stdout=log, stderr=log, cwd=folder)
    try:
        _wait(server, process, folder / "orthanc.log")
        yield Orthanc(server.http_port, server.dicom_port, server.move_port, user, process)
    finally:
        process.kill()
        process.wait(10)


def _configure(server: Orthanc, folder: Path, plugin: str) -> dict[str, Any]:
    return {
        "Name": "test archive",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [plugin],
        "HttpPort": server.http_port,
        "DicomPort": server.dicom_port,
        "DicomAet": AE_TITLE,
        "DicomCheckCalledAet": True,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": server.user is not None,
        "RegisteredUsers": dict([server.user]) if server.user else {},
        "DicomModalities": {"site": [SITE_AE_TITLE, "127.0.0.1", server.move_port]},
        "DicomAlwaysAllowFind": False,
        "StableAge": 1,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }


def _wait(server: Orthanc, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SEC
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.ask("/system")
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"Orthanc did not start: {log.read_text(errors='replace')[-2000:]}")
