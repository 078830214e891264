"""`pneumofed site`: a folder from a kit or by hand, a service that is started once, asked and stopped, and state that cannot lie."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pneumofed.client.cli.site import app
from pneumofed.client.site import service
from pneumofed.client.site.folder import SiteFolder
from pneumofed.client.site.init import MAX_KIT_FILES, init_by_hand, init_from_kit
from pneumofed.common.audit.log import read_entries
from pneumofed.common.config.parties import SitePolicy
from pneumofed.common.errors import ConfigError, FlowerError
from pneumofed.common.ops.processes import Daemon, started_at
from pneumofed.common.wire.keys import read_private_key, read_public_key
from tests.client.complete_site import make_site
from tests.client.kits import archive, kit_files, special

SLEEPER = "import time, sys; print('up', flush=True); time.sleep(600)"


def test_a_kit_becomes_a_private_site_folder(tmp_path: Path) -> None:
    kit = archive(tmp_path / "kit.tar.gz", kit_files())
    result = CliRunner().invoke(app, ["init", str(tmp_path / "site"), "--kit", str(kit)])
    assert result.exit_code == 0, result.output
    folder = SiteFolder.open(tmp_path / "site")
    assert (folder.config.name, folder.policy.min_patients, folder.connection.coordinator) == ("north", 30, "example.org:9443")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    for path in folder.path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() or path.suffix == ".sh" else 0o600), path


def test_a_kit_may_be_a_folder_or_an_archive_without_a_top(tmp_path: Path) -> None:
    init_from_kit(tmp_path / "first", archive(tmp_path / "kit.tar.gz", kit_files("")))
    init_from_kit(tmp_path / "second", tmp_path / "first")
    assert SiteFolder.open(tmp_path / "second").config.name == "north"


def test_what_is_the_hospitals_own_stays_when_a_kit_comes_again(tmp_path: Path) -> None:
    kit = archive(tmp_path / "kit.tar.gz", kit_files())
    init_from_kit(tmp_path / "site", kit)
    (tmp_path / "site" / "policy.yaml").write_text("min_patients: 99\n")
    assert "policy.yaml" in init_from_kit(tmp_path / "site", kit).kept
    assert SiteFolder.open(tmp_path / "site").policy.min_patients == 99


def test_a_kit_with_another_key_changes_nothing(tmp_path: Path) -> None:
    init_by_hand(tmp_path / "site", "north", "example.org:9443")
    before = (tmp_path / "site" / "keys" / "node").read_bytes()
    with pytest.raises(ConfigError, match="another key"):
        init_from_kit(tmp_path / "site", archive(tmp_path / "kit.tar.gz", kit_files()))
    assert (tmp_path / "site" / "keys" / "node").read_bytes() == before


@pytest.mark.parametrize(
    "bad",
    [
        {"../outside": "x"},
        {"/tmp/pneumofed-outside": "x"},
        {"north/../../outside": "x"},
        {"link": special("north/keys/link", tarfile.SYMTYPE)},
        {"hard": special("north/hard", tarfile.LNKTYPE)},
        {"device": special("north/device", tarfile.CHRTYPE)},
        {f"north/{number}": "x" for number in range(MAX_KIT_FILES + 1)},
        {"north/large": "x" * (11 << 20)},
    ],
)
def test_a_hostile_archive_writes_nothing_at_all(tmp_path: Path, bad: dict[str, Any]) -> None:
    kit = archive(tmp_path / "kit.tar.gz", {**kit_files(), **bad})
    with pytest.raises(ConfigError):
        init_from_kit(tmp_path / "deep" / "site", kit)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kit.tar.gz"]
    assert not Path("/tmp/pneumofed-outside").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x1f\x8b\x08\x00broken"])
def test_a_damaged_archive_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "kit.tar.gz").write_bytes(content)
    with pytest.raises(ConfigError):
        init_from_kit(tmp_path / "site", tmp_path / "kit.tar.gz")


def test_a_folder_made_by_hand_has_a_key_of_its_own_that_is_never_overwritten(tmp_path: Path) -> None:
    arguments = ["init", str(tmp_path / "site"), "--name", "north", "--coordinator", "example.org:9443"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "SHA256:" in result.output
    assert "BEGIN" not in result.output
    key = tmp_path / "site" / "keys" / "node"
    assert read_private_key(key).public_key() == read_public_key(key.with_name("node.pub"))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    assert isinstance(CliRunner().invoke(app, arguments).exception, ConfigError)
    assert key.read_bytes() == before
    assert SiteFolder.open(tmp_path / "site").policy == SitePolicy()


@pytest.mark.parametrize(
    ("name", "coordinator"), [("north hospital", "example.org:1"), ("north", "example.org"), ("../x", "a:1")]
)
def test_malformed_names_and_addresses_leave_no_folder(tmp_path: Path, name: str, coordinator: str) -> None:
    with pytest.raises(ConfigError):
        init_by_hand(tmp_path / "site", name, coordinator)
    assert not (tmp_path / "site").exists()


def test_a_folder_without_a_site_is_told(tmp_path: Path) -> None:
    assert isinstance(CliRunner().invoke(app, ["status", "-C", str(tmp_path)]).exception, ConfigError)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, pneumofed.client.cli.site; print([m for m in ('torch', 'flwr', 'numpy', 'cryptography') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# --- the service ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SiteFolder]:
    """A site whose SuperNode is a process that sleeps, and that says it is healthy."""
    folder = make_site(tmp_path / "site", "example.org:9443")
    (folder.path / "keys" / "ca.crt").write_text("certificate")
    monkeypatch.setattr(service, "supernode_command", lambda *_: [sys.executable, "-c", SLEEPER])
    monkeypatch.setattr(service, "is_serving", lambda _: True)
    monkeypatch.setattr(service, "SETTLE_SEC", 0.2)
    yield folder
    service.stop_service(folder, patience_sec=5.0)


def events(folder: SiteFolder) -> list[str]:
    return [entry.event for entry in read_entries(folder.audit.path)]


def test_a_site_is_started_once_and_stopped(site: SiteFolder) -> None:
    pid = service.start_service(site)
    assert service.read_status(site).pid == pid
    with pytest.raises(ConfigError, match=f"process {pid}"):
        service.start_service(site)
    assert service.stop_service(site)
    assert started_at(pid) is None
    assert service.read_status(site).process == "stopped"
    assert not service.stop_service(site)
    assert events(site) == ["site-started", "site-stopped"]


def test_a_process_that_died_is_told_as_such(site: SiteFolder) -> None:
    pid = service.start_service(site)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert service.read_status(site).process == "died"
    service.start_service(site)
    assert service.read_status(site).process == "running"


def test_a_pid_file_whose_number_is_another_programs_by_now_is_stale(site: SiteFolder) -> None:
    site.work.mkdir(exist_ok=True)
    (site.work / "supernode.pid").write_text(json.dumps({"pid": os.getpid(), "started": "another boot 17"}))
    assert service.read_status(site).process == "died"
    service.stop_service(site)  # and this very process lives on
    pid = service.start_service(site)
    assert pid != os.getpid()


def test_a_supernode_that_ends_at_once_is_told_with_its_last_words(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        service, "supernode_command", lambda *_: [sys.executable, "-c", "print('key refused'); raise SystemExit(1)"]
    )
    monkeypatch.setattr(service, "SETTLE_SEC", 60.0)
    with pytest.raises(FlowerError, match="key refused"):
        service.start_service(site)


def test_a_refusal_that_takes_its_time_is_no_start(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    late = f"import time; print('up', flush=True); time.sleep(2); print({service.STILL_CONNECTED!r}); raise SystemExit(1)"
    monkeypatch.setattr(service, "supernode_command", lambda *_: [sys.executable, "-c", late])
    monkeypatch.setattr(service, "SETTLE_SEC", 60.0)
    monkeypatch.setattr(service, "LEASE_SEC", 0.0)
    with pytest.raises(FlowerError, match=service.STILL_CONNECTED):
        service.start_service(site)


def test_a_site_that_was_taken_in_is_not_waited_for(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"import time; print({service.TAKEN_IN!r}, 7, flush=True); time.sleep(600)"
    monkeypatch.setattr(service, "supernode_command", lambda *_: [sys.executable, "-c", said])
    for _ in range(2):  # the log goes on with the second start
        started = time.monotonic()
        monkeypatch.setattr(service, "SETTLE_SEC", 120.0)
        pid = service.start_service(site)
        assert time.monotonic() - started < 60
        assert service.read_status(site).pid == pid
        service.stop_service(site, patience_sec=5.0)


def test_a_process_that_does_not_listen_is_killed(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    monkeypatch.setattr(service, "supernode_command", lambda *_: [sys.executable, "-c", deaf])
    pid = service.start_service(site)
    service.stop_service(site, patience_sec=0.5)
    assert started_at(pid) is None


@pytest.mark.parametrize("missing", ["keys/ca.crt", "keys/node", "policy.yaml", "connection.yaml"])
def test_an_incomplete_site_is_not_started(site: SiteFolder, missing: str) -> None:
    (site.path / missing).unlink()
    with pytest.raises(ConfigError):
        service.start_service(SiteFolder.open(site.path))
    assert not (site.work / "supernode.pid").exists()


def test_a_site_without_a_policy_is_not_started(site: SiteFolder) -> None:
    site.site_file.write_text("name: north\nmanifest: m.csv\nwork_dir: work\n")
    with pytest.raises(ConfigError, match="names no policy"):
        service.start_service(SiteFolder.open(site.path))


def test_the_gate_is_first_on_the_supernodes_path_and_the_site_says_whom_it_works_for(site: SiteFolder) -> None:
    service.start_service(site)
    pid = service.read_status(site).pid
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    path = next(value for value in variables if value.startswith("PATH=")).removeprefix("PATH=").split(os.pathsep)
    assert path[0] == str(site.work / "gate")
    assert (Path(path[0]) / "flwr-clientapp").is_file()
    assert "PNEUMOFED_COORDINATOR=example.org:9443" in variables
    assert f"FLWR_HOME={site.work / 'flower'}" in variables


def test_the_foreground_process_is_the_supernode_itself_and_is_found_and_stopped(site: SiteFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from pneumofed.client.site import service\n"
        "from pneumofed.client.site.folder import SiteFolder\n"
        f"service.supernode_command = lambda *_: [sys.executable, '-c', {SLEEPER!r}]\n"
        f"service.run_in_foreground(SiteFolder.open(Path({str(site.path)!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert service.read_status(site).pid == process.pid
        assert service.stop_service(site)
        assert started_at(process.pid) is None
    finally:
        process.kill()
        process.wait()


def test_the_supernodes_command_names_the_site_and_listens_on_loopback_alone(tmp_path: Path) -> None:
    folder = make_site(tmp_path / "site", "example.org:9443")
    command = service.supernode_command(folder, 5001, "127.0.0.1:5002")
    assert command[1:4] == ["-P", "-m", "pneumofed.client.site.supernode"]
    words = dict(zip(command[4::2], command[5::2], strict=True))
    assert words["--node-config"] == f'site-config="{folder.site_file}"'
    assert (words["--host"], words["--superlink"]) == ("127.0.0.1", "example.org:9443")
    assert "--insecure" not in command


def test_a_site_with_a_client_certificate_shows_it(tmp_path: Path) -> None:
    folder = make_site(tmp_path / "site", "example.org:9443")
    with folder.connection_file.open("a") as file:
        file.write("client_certificate: keys/client.crt\nclient_key: keys/client.key\n")
    command = service.supernode_command(SiteFolder.open(folder.path), 5001, "127.0.0.1:5002")
    assert command[command.index("--client-certificate") + 1] == str(folder.path / "keys" / "client.crt")


def test_a_path_that_would_break_the_command_line_is_refused(tmp_path: Path) -> None:
    folder = make_site(tmp_path / 'a"b', "example.org:9443")
    with pytest.raises(ConfigError, match="quotes"):
        service.supernode_command(folder, 1, "x")


def test_the_status_tells_the_last_reply_and_the_refusals_of_the_day(site: SiteFolder) -> None:
    site.audit.record("answer", work="train", run="r", round=3, bytes=9)
    for rule in ("quiet_hours", "approved_apps", "quiet_hours"):
        site.audit.record("refusal", rule=rule)
    found = service.read_status(site)
    assert found.last_answer is not None
    assert (found.last_answer["work"], found.last_answer["round"], found.last_answer["run"]) == ("train", 3, "r")
    assert found.refusals_today == {"approved_apps": 1, "quiet_hours": 2}
    assert found.audit_head == site.audit.head()
    assert service.read_status(site, lambda: datetime(2000, 1, 1, tzinfo=UTC)).refusals_today == {}


def test_the_status_tells_a_broken_audit_log_and_exits_with_3_where_nothing_runs(site: SiteFolder) -> None:
    site.audit.record("answer", work="train", run="r", round=3)
    site.audit.path.write_bytes(site.audit.path.read_bytes().replace(b'"round":3', b'"round":4'))
    result = CliRunner().invoke(app, ["status", "-C", str(site.path)])
    assert result.exit_code == 3
    assert "broken at line 1 (changed)" in result.output
    assert json.loads(CliRunner().invoke(app, ["status", "--json", "-C", str(site.path)]).output)["audit_problem"]


def test_a_daemon_without_a_pid_file_was_never_started(tmp_path: Path) -> None:
    daemon = Daemon("supernode", tmp_path)
    assert (daemon.pid(), daemon.was_started()) == (None, False)
