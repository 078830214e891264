"""Makes a site folder: from the kit that provisioning wrote, or by hand. The site's key is made here; none is ever overwritten.

A kit comes from outside, so that it is read as a whole (`read_kit`) and judged before a byte is written: files of known names and kinds,
and nothing else. What lies in a site folder besides a kit's files is the hospital's own (`work/`, `data/`): a kit that brings any of it,
e.g. a noise key that somebody else knows, is refused.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

import yaml

from pneumofed.common.config.experiment import Section
from pneumofed.common.config.parties import ConnectionConfig, SiteConfig, SitePolicy
from pneumofed.common.config.reader import build_config, format_yaml
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import atomic_write
from pneumofed.common.ops.render import default_policy
from pneumofed.common.wire.keys import (
    certificate_validity,
    parse_certificate,
    parse_private_key,
    parse_public_key,
    parse_tls_key,
    private_pem,
    read_private_key,
    write_node_key,
)

SITE_SUBFOLDERS = ("keys", "data", "work")
CLIENT_CERTIFICATE = "keys/client.crt"


@dataclass(frozen=True)
class SiteFromKit:
    """A site folder that a kit became."""

    kept: tuple[str, ...]
    """Names of the files that were there already and stay as they are."""
    made: Path | None
    """The public half of the node key that was made in the folder, which the coordinator is to admit."""
    brought_key: bool
    """Whether the kit brought the private node key, so that whoever made it can act as this site."""
    renewed_until: datetime | None = None
    """When the certificate ends that took the place of the site's former one; None where none did."""


def init_from_kit(folder: Path, kit: Path) -> SiteFromKit:
    """Puts the kit's files into the site folder, and makes the site's key there unless it has one.

    What is there stays, but for the site's own certificate: a kit's takes its place if it is of the same key, of the authority that the
    folder trusts already, and ends later.

    Args:
        folder: the site folder, made if there is none.
        kit: a tar archive or a folder.

    Raises:
        ConfigError: the kit is not taken (see `read_kit`), or is for another key than there is.
    """
    files = dict(read_kit(kit))
    _check_keys(folder, files)
    _make_folders(folder)
    renewed_until = _renew(folder, files.pop(CLIENT_CERTIFICATE, None))
    kept = tuple(name for name in sorted(files) if not _put(folder / name, files[name]))
    _put(folder / "policy.yaml", UnpackedFile(default_policy().encode()))
    node, made = folder / "keys" / "node", None
    if not node.exists() and "keys/node.pub" not in files:
        made = write_node_key(node.parent, str(yaml.safe_load(files["site.yaml"].content)["name"]))
    if node.exists() and "client_key" in yaml.safe_load(files["connection.yaml"].content):
        _put(node.with_name("client.key"), UnpackedFile(private_pem(read_private_key(node))))
    return SiteFromKit(kept, made, "keys/node" in files, renewed_until)


def _check_keys(folder: Path, files: Mapping[str, UnpackedFile]) -> None:
    """Refuses private keys other than those in the folder, and a kit that was made for another key than the folder's."""
    for name in ("keys/node", "keys/client.key"):
        if name in files and _differs(folder / name, files[name].content):
            raise ConfigError(
                f"{folder / name} exists and is another key than the kit's; move it away first if the kit's is the right one"
            )
    node = folder / "keys" / "node"
    if node.exists() and "keys/node.pub" in files:
        admitted = parse_public_key(files["keys/node.pub"].content, "keys/node.pub of the kit")
        if read_private_key(node).public_key() != admitted:
            raise ConfigError(f"the kit was made for another key than {node}; send {node}.pub to the coordinator")


def _renew(folder: Path, new: UnpackedFile | None) -> datetime | None:
    """Writes the site's certificate where there is none, or where it renews the one there; returns its end in the second case."""
    path, node = folder / CLIENT_CERTIFICATE, folder / "keys" / "node"
    if new is None or _put(path, new) or path.read_bytes() == new.content or not node.exists():
        return None
    certificate = parse_certificate(new.content, f"{CLIENT_CERTIFICATE} of the kit")
    authority = parse_certificate((folder / "keys" / "ca.crt").read_bytes(), "keys/ca.crt")
    ends, is_own = certificate.not_valid_after_utc, certificate.public_key() == read_private_key(node).public_key()
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # another authority's: a signature that fails, another issuer, or a kind of key that this one has not
        return None
    if not is_own or ends <= certificate_validity(path)[1]:
        return None
    with atomic_write(path) as output:
        output.write(new.content)
    return ends


def init_by_hand(folder: Path, name: str, coordinator: str, ca: Path | None = None) -> Path:
    """Makes a site folder with a new key.

    Args:
        folder: the site folder, made if there is none.
        name: the hospital's, as the coordinator knows it.
        coordinator: HOST:PORT.
        ca: certificate of the federation's authority (PEM); None where it is put into `keys/ca.crt` later.

    Returns:
        The path of the public key, which goes to the coordinator.

    Raises:
        ConfigError: a name or address is malformed, the certificate cannot be read, or there is a key already.
    """
    site = {"name": name, "manifest": "data/manifest.csv", "work_dir": "work", "policy": "policy.yaml"}
    connection = {"coordinator": coordinator, "ca": "keys/ca.crt", "key": "keys/node"}
    build_config(SiteConfig, site, "--name")
    build_config(ConnectionConfig, connection, "--coordinator")
    build_config(SitePolicy, yaml.safe_load(default_policy()), "policy.yaml")
    if ca is not None:
        certificate_validity(ca)
    _make_folders(folder)
    public = write_node_key(folder / "keys", name)
    files = {"site.yaml": _yaml(site), "connection.yaml": _yaml(connection), "policy.yaml": default_policy().encode()}
    if ca is not None:
        files["keys/ca.crt"] = ca.read_bytes()
    for path, content in files.items():
        _put(folder / path, UnpackedFile(content))
    return public


def _make_folders(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in SITE_SUBFOLDERS:
        (folder / name).mkdir(mode=0o700, exist_ok=True)


def _differs(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() != content


def _put(path: Path, file: UnpackedFile) -> bool:
    """Writes a file that is not there yet; False if it is, with whatever content."""
    if path.exists():
        return False
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with atomic_write(path) as output:
        output.write(file.content)
    if file.executable:
        path.chmod(0o700)
    return True


def _yaml(values: Mapping[str, str]) -> bytes:
    return format_yaml(values).encode()


MAX_KIT_FILE_BYTES = 1 << 20
MAX_KIT_FILES = 20
START_SCRIPT = ("set -eu", 'cd "$(dirname "$0")"', 'exec "${PNEUMOFED:-pneumofed}" site start --foreground')
"""All that `start.sh` may do besides comments: systemd runs it."""


@dataclass(frozen=True)
class UnpackedFile:
    """One file of a kit."""

    content: bytes
    executable: bool = False


def read_kit(kit: Path) -> dict[str, UnpackedFile]:
    """Reads the kit's files by their path below the site folder; a folder that holds all of them, as in an archive, is left away.

    Args:
        kit: a tar archive or a folder.

    Raises:
        ConfigError: it cannot be read, is no site's kit, or holds anything that a kit does not hold: a link, a device, a path that leads
            outside, another name, another kind of content.
    """
    try:
        files = _read_folder(kit) if kit.is_dir() else _read_archive(kit)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ConfigError(f"the kit {kit} cannot be read ({type(error).__name__}); ask for it again") from error
    tops = {name.partition("/")[0] for name in files}
    if len(tops) == 1 and "site.yaml" not in files:
        files = {name.partition("/")[2]: file for name, file in files.items()}
    if "site.yaml" not in files or "connection.yaml" not in files:
        raise ConfigError(f"{kit} is no site's kit: it holds no site.yaml and connection.yaml")
    for name in sorted(files):
        _check_file(kit, name, files[name])
    return files


def _check_file(kit: Path, name: str, file: UnpackedFile) -> None:
    kind = "pneumofed-SITE.service" if re.fullmatch(r"pneumofed-[A-Za-z0-9._-]+\.service", name) else name
    if kind not in KINDS:
        raise ConfigError(
            f"the kit {kit} holds {name!r}, which belongs into no kit; it is not taken. Ask the coordinator what it is"
        )
    if file.executable and name != "start.sh":
        raise ConfigError(f"the kit {kit} marks {name} as a program; it is not taken. Ask the coordinator what it is")
    try:
        KINDS[kind](file.content, name)
    except ConfigError as error:
        raise ConfigError(f"the kit {kit} is not taken: {error}") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"the kit {kit} is not taken: {name} is of another kind ({type(error).__name__})") from error


def _is_text(content: bytes, name: str) -> None:
    if b"\x00" in content:
        raise ConfigError(f"{name} is no text")
    content.decode("utf-8")


def _is_start_script(content: bytes, name: str) -> None:
    lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    if tuple(line for line in lines if line and not line.startswith("#")) != START_SCRIPT:
        raise ConfigError(f"{name} does something else than to start the site")
    if lines[0] != "#!/bin/sh":
        raise ConfigError(f"{name} is no shell script")


def _is_lock(content: bytes, name: str) -> None:
    """Packages, each by its version and hash, and nothing else: pip would take options and addresses from such a file too."""
    for line in content.decode("ascii").splitlines():
        if not line.startswith("#") and not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+ --hash=sha256:[0-9a-f]{64}", line):
            raise ConfigError(f"{name} holds something else than packages by version and hash")


def _is(schema: type[Section]) -> Callable[[bytes, str], None]:
    def check(content: bytes, name: str) -> None:
        build_config(schema, yaml.safe_load(content), name)

    return check


def _is_site(content: bytes, name: str) -> None:
    site = build_config(SiteConfig, yaml.safe_load(content), name)
    if (site.manifest, site.work_dir, site.policy) != ("data/manifest.csv", "work", "policy.yaml") or site.connection is not None:
        raise ConfigError(f"{name} names another manifest, work_dir, policy or connection than a new site folder has")


def _is_connection(content: bytes, name: str) -> None:
    connection = build_config(ConnectionConfig, yaml.safe_load(content), name)
    named = [connection.ca, connection.key, connection.client_certificate, connection.client_key]
    wanted = ["keys/ca.crt", "keys/node", "keys/client.crt", "keys/client.key"]
    if any(path not in (None, usual) for path, usual in zip(named, wanted, strict=True)):
        raise ConfigError(f"{name} names other keys than those of the site folder")


KINDS: Mapping[str, Callable[[bytes, str], object]] = {
    "site.yaml": _is_site,
    "connection.yaml": _is_connection,
    "policy.yaml": _is(SitePolicy),
    "keys/ca.crt": parse_certificate,
    "keys/node.pub": parse_public_key,
    "keys/node": parse_private_key,
    "keys/client.crt": parse_certificate,
    "keys/client.key": parse_tls_key,
    "start.sh": _is_start_script,
    "pneumofed-SITE.service": _is_text,
    "compose.yaml": _is_text,
    "Containerfile": _is_text,
    "constraints.txt": _is_text,
    "requirements.lock": _is_lock,
    ".dockerignore": _is_text,
    "README.md": _is_text,
}
"""All that a kit may hold, and what each file must be."""


def _read_archive(kit: Path) -> dict[str, UnpackedFile]:
    files: dict[str, UnpackedFile] = {}
    with tarfile.open(kit, "r:*") as archive:
        for member in archive:
            _check_name(kit, member.name)
            if member.isdir():
                continue
            name = str(PurePosixPath(member.name))
            stream = archive.extractfile(member) if member.isreg() else None
            if stream is None or member.size > MAX_KIT_FILE_BYTES or len(files) >= MAX_KIT_FILES or name in files:
                raise ConfigError(
                    f"the kit {kit} holds something that no kit holds (a link, a device, or too much); it is not unpacked"
                )
            files[name] = UnpackedFile(stream.read(), bool(member.mode & 0o100))
    return files


def _read_folder(kit: Path) -> dict[str, UnpackedFile]:
    found = [path for path in sorted(kit.rglob("*")) if path.is_symlink() or not path.is_dir()]
    odd = any(path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_KIT_FILE_BYTES for path in found)
    if odd or len(found) > MAX_KIT_FILES:
        raise ConfigError(f"the kit {kit} holds something that no kit holds (a link, or too much); it is not copied")
    return {
        path.relative_to(kit).as_posix(): UnpackedFile(path.read_bytes(), bool(path.stat().st_mode & 0o100)) for path in found
    }


def _check_name(kit: Path, name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ConfigError(
            f"the kit {kit} would write outside the site folder; it is not unpacked. Ask the coordinator what it is"
        )
