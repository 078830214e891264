"""A federation of real processes on loopback, started and asked through the command line as its users would.

federation = RealFederation(folder, three_sources(...))     provisioned kits, unpacked; images added at each site
federation.start()                                          coordinator, then the sites
federation.run("first", rounds=2)                           until it ends; returns its summary
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml

from pneumofed.common.data.manifest import ImageRecord, Manifest, write_manifest
from pneumofed.common.imaging.images import read_image
from pneumofed.common.ops.lifeline import children_end_with_me
from pneumofed.common.ops.processes import descendants, free_ports
from pneumofed.server.runs.events import EVENTS_FILE, read_activity
from pneumofed.server.runs.folder import RunFolder
from pneumofed.server.runs.summary_records import RunSummary
from tests.dicom_factory import dicom_bytes
from tests.orthanc import Orthanc, run_orthanc
from tests.tiny import TINY, draw_manifest

PNEUMOFED = [sys.executable, "-m", "pneumofed.cli.main"]
NAMES = ("north", "river", "hill")
TIMEOUT_SEC = 330.0


def need_nginx() -> None:
    """Skips a test on a machine without the proxy that the door is made of."""
    if not (shutil.which("nginx") or Path("/usr/sbin/nginx").exists()):
        pytest.skip("needs nginx (Debian: nginx-light)")


@cache
def bind_to_this_process() -> ExitStack:
    """Lets coordinators and sites end with the test run, also where it is ended from outside. Nobody closes what it returns."""
    stack = ExitStack()
    stack.enter_context(children_end_with_me(daemons=True))
    return stack


def call(*arguments: str, cwd: Path | None = None, ok: Sequence[int] = (0,)) -> subprocess.CompletedProcess[str]:
    """`pneumofed ARGUMENTS`; fails with all that it said if it exits otherwise than `ok`."""
    done = subprocess.run([*PNEUMOFED, *arguments], capture_output=True, text=True, timeout=TIMEOUT_SEC, check=False, cwd=cwd)
    assert done.returncode in ok, f"{' '.join(arguments)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done


@dataclass(frozen=True)
class Source:
    """Images of one hospital and how its engineer adds them: arguments of `pneumofed site data add`."""

    arguments: tuple[str, ...]


def kaggle_source(manifest: Manifest, folder: Path, split: str = "train") -> Source:
    """The images in the layout and with the file names of the Kaggle set."""
    for number, record in enumerate(manifest.records):
        person = manifest.patients.index(record.patient)
        normal = record.label == "normal"
        name = f"NORMAL/IM-{person:04d}-{number:04d}.jpeg" if normal else f"PNEUMONIA/person{person}_bacteria_{number}.jpeg"
        path = folder / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.open(record.path).save(path, quality=95)
    return Source(("kaggle", str(folder)))


def dicom_source(manifest: Manifest, folder: Path) -> Source:
    """A folder of DICOM files with a label table by accession number."""
    folder.mkdir(parents=True)
    for number, record in enumerate(manifest.records):
        (folder / f"{number}.dcm").write_bytes(as_dicom(record, number))
    return Source(("dicom", str(folder), "--labels", str(write_labels(manifest, folder.with_suffix(".csv")))))


def archive_source(manifest: Manifest, folder: Path, archive: Orthanc) -> Source:
    """The images in a running archive."""
    for number, record in enumerate(manifest.records):
        archive.upload(as_dicom(record, number))
    return Source(("dicomweb", archive.dicomweb, "--labels", str(write_labels(manifest, folder.with_suffix(".csv")))))


def as_dicom(record: ImageRecord, number: int) -> bytes:
    """The image as a hospital has it, with a patient's name in it."""
    stored = (read_image(record.path).pixels * 255).round().astype("u1")
    uid = f"2.25.{zlib.crc32(record.patient.encode())}.{number}"
    return dicom_bytes(
        stored,
        PatientName="DOE^JANE",
        PatientID=record.patient,
        AccessionNumber=f"A{number:05d}",
        StudyInstanceUID=f"{uid}.1",
        SeriesInstanceUID=f"{uid}.2",
        SOPInstanceUID=f"{uid}.3",
        Modality="DX",
        ViewPosition="PA",
        StudyDate="20260131",
        BodyPartExamined="CHEST",
    )


def write_labels(manifest: Manifest, path: Path) -> Path:
    rows = [f"A{number:05d},{record.label}" for number, record in enumerate(manifest.records)]
    path.write_text("accession_number,label\n" + "\n".join(rows) + "\n")
    return path


@contextmanager
def three_sources(folder: Path, patients: int = 12) -> Iterator[dict[str, Source]]:
    """One hospital with a Kaggle folder, one with DICOM files, one with an archive."""
    drawn = {name: draw_manifest(folder / f"drawn-{name}", patients, seed=number) for number, name in enumerate(NAMES)}
    (folder / "orthanc").mkdir()
    with run_orthanc(folder / "orthanc") as archive:
        yield {
            "north": kaggle_source(drawn["north"], folder / "kaggle"),
            "river": dicom_source(drawn["river"], folder / "dicom"),
            "hill": archive_source(drawn["hill"], folder / "archive", archive),
        }


class RealFederation:
    """Kits for a coordinator and hospitals, unpacked below `folder`; nothing runs before `start`."""

    def __init__(self, folder: Path, sources: dict[str, Source], test: Manifest | None = None, **federation: Any) -> None:
        """`test` holds the coordinator's own images; a few are drawn where there are none."""
        need_nginx()
        bind_to_this_process()
        self.folder, self.names = folder, tuple(sources)
        ports = free_ports(6)
        self.port = ports[0]
        self.federation_file = folder / "federation.yaml"
        self.federation: dict[str, Any] = {
            "name": "test-federation",
            "coordinator": {
                "hosts": ["127.0.0.1"],
                "port": self.port,
                "loopback": dict(zip(("superlink", "superlink_health", "superexec_health", "page"), ports[1:5], strict=True)),
            },
            "sites": [{"name": name} for name in sources],
            "mutual_tls": True,
            **federation,
        }
        self.provision()
        for name in sources:
            self.make_site(name)
        self.provision(*(f"--admit={name}={self.site(name) / 'keys' / 'node.pub'}" for name in sources))
        for name in sources:
            self.make_site(name)  # the kit again: with mutual TLS it now holds the site's certificate
        self.coordinator = folder / "coordinator"
        self.install_coordinator_kit()
        write_manifest(test or draw_manifest(folder / "test-images", 10, seed=1000), folder / "test.csv")
        local = {"test_manifest": str(folder / "test.csv"), "device": "cpu", "threads": 1}
        (self.coordinator / "local.yaml").write_text(yaml.safe_dump(local))
        for name, source in sources.items():
            self.install_site(name, source)

    def provision(self, *options: str) -> None:
        self.federation_file.write_text(yaml.safe_dump(self.federation))
        call("provision", str(self.federation_file), "--out", str(self.folder / "kits"), *options)

    def install_coordinator_kit(self) -> None:
        shutil.copytree(self.folder / "kits" / "coordinator", self.coordinator, dirs_exist_ok=True)

    def make_site(self, name: str) -> None:
        call("site", "init", str(self.site(name)), "--kit", str(self.folder / "kits" / f"{name}.tar.gz"))

    def install_site(self, name: str, source: Source) -> None:
        self.change_yaml(self.site(name) / "site.yaml", device="cpu", threads=1)
        self.change_yaml(self.site(name) / "policy.yaml", min_patients=2, min_patients_private=2, min_validation_patients=1)
        call("site", "data", "add", *source.arguments, "--site", str(self.site(name)))

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name

    @staticmethod
    def change_yaml(path: Path, **changes: Any) -> None:
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))

    def start(self) -> None:
        call("server", "start", "--folder", str(self.coordinator))
        for name in self.names:
            self.start_site(name)

    def start_site(self, name: str, ok: Sequence[int] = (0,)) -> subprocess.CompletedProcess[str]:
        return call("site", "start", "--site", str(self.site(name)), ok=ok)

    def stop(self) -> None:
        """Ends everything, whatever state it is in."""
        for name in self.names:
            self.resume_process(name)
            call("site", "stop", "--site", str(self.site(name)), ok=range(256))
        call("server", "stop", "--folder", str(self.coordinator), ok=range(256))

    def submit(self, name: str, **changes: Any) -> None:
        """Hands a run over; `changes` are sections of the experiment laid over a tiny one."""
        experiment: dict[str, Any] = {**TINY, "strategy": {"wait_for_sites": len(self.names), "wait_timeout_sec": 60.0}}
        for key, value in changes.items():
            experiment[key] = {**experiment[key], **value} if isinstance(value, dict) and key in experiment else value
        config = self.folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(experiment))
        call("server", "run", name, "--config", str(config), "--folder", str(self.coordinator))

    def wait(self, name: str, seconds: float = TIMEOUT_SEC) -> dict[str, Any]:
        """The registry's word on the run, once it is over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.state(name)
            if state["state"] in ("succeeded", "failed", "stopped"):
                return state
            time.sleep(1.0)
        raise AssertionError(f"{name} did not end within {seconds:g} s: {self.tell(name)}")

    def state(self, name: str) -> dict[str, Any]:
        """What `pneumofed server status --json` says of the run."""
        told = json.loads(call("server", "status", "--json", "--folder", str(self.coordinator), ok=(0, 1)).stdout)
        found: dict[str, Any] = next(run for run in told["runs"] if run["name"] == name)
        return found

    def run(self, name: str, **changes: Any) -> RunSummary:
        """The summary of a run that must succeed."""
        self.submit(name, **changes)
        state = self.wait(name)
        assert state["state"] == "succeeded", self.tell(name)
        return self.run_folder(name).read_summary()

    def run_folder(self, name: str) -> RunFolder:
        return RunFolder(self.coordinator / "runs" / name)

    def simulate(self, name: str, folder: Path) -> RunFolder:
        """The same run over copies of the same hospitals below `folder`, in this process."""
        from pneumofed.client.app import app as client_app
        from pneumofed.common.config.parties import CoordinatorConfig
        from pneumofed.server.federation.run import run_federation
        from pneumofed.simulation.local_grid import LocalGrid

        shutil.copytree(self.folder / "sites", folder / "sites", ignore=shutil.ignore_patterns("*.sock", "gate", "flower"))
        nodes = [{"site-config": str(folder / "sites" / site / "site.yaml")} for site in self.names]
        test = str(self.folder / "test.csv")
        settings = CoordinatorConfig(run_dir=str(folder / name), test_manifest=test, device="cpu", threads=1)
        run_federation(LocalGrid(client_app, nodes, {}), self.run_folder(name).read_config(), settings)
        return RunFolder(folder / name)

    def events(self, name: str) -> list[dict[str, Any]]:
        return read_activity(self.run_folder(name).path / EVENTS_FILE)

    def wait_for(self, name: str, kind: str, round_: int, seconds: float = 120.0, **facts: Any) -> dict[str, Any]:
        """The first event of `kind` in the round with these facts, as soon as it is there."""
        wanted = {"kind": kind, "round": round_, **facts}
        return until(
            lambda: next((event for event in self.events(name) if wanted.items() <= event.items()), None),
            seconds,
            lambda: f"no event {wanted} in {self.tell(name)}",
        )

    def tell(self, name: str) -> str:
        """All that is known of a run, for a test that failed."""
        folder = self.run_folder(name)
        logs = list((self.coordinator / "state").glob("*.log"))
        logs += [self.site(site) / "work" / log for site in self.names for log in ("supernode.log", "site.log")]
        ends = {str(path): path.read_text(errors="replace")[-1500:] for path in logs if path.exists()}
        events = "\n".join(map(str, self.events(name)[-25:]))
        return f"{folder.read_summary()}\n{events}\n" + "\n".join(f"--- {path}\n{end}" for path, end in ends.items())

    def supernode_pid(self, name: str) -> int | None:
        status = call("site", "status", "--json", "--site", str(self.site(name)), ok=(0, 3)).stdout
        pid: int | None = json.loads(status)["pid"]
        return pid

    def signal_site(self, name: str, sign: signal.Signals) -> None:
        """Sends `sign` to the SuperNode and everything that it started."""
        pid = self.supernode_pid(name)
        assert pid is not None
        for member in family(pid):
            os.kill(member, sign)

    def resume_process(self, name: str) -> None:
        """Lets a site that was paused go on."""
        pid = self.supernode_pid(name)
        for member in family(pid) if pid else ():
            os.kill(member, signal.SIGCONT)


def family(root: int) -> list[int]:
    """`root` and all processes below it, the youngest numbers first."""
    return sorted({root, *descendants(root)}, reverse=True)


def until(found: Callable[[], Any], seconds: float, tell: Callable[[], str]) -> Any:
    """The first true value that `found` gives."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(tell())
