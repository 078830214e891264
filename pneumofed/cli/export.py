"""`pneumofed export`: from a run to a model bundle, and from a bundle to a page that a browser runs. It joins the coordinator's exporter
with the page, which is a way to use a finished model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pneumofed.common.errors import ConfigError, in_a_row
from pneumofed.common.ops.command_line import Json, PointFile, Quiet, Trusted, note, print_json, say

if TYPE_CHECKING:
    from pneumofed.common.model_bundle.manifest import BundleManifest
    from pneumofed.inference.web_model.page import WebPage
    from pneumofed.inference.web_model.runtime import WebRuntime

CalibrationName = Literal["none", "temperature", "temperature_and_bias"]

Run = Annotated[
    Path, typer.Argument(help="Run folder of a run that succeeded; with --web also a finished bundle, with --check a page.")
]
Out = Annotated[Path | None, typer.Option(help="Folder of the bundle; the archive lies beside it.", show_default="RUN/bundle")]
Key = Annotated[
    Path | None,
    typer.Option(
        help="Private key that signs (P-384, OpenSSH).", show_default="keys/release/node of the coordinator, made if missing"
    ),
]
Reference = Annotated[
    list[Path] | None,
    typer.Option(help="Folder of radiographs or manifest, in the place of the run's test set as the reference; may repeat."),
]
Calibration = Annotated[
    CalibrationName | None, typer.Option(help="Fitted on the hospitals' validation statistics.", show_default="temperature")
]
Ages = Annotated[
    list[str] | None,
    typer.Option(
        help="SET=GROUP,GROUP: age groups of a held-out set whose images state no age, e.g. test=infant,child; may repeat."
    ),
]
Web = Annotated[
    Path | None,
    typer.Option(
        help="Also write into this folder a page that any browser runs, on a phone and offline; of the run's bundle if it has one."
    ),
]
Runtime = Annotated[
    Path | None,
    typer.Option(
        help="Archive of ONNX Runtime Web (npm pack), where the npm registry cannot be reached.", show_default="fetched once"
    ),
]
Check = Annotated[
    bool, typer.Option("--check", help="RUN is the folder of a page: check every file and the signature, and make nothing.")
]
MAKE_A_BUNDLE = ("--reference", "--calibration", "--ages")
"""Options without effect on a page."""


def export_command(
    run: Run,
    out: Out = None,
    key: Key = None,
    reference: Reference = None,
    calibration: Calibration = None,
    ages: Ages = None,
    web: Web = None,
    runtime: Runtime = None,
    operating_point: PointFile = None,
    check: Check = False,
    trusted: Trusted = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the model bundle of a run: weights, ONNX, int8, calibration, card and reference, signed, as a folder and an archive."""
    making = {"reference": reference, "calibration": calibration, "ages": ages}
    options = {"out": out, "key": key, "web": web, "runtime": runtime, **making}
    given = [f"--{name}" for name, value in options.items() if value]
    if check:
        _check_page(run, given, trusted or (), json_)
        return
    _check_alone(web, runtime, trusted, operating_point)
    # First, since a network that is missing would waste minutes of work.
    loaded = _load_runtime(web, runtime, json_ or quiet) if web else None
    finished = _finished_bundle(run, out, given) if web else None
    told: dict[str, Any] = {}
    if finished is None:
        told = _export_bundle(run, out, key, reference or (), calibration or "temperature", ages or (), json_=json_, quiet=quiet)
    if web and loaded:
        bundle = finished or Path(told["bundle"])
        signing = _page_key(run, bundle, key)
        told["web"] = _export_page(bundle, trusted or (), loaded, web, signing, operating_point, quiet=json_)
    if json_:
        print_json(told)


def _check_alone(web: Path | None, runtime: Path | None, trusted: Sequence[Path] | None, point: Path | None) -> None:
    given = [name for name, value in (("--runtime", runtime), ("--trusted", trusted), ("--operating-point", point)) if value]
    if given and not web:
        raise ConfigError(f"{in_a_row(given)} go with a page: give --web FOLDER too")


def _load_runtime(web: Path, archive: Path | None, is_quiet: bool) -> WebRuntime:
    from pneumofed.inference.web_model.page import check_new
    from pneumofed.inference.web_model.runtime import load_runtime

    check_new(web)
    return load_runtime(archive, say=(lambda _: None) if is_quiet else say)


def _finished_bundle(run: Path, out: Path | None, given: Sequence[str]) -> Path | None:
    """The bundle that the page is made of, if it is there: `run` itself, or what an earlier export of the run wrote.

    Raises:
        ConfigError: `given` has options that make a bundle.
    """
    from pneumofed.common.model_bundle.manifest import MANIFEST

    is_bundle = run.is_file() or (run / MANIFEST).is_file()
    found = run if is_bundle else out or run / "bundle"
    if not is_bundle and not (found / MANIFEST).is_file():
        return None
    refused = [name for name in given if name in MAKE_A_BUNDLE or (is_bundle and name == "--out")]
    if refused:
        raise ConfigError(
            f"{', '.join(refused)} make a bundle, and {found} is finished: leave them out, or give the run and another --out"
        )
    return found


def _export_bundle(
    run: Path,
    out: Path | None,
    key: Path | None,
    reference: Sequence[Path],
    calibration: CalibrationName,
    ages: Sequence[str],
    *,
    json_: bool,
    quiet: bool,
) -> dict[str, Any]:
    from pneumofed.common.ops.progress import open_progress, show_sentences
    from pneumofed.common.wire.keys import key_fingerprint, read_private_key
    from pneumofed.server.export.export import ExportPlan, export_run, release_key
    from pneumofed.server.export.measures import read_stated_ages
    from pneumofed.server.export.source import read_finished_run

    read_finished_run(run)  # before a key is made in its folder
    stated = read_stated_ages(ages)
    key_file = key or release_key(run, lambda text: note(text, style=None))
    signing = read_private_key(key_file)
    plan = ExportPlan(run, out or run / "bundle", signing, tuple(reference), calibration, stated)
    with (
        open_progress(quiet=quiet, results_piped=json_) as progress,
        show_sentences(progress, "export", lambda text: None if json_ or quiet else say(text)) as told_of,
    ):
        manifest = export_run(plan, told_of)
    told = {
        "bundle": str(plan.out),
        "archive": str(plan.archive),
        "signed_by": key_fingerprint(signing.public_key()),
        "public_key": str(key_file.with_name(f"{key_file.name}.pub")),
        "temperature": manifest.calibration.temperature,
        "intercept": manifest.calibration.intercept,
        "threshold": manifest.threshold.value,
        "int8": bool(manifest.card.quantization),
    }
    if not json_:
        _tell(told, manifest)
    return told


def _page_key(run: Path, bundle: Path, key: Path | None) -> Path | None:
    """The key that signs the page: the one that is given, else the run's; a page of a bundle alone has no signature without one."""
    from pneumofed.server.export.export import release_key

    return key or (None if bundle == run else release_key(run, lambda text: note(text, style=None)))


def _export_page(
    bundle: Path, trusted: Sequence[Path], runtime: WebRuntime, folder: Path, key: Path | None, point: Path | None, *, quiet: bool
) -> dict[str, Any]:
    from pneumofed.common.model_bundle.bundle import open_trusted
    from pneumofed.common.release import use_site_point
    from pneumofed.common.wire.keys import read_private_key
    from pneumofed.inference.web_model.page import write_page

    opened = open_trusted(bundle, trusted)
    if opened.manifest.preprocessing.slices:
        raise ConfigError(f"--web: {bundle} judges CT volumes, and the page takes radiographs")
    opened = use_site_point(opened, point) if point else opened
    page = write_page(opened, runtime, folder, read_private_key(key) if key else None)
    if not quiet:
        _tell_page(page, opened.signer)
    size = sum(page.sizes.values())
    return {"folder": str(folder), "precision": page.precision, "bytes": size, "bundle": opened.digest, "signed": key is not None}


def _check_page(folder: Path, given: Sequence[str], trusted: Sequence[Path], json_: bool) -> None:
    from pneumofed.common.wire.keys import read_public_key
    from pneumofed.inference.web_model.contents import check_contents

    if given:
        raise ConfigError(f"--check makes nothing: leave out {', '.join(given)}")
    contents, signer = check_contents(folder, [read_public_key(one) for one in trusted] or None)
    if json_:
        print_json({**contents, "signed_by": signer})
        return
    say(f"{folder}: all {len(contents['files'])} files are as they were made, of bundle {contents['bundle']}")
    say(f"signed by {signer}" if signer else "nobody has signed it", style=None if signer else "yellow")


def _tell_page(page: WebPage, signer: str) -> None:
    megabytes = sum(page.sizes.values()) / 2**20
    say(f"page: {page.folder}, {megabytes:.1f} MB, of a bundle signed by {signer}")
    if page.precision == "float32":
        say("the bundle has no int8 graph, so the page carries the float32 one", style="yellow")
    say("open index.html in it with a browser, or let any web server hand the folder out; over https it can be installed")


def _tell(told: dict[str, Any], manifest: BundleManifest) -> None:
    fit = manifest.calibration
    if fit.method == "none":
        say(f"probabilities are not calibrated: {fit.fitted_on}", style="yellow")
    else:
        say(f"temperature {fit.temperature:.3f}, bias {fit.intercept:+.3f}, fitted on {fit.fitted_on}")
    if manifest.card.phantom:
        say("trained on drawn images: the bundle says nothing about patients", style="yellow")
    say(f"bundle: {told['bundle']} and {told['archive']}")
    say(f"signed by {told['signed_by']}; read this to the hospitals on the telephone")
