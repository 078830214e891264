"""How a party gets the software: an image that is built from the kit, and everything as wheels for a hospital without any network.

    DIR/*.whl               pneumofed and all that it needs, in the pinned versions
    DIR/requirements.lock   NAME==VERSION --hash=sha256:..., one line a wheel
    DIR/install.sh          installs from this folder only, and only what has these hashes (pip's hash-checking mode)

The wheels are large and travel on any medium. What must be trusted is the list: it is also written into the kits, so that a hospital
installs by the list of its kit, and a wheel that was exchanged on its way is refused.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pneumofed.common.errors import ConfigError
from pneumofed.common.files import write_file
from pneumofed.common.ops.lifeline import children_end_with_me
from pneumofed.common.ops.render import render
from pneumofed.server.provisioning.authority import EXECUTABLE_MODE

LOCK_FILE = "requirements.lock"
SITE_CHECK = ["pneumofed", "site", "status", "--site", "/site"]
"""Exits with 0 while the SuperNode of the container runs."""
WHEEL_NAME = re.compile(r"(?P<name>[A-Za-z0-9._]+)-(?P<version>[A-Za-z0-9._+!]+)(-\d[^-]*)?-[^-]+-[^-]+-[^-]+\.whl")
"""NAME-VERSION(-BUILD)?-PYTHON-ABI-PLATFORM.whl (packaging.python.org, binary distribution format)."""
PLATFORM = re.compile(r"[a-z0-9_]+")


def page_check(port: int) -> list[str]:
    """Builds the command that exits with 0 while the live page on loopback answers."""
    return ["python", "-c", f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}/health', timeout=10)"]


def write_containerfile(
    party: str, *, nginx: bool, command: Sequence[str], health: Sequence[str], from_source: bool = False
) -> str:
    """Writes a Containerfile.

    Args:
        party: `site`, `coordinator`, or nothing for both.
        nginx: whether the gateway's program is in it.
        command: what a container runs.
        health: what tells whether it works; none for an image that is for both parties.
        from_source: builds the wheel from a checkout; otherwise it lies in `software/`.
    """
    shape: dict[str, Any] = {"party": party, "nginx": nginx, "from_source": from_source}
    return render(__package__, "Containerfile", version=version("pneumofed"), command=list(command), health=list(health), **shape)


def tested_versions() -> str:
    """Returns `constraints.txt`, the versions that this version of pneumofed was tested with."""
    return render(__package__, "constraints.txt")


@dataclass(frozen=True)
class WheelTarget:
    """For which Python and system wheels are collected; unset, for these here."""

    python: str | None = None
    """E.g. `3.11`."""
    platforms: tuple[str, ...] = ()
    """Tags, e.g. `manylinux_2_28_x86_64`; a wheel for any of them is taken."""

    def options(self) -> list[str]:
        """Writes it as options of `pip download`.

        Raises:
            ConfigError: it is no version or no tag.
        """
        if self.python is None and not self.platforms:
            return []
        if self.python is None or not re.fullmatch(r"3\.\d+", self.python) or not self.platforms:
            raise ConfigError("give --python, e.g. 3.11, and --platform, e.g. manylinux_2_28_x86_64, together")
        if wrong := [tag for tag in self.platforms if not PLATFORM.fullmatch(tag)]:
            raise ConfigError(f"--platform {wrong[0]}: expected a tag such as manylinux_2_28_x86_64")
        tags = [option for tag in self.platforms for option in ("--platform", tag)]
        return ["--python-version", self.python, "--implementation", "cp", "--only-binary", ":all:", *tags]


@dataclass(frozen=True)
class Wheelhouse:
    """What was collected."""

    folder: Path
    wheels: tuple[str, ...]
    size: int


def collect_wheelhouse(
    folder: Path, software: str, target: WheelTarget | None = None, constraints: Path | None = None, pip: Sequence[str] = ()
) -> Wheelhouse:
    """Downloads what `software` needs into `folder`, and writes the list of hashes and the install script there.

    Args:
        folder: made if missing; it must be empty.
        software: path of pneumofed's wheel, with the wanted extras, e.g. `pneumofed-0.2.0-py3-none-any.whl[imagenet]`.
        target: for which machine; what has no wheel is built where it is for this one.
        constraints: versions (pip's constraints file); those that this version was tested with if None.
        pip: further options of pip, such as where packages lie.

    Raises:
        ConfigError: the folder is not empty, there is no such wheel, or pip finds no wheel for something; its last words say for what.
    """
    options = (target or WheelTarget()).options()
    wheel = Path(software.partition("[")[0])
    if not wheel.is_file() or not WHEEL_NAME.fullmatch(wheel.name):
        raise ConfigError(f"{wheel} is no wheel; make it from a checkout: pip wheel --no-deps -w . CHECKOUT")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give another folder for the wheels")
    folder.mkdir(parents=True, exist_ok=True)
    pinned = folder / "constraints.txt"
    write_file(pinned, constraints.read_bytes() if constraints else tested_versions().encode())
    verb = ["download", "--dest"] if options else ["wheel", "--wheel-dir"]
    _run_pip(
        [*verb, str(folder), "--constraint", str(pinned), *options, *pip, str(wheel.resolve()) + software[len(str(wheel)) :]]
    )
    wheels = sorted(folder.glob("*.whl"))
    lock = "# Written by `pneumofed provision --wheelhouse`; pip takes nothing else.\n" + "".join(map(_lock_line, wheels))
    write_file(folder / LOCK_FILE, lock.encode())
    write_file(folder / "install.sh", render(__package__, "install.sh").encode())
    (folder / "install.sh").chmod(EXECUTABLE_MODE)
    return Wheelhouse(folder, tuple(path.name for path in wheels), sum(path.stat().st_size for path in wheels))


def keep_lock(wheelhouse: Wheelhouse, out: Path) -> None:
    """Lays the wheelhouse's list beside the kits, which hold it from then on.

    Args:
        wheelhouse: that was collected.
        out: folder of the kits.
    """
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_file(out / LOCK_FILE, (wheelhouse.folder / LOCK_FILE).read_bytes())


def _run_pip(arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    with children_end_with_me():
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=dict(os.environ), check=False
        )
    if done.returncode:
        words = (
            " ".join(line.strip() for line in done.stderr.splitlines() if line.startswith("ERROR")) or done.stderr[-300:].strip()
        )
        raise ConfigError(f"the wheelhouse is not complete: {words}")


def _lock_line(wheel: Path) -> str:
    found = WHEEL_NAME.fullmatch(wheel.name)
    if found is None:
        raise ConfigError(f"{wheel} has no wheel's name")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{found['name'].replace('_', '-')}=={found['version']} --hash=sha256:{digest}\n"
