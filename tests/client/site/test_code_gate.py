"""The gate: only approved code runs, the refusal is told and recorded, and a gate that cannot tell is closed."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
from flwr.supercore.superexec.executor import subprocess_executor
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime import run_clientapp as runtime
from typer.testing import CliRunner

from pneumofed.client.cli.site import app as site_cli
from pneumofed.client.federation.policy import read_policy
from pneumofed.client.site import code_gate
from pneumofed.client.site.approval import approve_app, installed_hash, revoke
from pneumofed.common.audit.log import read_entries
from pneumofed.common.data.manifest import write_manifest
from pneumofed.common.errors import ConfigError, FlowerError
from pneumofed.common.ops.app_bundle import PACKAGE, build_bundle, hash_bundle, write_app
from pneumofed.common.ops.render import default_policy
from pneumofed.common.ops.study_code import read_study_code
from pneumofed.common.wire.instructions import pack_instruction
from pneumofed.common.wire.messages import Failure, read_failure
from tests.client.federation.test_policy import instruction
from tests.client.superlink import Link, superlink
from tests.own_network import NETWORK, write
from tests.tiny import draw_manifest

PROJECT = """\
[project]
name = "stranger"
version = "1.0.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "someone"
fab-include = ["stranger/**/*.py"]

[tool.flwr.app.components]
serverapp = "stranger.app:app"
clientapp = "stranger.app:app"
"""
APP = """\
import pathlib
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
pathlib.Path({marker!r}).touch()
app = ClientApp()
@app.query()
def query(message, context):
    {body}
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site folder with a policy that approves the installed code."""
    (tmp_path / "site").mkdir()
    write_manifest(draw_manifest(tmp_path / "images", 32, seed=0), tmp_path / "site" / "manifest.csv")
    values = {
        "name": "north",
        "manifest": "manifest.csv",
        "work_dir": "work",
        "policy": "policy.yaml",
        "device": "cpu",
        "threads": 1,
    }
    (tmp_path / "site" / "site.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "site" / "policy.yaml").write_text(default_policy())
    return tmp_path / "site"


@pytest.fixture
def flower() -> Iterator[None]:
    """Puts Flower's module and ours back as they were."""
    before, modules, variables = (
        {name: getattr(runtime, name) for name in code_gate.FLOWER_FUNCTIONS},
        dict(sys.modules),
        dict(os.environ),
    )
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("stranger", PACKAGE)]:
        del sys.modules[name]
    for name, value in before.items():
        setattr(runtime, name, value)
    sys.modules.update(modules)
    for name in set(os.environ) - set(variables):
        del os.environ[name]


def bundle(folder: Path, marker: Path, body: str = "return Message(RecordDict(), reply_to=message)") -> bytes:
    """A foreign app that leaves `marker` behind when it is imported."""
    (folder / "stranger").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "stranger" / "__init__.py").write_text("")
    (folder / "stranger" / "app.py").write_text(APP.format(marker=str(marker), body=body))
    return bytes(build_fab_from_disk(folder))


def take_task(site: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, command: str = code_gate.CLIENT_APP) -> Message:
    """What `run_clientapp` does with one task, and the reply."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(pack_instruction(instruction()), dst_node_id=5, message_type="query")
    context = Context(1, 5, {"site-config": str(site / "site.yaml")}, RecordDict(), {})
    monkeypatch.setattr(runtime, "pull_task_input", lambda _: (message, context, None, SimpleNamespace(content=content)))
    inside: Any = code_gate.guard(site / "site.yaml", command)
    asked, context, _, fab = inside.pull_task_input(None)
    inside.install_from_fab(fab.content, skip_prompt=True)
    app = inside.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)("other/name", "9", "f" * 64)
    reply: Message = app(message=asked, context=context)
    return reply


def test_flowers_inside_is_as_the_gate_expects() -> None:
    """Where this fails, Flower has changed: read its run_clientapp again before the gate is trusted with the new version."""
    used = runtime.run_clientapp.__code__.co_names
    for name in ("pull_task_input", "install_from_fab", "get_load_client_app_fn"):
        assert name in used
    source = inspect.getsource(runtime.run_clientapp)
    assert source.index("pull_task_input(") < source.index("install_from_fab(") < source.index("get_load_client_app_fn(")
    assert {"load_app", "import_module", "exec"}.isdisjoint(used)
    expected = ["runtime_api_address", "token", "insecure", "certificates", "parent_pid", "runtime_dependency_install"]
    assert list(inspect.signature(runtime.run_clientapp).parameters) == expected
    assert list(inspect.signature(runtime.install_from_fab).parameters) == ["fab_file", "install_dir", "skip_prompt"]
    assert TASK_TYPE_TO_COMMAND[TaskType.CLIENT_APP] == code_gate.CLIENT_APP
    assert "TASK_TYPE_TO_COMMAND[spec.task_type]" in inspect.getsource(subprocess_executor)


def test_another_flower_lets_nothing_run(site: Path, flower: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_gate, "version", lambda _: "1.42.0")
    with pytest.raises(FlowerError, match="nothing may run here"):
        code_gate.guard(site / "site.yaml")
    monkeypatch.undo()
    monkeypatch.delattr(runtime, "install_from_fab")
    with pytest.raises(FlowerError, match="without install_from_fab"):
        code_gate.guard(site / "site.yaml")


def test_an_unapproved_bundle_is_refused_recorded_and_never_unpacked(
    site: Path, tmp_path: Path, flower: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bundle(tmp_path / "app", tmp_path / "marker")
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    failure = read_failure(take_task(site, content, monkeypatch))
    assert failure == Failure("north", "PolicyError", "the site's policy refuses this (approved_apps)")
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "home").exists()
    assert not (site / "work" / code_gate.APPS_FOLDER).exists()
    entry = read_entries(site / "work" / "audit.jsonl")[-1]
    assert (entry.event, entry.facts["rule"], entry.facts["app"]) == ("refusal", "approved_apps", hash_bundle(content))
    assert (entry.facts["work"], entry.facts["run"], entry.facts["round"]) == ("query", "00000000000000a7", 3)


def test_an_approved_bundle_runs_by_its_hash_and_not_by_what_is_said_of_it(
    site: Path, tmp_path: Path, flower: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bundle(tmp_path / "app", tmp_path / "marker")
    approve_app(site / "policy.yaml", hash_bundle(content))
    reply = take_task(site, content, monkeypatch)
    assert not reply.has_error()
    assert (tmp_path / "marker").exists()
    assert (site / "work" / code_gate.APPS_FOLDER / hash_bundle(content) / "pyproject.toml").exists()
    assert os.environ["PNEUMOFED_APP"] == hash_bundle(content)


@pytest.mark.parametrize("approved", [False, True])
def test_a_studys_own_network_needs_an_approval_of_its_own_and_its_file_is_named(
    approved: bool, site: Path, tmp_path: Path, flower: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = build_bundle([read_study_code(f"{write(tmp_path)}:build_net")])
    (tmp_path / "study.fab").write_bytes(content)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    if approved:
        said = CliRunner().invoke(site_cli, ["approve", "--bundle", str(tmp_path / "study.fab"), "--site", str(site)]).output
        assert "it holds the study's own code pneumofed/study_code/net.py" in said.replace("\n", " ")
    reply = take_task(site, content, monkeypatch)
    unpacked = site / "work" / code_gate.APPS_FOLDER / hash_bundle(content)
    assert reply.has_error() is not approved and unpacked.exists() is approved
    if approved:
        assert (unpacked / PACKAGE / "study_code" / "net.py").read_text() == NETWORK


def test_one_changed_byte_is_another_bundle(site: Path, tmp_path: Path, flower: None, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bundle(tmp_path / "app", tmp_path / "marker")
    approve_app(site / "policy.yaml", hash_bundle(content))
    reply = take_task(site, content[:-1] + bytes([content[-1] ^ 1]), monkeypatch)
    assert read_failure(reply).error == "PolicyError"
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("policy", ["approved_apps: [", "approved_appz: []", None, "approved_apps: []"])
def test_a_gate_without_a_policy_is_closed(
    site: Path, tmp_path: Path, flower: None, monkeypatch: pytest.MonkeyPatch, policy: str | None
) -> None:
    content = bundle(tmp_path / "app", tmp_path / "marker")
    (site / "policy.yaml").unlink()
    if policy is not None:
        (site / "policy.yaml").write_text(policy)
    assert read_failure(take_task(site, content, monkeypatch)).error == "PolicyError"
    assert not (tmp_path / "marker").exists()


def test_a_gate_without_a_site_is_closed(site: Path, tmp_path: Path, flower: None, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bundle(tmp_path / "app", tmp_path / "marker")
    (site / "site.yaml").write_text("name: north\nmanifest: m.csv\nwork_dir: work\n")
    assert read_failure(take_task(site, content, monkeypatch)).sentence == "the site's policy refuses this (policy)"
    (site / "site.yaml").unlink()
    assert read_failure(take_task(site, content, monkeypatch)).error == "ConfigError"
    assert not (tmp_path / "marker").exists()


def test_an_audit_log_that_cannot_be_written_does_not_open_the_gate(
    site: Path, tmp_path: Path, flower: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bundle(tmp_path / "app", tmp_path / "marker")
    (site / "work").mkdir()
    (site / "work" / "audit.jsonl").write_text("damaged\n")
    assert read_failure(take_task(site, content, monkeypatch)).error == "PolicyError"
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("command", sorted(set(TASK_TYPE_TO_COMMAND.values()) - {code_gate.CLIENT_APP}))
def test_a_task_of_another_kind_is_refused_also_for_approved_code(
    site: Path, tmp_path: Path, flower: None, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    content = bundle(tmp_path / "app", tmp_path / "marker")
    approve_app(site / "policy.yaml", hash_bundle(content))
    assert read_failure(take_task(site, content, monkeypatch, command)).sentence == "the site's policy refuses this (task_type)"
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("body", ["raise ValueError('/data/DOE^JANE/1.dcm')", "return open('/data/DOE^JANE/1.dcm')"])
def test_an_apps_own_error_leaves_the_site_without_its_text(
    site: Path, tmp_path: Path, flower: None, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    content = bundle(tmp_path / "app", tmp_path / "marker", body)
    approve_app(site / "policy.yaml", hash_bundle(content))
    reply = take_task(site, content, monkeypatch)
    assert reply.has_error()
    assert "DOE" not in str(reply.error)
    assert read_failure(reply).site == "north"


def test_every_command_that_flower_gives_a_task_to_leads_to_the_gate(site: Path, tmp_path: Path) -> None:
    folder = code_gate.write_commands(tmp_path / "it's here", site / "site.yaml")
    assert {path.name for path in folder.iterdir()} == set(TASK_TYPE_TO_COMMAND.values())
    command = folder / code_gate.CLIENT_APP
    assert stat.S_IMODE(command.stat().st_mode) == 0o700
    done = subprocess.run([str(command), "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "--runtime-api-address" in done.stdout
    assert "--parent-pid" in done.stdout


# --- approval -------------------------------------------------------------------------------------------------------------------

HASH = "12" + "0" * 30 + "e" + "4" * 31


@pytest.mark.parametrize(
    "text",
    [
        default_policy(),
        "# mine\nmin_patients: 3 # few\n",
        "",
        "approved_apps: []\n# end\n",
        "approved_apps:   # these\n- installed  # ours\n\n# end\nmin_patients: 3\n",
        'approved_apps:\n    - installed\n    - "' + "a" * 64 + '"  # other',
        "min_patients: 3\napproved_apps: [\n  installed,\n]\n",
    ],
)
def test_approving_and_taking_back_keeps_comments_and_all_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    before = read_policy(path)
    comments = [part for part in text.split() if part.startswith("#")]
    assert approve_app(path, HASH)
    assert not approve_app(path, HASH)
    assert read_policy(path).approved_apps == [*before.approved_apps, HASH]
    assert read_policy(path).min_patients == before.min_patients
    assert [part for part in path.read_text().split() if part.startswith("#")] == comments
    assert revoke(path, HASH)
    assert not revoke(path, HASH)
    assert read_policy(path) == before


def test_what_is_no_hash_is_not_approved(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(default_policy())
    with pytest.raises(ConfigError):
        approve_app(path, "latest")
    assert path.read_text() == default_policy()


def test_the_hash_of_the_installed_code_is_built_once_until_the_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []

    def build() -> bytes:
        built.append(1)
        return b"bundle"

    assert installed_hash(tmp_path, build) == installed_hash(tmp_path, build) == hash_bundle(b"bundle")
    assert len(built) == 1
    monkeypatch.setattr("pneumofed.client.site.approval.state_of_code", lambda: "other")
    installed_hash(tmp_path, build)
    assert len(built) == 2
    (tmp_path / "installed_app.json").write_text("{")
    assert installed_hash(tmp_path, build) == hash_bundle(b"bundle")


def test_installed_stands_for_the_bundle_of_this_very_code(site: Path, flower: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not take_task(site, build_bundle(), monkeypatch).has_error()


@pytest.fixture
def packages() -> Iterator[None]:
    """Puts the folders back in which our packages look for their modules, and what the gate knows of the code in memory."""
    found = {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] == PACKAGE and hasattr(module, "__path__")
    }
    paths, loaded = {name: list(module.__path__) for name, module in found.items()}, list(code_gate._loaded)
    yield
    code_gate._loaded[:] = loaded
    for name, module in found.items():
        module.__path__ = paths[name]


def test_the_installed_code_runs_as_it_was_imported_and_finds_the_rest_in_its_bundle(
    site: Path, flower: None, packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    code_gate.load_ahead(lambda: None)
    app, content = importlib.import_module("pneumofed.client.app"), build_bundle()
    assert not take_task(site, content, monkeypatch).has_error()
    assert sys.modules["pneumofed.client.app"] is app
    unpacked = site / "work" / code_gate.APPS_FOLDER / hash_bundle(content)
    assert list(sys.modules["pneumofed.client.federation"].__path__) == [str(unpacked / "pneumofed" / "client" / "federation")]


@pytest.mark.parametrize("when", ["while it was imported", "since", "in the bundle"])
def test_code_that_is_not_the_one_in_memory_runs_by_its_own_modules(
    when: str, site: Path, tmp_path: Path, flower: None, packages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upgrade() -> None:
        monkeypatch.setattr(code_gate, "state_of_code", lambda: "another")

    code_gate.load_ahead(upgrade if when.startswith("while") else lambda: None)
    app, content = importlib.import_module("pneumofed.client.app"), build_bundle()
    if when == "since":
        upgrade()
    elif when == "in the bundle":
        content = bytes(build_fab_from_disk(roll_call_app(tmp_path / "app", tmp_path / "marker")))
        approve_app(site / "policy.yaml", hash_bundle(content))
    assert not take_task(site, content, monkeypatch).has_error()
    unpacked = site / "work" / code_gate.APPS_FOLDER / hash_bundle(content)
    assert sys.modules["pneumofed.client.app"] is not app
    assert str(sys.modules["pneumofed.client.app"].__file__).startswith(str(unpacked))
    assert (tmp_path / "marker").exists() is (when == "in the bundle")


def test_the_command_approves_lists_and_takes_back(site: Path, tmp_path: Path) -> None:
    (tmp_path / "a.fab").write_bytes(bundle(tmp_path / "app", tmp_path / "marker"))
    wanted, runner = hash_bundle((tmp_path / "a.fab").read_bytes()), CliRunner()
    assert runner.invoke(site_cli, ["approve", "--bundle", str(tmp_path / "a.fab"), "-C", str(site)]).exit_code == 0
    listed = runner.invoke(site_cli, ["approve", "--list", "-C", str(site)]).output.splitlines()
    assert listed[1:] == [wanted]
    assert listed[0] == f"installed  {installed_hash(site / 'work')}"
    assert runner.invoke(site_cli, ["approve", wanted, "--remove", "-C", str(site)]).exit_code == 0
    assert read_policy(site / "policy.yaml").approved_apps == ["installed"]
    assert [entry.event for entry in read_entries(site / "work" / "audit.jsonl")] == ["app-approved", "app-revoked"]


# --- with Flower's own processes ------------------------------------------------------------------------------------------------

SERVER = """\
import json
import pathlib
import time
from flwr.app import Message
from flwr.serverapp import ServerApp
from pneumofed.common.wire.instructions import Instruction, pack_instruction
from pneumofed.common.wire.messages import read_failure, unpack_presence
from pneumofed.common.config.experiment import ExperimentConfig
app = ServerApp()
@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.5)
    content = pack_instruction(Instruction(ExperimentConfig.model_validate_json(context.run_config["experiment"]), "00000000000000a1", 0))
    replies = grid.send_and_receive([Message(content, dst_node_id=node, message_type="query") for node in nodes], timeout=120)
    said = [str(read_failure(r)) if r.has_error() else unpack_presence(r.content).site for r in replies]
    pathlib.Path(context.run_config["coordinator"]).write_text(json.dumps(said))
"""


def roll_call_app(folder: Path, marker: Path) -> Path:
    """The app of this project whose ServerApp calls the roll and no more, and whose client leaves `marker` behind."""
    write_app(folder)
    (folder / "pneumofed" / "server" / "app.py").write_text(SERVER)
    package = folder / "pneumofed" / "client" / "federation" / "training.py"
    # not __init__, which `flwr run` imports when it looks for the app
    package.write_text(f"{package.read_text()}\nimport pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    return folder


@pytest.mark.slow
def test_real_flower_processes_run_approved_code_and_no_other(site: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_experiment

    marker, out, runner = tmp_path / "marker", tmp_path / "out.json", CliRunner()
    app = roll_call_app(tmp_path / "app", marker)
    content = build_fab_from_disk(app)

    def call_roll(link: Link) -> Any:
        out.unlink(missing_ok=True)
        marker.unlink(missing_ok=True)
        assert link.run(app, {"experiment": tiny_experiment().model_dump_json(), "coordinator": str(out)}) == "finished:completed"
        return json.loads(out.read_text())

    with superlink(tmp_path / "link") as link:
        made = runner.invoke(
            site_cli, ["init", str(tmp_path / "new"), "--name", "north", "--coordinator", link.address, "--ca", str(link.ca)]
        )
        assert made.exit_code == 0, made.output
        shutil.copytree(tmp_path / "new", site, dirs_exist_ok=True)
        write_manifest(draw_manifest(tmp_path / "more", 16, seed=1), site / "data" / "manifest.csv")
        link.flwr("supernode", "register", str(site / "keys" / "node.pub"), "test")
        started = runner.invoke(site_cli, ["start", "-C", str(site)])
        try:
            assert started.exit_code == 0, (started.output, (site / "work" / "supernode.log").read_text()[-2000:])
            assert call_roll(link) == ["PolicyError: the site's policy refuses this (approved_apps)"]
            assert not marker.exists()
            assert read_entries(site / "work" / "audit.jsonl")[-1].facts["app"] == hash_bundle(content)
            approve_app(site / "policy.yaml", hash_bundle(content))
            assert call_roll(link) == ["north"]
            assert marker.exists()
            request = read_entries(site / "work" / "audit.jsonl")[-2]
            assert (request.facts["app"], request.facts["coordinator"]) == (hash_bundle(content), link.address)
            assert runner.invoke(site_cli, ["start", "-C", str(site)]).exit_code != 0
            status = json.loads(runner.invoke(site_cli, ["status", "--json", "-C", str(site)]).output)
            assert (status["process"], status["serving"], status["refusals_today"]) == ("running", True, {"approved_apps": 1})
            assert status["last_answer"]["run"] == "00000000000000a1"
        finally:
            runner.invoke(site_cli, ["stop", "-C", str(site)])
        assert json.loads(runner.invoke(site_cli, ["status", "--json", "-C", str(site)]).output)["process"] == "stopped"
