"""`pneumofed monitor`: are the images still like those that the model was made for? Nothing heavy is imported before it is needed."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pneumofed.common.errors import ConfigError, counted
from pneumofed.common.ops.command_line import ALARM, Json, print_json, say

if TYPE_CHECKING:
    from pneumofed.common.model_bundle.bundle import Bundle
    from pneumofed.inference.monitor.e_processes import Direction
    from pneumofed.inference.monitor.monitor import Monitor
    from pneumofed.inference.monitor.share import SiteDrift


app = typer.Typer(no_args_is_help=True, help="Watch for drift: are the images still like those that the model was made for?")

Folder = Annotated[Path, typer.Option("--folder", "-C", help="The monitor's folder; made with the first image.")]
BundlePath = Annotated[
    Path, typer.Option("--bundle", "-b", envvar="PNEUMOFED_BUNDLE", help="The model bundle: a folder or an archive.")
]
Trusted = Annotated[
    list[Path] | None,
    typer.Option("--trusted", help="Public key whose signature is taken; may repeat. Without it any is, and is shown."),
]
Day = datetime
DAY_FORMAT = ["%Y-%m-%d"]
First = Annotated[
    Day | None, typer.Option("--from", formats=DAY_FORMAT, help="First day.", show_default="30 days before the last")
]
Last = Annotated[Day | None, typer.Option("--to", formats=DAY_FORMAT, help="Last day.", show_default="today")]


@app.command("add")
def monitor_add(
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders with all below them, as `pneumofed predict` reads.")],
    bundle: BundlePath,
    folder: Folder = Path("monitor"),
    day: Annotated[Day | None, typer.Option(formats=DAY_FORMAT, help="Day of the images.", show_default="today")] = None,
    patients: Annotated[
        Path | None,
        typer.Option(help="Manifest (CSV with path and patient) that says whose the images are; other files than DICOM do not."),
    ] = None,
    trusted: Trusted = None,
    json_: Json = False,
) -> None:
    """Judge images and put them into the monitor. No pixel and no patient is kept."""
    from pneumofed.common.data.manifest import read_manifest
    from pneumofed.common.model_bundle.predictor import Predictor
    from pneumofed.common.ops.progress import open_progress
    from pneumofed.inference.monitor.monitor import Monitor, record_images
    from pneumofed.inference.monitor.store import own_monitor

    opened = _open(bundle, trusted, json_)
    records = read_manifest(patients).records if patients else ()
    known = {record.path.absolute(): record.patient for record in records}
    monitor = Monitor.open(folder, opened)
    with own_monitor(folder, "pneumofed monitor add"), open_progress(results_piped=json_) as progress:
        added = record_images(monitor, Predictor(opened), paths, day.date() if day else None, known, progress.show)
    if json_:
        print_json(vars(added))
        return
    say(f"{counted(added.judged, 'image')} added, {added.refused} of them cannot be judged")
    for reason, count in added.skipped.items():
        say(f"  left out: {reason}: {count}")
    if added.patients_unknown:
        say(f"  {added.patients_unknown} without a patient: each counts as one of its own (--patients tells whose they are)")


@app.command("check")
def check_drift(bundle: BundlePath, folder: Folder = Path("monitor"), trusted: Trusted = None, json_: Json = False) -> None:
    """Say whether anything has moved. Made for cron: exit code 0 quiet, 20 alarm."""
    from pneumofed.inference.monitor.wording import as_numbers, describe_scanners, sentences

    monitor = _monitor(folder, bundle, trusted, json_)
    findings = monitor.check()
    scanners = describe_scanners(findings, monitor.reference)
    if json_:
        print_json(as_numbers(findings, scanners))
    else:
        for sentence in sentences(findings, scanners):
            say(sentence)
    raise typer.Exit(ALARM if findings.alarms else 0)


@app.command("page")
def monitor_page(
    bundle: BundlePath,
    folder: Folder = Path("monitor"),
    out: Annotated[Path | None, typer.Option(help="Folder for drift.html and drift.png.", show_default="the monitor's")] = None,
    trusted: Trusted = None,
) -> None:
    """Write the page and the picture: evidence by scanner and day, what moved, and what that means."""
    from pneumofed.inference.monitor.page import write_drift_page

    monitor = _monitor(folder, bundle, trusted)
    html, picture = write_drift_page(out or folder, monitor.check(), monitor.reference)
    say(f"page: {html}")
    if picture:
        say(f"picture: {picture}")


@app.command("accept")
def monitor_accept(
    scanner: Annotated[str, typer.Argument(help="Its name, as `check --json` and the page tell it.")],
    bundle: BundlePath,
    folder: Folder = Path("monitor"),
    first: First = None,
    last: Last = None,
    trusted: Trusted = None,
) -> None:
    """Take a scanner's images as what its next ones are compared with, after a person found them in order, and the model on them."""
    start, end = _period(first, last)
    patients = _monitor(folder, bundle, trusted).accept(scanner, start, end)
    say(f"{scanner}: compared with its own images of {patients} patients from {start} to {end} from now on")


@app.command("resume")
def resume_scanner(
    scanner: Annotated[str, typer.Argument(help="Its name, as `check --json` and the page tell it.")],
    bundle: BundlePath,
    folder: Folder = Path("monitor"),
    last: Annotated[
        Day | None, typer.Option("--after", formats=DAY_FORMAT, help="Last day of the fault.", show_default="today")
    ] = None,
    trusted: Trusted = None,
) -> None:
    """Compare a scanner with the reference anew, after what raised the alarm was mended."""
    end = (last or datetime.now()).date()
    _monitor(folder, bundle, trusted).resume(scanner, end)
    say(f"{scanner}: compared with the model's reference images again, from the day after {end} on")


@app.command("share")
def monitor_share(
    out: Annotated[Path, typer.Option(help="File for the coordinator; read it before you send it.")],
    site: Annotated[str, typer.Option(help="This site's name.")],
    bundle: BundlePath,
    folder: Folder = Path("monitor"),
    first: First = None,
    last: Last = None,
    trusted: Trusted = None,
) -> None:
    """Write counts and sums that tell the coordinator whether this site has moved. No image, no patient, no day, no scanner."""
    from pneumofed.inference.monitor.share import write_share

    start, end = _period(first, last)
    summary = _monitor(folder, bundle, trusted).summarise(start, end)
    write_share(out, site, (start, end), summary)
    say(f"{out}: {counted(summary.patients, 'patient')} from {start} to {end}")


@app.command("compare")
def compare_shared(
    files: Annotated[list[Path], typer.Argument(help="What the sites shared, one file a site.")],
    bundle: BundlePath,
    looks: Annotated[int, typer.Option(min=1, help="How often a year is compared; the false-alarm rate is for the year.")] = 12,
    trusted: Trusted = None,
    json_: Json = False,
) -> None:
    """The coordinator's view: which site has moved, from what the sites shared. Exit code 0 none, 20 at least one."""
    from pneumofed.inference.monitor.reference import reference_of
    from pneumofed.inference.monitor.share import compare_sites, read_share
    from pneumofed.inference.monitor.streams import FALSE_ALARM_RATE

    reference = reference_of(_open(bundle, trusted, json_))
    shared = [read_share(file, reference) for file in files]
    summaries = {site: summary for site, _, summary in shared}
    if len(summaries) < len(shared):
        raise ConfigError("a site stands in two of the files; give one file a site")
    drifts = compare_sites(summaries, reference, looks)
    if json_:
        print_json([vars(drift) | {"moved": drift.moved(FALSE_ALARM_RATE)} for drift in drifts])
    else:
        _show_sites(drifts, FALSE_ALARM_RATE)
    raise typer.Exit(ALARM if any(drift.moved(FALSE_ALARM_RATE) for drift in drifts) else 0)


def _show_sites(drifts: list[SiteDrift], rate: float) -> None:
    from pneumofed.inference.monitor.wording import meaning, title

    for drift in drifts:
        moved = drift.moved(rate)
        say(f"{drift.site}: {counted(drift.patients, 'patient')}, {'moved' if moved else 'quiet'}")
        for name in moved[:5]:
            direction: Direction = "higher" if drift.rank.get(name, 0.5) >= 0.5 else "lower"
            words = f": {meaning(name, direction)}" if name in drift.rank else ""
            say(f"  {title(name)}{words} (p-value {drift.p_values[name]:.2g})")
        if drift.prevalence:
            found = drift.prevalence
            say(f"  not normal, if only their share changed: {found.value:.0%} (95% CI {found.low:.0%} to {found.high:.0%})")


def _monitor(folder: Path, bundle: Path, trusted: list[Path] | None, quiet: bool = False) -> Monitor:
    from pneumofed.inference.monitor.monitor import Monitor

    return Monitor.open(folder, _open(bundle, trusted, quiet))


def _open(path: Path, trusted: list[Path] | None, quiet: bool = False) -> Bundle:
    from pneumofed.common.model_bundle.bundle import open_trusted

    bundle = open_trusted(path, trusted)
    if not trusted and not quiet:
        say(f"model signed by {bundle.signer}")
    return bundle


def _period(first: Day | None, last: Day | None) -> tuple[date, date]:
    """First and last day, with their defaults."""
    end = (last or datetime.now()).date()
    return (first.date() if first else end - timedelta(days=30)), end
