"""`pneumofed server`: what the coordinator's operator types. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from pneumofed.common.ops.command_line import FAILURE, Json, console, exit_when_stopped, print_json, say
from pneumofed.common.ops.lifeline import children_end_with_me

if TYPE_CHECKING:
    from pneumofed.server.operations.settings import CoordinatorFolder
    from pneumofed.server.runs.runs import Runs
    from pneumofed.server.runs.tables import RunRow


app = typer.Typer(no_args_is_help=True, help="Coordinate a federation: its processes, its runs, and the live page.")

Folder = Annotated[Path, typer.Option("--folder", "-C", help="The coordinator folder, unpacked from the coordinator's kit.")]
Name = Annotated[str, typer.Argument(help="Name of the run.")]
Wait = Annotated[bool, typer.Option("--wait", help="Follow the run until it has ended; exit code 1 if it did not succeed.")]


@app.command("start")
def server_start(
    folder: Folder = Path(),
    new_token: Annotated[
        bool, typer.Option("--new-token", help="Make a new token for the live page; the old one is void.")
    ] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until stopped, and start again what dies.")] = False,
) -> None:
    """Start the SuperLink, the SuperExec, the door and the live page. What runs already goes on."""
    from pneumofed.server.operations.service import start_all, stay

    place = _open(folder)
    with children_end_with_me(daemons=True) if foreground else nullcontext():
        address, token = start_all(place, new_token)
        say(f"live page: {address}")
        if token:
            say(f"token of the live page, shown this once: {token}")
        with _runs(place) as runs:
            _show_processes(place, runs)
            _tell_of_interrupted(runs)
        if foreground:
            stay(place, say)


@app.command("run")
def server_run(
    name: Name,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file with what differs from the defaults, or a name, e.g. kaggle.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any key of the experiment: --set rounds=5. May repeat.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option("--init", help="Model bundle (folder or archive) that the run goes on from.")
    ] = None,
    trusted: Annotated[
        list[Path] | None, typer.Option("--trusted", help="Public key whose bundles are taken.", show_default="any")
    ] = None,
    wait: Wait = False,
    folder: Folder = Path(),
) -> None:
    """Submit a run to the sites; its folder is runs/NAME."""
    from pneumofed.common.config.reader import load_experiment, merge, parse_overrides

    overrides = parse_overrides(set_ or [])
    if init:
        from pneumofed.common.model_bundle.bundle import check_start, open_start, start_values

        bundle = open_start(init, trusted or [])
        overrides = merge(start_values(bundle, init), overrides)
    experiment = load_experiment(config, overrides)
    if init:
        check_start(experiment, bundle)
    with _runs(_open(folder)) as runs:
        runs.submit(name, experiment)
        say(f"submitted: {name}; its folder is {runs.registry.run(name).folder}")
        if wait:
            _follow(runs, name)


@app.command("status")
def server_status(
    name: Annotated[str | None, typer.Argument(help="Only this run; exit code 1 if it failed or was stopped.")] = None,
    json_: Json = False,
    folder: Folder = Path(),
) -> None:
    """Show the processes, the sites and the runs."""
    place = _open(folder)
    with _runs(place) as runs:
        runs.reconcile()
        chosen = [runs.registry.run(name)] if name else list(runs.registry.runs())
        runs.write_reports(chosen)
        if json_:
            from pneumofed.server.operations.service import describe_all

            print_json(describe_all(place, runs, chosen))
        else:
            if name is None:
                _show_processes(place, runs)
            _show_runs(chosen)
    if name and chosen[0].state in ("failed", "stopped"):
        raise typer.Exit(FAILURE)


@app.command("resume")
def server_resume(name: Name, wait: Wait = False, folder: Folder = Path()) -> None:
    """Go on with a run that failed or was stopped, after its last completed round."""
    with _runs(_open(folder)) as runs:
        runs.resume(name)
        say(f"submitted again: {name}")
        if wait:
            _follow(runs, name)


@app.command("stop")
def server_stop(name: Annotated[str | None, typer.Argument(help="Name of the run.")] = None, folder: Folder = Path()) -> None:
    """Stop a run, or without a name all runs and all processes."""
    place = _open(folder)
    if name is None:
        from pneumofed.server.operations.service import stop_all

        stop_all(place, say)
        say("stopped")
        return
    with _runs(place) as runs:
        ended = runs.stop(name)
        runs.write_reports([ended])
        _show_runs([ended])


@contextmanager
def _runs(place: CoordinatorFolder) -> Iterator[Runs]:
    from pneumofed.server.operations.service import open_runs

    found = open_runs(place)
    try:
        yield found
    finally:
        found.registry.close()


def _open(folder: Path) -> CoordinatorFolder:
    from pneumofed.server.operations.settings import CoordinatorFolder

    place = CoordinatorFolder(folder.resolve())
    place.settings()  # says what is wrong with the folder before anything is done
    return place


def _follow(runs: Runs, name: str) -> None:
    from pneumofed.server.runs.folder import RunFolder
    from pneumofed.server.runs.runs import follow

    goes_on = f"the run goes on; `pneumofed server status {name}` shows it, `pneumofed server stop {name}` ends it"
    with exit_when_stopped(lambda: goes_on, console):
        ended = follow(runs, name, console)
    runs.write_reports([ended])
    if ended.state != "succeeded":
        say(f"{name} {ended.state}: {ended.reason}")
        raise typer.Exit(FAILURE)
    report = RunFolder(Path(ended.folder)).report
    say(f"{name} succeeded; the report is {report}" if report.exists() else f"{name} succeeded; its report could not be written")


def _tell_of_interrupted(runs: Runs) -> None:
    """Names the runs that the last stop or crash cut off, since nobody goes on with them by themselves."""
    runs.reconcile()
    for found in runs.registry.runs()[:20]:
        if found.state in ("failed", "stopped") and "server resume" in found.reason:
            say(f"{found.name} {found.state}: {found.reason}")


def _show_processes(place: CoordinatorFolder, runs: Runs) -> None:
    from pneumofed.server.operations.overview import observe_federation
    from pneumofed.server.operations.service import page_state

    overview = observe_federation(place, runs.registry)
    table = _table("process", "", "")
    for process in (*overview.processes, page_state(place)):
        colour = "green" if process.serving else "red"
        table.add_row(
            process.name, Text("serving" if process.serving else "down", colour), "" if process.serving else process.detail
        )
    console.print(table)
    sites = _table("site", "connection", "last seen", "key")
    for site in runs.registry.sites():
        link = overview.links.get(site.name)
        seen = f"{site.last_seen:%Y-%m-%d %H:%M} UTC" if site.last_seen else "never"
        sites.add_row(
            site.name, "revoked" if link and link.revoked else (link.detail if link else "") or "unknown", seen, site.fingerprint
        )
    console.print(sites)


def _show_runs(found: list[RunRow]) -> None:
    table = _table("run", "state", "submitted", "why")
    for one in found:
        table.add_row(one.name, one.state, f"{one.submitted:%Y-%m-%d %H:%M} UTC", one.reason)
    console.print(table if found else "no run yet: pneumofed server run NAME --config FILE")


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
