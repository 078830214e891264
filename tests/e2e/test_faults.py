"""What breaks in real federations, broken on purpose: the run goes on or ends honestly, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pneumofed.common.audit.log import read_entries
from pneumofed.common.data.manifest import read_manifest
from pneumofed.common.ops.processes import started_at
from pneumofed.common.wire.keys import write_node_key
from pneumofed.server.runs.checkpoints import read_checkpoint
from tests.e2e.real import NAMES, RealFederation, call, family, three_sources, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = {"local_epochs": 400}
"""Training that takes some twenty seconds, so that it can be interrupted."""
MANY = 40
"""Rounds of runs that are stopped when what was to be seen has been seen."""


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[RealFederation]:
    with three_sources(tmp_path) as sources:
        federation = RealFederation(tmp_path, sources)
        try:
            federation.start()
            yield federation
        finally:
            federation.stop()


def client_process(federation: RealFederation, name: str) -> int:
    """The process that trains at the site, once it has written down what it was asked; an earlier one may still be on its way out."""
    log = federation.site(name) / "work" / "audit.jsonl"

    def find() -> int | None:
        asked = [entry for entry in read_entries(log) if entry.event == "request" and entry.facts["work"] == "train"]
        pid = federation.supernode_pid(name) if asked else None
        gates = [member for member in family(pid) if is_gate(member)] if pid else []
        return max(gates, key=lambda gate: int((started_at(gate) or "0").split()[-1]), default=None)

    return int(until(find, 60, lambda: f"{name} started no client process"))


def is_gate(pid: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline")
    return command.exists() and b"pneumofed.client.site.code_gate" in command.read_bytes()


def failures(federation: RealFederation, run: str) -> list[dict[str, str]]:
    return [dict(line.failures) for line in federation.run_folder(run).read_history()]


def trains_again(federation: RealFederation, run: str, site: str, after: int) -> int:
    """The first round after `after` in which the site's update arrived, as soon as that round is done."""

    def find() -> int | None:
        for event in federation.events(run):
            wanted = event["kind"] == "answered" and event.get("site") == site and event.get("task") == "train"
            if wanted and event["round"] > after and len(federation.run_folder(run).read_history()) >= event["round"]:
                return int(event["round"])
        return None

    return int(until(find, 300, lambda: f"{site} did not come back: {federation.tell(run)}"))


def end(federation: RealFederation, run: str) -> None:
    """Stops the run, which must still be going on, and checks that its state says so."""
    assert federation.state(run)["state"] == "running", federation.tell(run)
    call("server", "stop", run, "--folder", str(federation.coordinator))
    assert federation.wait(run, 60)["state"] == "stopped"


def assert_nothing_lost(federation: RealFederation) -> None:
    """Every site still has its images, and its audit log holds."""
    for name in NAMES:
        assert len(read_manifest(federation.site(name) / "data" / "manifest.csv")) == 24
        call("audit", "verify", str(federation.site(name) / "work" / "audit.jsonl"))
    call("audit", "verify", str(federation.coordinator / "state" / "audit.jsonl"))


def test_a_site_killed_in_training_is_named_and_joins_again(federation: RealFederation) -> None:
    federation.submit("run", rounds=MANY, training=LONG)
    federation.wait_for("run", "asked", 1, site="river", task="train")
    client_process(federation, "river")
    federation.signal_site("river", signal.SIGKILL)
    federation.start_site("river")
    again = trains_again(federation, "run", "river", after=1)
    told = failures(federation, "run")
    assert "lost" in told[0]["river"] and not {"north", "hill"} & set(told[0]), told
    assert "river" in federation.run_folder("run").read_history()[again - 1].sites
    end(federation, "run")
    assert_nothing_lost(federation)


def test_a_site_killed_while_sending_is_named_and_joins_again(federation: RealFederation) -> None:
    """ResNet18's 45 MB go out in pieces for seconds; the audit log tells of an answer just before it leaves."""
    federation.submit("run", rounds=MANY, model={"name": "resnet18"})
    log, pid = federation.site("river") / "work" / "audit.jsonl", federation.supernode_pid("river")
    assert pid is not None

    def answered() -> bool:
        return any(entry.event == "answer" and entry.facts["work"] == "train" for entry in read_entries(log))

    until(answered, 120, lambda: f"river did not train: {federation.tell('run')}")
    for member in family(pid):
        os.kill(member, signal.SIGKILL)
    federation.start_site("river")
    trains_again(federation, "run", "river", after=1)
    told = failures(federation, "run")
    assert "river" in told[0] and not {"north", "hill"} & set(told[0]), told
    end(federation, "run")
    assert_nothing_lost(federation)


def test_a_client_process_killed_is_named_and_the_site_goes_on(federation: RealFederation) -> None:
    federation.submit("run", rounds=MANY, training=LONG)
    federation.wait_for("run", "asked", 1, site="hill", task="train")
    subprocess.run(["kill", "-9", str(client_process(federation, "hill"))], check=True)
    trains_again(federation, "run", "hill", after=1)
    assert "hill" in failures(federation, "run")[0]
    end(federation, "run")
    assert_nothing_lost(federation)


def test_a_site_paused_past_the_deadline_is_late_counted_and_joins_again(federation: RealFederation) -> None:
    federation.submit("run", rounds=MANY, training=LONG, strategy={"round_timeout_sec": 50.0, "min_sites": 1})
    federation.wait_for("run", "asked", 1, site="north", task="train")
    client_process(federation, "north")
    federation.signal_site("north", signal.SIGSTOP)
    federation.wait_for("run", "round_done", 1, seconds=200)
    assert "north" in failures(federation, "run")[0]
    federation.resume_process("north")
    trains_again(federation, "run", "north", after=1)
    end(federation, "run")
    assert_nothing_lost(federation)


def test_the_coordinator_killed_in_a_round_resumes_with_the_weights_of_an_unbroken_run(federation: RealFederation) -> None:
    federation.run("unbroken", rounds=3)
    federation.submit("broken", rounds=3)
    federation.wait_for("broken", "round_started", 3)
    for pid in coordinator_processes(federation):
        subprocess.run(["kill", "-9", str(pid)], check=False)
    told = call("server", "status", "--folder", str(federation.coordinator), ok=(0, 1)).stdout
    assert "died" in told
    call("server", "start", "--folder", str(federation.coordinator))
    state = federation.wait("broken", 120)
    assert state["state"] == "failed" and "resume" in state["reason"], state
    call("server", "resume", "broken", "--folder", str(federation.coordinator))
    until(lambda: federation.state("broken")["state"] == "succeeded", 300, lambda: federation.tell("broken"))
    first, second = (read_checkpoint(federation.run_folder(name).last_checkpoint).arrays for name in ("unbroken", "broken"))
    assert (first.parameters == second.parameters).all()
    assert len(federation.run_folder("broken").read_history()) == 3
    assert_nothing_lost(federation)


def coordinator_processes(federation: RealFederation) -> list[int]:
    found = subprocess.run(["pgrep", "-f", str(federation.coordinator)], capture_output=True, text=True, check=False).stdout
    roots = [int(pid) for pid in found.split()]
    return sorted({member for root in roots for member in family(root)})


def test_a_network_cut_for_a_minute_loses_no_finished_work(federation: RealFederation) -> None:
    """The door is stopped while the sites train, and opened again within the deadline: their updates still arrive."""
    federation.submit("run", rounds=2, training=LONG)
    federation.wait_for("run", "asked", 1, site="hill", task="train")
    client_process(federation, "hill")
    door = json.loads((federation.coordinator / "state" / "door.pid").read_text())["pid"]
    for sign, pause in ((signal.SIGSTOP, 60.0), (signal.SIGCONT, 0.0)):
        for pid in family(door):
            subprocess.run(["kill", f"-{sign.value}", str(pid)], check=False)
        time.sleep(pause)
    assert federation.wait("run", 600)["state"] == "succeeded", federation.tell("run")
    history = federation.run_folder("run").read_history()
    assert sorted(history[-1].sites) == sorted(NAMES), federation.tell("run")
    assert_nothing_lost(federation)


def test_a_full_disk_at_a_site_is_told_and_the_others_go_on(federation: RealFederation, tmp_path: Path) -> None:
    work = federation.site("river") / "work"
    call("site", "stop", "--site", str(federation.site("river")))
    shutil.rmtree(work)
    work.mkdir(mode=0o700)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(work)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        federation.start_site("river", ok=range(256))
        (work / "ballast").write_bytes(b"0" * (max(0, shutil.disk_usage(work).free - 4096)))
        federation.submit("run", rounds=1, strategy={"wait_for_sites": 2, "min_sites": 2})
        assert federation.wait("run", 300)["state"] == "succeeded", federation.tell("run")
        history = federation.run_folder("run").read_history()
        assert {"north", "hill"} <= set(history[0].sites)
        told = {**history[0].absent, **history[0].failures}
        assert any("river" in site for site in told) or "river" in history[0].sites, told
    finally:
        call("site", "stop", "--site", str(federation.site("river")), ok=range(256))
        subprocess.run(["umount", "-l", str(work)], check=False)


def test_a_key_revoked_in_a_run_shuts_the_site_out_and_the_run_goes_on(federation: RealFederation) -> None:
    federation.submit("run", rounds=500, strategy={"min_sites": 2, "round_timeout_sec": 90.0})  # more than there is time for
    federation.wait_for("run", "round_done", 1)
    federation.federation["sites"] = [{"name": name, **({"revoked": True} if name == "hill" else {})} for name in NAMES]
    federation.provision()
    federation.install_coordinator_kit()
    call("server", "start", "--folder", str(federation.coordinator))

    def shut_out() -> int | None:
        history = federation.run_folder("run").read_history()
        return next((line.round for line in history if set(line.sites) == {"north", "river"}), None)

    first = int(until(shut_out, 300, lambda: federation.tell("run")))
    federation.wait_for("run", "round_done", first + 2)
    later = federation.run_folder("run").read_history()[first - 1 :]
    assert [set(line.sites) for line in later] == [{"north", "river"}] * len(later), federation.tell("run")
    end(federation, "run")


def test_an_unknown_key_and_another_version_of_the_code_are_refused_and_the_run_goes_on(federation: RealFederation) -> None:
    federation.change_yaml(federation.site("river") / "policy.yaml", approved_apps=["0" * 64])
    call("site", "stop", "--site", str(federation.site("hill")))
    key = federation.site("hill") / "keys" / "node"
    key.unlink()
    (federation.site("hill") / "keys" / "node.pub").unlink()
    write_node_key(key.parent, "hill")
    done = federation.start_site("hill", ok=range(256))
    assert done.returncode != 0 and "preflight" in done.stderr
    federation.submit("run", rounds=1, strategy={"wait_for_sites": 1, "min_sites": 1})
    assert federation.wait("run", 300)["state"] == "succeeded", federation.tell("run")
    line = federation.run_folder("run").read_history()[0]
    assert set(line.sites) == {"north"}
    assert "approved_apps" in line.absent["river"]
