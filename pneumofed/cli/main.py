"""The command `pneumofed`. Nothing heavy is imported before a command needs it: `--help` answers at once."""

from __future__ import annotations

import atexit
import gc
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pneumofed.cli.audit import app as audit_app
from pneumofed.cli.backup import server_backup, server_restore, site_backup, site_restore
from pneumofed.cli.export import export_command
from pneumofed.cli.release import release
from pneumofed.cli.site import export_personal, feedback
from pneumofed.cli.studies import attack, check_model, sweep_command
from pneumofed.client.cli.data import app as data_app
from pneumofed.client.cli.site import app as site_app
from pneumofed.client.cli.site import privacy_app
from pneumofed.common.config.choices import ModelName, StrategyName
from pneumofed.common.errors import ConfigError, counted
from pneumofed.common.ops.command_line import (
    Json,
    Quiet,
    console,
    exit_on_error,
    exit_when_stopped,
    note,
    print_json,
    read_pairs,
    say,
    take_stop_signals,
)
from pneumofed.inference.cli.monitor import app as monitor_app
from pneumofed.inference.cli.predict import explain_command, predict_command
from pneumofed.inference.cli.reading_room import app as room_app
from pneumofed.server.cli.coordinator import app as server_app
from pneumofed.server.cli.provision import provision_command
from pneumofed.server.cli.track import Track, track_command
from pneumofed.simulation.plan import EngineName, PhantomFormat, PretrainSource, VolumeFormat

if TYPE_CHECKING:
    from pneumofed.server.runs.summary_records import RunSummary
    from pneumofed.simulation.plan import SimulationRequest


app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)

app.command("provision", rich_help_panel="Federation")(provision_command)
server_app.command("backup")(server_backup)
server_app.command("restore")(server_restore)
app.add_typer(server_app, name="server", rich_help_panel="Federation")
data_app.command("feedback")(feedback)
site_app.command("export-personal")(export_personal)
site_app.command("backup")(site_backup)
site_app.command("restore")(site_restore)
app.add_typer(site_app, name="site", rich_help_panel="Federation")
privacy_app.command("attack")(attack)
app.add_typer(privacy_app, name="privacy", rich_help_panel="Federation")
app.add_typer(audit_app, name="audit", rich_help_panel="Federation")
app.command("sweep", rich_help_panel="Research")(sweep_command)
app.command("check-model", rich_help_panel="Research")(check_model)
app.command("export", rich_help_panel="Study")(export_command)
app.command("release", rich_help_panel="Study")(release)
app.command("track", rich_help_panel="Study")(track_command)
app.command("predict", rich_help_panel="Reading room")(predict_command)
app.command("explain", rich_help_panel="Reading room")(explain_command)
app.add_typer(room_app, name="reading-room", rich_help_panel="Reading room")
app.add_typer(monitor_app, name="monitor", rich_help_panel="Reading room")

Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="A set that is dealt to hospitals: a folder (Kaggle layout, tables, DICOM) or table. Else phantoms."
    ),
]
External = Annotated[Path | None, typer.Option(help="Held-out external set: a folder or table.")]
Hospitals = Annotated[int | None, typer.Option(min=1, help="Number of hospitals that --data is dealt to.", show_default="5")]
Hospital = Annotated[
    list[str] | None, typer.Option(help="NAME=SOURCE, a given hospital; NAME:N=SOURCE deals the source to N. May repeat.")
]
HeldOut = Annotated[list[str] | None, typer.Option("--test", help="NAME=SOURCE, a further held-out set. May repeat.")]
HoldOut = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=SHARE, this share of a given source's patients is held out as NAME; test=SHARE of --data. May repeat."
    ),
]
Slow = Annotated[
    list[str] | None,
    typer.Option(help="HOSPITAL=FACTOR: so many times as long as the others it trains, by a virtual clock. May repeat."),
]
Partition = Annotated[
    str | None,
    typer.Option(
        help="How --data is dealt: iid, dirichlet, quantity, scanner, or column:NAME of a table.",
        show_default="dirichlet",
    ),
]
Alpha = Annotated[float | None, typer.Option(help="Concentration of the Dirichlet draws; small is uneven.", show_default="0.5")]
Phantoms = Annotated[int | None, typer.Option(min=3, help="Phantom patients that are drawn without --data.", show_default="240")]
Model = Annotated[
    str | None, typer.Option(help="Network: one of the list, or a study's own, FILE.py:FUNCTION.", show_default="resnet18")
]
Loss = Annotated[
    str | None, typer.Option(help="Loss: one of the list, or a study's own, FILE.py:FUNCTION.", show_default="cross_entropy")
]
Strategy = Annotated[StrategyName | None, typer.Option(help="Federated strategy.", show_default="fedavg")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Number of rounds.", show_default="12")]
ImageSize = Annotated[int | None, typer.Option(min=32, max=1024, help="Side of the model's input in pixels.", show_default="128")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of everything that is drawn.", show_default="0")]
Baselines = Annotated[bool, typer.Option("--baselines", help="Also train on pooled images and in each hospital alone.")]
RunQuiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no line a round: the result and errors only.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out after its last completed round.")]
Out = Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/<date>-<time>")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with what differs from the defaults, or a name: kaggle, private, ...",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any key of the experiment: --set training.learning_rate=1e-3. May stand more than once."),
]
Init = Annotated[Path | None, typer.Option("--init", help="Model bundle (folder or archive) that the run goes on from.")]
Trusted = Annotated[
    list[Path] | None, typer.Option("--trusted", help="Public key of a coordinator whose bundles are taken.", show_default="any")
]
Engine = Annotated[
    EngineName | None,
    typer.Option(
        help="local: processes on this machine. flower: Flower's simulation on Ray.",
        show_default="local; flower with --gpus or --ray-address",
    ),
]
WorkerCount = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="How many hospitals work at once in the local engine; 1: in this process.",
        show_default="one a CPU; 1 with a GPU",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of each hospital's training.", show_default="1")]
Gpus = Annotated[float, typer.Option(min=0.0, help="Share of a GPU for each hospital, e.g. 0.25.")]
RayAddress = Annotated[str | None, typer.Option(help="Run on the Ray cluster at this address instead of this machine alone.")]


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        console.print(f"pneumofed {version('pneumofed')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Federated learning across hospitals for pneumonia on chest X-rays."""


@app.command("simulate", rich_help_panel="Research")
def simulate_command(
    data: Data = None,
    external: External = None,
    hospitals: Hospitals = None,
    hospital: Hospital = None,
    test: HeldOut = None,
    hold_out: HoldOut = None,
    slow: Slow = None,
    partition: Partition = None,
    alpha: Alpha = None,
    phantoms: Phantoms = None,
    model: Model = None,
    loss: Loss = None,
    strategy: Strategy = None,
    rounds: Rounds = None,
    image_size: ImageSize = None,
    seed: Seed = None,
    baselines: Baselines = False,
    resume: Resume = False,
    init: Init = None,
    trusted: Trusted = None,
    out: Out = None,
    config: ConfigFile = None,
    set_: Set = None,
    engine: Engine = None,
    workers: WorkerCount = None,
    threads: Threads = None,
    gpus: Gpus = 0.0,
    ray_address: RayAddress = None,
    track: Track = None,
    survey: Annotated[
        bool, typer.Option("--survey", help="Only survey the hospitals, as `pneumofed server survey` does: nothing is trained.")
    ] = False,
    quiet: RunQuiet = False,
    as_json: Json = False,
) -> None:
    """Train one model over N virtual hospitals on this machine, judge it on held-out data, and write a report."""
    from pneumofed.common.config.reader import parse_overrides
    from pneumofed.server.tracking.targets import read_targets
    from pneumofed.simulation.plan import SimulationRequest

    (_survey if survey else _simulate)(
        SimulationRequest(
            data=data,
            external=external,
            hospitals=hospitals,
            sources=read_pairs(hospital, "--hospital"),
            held_out=read_pairs(test, "--test"),
            hold_out=read_pairs(hold_out, "--hold-out"),
            slow=read_pairs(slow, "--slow"),
            partition=partition,
            alpha=alpha,
            phantoms=phantoms,
            model=model,
            loss=loss,
            strategy=strategy,
            rounds=rounds,
            image_size=image_size,
            seed=seed,
            baselines=baselines,
            resume=resume,
            init=init,
            trusted=trusted or [],
            out=out,
            config=config,
            settings=parse_overrides(set_ or []),
            engine=engine,
            workers=workers,
            threads=threads,
            gpus=gpus,
            ray_address=ray_address,
            track=read_targets(track),
        ),
        as_json,
        quiet,
    )


@app.command("demo", rich_help_panel="Research")
def demo_command(
    out: Annotated[Path, typer.Option(help="Run folder; an earlier demo there is replaced.")] = Path("runs/demo"),
    quiet: RunQuiet = False,
) -> None:
    """The whole way on drawn images in minutes: phantoms, three hospitals, a few rounds, baselines, report."""
    import shutil

    from pneumofed.common.config.reader import read_yaml
    from pneumofed.simulation.plan import demo_request

    if (out / "simulation.yaml").exists() and read_yaml(out / "simulation.yaml").get("data") is None:
        shutil.rmtree(out)
    _simulate(demo_request(out), quiet=quiet)


@app.command("phantom", rich_help_panel="Research")
def phantom_command(
    folder: Annotated[Path, typer.Argument(help="Folder to draw into.")],
    patients: Annotated[int, typer.Option(min=3, help="Patients of the training set.")] = 240,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all that is drawn.")] = 0,
    size: Annotated[
        int | None, typer.Option(min=32, max=1024, help="Longer side in pixels.", show_default="144, of CT 64")
    ] = None,
    format_: Annotated[
        PhantomFormat | None,
        typer.Option(
            "--format", help="jpeg: the Kaggle layout. dicom: a hospital's archive with a label table.", show_default="jpeg"
        ),
    ] = None,
    ct: Annotated[
        VolumeFormat | None,
        typer.Option(help="CT volumes, as DICOM series or NIfTI files; beside them each patient's radiograph."),
    ] = None,
    slices: Annotated[int | None, typer.Option(min=8, max=512, help="Of a CT volume.", show_default="32")] = None,
    quiet: Quiet = False,
) -> None:
    """Draw a set of phantom radiographs, or of CT volumes, with a test set and an external set."""
    if ct and format_:
        raise ConfigError("--format is of radiographs and --ct of volumes: leave one out")
    if slices and not ct:
        raise ConfigError("--slices is of CT volumes: add --ct dicom or --ct nifti")
    from pneumofed.common.ops.progress import open_progress

    if ct:
        from pneumofed.simulation.phantoms.ct_sets import write_ct_phantoms

        with open_progress(quiet=quiet) as progress:
            manifest = write_ct_phantoms(folder, patients, seed, size or 64, slices or 32, ct, progress.show)
        console.print(
            f"{len(manifest.records)} training volumes of as many phantom patients in {folder}; radiographs in radiographs/"
        )
        return
    from pneumofed.simulation.phantoms.phantom import write_phantoms

    with open_progress(quiet=quiet) as progress:
        manifest = write_phantoms(folder, patients, seed, size or 144, format_ or "jpeg", progress.show)
    console.print(f"{len(manifest.records)} training images of {patients} phantom patients in {folder}")


@app.command("pretrain", rich_help_panel="Research")
def pretrain_command(
    out: Annotated[Path, typer.Option(help="File for the weights; a run takes it as model.weights.")],
    source: Annotated[PretrainSource, typer.Option(help="What is drawn.")] = "phantoms",
    model: Annotated[ModelName | None, typer.Option(help="Network.", show_default="resnet18")] = None,
    images: Annotated[int, typer.Option(min=3, help="Pictures that are drawn.")] = 10_000,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over them.")] = 10,
    image_size: ImageSize = None,
    seed: Seed = None,
    config: ConfigFile = None,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Train first weights on drawn pictures: no download, no patient, no cost in privacy."""
    from pneumofed.common.config.reader import load_experiment, merge, parse_overrides

    shortcuts = _given(
        seed=seed,
        model={"name": model} if model else None,
        image={"size_px": image_size} if image_size else None,
        rounds=epochs,
    )
    experiment = load_experiment(config, merge(shortcuts, parse_overrides(set_ or [])))
    from pneumofed.common.ops.progress import open_progress
    from pneumofed.simulation.pretrain import pretrain_network as train

    with open_progress(quiet=quiet) as progress:
        provenance = train(source, experiment, images, out, (lambda _: None) if quiet else say, progress)
    console.print(f"weights: {out}, from {images} pictures of {source}, accuracy {provenance['last_epoch_accuracy']:.3f}")


@app.command("report", rich_help_panel="Study")
def report_command(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write the report of a run anew, whatever state the run is in."""
    from pneumofed.server.report.report import write_report

    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run} is no run folder: it holds no config.yaml")
    console.print(f"report: {write_report(run)}")


@app.command("config", rich_help_panel="Study")
def config_command(
    file: Annotated[Path | None, typer.Argument(help="YAML file, or a name, e.g. kaggle; the defaults without one.")] = None,
    set_: Set = None,
) -> None:
    """Check a configuration and show it in full, as YAML."""
    from pneumofed.common.config.reader import format_yaml, load_experiment, parse_overrides

    experiment = load_experiment(file, parse_overrides(set_ or []))
    console.print(format_yaml(experiment.model_dump()), end="")


def main() -> None:
    """Runs the command line. Our errors are one sentence on standard error; others keep their trace, since they are bugs."""
    atexit.register(gc.freeze)  # after torch was imported, the interpreter's last search for garbage takes more than a second
    take_stop_signals()
    with exit_on_error():
        app()


def _simulate(request: SimulationRequest, as_json: bool = False, quiet: bool = False) -> None:
    """Runs the simulation; as JSON, the summary alone goes to standard output, and the progress to standard error."""
    from pneumofed.common.ops.progress import open_progress
    from pneumofed.simulation.plan import plan_simulation

    plan = plan_simulation(request)
    with open_progress(quiet=quiet, results_piped=as_json) as progress:
        from pneumofed.server.runs.folder import RunFolder
        from pneumofed.server.runs.resume import describe_way_on
        from pneumofed.simulation.runner import run_simulation

        tell = partial(note if as_json else say, style=None) if not quiet else lambda _: None
        tell(f"run folder: {plan.run_dir}")
        if plan.tracking.targets:
            tell(f"tracked at: {', '.join(str(target) for target in plan.tracking.targets)}")
        with exit_when_stopped(lambda: f"pneumofed: stopped; {describe_way_on(RunFolder(plan.run_dir))}"):
            summary = run_simulation(plan, tell, progress)
    if as_json:
        print_json({"run_folder": str(plan.run_dir), **summary.to_json()})
    else:
        _show(summary, plan.run_dir)


def _survey(request: SimulationRequest, as_json: bool = False, quiet: bool = False) -> None:
    """Surveys the hospitals of the simulation in place of a run."""
    from pneumofed.common.ops.progress import open_progress
    from pneumofed.simulation.plan import plan_simulation

    plan = plan_simulation(request)
    with open_progress(quiet=quiet, results_piped=as_json) as progress:
        from pneumofed.server.cli.coordinator import show_survey
        from pneumofed.simulation.runner import survey_hospitals

        say_it = partial(note if as_json else say, style=None) if not quiet else lambda _: None
        folder = survey_hospitals(plan, say_it, progress)
    show_survey(folder, None, as_json)


def _show(summary: RunSummary, run_dir: Path) -> None:
    """The result in a few lines."""
    from pneumofed.common.ops.progress import say_seconds

    for name, results in summary.results.items():
        auroc, accuracy = results["auroc"], results["accuracy"]
        console.print(
            f"{name}: AUROC {_number(auroc.value)} ({_number(auroc.low)} to {_number(auroc.high)}), "
            f"accuracy {_number(accuracy.value)} at the threshold {_number(summary.threshold.value if summary.threshold else None)}"
        )
    if summary.personal:
        from pneumofed.server.report.personal import personal_sentences
        from pneumofed.server.report.read_run import read_run

        console.print(*personal_sentences(read_run(run_dir)), sep="\n")
    if summary.phantom:
        console.print("these are drawn images: the numbers say nothing about patients")
    wall = summary.wall
    parts = f" ({', '.join(f'{name} {say_seconds(seconds)}' for name, seconds in wall.parts.items())})" if wall else ""
    seconds = say_seconds(wall.total if wall else summary.seconds or 0.0)
    console.print(f"{summary.status} after {counted(summary.rounds_completed, 'round')} and {seconds}{parts}")
    report = run_dir / "report.html"
    console.print(f"report: {report if report.exists() else 'could not be written'}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


if __name__ == "__main__":
    main()
