"""The coordinator's real processes, and a hospital's real SuperNode that comes in through the gateway."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from httpx import HTTPStatusError

from pneumofed.common.errors import ConfigError, FlowerError
from pneumofed.common.ops.app_bundle import write_app
from pneumofed.common.ops.lifeline import children_end_with_me
from pneumofed.common.ops.processes import (
    ALLOCATOR_SETTINGS,
    SERVING_ALLOCATOR,
    flower_environment,
    flower_tool,
    free_port,
    started_at,
    stop_group,
    without_proxy_on_loopback,
)
from pneumofed.common.wire.keys import NodeKey, public_pem, read_public_key
from pneumofed.server.operations import processes
from pneumofed.server.operations.control import open_control
from pneumofed.server.provisioning.identities import FederationConfig
from pneumofed.server.provisioning.provision import provision
from tests.server.federations import changed, federation, make_kits, needs_nginx, send, status_of

pytestmark = needs_nginx
SITES = [{"name": "alpha"}, {"name": "beta"}]


class Federation:
    """Kits on this machine, and the coordinator that runs on one of them."""

    def __init__(self, config: FederationConfig, kits: Path) -> None:
        self.config, self.kits = config, kits
        self.place = make_kits(config, kits)

    @property
    def folder(self) -> Path:
        return self.place.path

    def change(self, **changes: object) -> None:
        self.config = changed(self.config, **changes)
        provision(self.config, self.kits, with_keys=True)

    def site(self, name: str) -> processes.SiteStatus:
        return next(site for site in processes.process_status(self.folder).sites if site.name == name)


@contextmanager
def running(config: FederationConfig, kits: Path) -> Iterator[Federation]:
    """A federation whose daemons end with the tests, also where those are ended from outside."""
    federation = Federation(config, kits)
    with children_end_with_me(daemons=True):
        try:
            processes.start_processes(federation.folder)
            yield federation
        finally:
            processes.stop_processes(federation.folder)


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with running(federation(sites=SITES), tmp_path_factory.mktemp("kits")) as started:
        yield started


@contextmanager
def supernode(site: Path, program: list[str] | None = None) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The SuperNode of the kit in `site`, as the hospital starts it, and its log."""
    coordinator = next(line for line in (site / "connection.yaml").read_text().splitlines() if line.startswith("coordinator:"))
    work = site / "work"
    work.mkdir(exist_ok=True)
    environment = flower_environment(work / "flwr")
    command = [
        *(program or [flower_tool("flower-supernode")]),
        "--root-certificates", str(site / "keys" / "ca.crt"), "--superlink", coordinator.split()[1],
        "--auth-supernode-private-key", str(site / "keys" / "node"), "--port", str(free_port()),
    ]  # fmt: skip
    with (work / "supernode.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment | without_proxy_on_loopback(environment), cwd=work, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip
        try:
            yield process, work / "supernode.log"
        finally:
            stop_group(process)


def wait_for(condition: Callable[[], bool], seconds: float = 45.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def online_until(coordinator: Federation, name: str) -> float:
    with open_control(coordinator.place) as control:
        return next(node.online_until for node in control.nodes() if node.name == name)


def kill(pid: int | None) -> None:
    assert pid
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: started_at(pid) is None, 10)


def test_a_site_connects_with_its_kit_and_is_listed(coordinator: Federation) -> None:
    assert coordinator.site("alpha").detail == "registered, not connected yet"
    with supernode(coordinator.kits / "alpha"):
        assert wait_for(lambda: coordinator.site("alpha").connected)
        assert not coordinator.site("beta").connected
    assert wait_for(lambda: coordinator.site("alpha").detail.startswith("disconnected since"))


def test_every_process_serves(coordinator: Federation) -> None:
    state = processes.process_status(coordinator.folder)
    assert [(p.name, p.serving, p.detail) for p in state.processes] == [
        (name, True, "serving") for name in ("superlink", "superexec", "door")
    ]
    assert state.serving


def test_what_starts_the_coordinators_app_has_the_allocator_of_training_and_the_superlink_that_of_a_server(
    coordinator: Federation,
) -> None:
    superlink, superexec, _ = processes.build_parts(coordinator.place)
    for part, wanted in ((superlink, SERVING_ALLOCATOR), (superexec, ALLOCATOR_SETTINGS)):
        variables = Path(f"/proc/{part.daemon.pid()}/environ").read_bytes().decode().split("\0")
        assert {f"{name}={value}" for name, value in wanted.items()} <= set(variables)


def test_starting_twice_changes_nothing(coordinator: Federation) -> None:
    before = processes.process_status(coordinator.folder)
    assert processes.start_processes(coordinator.folder) == before


def test_a_hospital_reaches_neither_control_nor_runtime(coordinator: Federation) -> None:
    """With a good TLS connection and the very clients of Flower; the same calls work from the coordinator's side."""
    ca = coordinator.place.ca.read_bytes()
    gateway = f"127.0.0.1:{coordinator.place.settings().port}"
    version = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]
    with ControlHttpClient.from_server_address(gateway, False, ca, version) as control:
        for call in (
            lambda: control.ListNodes(ListNodesRequest()),
            lambda: control.RegisterNode(RegisterNodeRequest(public_key=b"k")),
        ):
            with pytest.raises(HTTPStatusError, match="404"):
                call()
    with (
        RuntimeHttpClient.from_server_address(gateway, False, ca, version) as runtime,
        pytest.raises(HTTPStatusError, match="404"),
    ):
        runtime.AcquireTask(AcquireTaskRequest())
    assert [site.node_id for site in processes.process_status(coordinator.folder).sites if site.node_id] != []


def test_a_task_is_not_given_without_the_secret_even_on_loopback(coordinator: Federation) -> None:
    address = f"127.0.0.1:{coordinator.place.settings().loopback.superlink}"
    version = [RuntimeVersionHttpInterceptor(component_name="SuperExec")]
    with (
        RuntimeHttpClient.from_server_address(address, False, coordinator.place.ca.read_bytes(), version) as runtime,
        pytest.raises(HTTPStatusError, match=r"401|403"),
    ):
        runtime.AcquireTask(AcquireTaskRequest())


def test_the_flwr_command_cannot_submit_from_a_hospital(coordinator: Federation, tmp_path: Path) -> None:
    home = tmp_path / "flwr"
    home.mkdir()
    gateway = coordinator.place.settings().port
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "x"\n[superlink.x]\naddress = "127.0.0.1:{gateway}"\nroot-certificates = "{coordinator.place.ca}"\n'
    )
    command = [flower_tool("flwr"), "run", str(write_app(tmp_path / "app")), "x", "--format", "json"]
    answer = subprocess.run(command, env=flower_environment(home), capture_output=True, text=True, check=False, timeout=60)
    assert "404" in answer.stdout + answer.stderr
    assert not json.loads(answer.stdout)["success"]


def test_an_unknown_key_is_refused(coordinator: Federation, tmp_path: Path) -> None:
    site = tmp_path / "stranger"
    shutil.copytree(coordinator.kits / "alpha", site, ignore=shutil.ignore_patterns("work"))
    (site / "keys" / "node").write_bytes(NodeKey.generate("stranger").private)
    with supernode(site) as (process, log):
        assert process.wait(45) != 0
        assert "could not be activated" in log.read_text() or "initialize the connection" in log.read_text()


def test_a_dead_process_is_told_and_brought_back(coordinator: Federation) -> None:
    gateway = processes.process_status(coordinator.folder).processes[2]
    kill(gateway.pid)
    state = processes.process_status(coordinator.folder)
    assert not state.serving
    assert state.processes[2].pid is None
    assert state.processes[2].detail.startswith("died")
    assert processes.start_processes(coordinator.folder).serving


def test_a_run_is_submitted_without_waiting_and_stopped(coordinator: Federation) -> None:
    run = processes.submit(coordinator.folder, {"experiment": "", "coordinator": "/nowhere.yaml"})
    assert processes.run_status(coordinator.folder, run) in ("pending", "starting", "running")
    processes.stop_run(coordinator.folder, run)
    assert wait_for(lambda: processes.run_status(coordinator.folder, run) == "finished:stopped", 20)
    processes.stop_run(coordinator.folder, run)  # has ended: nothing to do
    with pytest.raises(FlowerError, match="refuses"):
        processes.run_status(coordinator.folder, 1)


def test_a_revoked_site_is_cut_off_and_a_new_one_comes_in(coordinator: Federation) -> None:
    """The last test here: it changes the federation."""
    alpha = coordinator.site("alpha").node_id
    with supernode(coordinator.kits / "beta") as (process, _):
        assert wait_for(lambda: coordinator.site("beta").connected)
        coordinator.change(sites=[{"name": "alpha"}, {"name": "beta", "revoked": True}, {"name": "gamma"}])
        sites = {site.name: site for site in processes.sync_sites(coordinator.folder)}
        assert process.wait(60) is not None  # its next call is refused, and it ends
    assert (sites["beta"].detail, sites["beta"].node_id) == ("revoked", None)
    assert sites["alpha"].node_id == alpha
    assert sites["gamma"].node_id
    with supernode(coordinator.kits / "beta") as (process, _):
        assert process.wait(45) != 0
    assert not coordinator.site("beta").connected


@pytest.mark.slow
def test_a_restart_knows_the_sites_again(tmp_path: Path) -> None:
    with running(federation(sites=SITES), tmp_path) as coordinator:
        before = processes.process_status(coordinator.folder).sites
        processes.stop_processes(coordinator.folder)
        down = processes.process_status(coordinator.folder)
        assert not down.serving
        assert {site.detail for site in down.sites} == {"unknown: the SuperLink does not answer"}
        assert processes.start_processes(coordinator.folder).sites == before


@pytest.mark.slow
def test_a_site_stays_while_the_coordinator_is_killed_and_started_again(tmp_path: Path) -> None:
    with running(federation(sites=SITES), tmp_path) as coordinator, supernode(coordinator.kits / "alpha") as (process, _):
        assert wait_for(lambda: coordinator.site("alpha").connected)
        node = coordinator.site("alpha").node_id
        for killed in processes.process_status(coordinator.folder).processes:
            kill(killed.pid)
        processes.start_processes(coordinator.folder)
        before = online_until(coordinator, "alpha")
        assert wait_for(lambda: online_until(coordinator, "alpha") > before, 90)  # a heartbeat has come
        assert (process.poll(), coordinator.site("alpha").node_id) == (None, node)


def test_a_port_in_use_is_explained(tmp_path: Path) -> None:
    place = make_kits(federation(), tmp_path)
    port = place.settings().loopback.superlink
    server = subprocess.Popen(
        [sys.executable, "-c", f"import socket; s=socket.create_server(('127.0.0.1', {port})); print('up', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout
    server.stdout.readline()
    try:
        with pytest.raises(ConfigError, match=f"port {port} .SuperLink. is taken by another program"):
            processes.start_processes(place.path)
    finally:
        server.kill()
        server.communicate()


def test_a_folder_that_is_no_kit_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks coordinator\.yaml"):
        processes.start_processes(tmp_path)


def test_a_key_that_was_revoked_never_comes_back(tmp_path: Path) -> None:
    with running(federation(sites=SITES), tmp_path) as coordinator:
        key = read_public_key(coordinator.place.sites / "beta.pub")
        (coordinator.place.sites / "beta.pub").rename(tmp_path / "beta.pub")
        processes.sync_sites(coordinator.folder)
        (tmp_path / "beta.pub").rename(coordinator.place.sites / "beta.pub")
        with pytest.raises(FlowerError, match="no key twice"):
            processes.sync_sites(coordinator.folder)
        with open_control(coordinator.place) as control:
            assert [n.status for n in control.nodes() if n.public_key == public_pem(key)] == ["unregistered"]


@pytest.mark.slow
def test_the_isolated_serverapp_runs_and_its_failure_is_told(tmp_path: Path) -> None:
    with running(federation(sites=SITES), tmp_path) as coordinator:
        run = processes.submit(coordinator.folder, {"experiment": "", "coordinator": "/nowhere.yaml"})
        assert wait_for(lambda: processes.run_status(coordinator.folder, run).startswith("finished"), 120)
        assert processes.run_status(coordinator.folder, run) == "finished:failed"
        assert "/nowhere.yaml does not exist" in processes.run_log(coordinator.folder, run)


@pytest.mark.slow
def test_a_site_connects_with_mutual_tls_and_not_without(tmp_path: Path) -> None:
    with running(federation(sites=SITES, mutual_tls=True), tmp_path) as coordinator:
        keys = coordinator.kits / "alpha" / "keys"
        program = [sys.executable, "-P", "-m", "pneumofed.client.site.supernode"]
        pair = ["--client-certificate", str(keys / "client.crt"), "--client-key", str(keys / "client.key")]
        with supernode(coordinator.kits / "alpha", [*program, *pair]):
            assert wait_for(lambda: coordinator.site("alpha").connected)
        with supernode(coordinator.kits / "beta") as (process, _):
            assert process.wait(60) != 0
        assert ask_with_certificate(coordinator, "beta") == 415  # the SuperLink's own answer to something else than protobuf
        coordinator.change(sites=[{"name": "alpha"}, {"name": "beta", "revoked": True}])
        processes.start_processes(coordinator.folder)
        assert wait_for(lambda: ask_with_certificate(coordinator, "beta") == 404, 10)


def ask_with_certificate(coordinator: Federation, name: str) -> int:
    keys = coordinator.kits / name / "keys"
    context = ssl.create_default_context(cafile=str(coordinator.place.ca))
    context.load_cert_chain(keys / "client.crt", keys / "client.key")
    request = b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    return status_of(send(coordinator.place.settings().port, request, context))
