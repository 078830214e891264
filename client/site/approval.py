"""Which code a hospital has approved: hashes of app bundles in its `policy.yaml`, and the hash of the code that is installed here."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import yaml

from pneumofed.client.federation.policy import read_policy
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.config.reader import build_config
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import write_file
from pneumofed.common.ops.app_bundle import PACKAGE, build_bundle, hash_bundle, package_folder
from pneumofed.common.ops.study_code import FOLDER

INSTALLED = "installed"
"""Stands in policy.yaml for the hash of the code that is installed here, whichever it is."""
POLICY_KEY = "approved_apps"


def approved_hashes(policy: SitePolicy, work_dir: Path) -> set[str]:
    """Returns the hashes that may run here, with `installed` replaced by the hash of the installed code.

    Args:
        policy: the hospital's.
        work_dir: the site's own folder, which keeps the hash of the installed code.
    """
    named = set(policy.approved_apps)
    return (named - {INSTALLED}) | ({installed_hash(work_dir)} if INSTALLED in named else set())


def installed_hash(work_dir: Path, build: Callable[[], bytes] = build_bundle, state: str | None = None) -> str:
    """Returns the hash of the installed code's bundle, kept in `work_dir` until a file of the code changes: to build it costs a second.

    Args:
        work_dir: the site's own folder, made if there is none; it keeps the hash in `installed_app.json`.
        build: makes the bundle of the installed code.
        state: of the code, where the caller has looked already.

    Returns:
        SHA-256 in hexadecimal.
    """
    memo, state = work_dir / "installed_app.json", state or state_of_code()
    try:
        known = json.loads(memo.read_bytes())
        if known["state"] == state and re.fullmatch(r"[0-9a-f]{64}", known["hash"]):
            return str(known["hash"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not built yet, or damaged
    found = hash_bundle(build())
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(memo, json.dumps({"state": state, "hash": found}).encode())
    return found


def hash_app_file(path: Path) -> str:
    """Computes the hash of the bundle in `path`.

    Raises:
        ConfigError: it cannot be read, or is no bundle.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the bundle {path} cannot be read: {error.strerror}") from error
    if not content.startswith(b"PK"):
        raise ConfigError(f"{path} is no app bundle (.fab), which is a ZIP archive")
    return hash_bundle(content)


def study_files(path: Path) -> list[str]:
    """Lists the files of a study's own network or loss in the bundle `path`.

    Raises:
        ConfigError: it is no archive that can be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(name for name in archive.namelist() if name.startswith(f"{PACKAGE}/{FOLDER}/"))
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"the bundle {path} cannot be read: {error}") from None


def approve_app(policy_file: Path, app: str) -> bool:
    """Adds `app` (a hash or `installed`) to the policy file, whose comments stay.

    Args:
        policy_file: the hospital's policy.yaml.
        app: 64 hexadecimal digits, or `installed`.

    Returns:
        False if it was approved before.

    Raises:
        ConfigError: the file is no policy, or `app` is no hash; the file is as it was.
    """
    approved = read_policy(policy_file).approved_apps
    if app in approved:
        return False
    _rewrite(policy_file, _with_app(policy_file.read_text(encoding="utf-8"), app), [*approved, app])
    return True


def revoke(policy_file: Path, app: str) -> bool:
    """Removes `app` from the policy file, whose comments stay.

    Args:
        policy_file: the hospital's policy.yaml.
        app: a hash or `installed`, as it stands in the file.

    Returns:
        False if it was not approved.

    Raises:
        ConfigError: the file is no policy.
    """
    approved = read_policy(policy_file).approved_apps
    if app not in approved:
        return False
    kept = [name for name in approved if name != app]
    _rewrite(policy_file, _without_app(policy_file.read_text(encoding="utf-8"), app), kept)
    return True


def state_of_code() -> str:
    """A mark that changes with the version, and with the name, size or time of any file of the code."""
    rows = [version("pneumofed")]
    for house in ("client", "common", "server"):  # links in a checkout, which rglob does not follow from above
        folder = package_folder() / house
        for path in sorted(folder.rglob("*.py")):
            status = path.stat()
            rows.append(f"{house}/{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _rewrite(policy_file: Path, text: str, expected: list[str]) -> None:
    """Puts `text` in place if it is a policy that approves what is expected."""
    policy = build_config(SitePolicy, yaml.safe_load(text) or {}, policy_file.name)
    if policy.approved_apps != expected:
        raise ConfigError(f"{policy_file}: the list '{POLICY_KEY}' cannot be edited without losing comments; edit it by hand")
    write_file(policy_file, text.encode())


def _node(text: str) -> yaml.SequenceNode | None:
    """Where the list stands in the text."""
    root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return next((value for key, value in pairs if key.value == POLICY_KEY and isinstance(value, yaml.SequenceNode)), None)


def _with_app(text: str, app: str) -> str:
    node, item = _node(text), f'"{app}"'  # in quotes: a hash such as 12e345... would be read as a number
    if node is None:
        return f'{text.rstrip()}\n{POLICY_KEY}:\n  - "{INSTALLED}"\n  - {item}\n'.lstrip()
    if node.flow_style:
        end = node.end_mark.index - 1
        return text[:end].rstrip().rstrip(",") + (", " if node.value else "") + item + text[end:]
    end = _end_of_line(text, node.value[-1].end_mark.index)
    return f"{text[:end].rstrip(chr(10))}\n{' ' * node.start_mark.column}- {item}\n{text[end:]}"


def _without_app(text: str, app: str) -> str:
    node = _node(text)
    if node is None:  # the default, which names nothing but `installed`
        return f"{text.rstrip()}\n{POLICY_KEY}: []\n".lstrip()
    kept = [item.value for item in node.value if item.value != app]
    if node.flow_style or not kept:
        start, end = (node.start_mark.index, node.end_mark.index) if node.flow_style else _span_of_block(text, node)
        listed = "[" + ", ".join(f'"{name}"' for name in kept) + "]"
        return text[:start] + (listed if node.flow_style else f" {listed}\n") + text[end:]
    for item in reversed([item for item in node.value if item.value == app]):
        start = text.rfind("\n", 0, item.start_mark.index) + 1
        text = text[:start] + text[_end_of_line(text, item.end_mark.index) :]
    return text


def _span_of_block(text: str, node: yaml.SequenceNode) -> tuple[int, int]:
    """From behind the key's colon to the end of the last item's line."""
    return text.rfind(":", 0, node.start_mark.index) + 1, _end_of_line(text, node.value[-1].end_mark.index)


def _end_of_line(text: str, index: int) -> int:
    """The beginning of the next line."""
    found = text.find("\n", index)
    return len(text) if found < 0 else found + 1
