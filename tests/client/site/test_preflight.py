"""The preflight: each problem has its kind, its sentence and its remedy, and the exit code tells the kinds apart."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from ssl import PROTOCOL_TLS_SERVER, SSLContext
from typing import Any

import pytest
from typer.testing import CliRunner

from pneumofed.client.cli.site import app
from pneumofed.client.site import checks, preflight
from pneumofed.client.site.checks import Kind, PreflightFinding
from pneumofed.client.site.folder import SiteFolder
from pneumofed.client.site.preflight import (
    CHECKS,
    EXIT_CODES,
    ConnectionProblem,
    check_clock,
    check_port,
    exit_code,
    probe_gateway,
    run_checks,
)
from pneumofed.common.wire.keys import write_node_key
from pneumofed.server.provisioning.authority import Authority
from tests.client.complete_site import make_site
from tests.client.superlink import issue, superlink

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


def levels(findings: Any) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "link").mkdir()
    return issue(tmp_path / "link")


@pytest.fixture
def site(tmp_path: Path, authority: Authority) -> SiteFolder:
    return make_site(tmp_path / "site", ca=tmp_path / "link" / "ca.crt")


@pytest.fixture
def fit_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever machine the tests run on, its disk and memory are no problem."""
    monkeypatch.setitem(CHECKS, "environment", lambda _: [])


class Handler(BaseHTTPRequestHandler):
    """Answers 404 with the time that the class is told."""

    shift = timedelta()
    status = 404

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return f"{datetime.now(UTC) + self.shift:%a, %d %b %Y %H:%M:%S GMT}"

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def door(folder: Path, shift: timedelta = timedelta(), status: int = 404) -> Iterator[int]:
    """A TLS server with the certificate in `folder` on a free port."""
    server = HTTPServer(("127.0.0.1", 0), type("Shifted", (Handler,), {"shift": shift, "status": status}))
    context = SSLContext(PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- exit codes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(EXIT_CODES))
def test_the_exit_code_is_the_first_kinds_that_has_a_problem(kind: Kind) -> None:
    later = [PreflightFinding(other, "x", "problem", "") for other in EXIT_CODES if EXIT_CODES[other] >= EXIT_CODES[kind]]
    assert exit_code(later) == EXIT_CODES[kind]


def test_warnings_do_not_fail() -> None:
    assert exit_code([PreflightFinding(kind, "x", "warning", "") for kind in EXIT_CODES]) == 0
    assert exit_code([]) == 0


def test_whatever_is_not_ok_says_what_to_do(site: SiteFolder) -> None:
    findings = run_checks(site)
    assert all(finding.remedy for finding in findings if finding.level != "ok")
    assert all(finding.sentence for finding in findings)


def test_a_check_that_fails_itself_is_told_and_the_others_are_made(site: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> PreflightFinding:
        raise ZeroDivisionError

    monkeypatch.setattr(checks, "check_disk", broken)
    findings = run_checks(site)
    assert any(finding.level == "problem" and "ZeroDivisionError" in finding.sentence for finding in findings)
    assert {finding.kind for finding in findings} == set(EXIT_CODES)


@pytest.mark.usefixtures("fit_machine")
def test_the_command_prints_json_and_exits_with_the_kind(site: SiteFolder) -> None:
    result = CliRunner().invoke(app, ["preflight", "--json", "-C", str(site.path)])
    found = json.loads(result.output)
    assert {"kind", "name", "level", "sentence", "remedy"} == set(found[0])
    assert result.exit_code == 12, result.output  # nobody listens on port 1
    assert CliRunner().invoke(app, ["preflight", "-C", str(site.path)]).exit_code == 12


# --- environment ----------------------------------------------------------------------------------------------------------------


def test_this_very_environment_is_fit() -> None:
    assert checks.check_flower().level == "ok"
    assert checks.check_python((3, 11)).level == "ok"


@pytest.mark.parametrize("found", [(3, 10), (3, 13), (2, 7)])
def test_another_python_is_a_problem(found: tuple[int, int]) -> None:
    assert checks.check_python(found).level == "problem"


@pytest.mark.parametrize(("installed", "level"), [("1.41.9", "ok"), ("1.42.0", "problem"), ("1.4.1", "problem")])
def test_flower_must_be_of_the_same_minor_version(monkeypatch: pytest.MonkeyPatch, installed: str, level: str) -> None:
    monkeypatch.setattr(checks, "version", lambda _: installed)
    assert checks.check_flower().level == level


@pytest.mark.parametrize(("kib", "level"), [(1 << 20, "problem"), (3 << 20, "warning"), (9 << 20, "ok")])
def test_little_memory_is_told(tmp_path: Path, kib: int, level: str) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {kib} kB\n")
    assert checks.check_memory(tmp_path / "meminfo").level == level


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 28}))
    assert checks.check_disk(tmp_path / "not" / "there").level == "problem"


def test_a_work_folder_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert checks.check_work_folder(tmp_path / "file" / "work").level == "problem"
    assert checks.check_work_folder(tmp_path / "work").level == "ok"
    (tmp_path / "work").chmod(0o755)
    assert checks.check_work_folder(tmp_path / "work").level == "warning"


def test_a_graphics_card_that_is_not_there_is_a_problem_only_if_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert checks.check_device("cpu").level == "ok"
    assert checks.check_device("cuda:0").level == "problem"


@pytest.mark.parametrize(
    ("seconds", "level"), [(0, "ok"), (2, "ok"), (-3, "ok"), (4, "warning"), (6, "problem"), (-60, "warning"), (-280, "problem")]
)
def test_a_clock_that_the_coordinator_would_refuse_is_a_problem(seconds: float, level: str) -> None:
    finding = check_clock(NOW, NOW + timedelta(seconds=seconds))
    assert (finding.kind, finding.level) == ("environment", level)


# --- keys -----------------------------------------------------------------------------------------------------------------------


def test_keys_made_by_hand_are_fine(site: SiteFolder) -> None:
    assert set(levels(checks.check_site_keys(site)).values()) == {"ok"}


@pytest.mark.parametrize(("days", "level"), [(3600, "ok"), (3640, "warning"), (3700, "problem"), (-1, "problem")])
def test_a_certificate_is_judged_by_its_days(site: SiteFolder, days: int, level: str) -> None:
    finding = checks.check_certificate(
        "authority", site.path / "keys" / "ca.crt", "ask", datetime.now(UTC) + timedelta(days=days)
    )
    assert finding.level == level


def test_a_key_that_others_can_read_is_a_problem(site: SiteFolder) -> None:
    (site.path / "keys" / "node").chmod(0o644)
    assert levels(checks.check_site_keys(site))["mode of node"] == "problem"


def test_a_public_part_of_another_key_is_a_problem(site: SiteFolder, tmp_path: Path) -> None:
    other = write_node_key(tmp_path / "other", "north")
    (site.path / "keys" / "node.pub").write_bytes(other.read_bytes())
    assert levels(checks.check_site_keys(site))["node key"] == "problem"


@pytest.mark.usefixtures("fit_machine")
@pytest.mark.parametrize("name", ["node", "ca.crt"])
def test_a_missing_or_damaged_key_or_certificate_is_a_problem(site: SiteFolder, name: str) -> None:
    (site.path / "keys" / name).write_text("nonsense")
    assert "problem" in levels(checks.check_site_keys(site)).values()
    (site.path / "keys" / name).unlink()
    assert "problem" in levels(checks.check_site_keys(site)).values()
    assert exit_code(run_checks(site)) == 11


# --- connection -----------------------------------------------------------------------------------------------------------------


def test_an_unknown_name_and_a_closed_port_are_told_apart(site: SiteFolder) -> None:
    with pytest.raises(ConnectionProblem, match="not known"):
        preflight.check_name("no-such-host.invalid")
    with pytest.raises(ConnectionProblem, match="refuses"):
        check_port("127.0.0.1", 1)


def test_a_door_of_the_federation_is_accepted_and_its_clock_read(site: SiteFolder, tmp_path: Path) -> None:
    with door(tmp_path / "link", timedelta(hours=1)) as port:
        answer = probe_gateway(site.connection, "localhost", port)
    assert answer.status == 404
    assert answer.date is not None
    assert check_clock(answer.date, datetime.now(UTC)).level == "problem"
    assert levels(preflight.check_gateway(answer))["answer"] == "ok"


def test_a_door_of_another_authority_is_a_problem(site: SiteFolder, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    issue(tmp_path / "foreign")
    with door(tmp_path / "foreign") as port, pytest.raises(ConnectionProblem, match="not from the federation's authority"):
        probe_gateway(site.connection, "localhost", port)


def test_a_door_with_an_expired_certificate_is_told_as_such(site: SiteFolder, tmp_path: Path, authority: Authority) -> None:
    (tmp_path / "old").mkdir()
    issue(tmp_path / "old", authority, days=-0.01)
    with door(tmp_path / "old") as port, pytest.raises(ConnectionProblem, match="expired"):
        probe_gateway(site.connection, "localhost", port)


def test_a_certificate_for_another_name_is_told_as_such(
    site: SiteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda address, *more: connect(("127.0.0.1", address[1]), *more))
    with door(tmp_path / "link") as port, pytest.raises(ConnectionProblem, match=r"is not for other\.example"):
        probe_gateway(site.connection, "other.example", port)


def test_a_certificate_that_ends_soon_and_a_door_that_fails_are_told(
    site: SiteFolder, tmp_path: Path, authority: Authority
) -> None:
    (tmp_path / "soon").mkdir()
    issue(tmp_path / "soon", authority, days=3)
    with door(tmp_path / "soon", status=502) as port:
        found = levels(preflight.check_gateway(probe_gateway(site.connection, "localhost", port)))
    assert found == {"TLS": "warning", "answer": "problem"}


def test_a_plain_text_port_is_told(site: SiteFolder) -> None:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    with pytest.raises(ConnectionProblem, match="does not speak our TLS"):
        probe_gateway(site.connection, "localhost", server.server_port)
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("fit_machine")
def test_a_coordinator_that_knows_the_key_and_one_that_does_not(tmp_path: Path) -> None:
    with superlink(tmp_path / "real") as link:
        site = make_site(tmp_path / "known", link.address, link.ca)
        stranger = make_site(tmp_path / "stranger", link.address, link.ca)
        link.flwr("supernode", "register", str(site.path / "keys" / "node.pub"), "test")
        for _ in range(2):  # the first question leaves no trace
            assert set(levels(preflight.check_connection(site)).values()) == {"ok"}
        assert exit_code(run_checks(site)) == 0
        assert levels(preflight.check_connection(stranger))["node"] == "problem"
        assert exit_code(run_checks(stranger)) == 12


# --- data and policy ------------------------------------------------------------------------------------------------------------


def test_a_good_manifest_is_fine(site: SiteFolder) -> None:
    assert set(levels(checks.check_data(site)).values()) == {"ok"}


def test_missing_files_are_counted_and_not_named(site: SiteFolder) -> None:
    victims = sorted((site.path / "data" / "images").iterdir())
    victims[0].unlink()
    (finding,) = [finding for finding in checks.check_data(site) if finding.name == "files"]
    assert (finding.level, finding.sentence) == ("warning", "1 of 32 files are missing")
    for victim in victims[1:]:
        victim.unlink()
    assert levels(checks.check_data(site))["files"] == "problem"


@pytest.mark.parametrize("content", [None, "", "nonsense\n1\n", "path,patient,label\n"])
def test_a_manifest_that_cannot_be_used_is_a_problem(site: SiteFolder, content: str | None) -> None:
    path = Path(site.config.manifest)
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert levels(checks.check_data(site))["manifest"] == "problem"


def test_one_class_alone_is_worth_a_warning_and_none_a_problem(site: SiteFolder) -> None:
    path = Path(site.config.manifest)
    text = path.read_text()
    path.write_text(text.replace("normal", "pneumonia"))
    assert levels(checks.check_data(site))["classes"] == "warning"
    path.write_text(text.replace("normal", "x").replace("pneumonia", "y"))
    assert levels(checks.check_data(site))["classes"] == "problem"


def test_fewer_patients_than_the_policy_asks_for_are_a_problem(site: SiteFolder) -> None:
    site.policy_file.write_text("min_patients: 15\n")
    assert levels(checks.check_data(site))["patients"] == "problem"


@pytest.mark.parametrize(
    "text",
    [
        "approved_apps: []",
        "models: []",
        "strategies: []",
        "max_rounds_per_day: 0",
        'quiet_hours: ["00:00-00:00"]',
        'quiet_hours: ["07:00-19:00", "18:00-07:00"]',
        "min_patient: 1",
    ],
)
def test_a_policy_that_lets_nothing_run_is_a_problem(site: SiteFolder, text: str) -> None:
    site.policy_file.write_text(text)
    assert exit_code(list(checks.check_policy_file(site))) == 14


def test_a_privacy_limit_is_worth_a_warning_and_the_default_policy_is_fine(site: SiteFolder) -> None:
    assert set(levels(checks.check_policy_file(site)).values()) == {"ok"}
    site.policy_file.write_text("max_epsilon: 3.0")
    assert levels(checks.check_policy_file(site))["privacy"] == "warning"


def test_a_policy_that_others_can_change_is_a_problem(site: SiteFolder) -> None:
    site.policy_file.chmod(0o666)
    assert levels(checks.check_policy_file(site))["policy"] == "problem"
