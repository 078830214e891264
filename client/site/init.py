"""Makes a site folder: from the kit that provisioning wrote, or by hand. The site's key is made here; none is ever overwritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from pneumofed.client.site.kit import UnpackedFile, read_kit
from pneumofed.common.config.default_policy import default_policy
from pneumofed.common.config.parties import ConnectionConfig, SiteConfig, SitePolicy
from pneumofed.common.config.reader import build_config
from pneumofed.common.errors import ConfigError
from pneumofed.common.files import atomic_write
from pneumofed.common.wire.keys import certificate_validity, parse_public_key, private_pem, read_private_key, write_node_key

SITE_SUBFOLDERS = ("keys", "data", "work")


@dataclass(frozen=True)
class SiteFromKit:
    """A site folder that a kit became."""

    kept: tuple[str, ...]
    """Names of the files that were there already and stay as they are."""
    made: Path | None
    """The public half of the node key that was made in the folder, which the coordinator is to admit."""
    brought_key: bool
    """Whether the kit brought the private node key, so that whoever made it can act as this site."""


def init_from_kit(folder: Path, kit: Path) -> SiteFromKit:
    """Puts the kit's files into the site folder, and makes the site's key there unless it has one.

    Args:
        folder: the site folder, made if there is none.
        kit: a tar archive or a folder.

    Raises:
        ConfigError: the kit is not taken (see `read_kit`), or is for another key than there is.
    """
    files = read_kit(kit)
    _check_keys(folder, files)
    _make_folders(folder)
    kept = tuple(name for name in sorted(files) if not _put(folder / name, files[name]))
    _put(folder / "policy.yaml", UnpackedFile(default_policy().encode()))
    node, made = folder / "keys" / "node", None
    if not node.exists() and "keys/node.pub" not in files:
        made = write_node_key(node.parent, str(yaml.safe_load(files["site.yaml"].content)["name"]))
    if node.exists() and "client_key" in yaml.safe_load(files["connection.yaml"].content):
        _put(node.with_name("client.key"), UnpackedFile(private_pem(read_private_key(node))))
    return SiteFromKit(kept, made, "keys/node" in files)


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
    return yaml.safe_dump(dict(values), sort_keys=False).encode()
