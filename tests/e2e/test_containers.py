"""Coordinator and three sites from the kits' own compose files in podman: a run, a lost disk, a restore, the next run.

Needs what a workstation rarely has, so that it is skipped elsewhere: root, podman with runc, podman-compose, a base image and a wheelhouse.

    PNEUMOFED_TEST_BASE        base image that is there, for BASE of the Containerfile; the pinned one is not pulled by a test
    PNEUMOFED_TEST_WHEELHOUSE  folder of `pneumofed provision --wheelhouse`, of this version
    PNEUMOFED_TEST_COMPOSE     the program podman-compose, where it is not on the path
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pneumofed.client.privacy.ledger import Ledger
from pneumofed.common.config.reader import merge
from pneumofed.common.data.manifest import write_manifest
from pneumofed.common.ops.processes import free_ports
from tests.e2e.real import NAMES, call, until
from tests.tiny import TINY, draw_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2700)]
BASE, HOUSE = os.environ.get("PNEUMOFED_TEST_BASE"), os.environ.get("PNEUMOFED_TEST_WHEELHOUSE")
COMPOSE = os.environ.get("PNEUMOFED_TEST_COMPOSE", "podman-compose")
HOST = "host.containers.internal"
"""How podman calls the machine that its containers run on."""
USER = 1000
ENGINE = """
[engine]
runtime = "runc"
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
"""
PRIVATE = {
    "model": {"name": "scattering", "norm": "group"},
    "loss": {"logit_adjustment": False, "label_smoothing": 0.0},
    "strategy": {"wait_for_sites": len(NAMES), "wait_timeout_sec": 240.0, "max_update_norm_factor": 1000.0},
    "privacy": {
        "mechanism": "dp_sgd", "noise_multiplier": 2.0, "delta": 1e-3, "expected_batch_size": 8, "physical_batch_size": 8,
    },
}  # fmt: skip


class Containers:
    """A federation whose parties are containers; their folders lie below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "containers.conf").write_text(ENGINE)
        self.environment = {
            **os.environ,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "UID": str(USER),
            "GID": str(USER),
            "PODMAN_IGNORE_CGROUPSV1_WARNING": "1",
        }
        port = free_ports(1)[0]
        self.federation = folder / "federation.yaml"
        sites = [{"name": name} for name in NAMES]
        values = {"name": "boxes", "coordinator": {"hosts": [HOST], "port": port}, "sites": sites, "mutual_tls": True}
        self.federation.write_text(yaml.safe_dump(values))
        self.provision()
        for number, name in enumerate(NAMES):
            self.make_site(name)
            write_manifest(
                draw_manifest(self.of(name) / "data" / "images", 12, seed=number), self.of(name) / "data" / "manifest.csv"
            )
            self.change(name, "policy.yaml", min_patients=2, min_patients_private=2, min_validation_patients=1)
            self.change(name, "policy.yaml", max_epsilon=1e6, open_statistics=True)
            self.change(name, "site.yaml", device="cpu", threads=1)
        self.provision(*(f"--admit={name}={self.of(name) / 'keys' / 'node.pub'}" for name in NAMES))
        for name in NAMES:
            self.make_site(name)
        shutil.copytree(folder / "kits" / "coordinator", self.of("coordinator"))
        for party in ("coordinator", *NAMES):
            self.give_software(party)

    def of(self, party: str) -> Path:
        return self.folder / party

    def provision(self, *options: str) -> None:
        call("provision", str(self.federation), "--out", str(self.folder / "kits"), *options)

    def make_site(self, name: str) -> None:
        call("site", "init", str(self.of(name)), "--kit", str(self.folder / "kits" / f"{name}.tar.gz"))

    def change(self, party: str, file: str, **changes: Any) -> None:
        path = self.of(party) / file
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))

    def give_software(self, party: str) -> None:
        """Puts the wheelhouse into the build context, and the folder into the hands of the user of compose.yaml."""
        assert HOUSE
        shutil.copytree(HOUSE, self.of(party) / "software", dirs_exist_ok=True, copy_function=os.link)
        self.give_to_user(party)

    def give_to_user(self, party: str) -> None:
        for path in (self.of(party), *self.of(party).rglob("*")):
            if "software" not in path.parts:
                os.chown(path, USER, USER)

    def podman(self, *arguments: str, ok: bool = True) -> str:
        done = subprocess.run(
            ["podman", *arguments], capture_output=True, text=True, env=self.environment, timeout=1500, check=False
        )
        assert not ok or done.returncode == 0, f"podman {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def compose(self, party: str, *arguments: str, ok: bool = True) -> None:
        command = [*COMPOSE.split(), "-p", f"pneumofed-{party}", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=1500, check=False, cwd=self.of(party)
        )
        assert not ok or done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def box(self, party: str) -> str:
        return f"pneumofed-{party}_{'coordinator' if party == 'coordinator' else 'site'}_1"

    def build(self) -> None:
        """The build commands of the compose files, with another base."""
        for party, image in (("coordinator", "coordinator"), (NAMES[0], "site")):
            tag = yaml.safe_load((self.of(party) / "compose.yaml").read_text())["services"][image]["image"]
            arguments = (
                "--network=none" if image == "site" else "--network=host",
                f"--build-arg=BASE={BASE}",
                "-t",
                f"localhost/{tag}",
            )
            self.podman("build", *arguments, "-f", str(self.of(party) / "Containerfile"), str(self.of(party)))

    def up(self, party: str) -> None:
        self.compose(party, "up", "-d", "--no-build")
        until(lambda: self.healthy(party), 240.0, lambda: self.podman("logs", self.box(party), ok=False)[-3000:])

    def healthy(self, party: str) -> bool:
        """Whether the health check of the image passes now."""
        done = subprocess.run(
            ["podman", "healthcheck", "run", self.box(party)], capture_output=True, env=self.environment, timeout=120, check=False
        )
        return done.returncode == 0

    def run(self, name: str) -> dict[str, Any]:
        values = merge(TINY, PRIVATE | {"training": {"optimizer": "sgd"}})
        (self.of("coordinator") / f"{name}.yaml").write_text(yaml.safe_dump(values))
        self.give_to_user("coordinator")
        inside = (
            "pneumofed",
            "server",
            "run",
            name,
            "--config",
            f"/coordinator/{name}.yaml",
            "--folder",
            "/coordinator",
            "--wait",
        )
        self.podman("exec", self.box("coordinator"), *inside)
        summary: dict[str, Any] = json.loads((self.of("coordinator") / "runs" / name / "summary.json").read_text())
        return summary

    def end(self) -> None:
        for party in ("coordinator", *NAMES):
            self.compose(party, "down", ok=False)


def ledger_entries(site: Path) -> Sequence[str]:
    return [one.hash for lineage in Ledger(site / "work" / "ledger.sqlite").lineages() for one in lineage.entries]


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """Built and up."""
    if not (BASE and HOUSE and os.geteuid() == 0 and shutil.which("podman") and shutil.which("runc")):
        pytest.skip("needs root, podman, runc, PNEUMOFED_TEST_BASE and PNEUMOFED_TEST_WHEELHOUSE")
    containers = Containers(tmp_path_factory.mktemp("boxes"))
    try:
        containers.build()
        for party in ("coordinator", *NAMES):
            containers.up(party)
        yield containers
    finally:
        containers.end()


def test_a_container_is_nobody_special_and_writes_its_folder_only(boxes: Containers) -> None:
    for party in ("coordinator", NAMES[0]):
        box = boxes.box(party)
        assert boxes.podman("exec", box, "id", "-u").strip() == str(USER)
        status = boxes.podman("exec", box, "cat", "/proc/self/status")
        assert "CapEff:\t0000000000000000" in status and "NoNewPrivs:\t1" in status
        for place in ("/", "/opt/pneumofed", "/etc", "/usr/bin"):
            assert "wrote" not in boxes.podman("exec", box, "sh", "-c", f"touch {place}/x && echo wrote", ok=False)
    image = json.loads(boxes.podman("inspect", boxes.box(NAMES[0])))[0]["Image"]
    keys = ("(", "-name", "node.pub", "-o", "-name", "client.key", "-o", "-name", "pseudonym.key", ")")
    ours = ("-not", "-path", "*/site-packages/*")  # pynetdicom brings a key of its own tests
    found = boxes.podman("run", "--rm", "--network=none", "--user=0", image, "find", "/", "-xdev", *keys, *ours)
    assert found == ""


def test_a_run_a_lost_disk_a_restore_and_the_next_run(boxes: Containers, tmp_path: Path) -> None:
    assert boxes.run("first")["status"] == "succeeded"
    north, phrase = boxes.of("north"), tmp_path / "phrase"
    phrase.write_text("correct horse battery staple")
    call("site", "backup", str(tmp_path / "north.backup"), "--passphrase-file", str(phrase), "--site", str(north))
    held = ledger_entries(north)
    assert len(held) >= 2
    assert boxes.run("second")["status"] == "succeeded"
    spent = ledger_entries(north)
    boxes.compose("north", "down")
    shutil.rmtree(north)
    log = boxes.of("coordinator") / "state" / "audit.jsonl"
    evidence = ("--coordinator-log", str(log), "--passphrase-file", str(phrase))
    call("site", "restore", str(tmp_path / "north.backup"), str(north), *evidence)
    restored = ledger_entries(north)
    assert restored[: len(held)] == held and len(restored) == len(held) + 1
    call("privacy", "verify", "--site", str(north))
    assert len(spent) > len(held)
    boxes.give_software("north")
    boxes.up("north")
    assert boxes.run("third")["status"] == "succeeded"
    assert ledger_entries(north)[: len(restored)] == restored and len(ledger_entries(north)) > len(restored)
    call("audit", "verify", str(north / "work" / "audit.jsonl"))
