"""Makes a site folder: from the kit that provisioning wrote, or by hand with a key that is made here. No key is ever overwritten."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from pneumofed.common.config.default_policy import default_policy
from pneumofed.common.config.parties import ConnectionConfig, SiteConfig, SitePolicy
from pneumofed.common.config.reader import build_config
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import atomic_write

MAX_KIT_FILE_BYTES = 10 << 20
MAX_KIT_FILES = 200
SITE_SUBFOLDERS = ("keys", "data", "work")


@dataclass(frozen=True)
class UnpackedFile:
    """One file of a kit."""

    content: bytes
    executable: bool = False


def init_from_kit(folder: Path, kit: Path) -> list[str]:
    """Puts the kit's files into the site folder.

    Args:
        folder: the site folder, made if there is none.
        kit: a tar archive or a folder.

    Returns:
        Names of the files that were there already and stay as they are.

    Raises:
        ConfigError: the kit cannot be read, would write outside the folder, is no site's kit, or brings another key than there is.
    """
    files = read_kit(kit)
    if "site.yaml" not in files or "connection.yaml" not in files:
        raise ConfigError(f"{kit} is no site's kit: it holds no site.yaml and connection.yaml")
    for name in sorted(files):
        path = folder / name
        if path.parent.name == "keys" and not name.endswith((".crt", ".pub")) and _differs(path, files[name].content):
            raise ConfigError(
                f"{path} exists and is another key than the kit's; move it away first if the kit's is the right one"
            )
    _make_folders(folder)
    kept = [name for name in sorted(files) if not _put(folder / name, files[name])]
    _put(folder / "policy.yaml", UnpackedFile(default_policy().encode()))
    return kept


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
    from pneumofed.common.wire.keys import certificate_validity, write_node_key

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


def read_kit(kit: Path) -> dict[str, UnpackedFile]:
    """Reads the kit's files by their path below the site folder; a folder that holds all of them, as in an archive, is left away.

    Raises:
        ConfigError: it cannot be read, or holds a link, a device, a path that leads outside, or more than a kit can hold.
    """
    try:
        files = _read_folder(kit) if kit.is_dir() else _read_archive(kit)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ConfigError(f"the kit {kit} cannot be read ({type(error).__name__}); ask for it again") from error
    tops = {name.partition("/")[0] for name in files}
    if len(tops) == 1 and "site.yaml" not in files:
        files = {name.partition("/")[2]: file for name, file in files.items()}
    return files


def _read_archive(kit: Path) -> dict[str, UnpackedFile]:
    files: dict[str, UnpackedFile] = {}
    with tarfile.open(kit, "r:*") as archive:
        for member in archive:
            _check_name(kit, member.name)
            if member.isdir():
                continue
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is None or member.size > MAX_KIT_FILE_BYTES or len(files) >= MAX_KIT_FILES:
                raise ConfigError(
                    f"the kit {kit} holds something that no kit holds (a link, a device, or too much); it is not unpacked"
                )
            files[str(PurePosixPath(member.name))] = UnpackedFile(stream.read(), bool(member.mode & 0o100))
    return files


def _read_folder(kit: Path) -> dict[str, UnpackedFile]:
    found = [path for path in sorted(kit.rglob("*")) if path.is_file() or path.is_symlink()]
    if len(found) > MAX_KIT_FILES or any(path.is_symlink() or path.stat().st_size > MAX_KIT_FILE_BYTES for path in found):
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
    return yaml.safe_dump(dict(values), sort_keys=False).encode()
