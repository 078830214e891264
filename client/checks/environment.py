"""Is this machine fit: versions, disk, memory, graphics card, work folder, clock."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from client.checks.finding import Finding, Level
from client.folder import SiteFolder

FLOWER = "1.41"
PYTHON = ((3, 11), (3, 13))
GIB = 1 << 30
DISK_GIB, MEMORY_GIB = (1.0, 5.0), (2.0, 4.0)
"""Less than the first is a problem, less than the second a warning. A ResNet18 with its actors takes 1 to 2 GiB of memory."""


def check(folder: SiteFolder) -> Iterator[Finding]:
    yield check_python(sys.version_info[:2])
    yield check_flower()
    yield Finding("environment", "pneumofed", "ok", f"version {version('pneumofed')}")
    yield check_work_folder(folder.work)
    yield check_disk(folder.work)
    yield check_memory(Path("/proc/meminfo"))
    yield check_device(folder.config.device)
    yield check_time_service()


def check_python(found: tuple[int, int]) -> Finding:
    fits = PYTHON[0] <= found < PYTHON[1]
    remedy = "" if fits else "install Python 3.11 or 3.12 and pneumofed into it"
    return Finding("environment", "Python", "ok" if fits else "problem", f"version {found[0]}.{found[1]}", remedy)


def check_flower() -> Finding:
    """All parties of a federation need the same major and minor version of Flower."""
    try:
        found = version("flwr")
    except PackageNotFoundError:
        return Finding("environment", "Flower", "problem", "not installed", f"pip install 'flwr=={FLOWER}.*'")
    if found.split(".")[:2] == FLOWER.split("."):
        return Finding("environment", "Flower", "ok", f"version {found}")
    return Finding("environment", "Flower", "problem", f"version {found}, needed is {FLOWER}", f"pip install 'flwr=={FLOWER}.*'")


def check_work_folder(work: Path) -> Finding:
    try:
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work) as file:
            file.write(b"x")
    except OSError as error:
        remedy = "give the service's user this folder, or set work_dir in site.yaml to one that it owns"
        return Finding("environment", "work folder", "problem", f"{work} cannot be written: {error.strerror}", remedy)
    if work.stat().st_mode & 0o077:
        return Finding("environment", "work folder", "warning", f"others can read {work}", f"chmod 700 {work}")
    return Finding("environment", "work folder", "ok", "can be written")


def check_disk(work: Path) -> Finding:
    place = next(path for path in (work, *work.parents) if path.exists())
    free = shutil.disk_usage(place).free / GIB
    remedy = f"free some space, or set work_dir in site.yaml to a larger disk; {DISK_GIB[1]:g} GiB are comfortable"
    return _amount("disk", free, DISK_GIB, "free", remedy)


def check_memory(meminfo: Path) -> Finding:
    """`MemAvailable` of proc(5)."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        available = int(lines["MemAvailable"].split()[0]) * 1024 / GIB
    except (OSError, ValueError, KeyError):
        return Finding("environment", "memory", "ok", "not known on this system")
    return _amount("memory", available, MEMORY_GIB, "available", f"stop other programs; {MEMORY_GIB[1]:g} GiB are comfortable")


def check_device(device: str) -> Finding:
    """`auto` takes a graphics card where torch finds one; a card that is there and that torch cannot use is worth a word."""
    import torch

    if torch.cuda.is_available():
        number = int(device.partition(":")[2] or 0) if device.startswith("cuda") else 0
        if number >= torch.cuda.device_count():
            sentence = f"site.yaml asks for {device}; {torch.cuda.device_count()} are there"
            return Finding("environment", "graphics card", "problem", sentence, "set device in site.yaml to cuda:0 or auto")
        return Finding("environment", "graphics card", "ok", torch.cuda.get_device_name(number))
    remedy = "install the NVIDIA driver and the torch build for it, or set device: auto in site.yaml"
    if device.startswith("cuda"):
        return Finding("environment", "graphics card", "problem", f"site.yaml asks for {device} and torch finds none", remedy)
    if device == "auto" and Path("/dev/nvidia0").exists():
        return Finding("environment", "graphics card", "warning", "there is one that torch cannot use", remedy)
    return Finding("environment", "graphics card", "ok", "none; training uses the processor")


def check_time_service() -> Finding:
    """Whether the system keeps its clock right by itself; the clock is compared with the coordinator's by the connection's check."""
    state = _ntp_state()
    if state == "no":
        remedy = "switch time synchronisation on: timedatectl set-ntp true"
        return Finding("environment", "time service", "warning", "the clock is not synchronised", remedy)
    return Finding("environment", "time service", "ok", "synchronised" if state == "yes" else "not known on this system")


def _ntp_state() -> Literal["yes", "no", "unknown"]:
    command = shutil.which("timedatectl")
    if command is None:
        return "unknown"
    try:
        words = [command, "show", "-p", "NTPSynchronized", "--value"]
        said = subprocess.run(words, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return "yes" if said == "yes" else "no" if said == "no" else "unknown"


def _amount(name: str, gib: float, limits: tuple[float, float], word: str, remedy: str) -> Finding:
    level: Level = "problem" if gib < limits[0] else "warning" if gib < limits[1] else "ok"
    return Finding("environment", name, level, f"{gib:.1f} GiB {word}", "" if level == "ok" else remedy)
