"""Wheels as small as wheels can be, made without a build."""

from __future__ import annotations

import base64
import hashlib
import re
import zipfile
from pathlib import Path


def make_wheel(folder: Path, name: str, version: str = "1.0", needs: tuple[str, ...] = (), program: bool = False) -> Path:
    """Writes `NAME-VERSION-py3-none-any.whl` with a module of that name; with `program`, a command of that name that says the version.

    Args:
        folder: made if missing.
        name: of the package.
        version: of the package.
        needs: what it requires.
        program: whether it has a command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    module = f"{name}_small"
    files = {
        f"{module}.py": f"def main():\n    print('{name} {version}')\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Provides-Extra: {extra}\n" for need in needs for extra in re.findall(r"extra == '(\w+)'", need))
        + "".join(f"Requires-Dist: {need}\n" for need in needs),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if program:
        files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{name} = {module}:main\n"
    record = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
