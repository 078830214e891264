"""The hospital's gate: no app bundle runs here unless the hospital approved its hash.

The check cannot be a part of what it checks. So it is the installed code that runs in place of Flower's command: SuperNode starts
`flower-superexec`, which starts `flwr-clientapp` by that name; `pneumofed site start` puts a folder first on PATH in which every
command that Flower gives a task to leads here (`write_commands`), that of messages by way of `client.site.code_gate_resident`. The gate
takes the task as Flower would, hashes the bundle, and then either lets Flower install and run it, or answers with the refusal and never
unpacks it. Where the gate cannot decide, nothing runs.

An approved bundle is unpacked under its whole hash (`unpack_app`) and kept apart from the installed code (`forget_our_modules`). One
that is the installed code, byte for byte, as the resident process imported it, runs by these modules (`load_ahead`); what they import
later comes from the unpacked bundle too.

The gate relies on these names of flwr 1.41, all in `flwr.supernode.runtime.run_clientapp` (tests/client/site/test_code_gate.py fails
where they change):

    run_clientapp(...)            takes one task, from its message to its reply
    pull_task_input(client)       -> (message, context, run, bundle); we look at what it returns
    install_from_fab(bytes, skip_prompt=True)         unpacks a bundle
    get_load_client_app_fn(default_app_ref, app_path, False)          -> function that imports the app from `app_path`
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from flwr.app import Context, Message

from pneumofed.client.federation.policy import require_policy
from pneumofed.client.federation.requests import audit_log
from pneumofed.client.federation.site_data import read_site_config
from pneumofed.client.site.approval import approved_hashes, installed_hash, state_of_code
from pneumofed.client.site.folder import APP_VARIABLE, COORDINATOR_VARIABLE
from pneumofed.common.audit.log import REFUSAL_EVENT
from pneumofed.common.config.parties import SiteConfig
from pneumofed.common.errors import FlowerError, PolicyError
from pneumofed.common.ops.app_bundle import PACKAGE, hash_bundle
from pneumofed.common.wire.fields import foreign_sentence
from pneumofed.common.wire.messages import CONFIG, build_failure, tune_parts

logger = logging.getLogger(__name__)
FLOWER_VERSION = "1.41."
CLIENT_APP = "flwr-clientapp"
GATE = (
    "-P",
    "-m",
    "pneumofed.client.site.code_gate",
)  # -P: nothing is imported from the folder that the process happens to be in
"""Python's arguments for the gate."""
FLOWER_FUNCTIONS = ("run_clientapp", "pull_task_input", "install_from_fab", "get_load_client_app_fn")
"""What the gate relies on in `flwr.supernode.runtime.run_clientapp`."""
APPS_FOLDER = "apps"
"""Folder below the work folder in which approved bundles are unpacked, each under its whole hash."""
App = Callable[[Message, Context], Message]


@dataclass(frozen=True)
class Task:
    """What Flower hands over: which of its commands it wanted, the coordinator's message, the app bundle."""

    command: str
    message: Message
    bundle: bytes

    def asked(self) -> dict[str, Any]:
        """Who asked for what, for the audit log, as far as a message of unknown code can be read."""
        config: Any = self.message.content.config_records.get(CONFIG, {}) if self.message.has_content() else {}
        known = {"work": self.message.metadata.message_type, "run": config.get("run"), "round": config.get("round")}
        return {
            key: foreign_sentence(value, 64) if isinstance(value, str) else value
            for key, value in known.items()
            if isinstance(value, str | int)
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """What Flower starts in place of its own commands; see `write_commands`."""
    from flwr.common.args import add_args_flwr_app_common, try_obtain_flwr_app_token
    from flwr.supercore.tls import validate_and_resolve_root_certificates

    parser = argparse.ArgumentParser(prog=CLIENT_APP)
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--runtime-api-address", required=True)
    add_args_flwr_app_common(parser)
    args = parser.parse_args(arguments)
    runtime = guard(args.site, args.command)
    tune_parts()
    runtime.run_clientapp(
        runtime_api_address=args.runtime_api_address,
        token=try_obtain_flwr_app_token(args),
        insecure=args.insecure,
        certificates=validate_and_resolve_root_certificates(args.root_certificates, args.insecure),
        parent_pid=args.parent_pid,
        runtime_dependency_install=False,  # an approved bundle brings no other code along
    )


def guard(site: Path, command: str = CLIENT_APP) -> ModuleType:
    """Returns Flower's module `run_clientapp` with the gate in it, closed until a task's bundle is approved.

    Args:
        site: the hospital's site.yaml.
        command: the one of Flower that was wanted; any but `flwr-clientapp` is refused.

    Raises:
        FlowerError: this is another Flower than the one whose inside the gate knows.
    """
    from flwr.supernode.runtime import run_clientapp as runtime

    missing = [name for name in FLOWER_FUNCTIONS if not callable(getattr(runtime, name, None))]
    if missing or not version("flwr").startswith(FLOWER_VERSION):
        raise FlowerError(
            f"the gate knows flwr {FLOWER_VERSION}x and found {version('flwr')}{' without ' + ', '.join(missing) if missing else ''}; "
            "nothing may run here: install the version that this release asks for"
        )
    inside: Any = runtime
    pull, install, load = inside.pull_task_input, inside.install_from_fab, inside.get_load_client_app_fn
    _close(inside, _refusal(PolicyError("approved_apps", "no bundle was judged"), None))

    def pull_and_judge(client: Any) -> Any:
        message, context, run, bundle = pull(client)
        app = _judge(Task(command, message, bundle.content), site, install, load)
        inside.get_load_client_app_fn = lambda *_, **__: lambda *_: app()
        return message, context, run, bundle

    inside.pull_task_input = pull_and_judge
    return runtime


def write_commands(folder: Path, site: Path, client: Sequence[str] = (sys.executable, *GATE)) -> Path:
    """Fills `folder` with one command for each that Flower gives a task to; each of them starts the gate.

    Args:
        folder: made if there is none; it goes first on SuperNode's PATH.
        site: the hospital's site.yaml.
        client: starts the gate in place of `flwr-clientapp`, which is asked for at every message.

    Returns:
        `folder`.
    """
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for command in TASK_TYPE_TO_COMMAND.values():
        program = client if command == CLIENT_APP else (sys.executable, *GATE)
        words = [*program, "--site", str(site.resolve()), "--command", command]
        path = folder / command
        path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
        path.chmod(0o700)
    return folder


def unpack_app(folder: Path, content: bytes, install: Callable[..., Path]) -> Path:
    """Unpacks the bundle into `folder`, which appears whole or not at all.

    Args:
        folder: named by the hash of the whole bundle; one that is there already is taken as it is.
        content: the bundle, a ZIP archive.
        install: Flower's `install_from_fab`.

    Returns:
        `folder`.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as name:
        unpacked = Path(install(content, install_dir=Path(name), skip_prompt=True))
        try:
            unpacked.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def app_reference(unpacked: Path) -> str:
    """Reads which object of the bundle is the app from its own project file; what the coordinator says of the bundle counts for nothing."""
    project = tomllib.loads((unpacked / "pyproject.toml").read_text(encoding="utf-8"))
    return str(project["tool"]["flwr"]["app"]["components"]["clientapp"])


def forget_our_modules() -> None:
    """Makes the next import of `pneumofed` look for it anew, on the path that the bundle is first on."""
    for module in [module for module in sys.modules if module.partition(".")[0] == PACKAGE]:
        del sys.modules[module]


_loaded: list[str] = []
"""The state of the code that this process has imported, where it is known."""


def load_ahead(imports: Callable[[], None]) -> None:
    """Imports the installed code for bundles that are the same; without effect for them if a file of it changes meanwhile.

    Args:
        imports: imports what a message needs.
    """
    before = state_of_code()
    imports()
    _loaded[:] = [before] if state_of_code() == before else []


def is_loaded(bundle: str, work_dir: Path) -> bool:
    """Checks whether an approved bundle is the installed code, and the modules in memory are that code still.

    Args:
        bundle: its hash.
        work_dir: the site's own folder, which keeps the hash of the installed code.
    """
    state = state_of_code()
    return _loaded == [state] and bundle == installed_hash(work_dir, state=state)


def import_the_rest_from(unpacked: Path) -> None:
    """Makes the packages in memory look for further modules in the bundle, which an upgrade of the installed code leaves as it is.

    Args:
        unpacked: the folder of a bundle whose code is that of the modules in memory.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == PACKAGE and hasattr(module, "__path__"):
            module.__path__ = [str(unpacked.joinpath(*name.split(".")))]


def _close(runtime: Any, app: App) -> None:
    """Flower installs nothing and loads `app`, whatever it is asked for."""
    runtime.install_from_fab = lambda *_, **__: None
    runtime.get_load_client_app_fn = lambda *_, **__: lambda *_: app


def _judge(task: Task, site: Path, install: Any, load: Any) -> Callable[[], App]:
    """Gives the approved app when it is asked for; in the place of any other, one that refuses."""
    config: SiteConfig | None = None
    content = task.bundle
    try:
        config = read_site_config(site)
        _check(config, task)
        unpacked = unpack_app(Path(config.work_dir) / APPS_FOLDER / hash_bundle(content), content, install)
        loaded = is_loaded(hash_bundle(content), Path(config.work_dir))
    except Exception as error:
        _record(config, task, error)
        refusing = _refusal(error, config)
        return lambda: refusing
    os.environ[APP_VARIABLE] = hash_bundle(content)
    name = config.name

    def approved() -> App:
        if loaded:
            import_the_rest_from(unpacked)
        else:
            forget_our_modules()  # before the bundle's of the same names are imported: else the two would mix
        return _quiet(lambda: load(app_reference(unpacked), str(unpacked), False)("", "", ""), name)

    return approved


def _check(config: SiteConfig, task: Task) -> None:
    """Does nothing for an approved bundle in a task of the right kind.

    Raises:
        PolicyError: another kind of task, no policy, or a bundle that is not approved.
    """
    if task.command != CLIENT_APP:
        raise PolicyError("task_type", f"the coordinator asked for {task.command}; a site runs only {CLIENT_APP}")
    if config.policy is None:
        raise PolicyError("policy", "site.yaml names no policy, so no code is approved")
    found = hash_bundle(task.bundle)
    if found not in approved_hashes(require_policy(Path(config.policy)), Path(config.work_dir)):
        raise PolicyError(
            "approved_apps", f"the app bundle {found} is not approved; `pneumofed site approve {found}` would approve it"
        )


def _quiet(load: Callable[[], App], site: str) -> App:
    """The unpacked app; if it cannot be loaded or raises, the coordinator learns no more than the class of the error.

    Flower would send the error's text, which may hold a path.
    """

    def run(message: Message, context: Context) -> Message:
        try:
            return load()(message, context)
        except Exception as error:
            logger.exception("the app of site %s failed", site)
            return build_failure(error, site, message)

    return run


def _refusal(error: Exception, config: SiteConfig | None) -> App:
    """An app that answers each message with the refusal."""

    def refuse(message: Message, context: Context) -> Message:
        return build_failure(error, config.name if config else None, message)

    return refuse


def _record(config: SiteConfig | None, task: Task, error: Exception) -> None:
    logger.error("nothing was run: %s", error)
    if config is None:
        return
    rule = error.rule if isinstance(error, PolicyError) else type(error).__name__
    facts = {"coordinator": os.environ.get(COORDINATOR_VARIABLE, "unknown"), "app": hash_bundle(task.bundle), "rule": rule}
    try:
        audit_log(config).record(REFUSAL_EVENT, **task.asked(), **facts)
    except Exception:
        logger.exception("the refusal could not be recorded")  # it stands all the same


if __name__ == "__main__":
    main()
