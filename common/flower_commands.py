"""Flower's own commands as child processes: where they lie, the environment they need, and how they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from common.errors import FlowerError
from common.processes import descendants, started_at

SWITCHES = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else every run installs our dependencies anew, and fails offline
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
ALLOCATOR = {
    # glibc gives large blocks back to the system after each step and faults them in again: 8 to 13 % of a ResNet18 step on a CPU.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_TOP_PAD_": str(2**26),
    "THP_MEM_ALLOC_ENABLE": "1",  # torch asks for huge pages
}


def flower_tool(name: str) -> str:
    """Path of the command `name` of this Python's own environment.

    Raises:
        FlowerError: Flower is not installed beside this Python.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise FlowerError(f"{name} is not installed beside {sys.executable}; install with pip install 'flwr[simulation]'")
    return str(path)


def flower_environment(home: Path, first_on_path: Path | None = None) -> dict[str, str]:
    """Environment of a Flower process whose state lies in `home` (FLWR_HOME).

    PATH begins with `first_on_path`, if given, and this Python's commands: Flower starts its helpers by their names.
    """
    own = [str(first_on_path)] if first_on_path else []
    path = os.pathsep.join([*own, str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**ALLOCATOR, **os.environ, **SWITCHES, "FLWR_HOME": str(home), "PATH": path}


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """Asks the process and its children (it leads a session of its own) to stop, and makes them after ten seconds.

    Children that lead sessions of their own, as those of Ray do, are found before their parents end and would lose them.
    """
    family = {pid: started_at(pid) for pid in descendants(process.pid)}
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=patience)
            break
        except ProcessLookupError:
            process.wait()
            break
        except subprocess.TimeoutExpired:
            continue
    for pid, started in family.items():
        if started_at(pid) == started:  # else the number is another program's by now
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
