"""The promise: what pneumofed starts ends with it within ten seconds, also after `kill -9`. Daemons outlive the command that started
them, and their children end with them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from pneumofed.common.ops.processes import started_at
from tests.adversary.marked import PYTHON, kill_at, marked, moments

ROOT = Path(__file__).parents[2]
HOUSES = ("client", "common", "inference", "pneumofed", "server", "simulation")
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
GRANDCHILD = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True).wait()"
PARENT = f"""
import subprocess, sys, time
from pneumofed.common.ops.lifeline import children_end_with_me
with children_end_with_me():
    for _ in range(3):
        subprocess.Popen([sys.executable, "-c", {GRANDCHILD!r}], start_new_session=True)
    time.sleep(100)
"""
DAEMON = """
import os, sys, time
from contextlib import nullcontext
from pathlib import Path
from pneumofed.common.ops.lifeline import children_end_with_me
from pneumofed.common.ops.processes import Daemon
with children_end_with_me(daemons=True) if sys.argv[1] == "bound" else nullcontext():
    Daemon("thing", Path()).start(sys.argv[2:], os.environ, Path())
    time.sleep(100)
"""
ROOM = """
from functools import partial
from pneumofed.inference.reading_room.worker import Worker
import time
if __name__ == "__main__":
    Worker(partial(time.sleep, 100), 1000, 1.0).start()
"""
POOL = """
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pneumofed.common.ops.lifeline import children_end_with_me
if __name__ == "__main__":
    with children_end_with_me(), ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(time.sleep, [100, 100]))
"""

HOSPITALS = """
import time
from pneumofed.simulation.workers import HospitalWorkers
with HospitalWorkers(2):
    time.sleep(100)
"""


@pytest.mark.parametrize("moment", moments(3, 0.4, seed=0))
def test_children_and_theirs_end_with_a_killed_parent(tmp_path: Path, moment: float) -> None:
    with marked() as family:
        parent = family.start([PYTHON, "-c", PARENT], tmp_path)
        family.wait_for(2)  # the parent and a first child
        assert kill_at(parent, moment)
        assert family.all_gone(), family.living()


@pytest.mark.parametrize(("script", "count"), [(ROOM, 3), (POOL, 4), (HOSPITALS, 2)])  # with its helpers
def test_worker_processes_end_with_a_killed_parent(tmp_path: Path, script: str, count: int) -> None:
    (tmp_path / "script.py").write_text(script)
    with marked() as family:
        parent = family.start([PYTHON, "script.py"], tmp_path)
        family.wait_for(count)
        assert kill_at(parent, 0.5)
        assert family.all_gone(), family.living()


@pytest.mark.parametrize("bound", [False, True])
def test_a_daemon_outlives_its_command_unless_it_is_bound_to_it(tmp_path: Path, bound: bool) -> None:
    with marked() as family:
        starter = family.start([PYTHON, "-c", DAEMON, "bound" if bound else "free", PYTHON, "-c", STUBBORN], tmp_path)
        pid = daemon(tmp_path)
        starter.kill()
        starter.wait()
        if bound:
            assert family.all_gone(), family.living()
        else:
            time.sleep(1.0)
            assert list(family.living()) == [pid]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_the_children_of_a_daemon_end_with_it(tmp_path: Path, how: signal.Signals) -> None:
    with marked() as family:
        starter = family.start([PYTHON, "-c", DAEMON, "free", PYTHON, "-c", GRANDCHILD], tmp_path)
        pid = daemon(tmp_path)
        family.wait_for(3)
        starter.kill()
        starter.wait()
        os.kill(pid, how)
        assert family.all_gone(), family.living()


@pytest.mark.parametrize("bound", [False, True])
def test_a_child_that_hides_its_environment_ends_too(tmp_path: Path, bound: bool) -> None:
    """As nginx, which clears it and writes its title over it."""
    hidden = ["sh", "-c", "env -i sleep 98765 & wait"]
    with marked() as family:
        starter = family.start([PYTHON, "-c", DAEMON, "bound" if bound else "free", *hidden], tmp_path)
        pid = daemon(tmp_path)
        child = wait_for_child(pid)
        os.kill(starter.pid if bound else pid, signal.SIGKILL)
        assert ended(child)
        starter.kill()
        starter.wait()


def test_every_process_of_the_product_is_started_in_the_one_way() -> None:
    starts = re.compile(r"\bPopen\(|ProcessPoolExecutor\(|\.Process\(|os\.(fork|posix_spawn|exec\w+)\(|create_subprocess_|Pool\(")
    guarded = re.compile(r"with children_end_with_me\(|lead_command\(")
    files = [path for house in HOUSES for path in (ROOT / house).rglob("*.py") if not path.is_symlink()]
    starting = {path.relative_to(ROOT).as_posix() for path in files if starts.search(path.read_text())}
    loose = {name for name in starting if not guarded.search((ROOT / name).read_text())}
    assert len(starting) >= 5
    assert loose <= {"common/ops/lifeline.py"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["flower", "local"])
@pytest.mark.parametrize("moment", moments(int(os.environ.get("PNEUMOFED_KILLS", "5")), 45.0, seed=1))
def test_nothing_of_a_killed_simulation_lives_on(tmp_path: Path, moment: float, engine: str) -> None:
    command = [PYTHON, "-m", "pneumofed.cli.main", "simulate", "--phantoms", "24", "--hospitals", "2", "--image-size", "32"]
    settings = ["--set", "model.name=small_cnn", "--set", "rounds=1000", "--engine", engine, "--out", str(tmp_path / "run")]
    with marked() as family:
        assert kill_at(family.start([*command, *settings], tmp_path), moment), (tmp_path / "out").read_text()
        assert family.all_gone(), family.living()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_of_a_killed_test_of_a_real_federation_lives_on(tmp_path: Path) -> None:
    if not (shutil.which("nginx") or Path("/usr/sbin/nginx").exists()):
        pytest.skip("needs nginx")
    script = f"""
from pathlib import Path
from tests.e2e.real import RealFederation, kaggle_source
from tests.tiny import draw_manifest
import time
folder = Path({str(tmp_path)!r})
sources = {{name: kaggle_source(draw_manifest(folder / name, 8, seed=n), folder / ("k" + name)) for n, name in enumerate(("a", "b"))}}
federation = RealFederation(folder, sources)
federation.start()
federation.submit("run", rounds=40)
federation.wait_for("run", "asked", 1, task="train")
print("ready", flush=True)
time.sleep(600)
"""
    with marked() as family:
        test = family.start([PYTHON, "-c", script], tmp_path, {"PYTHONPATH": str(ROOT)})
        deadline = time.monotonic() + 300
        while "ready" not in (out := (tmp_path / "out").read_text()):
            assert test.poll() is None and time.monotonic() < deadline, out
            time.sleep(0.5)
        door = daemon(tmp_path / "coordinator" / "state", "door")
        assert len(family.living()) >= 6
        assert kill_at(test, 0.0)
        assert family.all_gone(), family.living()
        assert ended(door)


def daemon(state: Path, name: str = "thing") -> int:
    """The number in the pid file, once it is there."""
    deadline, path = time.monotonic() + 20, state / f"{name}.pid"
    while not path.exists():
        assert time.monotonic() < deadline, (state / "out").read_text()
        time.sleep(0.02)
    return int(json.loads(path.read_text())["pid"])


def wait_for_child(pid: int) -> int:
    deadline = time.monotonic() + 20
    while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) or not is_sleep(int(found[0])):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(found[0])


def is_sleep(pid: int) -> bool:
    return b"98765" in Path(f"/proc/{pid}/cmdline").read_bytes() and not Path(f"/proc/{pid}/environ").read_bytes()


def ended(pid: int) -> bool:
    """Whether it does within ten seconds."""
    deadline = time.monotonic() + 10
    while started_at(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return started_at(pid) is None
