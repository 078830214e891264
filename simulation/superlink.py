"""A private Flower SuperLink that simulates, for the time of one run, and the supported commands that submit to it.

`flwr run` by itself would start a detached SuperLink that never stops, and it exits with 0 also when the run failed. So each run gets a
SuperLink of its own in a temporary FLWR_HOME, is asked for its status when it has ended, and is cleaned up whatever happens.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pneumofed.common.errors import ConfigError, FlowerError
from pneumofed.common.ops.lifeline import children_end_with_me
from pneumofed.common.ops.processes import descendants, flower_environment, flower_tool, free_port, stop_group

CONNECTION_NAME = "private"
START_TIMEOUT_SEC = 60.0
STATUS_TIMEOUT_SEC = 20.0
EXECUTOR, EXECUTOR_PATIENCE_SEC = "flower-superexec", 20.0
"""How long the status of an ended run is asked for: Flower writes it a few seconds after the stream of logs has ended."""


@dataclass(frozen=True)
class Superlink:
    """A running SuperLink: its environment, and the neutral folder that it and its workers start in."""

    environment: Mapping[str, str]
    folder: Path
    pid: int

    @property
    def executes(self) -> bool:
        """Whether its SuperExec lives, which alone starts apps: Flower waits for a dead one without end and without a word.
        Where there is no /proc it is taken to live."""
        return not Path("/proc/self").exists() or any(EXECUTOR in _command_line(pid) for pid in descendants(self.pid))


@dataclass(frozen=True)
class Resources:
    """What a simulation may use of the machine or of a Ray cluster.

    Attributes:
        nodes: number of virtual nodes.
        client_cpus: CPUs of each node while it answers.
        client_gpus: share of a GPU of each node while it answers.
        cpus: of Ray in all; None: all of the machine. Not used with `ray_address`: the cluster has its own.
        gpus: likewise.
        ray_address: of a running Ray cluster; None: Ray is started on this machine.
        verbose: whether Flower writes its debug log.
    """

    nodes: int
    client_cpus: float = 1
    client_gpus: float = 0.0
    cpus: int | None = None
    gpus: float | None = None
    ray_address: str | None = None
    verbose: bool = False

    def check(self) -> None:
        """Refuses what would hang: Ray waits for ever for an actor that is larger than the machine, and for a cluster that is not there.

        Raises:
            ConfigError: a client needs more than there is, or no cluster answers.
        """
        if self.ray_address is not None:
            check_cluster(self.ray_address)
            return
        available = self.cpus or os.cpu_count() or 1
        if self.client_cpus > available:
            raise ConfigError(
                f"each hospital asks for {self.client_cpus:g} CPUs but {available} are there; lower client_resources.num_cpus"
            )
        gpus = (count_gpus() if self.gpus is None else self.gpus) if self.client_gpus > 0 else 0
        if self.client_gpus > gpus:
            raise ConfigError(
                f"each hospital asks for {self.client_gpus:g} of a GPU but {f'{gpus:g}' if gpus else 'none'} is there; "
                "leave out --gpus (client_resources.num_gpus) to train on the CPU"
            )

    def federation_config(self) -> str:
        """Returns the value of `flwr run --federation-config`."""
        values = {
            "num-supernodes": self.nodes,
            "client-resources-num-cpus": self.client_cpus,
            "client-resources-num-gpus": float(self.client_gpus),
            "init-args-num-cpus": self.cpus,
            "init-args-num-gpus": self.gpus,
            "verbose": "true" if self.verbose else None,
        }
        return " ".join(f"{key}={value}" for key, value in values.items() if value is not None)


def count_gpus() -> int:
    """Counts the GPUs of this machine that its processes may see, without loading torch: those of NVIDIA, else those of AMD."""
    driver = Path("/proc/driver/nvidia/gpus")
    found = len(list(driver.iterdir())) if driver.is_dir() else 0
    if not found and (tool := shutil.which("nvidia-smi")):  # under WSL the driver has no such folder
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
        found = listed.stdout.count("GPU ") if listed.returncode == 0 else 0
    if not found:
        nodes = Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
        return sum(node.read_text(encoding="ascii").strip() != "0" for node in nodes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else min(found, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def check_cluster(address: str) -> None:
    """Refuses the address of a Ray cluster at which nothing listens.

    Args:
        address: `HOST:PORT`, `ray://HOST:PORT`, or `auto` for the cluster that this machine belongs to.

    Raises:
        ConfigError: it is no address, or nobody answers.
    """
    if address == "auto":
        if not Path(tempfile.gettempdir(), "ray", "ray_current_cluster").is_file():
            raise ConfigError("--ray-address auto: this machine belongs to no Ray cluster; start one with `ray start --head`")
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--ray-address: expected HOST:PORT, ray://HOST:PORT or auto, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except OSError as error:
        reason = error.strerror or "it does not answer"
        raise ConfigError(
            f"--ray-address {address}: no Ray cluster there ({reason}); start one with `ray start --head`"
        ) from None


@contextmanager
def private_superlink(log: Path, extra_environment: Mapping[str, str]) -> Iterator[Superlink]:
    """Starts a SuperLink on a free port of the loopback interface, and stops it with all its children at the end, or at this process's own.

    Args:
        log: file that takes its output, at the end.
        extra_environment: wins over the variables that a SuperLink gets otherwise.

    Raises:
        FlowerError: it does not come up; the text ends with its last words.
    """
    with children_end_with_me(), tempfile.TemporaryDirectory(prefix="pneumofed-flower-") as name, log.open("ab") as output:
        folder, port = Path(name), free_port()
        environment = {**flower_environment(folder), **extra_environment}
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION_NAME}"\n\n[superlink.{CONNECTION_NAME}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
            encoding="utf-8",
        )
        command = [flower_tool("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(
            [*command, "--disable-runtime-dependency-installation"],
            env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            _wait_until_up(process, port, log)
            yield Superlink(environment, folder, process.pid)
        finally:
            stop_group(process)


def run_app(
    superlink: Superlink,
    app: Path,
    run_config: Mapping[str, Any],
    resources: Resources,
    output: IO[Any] | None,
    watch: Callable[[], None],
) -> None:
    """Runs a Flower app on the SuperLink and waits for its end.

    Args:
        superlink: running.
        app: folder of the app.
        run_config: values of the app's run config, which are text, numbers or booleans.
        resources: of the nodes.
        output: file that takes the stream of logs; None: this process's own standard output.
        watch: called about twice a second, and once at the end.

    Raises:
        FlowerError: the run was refused or failed, or what starts apps has ended.
    """
    settings = superlink.folder / "run_config.toml"
    settings.write_text("".join(f"{json.dumps(key)} = {_toml(value)}\n" for key, value in run_config.items()), encoding="utf-8")
    command = [
        flower_tool("flwr"),
        "run",
        str(app),
        CONNECTION_NAME,
        "--stream",
        "--federation-config",
        resources.federation_config(),
    ]
    if run_config:
        command += ["--run-config", str(settings)]
    process = subprocess.Popen(
        command, env=superlink.environment, cwd=superlink.folder, stdout=output, stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )  # fmt: skip
    seen = time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.5)
            watch()
            if superlink.executes:
                seen = time.monotonic()
            elif time.monotonic() - seen > EXECUTOR_PATIENCE_SEC:
                raise FlowerError(f"Flower's {EXECUTOR} is not running, so nothing can start; its last words are in the log")
    finally:
        stop_group(process)
    watch()
    _check_status(superlink)


def _check_status(superlink: Superlink) -> None:
    """Raises `FlowerError` unless the run ended well."""
    deadline = time.monotonic() + STATUS_TIMEOUT_SEC
    status = "unknown"
    while time.monotonic() < deadline:
        command = [flower_tool("flwr"), "list", CONNECTION_NAME, "--format", "json"]
        listed = subprocess.run(
            command, env=superlink.environment, cwd=superlink.folder, capture_output=True, text=True, check=False
        )
        status = _status_in(listed.stdout)
        if status == "finished:completed":
            return
        if status.startswith("finished"):
            break
        time.sleep(1.0)
    raise FlowerError(f"Flower ended the run as '{status}'")


def _status_in(text: str) -> str:
    try:
        runs = json.loads(text)["runs"]
    except (ValueError, KeyError):
        return "unknown"
    return str(runs[0]["status"]) if runs else "refused"


def _wait_until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SEC
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
    raise FlowerError(f"the SuperLink did not start within {START_TIMEOUT_SEC:g} s: {' '.join(last) or 'it said nothing'}")


def _toml(value: Any) -> str:
    """A TOML scalar; JSON's strings, numbers and booleans are TOML's."""
    return json.dumps(value)


def _command_line(pid: int) -> str:
    """Empty for a process that has ended (proc(5))."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
