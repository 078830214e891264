"""`pneumofed provision` and `server`: what the coordinator's operator types, from kits to runs. Nothing heavy is imported before a command
needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from pneumofed.common.ops.command_line import FAILURE, Json, console, exit_when_stopped, note, print_json, say
from pneumofed.common.ops.lifeline import children_end_with_me
from pneumofed.server.cli.track import Track

if TYPE_CHECKING:
    from pneumofed.common.config.experiment import ExperimentConfig
    from pneumofed.server.operations.settings import CoordinatorFolder
    from pneumofed.server.report.survey import PowerAssumptions
    from pneumofed.server.runs.runs import Runs
    from pneumofed.server.runs.tables import RunRow
    from pneumofed.server.tracking.targets import TrackingTarget


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
    model: Annotated[
        str | None, typer.Option(help="Network: of the list, or a study's own, FILE.py:FUNCTION, which hospitals must approve.")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="Loss: of the list, or a study's own, FILE.py:FUNCTION.")] = None,
    init: Annotated[
        Path | None, typer.Option("--init", help="Model bundle (folder or archive) that the run goes on from.")
    ] = None,
    trusted: Annotated[
        list[Path] | None, typer.Option("--trusted", help="Public key whose bundles are taken.", show_default="any")
    ] = None,
    track: Track = None,
    wait: Wait = False,
    folder: Folder = Path(),
) -> None:
    """Submit a run to the sites; its folder is runs/NAME."""
    from pneumofed.common.config.reader import merge, parse_overrides
    from pneumofed.common.ops.study_code import names_in
    from pneumofed.server.tracking.targets import read_targets

    targets = read_targets(track)
    named = {section: {"name": value} for section, value in (("model", model), ("loss", loss)) if value}
    experiment = _read_experiment(config, merge(named, parse_overrides(set_ or [])), init, trusted or [])
    if names_in(experiment):
        _try_study(experiment)
    with _runs(_open(folder)) as runs:
        runs.submit(name, experiment)
        say(f"submitted: {name}; its folder is {runs.registry.run(name).folder}")
        if names_in(experiment):
            say(f"hospitals let it run by `pneumofed site approve {runs.registry.run(name).app_hash}`")
        _start_tracking(runs, name, targets)
        if wait:
            _follow(runs, name)


@app.command("survey")
def server_survey(
    name: Annotated[
        str, typer.Argument(help="Name of the survey; its folder is surveys/NAME. One that is there is shown again.")
    ],
    ask: Annotated[
        list[str] | None,
        typer.Option(
            help="label, sex, age, manufacturer, year, image_size, images, of radiographs view, grey_level, contrast, of CT slices, "
            "slice_step, hounsfield. May repeat.",
            show_default="all",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of the planned run: its share of validation patients.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any key of the experiment: --set strategy.wait_for_sites=4. May repeat.")
    ] = None,
    auroc: Annotated[float | None, typer.Option(help="AUROC that the power is computed for.", show_default="0.9")] = None,
    margin: Annotated[float | None, typer.Option(help="Loss of AUROC that counts as not worse.", show_default="0.02")] = None,
    power: Annotated[float | None, typer.Option(help="Wanted chance to show that.", show_default="0.8")] = None,
    json_: Json = False,
    folder: Folder = Path(),
) -> None:
    """Ask the sites what they have, in tables that name nobody, and show who differs and what power the study has. Trains nothing."""
    from pneumofed.common.config.reader import build_config, load_experiment, parse_overrides
    from pneumofed.server.operations.service import ask_survey
    from pneumofed.server.report.survey import PowerAssumptions

    place = _open(folder)
    given = {"auroc": auroc, "margin": margin, "power": power}
    assumed = build_config(PowerAssumptions, {key: value for key, value in given.items() if value is not None}, "power")
    experiment = load_experiment(config, parse_overrides(set_ or []))
    with exit_when_stopped(lambda: f"the sites may still answer; `pneumofed server survey {name}` shows it then", console):
        found = ask_survey(place, name, experiment, ask)
    show_survey(found, assumed, json_)


def show_survey(folder: Path, assumed: PowerAssumptions | None, as_json: bool) -> None:
    """Writes a survey's page and shows its sentences, or as JSON all that it says.

    Args:
        folder: of the survey.
        assumed: for the power; None for the defaults.
        as_json: only the JSON, on standard output.
    """
    from pneumofed.server.federation.survey import read_survey
    from pneumofed.server.report.survey import PowerAssumptions, analyse_survey, survey_sentences, write_survey_page

    chosen = assumed or PowerAssumptions()
    page, result = write_survey_page(folder, chosen), read_survey(folder)
    found = analyse_survey(result, chosen)
    if as_json:
        print_json({"page": str(page), **found, "answers": result.model_dump(mode="json")["answers"]})
        return
    for sentence in survey_sentences(result, found):
        say(sentence)
    for site, reason in result.absent.items():
        say(f"{site} told nothing: {reason}", style="yellow")
    say(f"page: {page}")


def _read_experiment(config: Path | None, overrides: dict[str, Any], init: Path | None, trusted: list[Path]) -> ExperimentConfig:
    """The experiment, of which the bundle to start from gives what is not said otherwise."""
    from pneumofed.common.config.reader import load_experiment, merge

    if init is None:
        return load_experiment(config, overrides)
    from pneumofed.common.model_bundle.bundle import check_start, open_trusted, start_values

    bundle = open_trusted(init, trusted)
    experiment = load_experiment(config, merge(start_values(bundle, init), overrides))
    check_start(experiment, bundle)
    return experiment


def _try_study(experiment: ExperimentConfig) -> None:
    """Builds the study's own network and loss once, so that what is wrong with them is said before hospitals are asked."""
    from pneumofed.common.config.classes import classes_of
    from pneumofed.common.models.build import build_model
    from pneumofed.common.models.recipe import build_loss

    build_model(experiment.model.without_weights(), experiment.task, experiment.seed)
    build_loss(experiment.loss, [1] * len(classes_of(experiment.task)))


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
def server_resume(name: Name, track: Track = None, wait: Wait = False, folder: Folder = Path()) -> None:
    """Go on with a run that failed or was stopped, after its last completed round; it is tracked where it was, too."""
    from pneumofed.server.tracking.targets import read_targets

    targets = read_targets(track)
    with _runs(_open(folder)) as runs:
        runs.resume(name)
        say(f"submitted again: {name}")
        _start_tracking(runs, name, targets)
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


def _start_tracking(runs: Runs, name: str, targets: tuple[TrackingTarget, ...]) -> None:
    """Starts the process that tracks the run, if it is tracked anywhere. One that cannot be started is a warning: the run goes on."""
    from pneumofed.common.errors import PneumofedError
    from pneumofed.server.tracking.process import start_follower
    from pneumofed.server.tracking.targets import Tracking

    run = runs.registry.run(name)
    place = Path(run.folder)
    try:
        daemon = start_follower(name, place, Tracking(targets, app=run.app_hash or ""), runs.folder.state)
    except (PneumofedError, OSError) as error:
        why = str(error) if isinstance(error, PneumofedError) else f"its process cannot be started ({error.strerror})"
        note(f"{name} is not tracked: {why}; `pneumofed track {place} --follow` does it from here")
        return
    if daemon:
        say(f"tracked beside the run; {daemon.log} has what goes wrong with it")


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
