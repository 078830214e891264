"""What each party gets, and what a second run leaves alone."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import ssl
import subprocess
import tarfile
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.verification import PolicyBuilder, Store
from typer import Typer
from typer.testing import CliRunner

from pneumofed.client.site.init import init_from_kit
from pneumofed.common.config.parties import ConnectionConfig, SiteConfig, SitePolicy
from pneumofed.common.config.reader import build_config, read_yaml
from pneumofed.common.errors import ConfigError, SecureSumError
from pneumofed.common.secure_aggregation.key_agreement import KeyDirectory, authority_key, read_roster
from pneumofed.common.wire.keys import (
    NodeKey,
    certificate_validity,
    key_fingerprint,
    parse_private_key,
    read_private_key,
    read_public_key,
    write_node_key,
)
from pneumofed.server.cli.provision import provision_command as command
from pneumofed.server.operations.settings import CoordinatorFolder
from pneumofed.server.provisioning.authority import new_key, open_authority
from pneumofed.server.provisioning.identities import FederationConfig, read_federation
from pneumofed.server.provisioning.provision import PartyReport
from pneumofed.server.provisioning.provision import provision as provision_by_default
from tests.server.federations import changed, federation

SITES = [{"name": "alpha"}, {"name": "beta"}]
AUDITORS = [{"name": "board"}]
EXAMPLE = Path(__file__).parents[3] / "configs" / "federation.example.yaml"

Snapshot = dict[str, tuple[bytes, int]]


def provision(config: FederationConfig, out: Path) -> list[PartyReport]:
    """Kits that hold the keys of their sites."""
    return provision_by_default(config, out, with_keys=True)


def snapshot(folder: Path) -> Snapshot:
    """Content and time of change of every file below `folder`."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def parties_touched(before: Snapshot, after: Snapshot) -> set[str]:
    different = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {name.split("/")[0].removesuffix(".tar.gz") for name in different}


def outcomes(config: FederationConfig, out: Path) -> dict[str, str]:
    return {report.name: report.outcome for report in provision(config, out)}


def days_from_now(days: int) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def files_of(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def config() -> FederationConfig:
    return federation(sites=SITES, auditors=AUDITORS)


@pytest.fixture
def out(tmp_path: Path, config: FederationConfig) -> Path:
    provision(config, tmp_path / "kits")
    return tmp_path / "kits"


def test_each_party_gets_a_folder_and_the_same_as_an_archive(out: Path) -> None:
    for party in ("coordinator", "alpha", "beta", "auditor-board"):
        with tarfile.open(out / f"{party}.tar.gz") as archive:
            packed = {m.name: (archive.extractfile(m).read(), m.mode) for m in archive}  # type: ignore[union-attr]
        lying = {
            f"{party}/{p.relative_to(out / party)}": (p.read_bytes(), p.stat().st_mode & 0o777) for p in files_of(out / party)
        }
        assert packed == lying


def test_nobody_else_on_the_machine_can_read_a_kit(out: Path) -> None:
    for path in [out, *out.rglob("*")]:
        wanted = 0o700 if path.is_dir() or path.name == "start.sh" else 0o600
        assert path.stat().st_mode & 0o777 == wanted, path


def test_a_second_run_touches_nothing(config: FederationConfig, out: Path) -> None:
    before = snapshot(out)
    assert set(outcomes(config, out).values()) == {"unchanged"}
    assert snapshot(out) == before


def roster_of(out: Path) -> KeyDirectory:
    """The coordinator's roster, as a site checks it."""
    ca = out / "alpha" / "keys" / "ca.crt"
    return read_roster((out / "coordinator" / "keys" / "roster.json").read_text(), authority_key(ca))


def test_the_key_roster_holds_the_sites_keys_and_each_change_has_the_next_serial(config: FederationConfig, out: Path) -> None:
    first = roster_of(out)
    assert (first.serial, first.sites) == (1, {"alpha", "beta"})
    assert first.keys["beta"] == read_public_key(out / "beta" / "keys" / "node.pub")
    provision(changed(config, sites=[*SITES, {"name": "gamma"}]), out)
    assert (roster_of(out).serial, roster_of(out).sites) == (2, {"alpha", "beta", "gamma"})
    provision(changed(config, sites=[SITES[0], {"name": "beta", "revoked": True}, {"name": "gamma"}]), out)
    assert (roster_of(out).serial, roster_of(out).sites) == (3, {"alpha", "gamma"})


def test_a_key_that_a_hospital_made_itself_is_in_the_roster(config: FederationConfig, out: Path, tmp_path: Path) -> None:
    path = write_node_key(tmp_path / "own", "beta")
    provision(changed(config, sites=[SITES[0], {"name": "beta", "public_key": str(path)}]), out)
    assert roster_of(out).keys["beta"] == read_public_key(path)
    assert roster_of(out).serial == 2


def test_a_changed_roster_is_noticed(out: Path) -> None:
    path = out / "coordinator" / "keys" / "roster.json"
    path.write_text(path.read_text().replace('"serial": 1', '"serial": 9'))
    with pytest.raises(SecureSumError, match="certificate authority signed"):
        roster_of(out)


def test_adding_a_site_touches_the_coordinator_alone(config: FederationConfig, out: Path) -> None:
    before = snapshot(out)
    provision(changed(config, sites=[*SITES, {"name": "gamma"}]), out)
    assert parties_touched(before, snapshot(out)) == {"coordinator", "gamma", "ca"}
    assert set(CoordinatorFolder(out / "coordinator").site_keys()) == {"alpha", "beta", "gamma"}


def test_revoking_a_site_touches_the_coordinator_alone(config: FederationConfig, out: Path) -> None:
    before = snapshot(out)
    assert outcomes(changed(config, sites=[SITES[0], {"name": "beta", "revoked": True}]), out)["beta"] == "revoked"
    touched = parties_touched(before, snapshot(out))
    assert touched == {"coordinator", "beta", "ca"}  # of beta, the archive is gone
    assert not (out / "beta.tar.gz").exists()
    coordinator = CoordinatorFolder(out / "coordinator")
    assert set(coordinator.site_keys()) == {"alpha"}
    assert coordinator.settings().revoked == ["beta"]
    with tarfile.open(out / "coordinator.tar.gz") as archive:
        assert "coordinator/sites/beta.pub" not in archive.getnames()


def test_a_site_that_comes_back_gets_a_new_key(config: FederationConfig, out: Path) -> None:
    old = key_fingerprint(read_public_key(out / "beta" / "keys" / "node.pub"))
    provision(changed(config, sites=[SITES[0], {"name": "beta", "revoked": True}]), out)
    provision(config, out)
    new = read_public_key(out / "beta" / "keys" / "node.pub")
    assert key_fingerprint(new) != old
    assert read_private_key(out / "beta" / "keys" / "node").public_key() == new
    assert read_public_key(out / "coordinator" / "sites" / "beta.pub") == new


def test_a_line_lost_by_accident_is_refused(config: FederationConfig, out: Path) -> None:
    before = snapshot(out)
    with pytest.raises(ConfigError, match="the site 'beta' has a kit but is not in the federation file"):
        provision(changed(config, sites=SITES[:1]), out)
    with pytest.raises(ConfigError, match="the auditor 'board'"):
        provision(changed(config, auditors=[]), out)
    assert snapshot(out) == before


def test_the_authority_of_another_federation_is_not_overwritten(config: FederationConfig, out: Path) -> None:
    before = snapshot(out)
    with pytest.raises(ConfigError, match="of the federation 'test', not of 'other'"):
        provision(changed(config, name="other"), out)
    assert snapshot(out) == before


@pytest.mark.parametrize("lost", ["ca.key", "ca.crt"])
def test_half_an_authority_is_refused(config: FederationConfig, out: Path, lost: str) -> None:
    (out / "ca" / lost).unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        provision(config, out)
    assert not (out / "ca" / lost).exists()


def test_a_certificate_is_renewed_before_it_ends_and_not_earlier(config: FederationConfig, out: Path) -> None:
    def ends() -> datetime:
        return x509.load_pem_x509_certificate((out / "coordinator/keys/server.crt").read_bytes()).not_valid_after_utc

    before, files = ends(), snapshot(out)
    provision(changed(config, validity_days=800, renew_before_days=396), out)
    assert ends() == before
    provision(changed(config, validity_days=800, renew_before_days=397), out)
    assert ends() > before + timedelta(days=400)
    assert parties_touched(files, snapshot(out)) == {"coordinator"}


def test_a_new_host_name_gets_a_new_certificate(config: FederationConfig, out: Path) -> None:
    coordinator = config.coordinator.model_dump() | {"hosts": ["127.0.0.1", "new.example.org"]}
    files = snapshot(out)
    provision(changed(config, coordinator=coordinator), out)
    verify(out, "new.example.org")
    assert parties_touched(files, snapshot(out)) == {"coordinator"}


def verify(out: Path, host: str) -> None:
    """Path validation of RFC 5280, as strict as `cryptography` has it."""
    authority, server = (
        x509.load_pem_x509_certificate((out / path).read_bytes()) for path in ("ca/ca.crt", "coordinator/keys/server.crt")
    )
    verifier = PolicyBuilder().store(Store([authority])).build_server_verifier(x509.DNSName(host))
    verifier.verify(server, [])


@pytest.mark.parametrize("host", ["fl.example.org", "localhost"])
def test_the_server_certificate_stands_for_each_name(out: Path, host: str) -> None:
    verify(out, host)


def test_the_server_key_belongs_to_its_certificate(out: Path) -> None:
    keys = out / "coordinator" / "keys"
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(keys / "server.crt", keys / "server.key")


def test_the_authoritys_key_is_in_no_kit(out: Path) -> None:
    secret = (out / "ca" / "ca.key").read_bytes().splitlines()[1]
    holders = {path.parent.name for path in files_of(out) if path.suffix != ".gz" and secret in path.read_bytes()}
    assert holders == {"ca"}


def test_a_sites_private_key_is_in_its_own_kit_alone(out: Path) -> None:
    secret = (out / "alpha" / "keys" / "node").read_bytes().splitlines()[3]
    assert [str(path.relative_to(out)) for path in files_of(out) if secret in path.read_bytes()] == ["alpha/keys/node"]


def test_an_auditors_token_is_in_the_auditors_kit_alone(out: Path) -> None:
    token = (out / "auditor-board" / "token").read_text().strip()
    assert len(token) >= 40
    assert [path.parent.name for path in files_of(out) if token.encode() in path.read_bytes()] == ["auditor-board"]
    (access,) = CoordinatorFolder(out / "coordinator").settings().auditors
    assert access.token_sha256 == hashlib.sha256(token.encode()).hexdigest()


def test_an_auditors_kit_holds_no_key(out: Path) -> None:
    assert {path.name for path in files_of(out / "auditor-board")} == {"token", "ca.crt", "README.md"}


def test_a_revoked_auditor_gets_another_token(config: FederationConfig, out: Path) -> None:
    old = (out / "auditor-board" / "token").read_text()
    provision(changed(config, auditors=[{"name": "board", "revoked": True}]), out)
    assert CoordinatorFolder(out / "coordinator").settings().auditors == []
    provision(config, out)
    assert (out / "auditor-board" / "token").read_text() != old


@pytest.mark.parametrize("mutual_tls", [False, True])
def test_a_hospitals_files_are_what_the_schemas_ask_for(tmp_path: Path, mutual_tls: bool) -> None:
    config = federation(mutual_tls=mutual_tls, sites=[{"name": "1e5", "contact": "a: b # c"}])
    provision(config, tmp_path)
    kit = tmp_path / "1e5"
    assert build_config(SiteConfig, read_yaml(kit / "site.yaml")).name == "1e5"
    assert build_config(SitePolicy, read_yaml(kit / "policy.yaml")) == SitePolicy()
    connection = build_config(ConnectionConfig, read_yaml(kit / "connection.yaml"))
    assert connection.coordinator == f"127.0.0.1:{config.coordinator.port}"
    named = [connection.ca, connection.key, connection.client_certificate, connection.client_key]
    assert all((kit / name).is_file() for name in named if name)
    assert (connection.client_certificate is not None) == mutual_tls
    yaml.safe_load((kit / "compose.yaml").read_text())


def test_the_policy_of_a_kit_explains_every_rule(out: Path) -> None:
    text = (out / "alpha" / "policy.yaml").read_text()
    assert all(re.search(rf"^{field}: ", text, re.MULTILINE) for field in SitePolicy.model_fields)


def test_a_hospitals_own_changes_stay(config: FederationConfig, out: Path) -> None:
    policy = out / "alpha" / "policy.yaml"
    policy.write_text("min_patients: 500\n")
    provision(config, out)
    assert policy.read_text() == "min_patients: 500\n"


def test_a_kit_that_was_handed_over_keeps_its_key(config: FederationConfig, out: Path) -> None:
    known = (out / "coordinator" / "sites" / "alpha.pub").read_bytes()
    shutil.rmtree(out / "alpha")
    shutil.rmtree(out / "auditor-board")
    assert outcomes(config, out) == {
        "coordinator": "unchanged", "alpha": "handed over", "beta": "unchanged", "auditor-board": "handed over",
    }  # fmt: skip
    assert not (out / "alpha").exists()
    assert (out / "coordinator" / "sites" / "alpha.pub").read_bytes() == known


def test_a_coordinators_kit_can_be_made_again(config: FederationConfig, out: Path) -> None:
    before = snapshot(out)
    shutil.rmtree(out / "coordinator")
    provision(config, out)
    assert parties_touched(before, snapshot(out)) == {"coordinator"}
    verify(out, "fl.example.org")


class TestOwnKey:
    """The hospital makes its key itself, and only the public half travels."""

    @pytest.fixture
    def public(self, tmp_path: Path) -> Path:
        return write_node_key(tmp_path / "hospital", "alpha")

    def config(self, public: Path, **changes: object) -> FederationConfig:
        return federation(sites=[{"name": "alpha", "public_key": str(public)}], **changes)

    @pytest.mark.parametrize("mutual_tls", [False, True])
    def test_the_kit_holds_no_private_key(self, tmp_path: Path, public: Path, mutual_tls: bool) -> None:
        provision(self.config(public, mutual_tls=mutual_tls), tmp_path / "kits")
        assert not [path for path in files_of(tmp_path / "kits" / "alpha") if b"PRIVATE KEY" in path.read_bytes()]
        assert read_public_key(tmp_path / "kits" / "coordinator" / "sites" / "alpha.pub") == read_public_key(public)

    def test_a_certificate_for_mutual_tls_fits_the_key_that_never_travelled(self, tmp_path: Path, public: Path) -> None:
        provision(self.config(public, mutual_tls=True), tmp_path / "kits")
        certificate = x509.load_pem_x509_certificate((tmp_path / "kits/alpha/keys/client.crt").read_bytes())
        assert certificate.public_key() == read_private_key(public.with_suffix("")).public_key()

    def test_the_site_turns_its_key_into_one_for_tls(self, tmp_path: Path, public: Path) -> None:
        provision(self.config(public, mutual_tls=True), tmp_path / "kits")
        site = tmp_path / "hospital-folder"
        init_from_kit(site, tmp_path / "kits" / "alpha.tar.gz")
        shutil.copy(public.with_suffix(""), site / "keys" / "node")
        init_from_kit(site, tmp_path / "kits" / "alpha.tar.gz")
        ssl.create_default_context().load_cert_chain(site / "keys" / "client.crt", site / "keys" / "client.key")

    @pytest.mark.parametrize("kit_is_kept", [True, False])
    def test_a_certificate_that_is_due_is_renewed_at_the_hospital_by_the_same_command(
        self, tmp_path: Path, kit_is_kept: bool
    ) -> None:
        out, site = tmp_path / "kits", tmp_path / "site"
        short = federation(sites=SITES[:1], mutual_tls=True, validity_days=20, renew_before_days=5)
        provision_by_default(short, out)
        init_from_kit(site, out / "alpha.tar.gz")
        provision_by_default(short, out, {"alpha": site / "keys" / "node.pub"})
        assert init_from_kit(site, out / "alpha.tar.gz").renewed_until is None
        before = certificate_validity(site / "keys" / "client.crt")[1]
        if not kit_is_kept:
            shutil.rmtree(out / "alpha")
            (out / "alpha.tar.gz").unlink()
        assert [report.outcome for report in provision_by_default(short, out)][1] == (
            "unchanged" if kit_is_kept else "handed over"
        )
        due = federation(sites=SITES[:1], mutual_tls=True, validity_days=400, renew_before_days=30)
        assert [report.outcome for report in provision_by_default(due, out)][1] == "written"
        renewed = init_from_kit(site, out / "alpha.tar.gz").renewed_until
        assert renewed is not None and renewed > before
        assert certificate_validity(site / "keys" / "client.crt")[1] == renewed
        ssl.create_default_context().load_cert_chain(site / "keys" / "client.crt", site / "keys" / "client.key")

    @pytest.mark.parametrize("other", ["authority", "key", "shorter"])
    def test_a_certificate_of_another_authority_or_key_or_an_older_one_renews_nothing(self, tmp_path: Path, other: str) -> None:
        out, site = tmp_path / "kits", tmp_path / "site"
        days = {"validity_days": 50, "renew_before_days": 5}
        provision_by_default(federation(sites=SITES[:1], mutual_tls=True, **days), out)
        init_from_kit(site, out / "alpha.tar.gz")
        public = site / "keys" / "node.pub"
        provision_by_default(federation(sites=SITES[:1], mutual_tls=True, **days), out, {"alpha": public})
        init_from_kit(site, out / "alpha.tar.gz")
        before = (site / "keys" / "client.crt").read_bytes()
        authority = open_authority((tmp_path / "foreign" if other == "authority" else out) / "ca", "test", days_from_now(900))
        key = new_key() if other == "key" else read_private_key(public.with_suffix(""))
        certificate = authority.issue_client(key.public_key(), "alpha", days_from_now(10 if other == "shorter" else 400))
        shutil.copytree(out / "alpha", tmp_path / "kit")
        (tmp_path / "kit" / "keys" / "client.crt").write_bytes(certificate)
        assert init_from_kit(site, tmp_path / "kit").renewed_until is None
        assert (site / "keys" / "client.crt").read_bytes() == before

    def test_a_key_made_here_before_leaves_the_kit(self, tmp_path: Path, public: Path) -> None:
        out = tmp_path / "kits"
        provision(federation(sites=SITES[:1]), out)
        old = key_fingerprint(read_public_key(out / "coordinator" / "sites" / "alpha.pub"))
        provision(self.config(public), out)
        assert not (out / "alpha" / "keys" / "node").exists()
        assert old in (out / "ca" / "revoked").read_text()

    def test_a_hospital_that_works_in_its_kit_folder_keeps_its_key(self, tmp_path: Path) -> None:
        public = write_node_key(tmp_path / "alpha" / "keys", "alpha")
        before = public.with_suffix("").read_bytes()
        provision(self.config(public), tmp_path)
        assert public.with_suffix("").read_bytes() == before

    def test_a_private_key_sent_by_mistake_is_told(self, tmp_path: Path, public: Path) -> None:
        with pytest.raises(ConfigError, match="must not leave its site"):
            provision(self.config(public.with_suffix("")), tmp_path / "kits")

    def test_a_key_of_another_kind_is_told(self, tmp_path: Path) -> None:
        key = rsa.generate_private_key(65537, 2048).public_key()
        path = tmp_path / "rsa.pub"
        path.write_bytes(key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))
        with pytest.raises(ConfigError, match="expected a P-384 key"):
            provision(self.config(path), tmp_path / "kits")

    def test_a_key_of_another_site_is_told(self, tmp_path: Path, public: Path) -> None:
        config = federation(sites=[{"name": name, "public_key": str(public)} for name in ("alpha", "beta")])
        with pytest.raises(ConfigError, match="is the one of site alpha"):
            provision(config, tmp_path / "kits")

    def test_a_revoked_key_is_never_taken_again(self, tmp_path: Path, public: Path) -> None:
        config = self.config(public)
        provision(config, tmp_path / "kits")
        provision(changed(config, sites=[{"name": "alpha", "revoked": True}]), tmp_path / "kits")
        with pytest.raises(ConfigError, match="was revoked and is never taken again"):
            provision(config, tmp_path / "kits")


class TestCommand:
    def run(self, *arguments: str) -> str:
        app = Typer()
        app.command()(command)
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    def test_no_secret_is_shown_or_logged(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        shown = self.run(str(EXAMPLE), "--out", str(tmp_path / "kits"), "--with-keys") + caplog.text
        names = {"node", "server.key", "ca.key", "superexec.secret", "token"}
        secrets = [line for path in files_of(tmp_path) if path.name in names for line in path.read_text().splitlines()]
        assert len(secrets) > 20
        assert not [line for line in secrets if line in shown]

    def test_each_key_is_shown_by_its_fingerprint(self, tmp_path: Path) -> None:
        shown = self.run(str(EXAMPLE), "--out", str(tmp_path), "--with-keys")
        assert key_fingerprint(read_public_key(tmp_path / "river-clinic" / "keys" / "node.pub")) in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": [{"name": "a"}, {"name": "A"}]}, "differ by more than their case"),
        ({"sites": [{"name": "coordinator"}]}, "is kept for a folder"),
        ({"sites": [{"name": "auditor-x"}]}, "is kept for a folder"),
        ({"sites": [{"name": "../x"}]}, "sites.0.name"),
        ({"sites": [{"name": "a", "contact": "x\nExecStart=/bin/sh"}]}, "contact"),
        ({"coordinator": {"hosts": ["a b"]}}, "hosts.0"),
        ({"coordinator": {"hosts": ["a;return 200"]}}, "hosts.0"),
        ({"coordinator": {"hosts": ["a"]}, "auditors": AUDITORS}, "page_port is needed"),
        ({"coordinator": {"hosts": ["a"], "port": 1, "page_port": 1}}, "must differ"),
        ({"validity_days": 10, "renew_before_days": 10}, "smaller than validity_days"),
        ({"mutual_tsl": True}, "did you mean 'mutual_tls'"),
    ],
)
def test_a_wrong_federation_file_is_explained(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        federation(**changes)


def test_a_public_key_is_looked_for_beside_the_federation_file(tmp_path: Path) -> None:
    file = tmp_path / "federation.yaml"
    file.write_text("name: x\ncoordinator: {hosts: [a]}\nsites: [{name: alpha, public_key: keys/alpha.pub}]\n")
    with pytest.raises(ConfigError, match=r"site alpha: the public key .*keys/alpha\.pub does not exist"):
        read_federation(file)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "alpha.pub").write_bytes(NodeKey.generate("alpha").public)
    assert read_federation(file).sites[0].public_key == str(tmp_path / "keys" / "alpha.pub")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_fingerprints_are_those_of_ssh_keygen(tmp_path: Path) -> None:
    public = write_node_key(tmp_path, "alpha")
    shown = subprocess.run(["ssh-keygen", "-lf", str(public)], capture_output=True, text=True, check=True).stdout
    assert key_fingerprint(read_public_key(public)) == shown.split()[1]


def test_a_node_key_is_never_overwritten(tmp_path: Path) -> None:
    write_node_key(tmp_path, "alpha")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="exists"):
        write_node_key(tmp_path, "alpha")
    assert snapshot(tmp_path) == before
    assert (tmp_path / "node").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content", [b"", b"x", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"]
)
def test_a_damaged_private_key_is_told(content: bytes) -> None:
    with pytest.raises(ConfigError, match="expected a P-384 private key"):
        parse_private_key(content, "keys/node")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_units(out: Path) -> None:
    for unit in (out / "alpha/pneumofed-alpha.service", out / "coordinator/pneumofed-coordinator.service"):
        checked = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
        assert not re.search("Unknown|Invalid|Failed to parse", checked.stderr)


def test_the_start_scripts_are_shell(out: Path) -> None:
    for script in out.rglob("start.sh"):
        subprocess.run(["sh", "-n", str(script)], check=True)


def test_the_certificates_begin_in_time_for_late_clocks(out: Path) -> None:
    certificate = x509.load_pem_x509_certificate((out / "coordinator/keys/server.crt").read_bytes())
    assert certificate.not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=50)
