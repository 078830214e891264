"""`pneumofed predict`. Nothing heavy is imported before the command runs.

`pneumofed explain`: maps of evidence over radiographs, and whether to believe them. Nothing heavy at the top.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pneumofed.common.errors import ConfigError, counted
from pneumofed.common.ops.command_line import (
    FAILURE,
    SOME_UNREADABLE,
    BundlePath,
    Json,
    PointFile,
    Quiet,
    Trusted,
    console,
    exit_when_stopped,
    note,
    say,
)
from pneumofed.inference.explain.methods import ACTIVATION_METHODS, METHODS, choose_detail, choose_methods, choose_target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pneumofed.common.model_bundle.bundle import Bundle
    from pneumofed.common.model_bundle.predictor import Predictor
    from pneumofed.common.ops.progress import Progress
    from pneumofed.inference.explain.files import ExplanationReport
    from pneumofed.inference.explain.methods import Method
    from pneumofed.inference.predict.clinical_table import ClinicalTable
    from pneumofed.inference.predict.dicom_objects import ArchiveWriter
    from pneumofed.inference.predict.outputs import Output, Recorder
    from pneumofed.inference.predict.predict import FileResult, PredictionSummary


ImagePaths = Annotated[
    list[Path],
    typer.Argument(
        help="DICOM, JPEG, PNG, TIFF, BMP or WebP files, and folders of them; of a model for CT volumes folders of series, and NIfTI."
    ),
]
ClinicalFile = Annotated[
    Path | None,
    typer.Option("--clinical", help="CSV with a column 'file' and the model's clinical values, for a model that takes some."),
]


def predict_command(
    paths: ImagePaths,
    bundle: BundlePath,
    trusted: Trusted = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write a row for each file here.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON document in the place of the table.")] = False,
    sr: Annotated[Path | None, typer.Option("--sr", help="Folder for a Structured Report of each DICOM image or series.")] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Folder for a heat map of each judged image or series: DICOM secondary capture, else PNG.")
    ] = None,
    monitor: Annotated[
        Path | None, typer.Option(help="Put what is judged into the monitor of drift in this folder, in the order of the files.")
    ] = None,
    clinical: ClinicalFile = None,
    operating_point: PointFile = None,
    int8: Annotated[bool, typer.Option("--int8", help="The quantised network: faster, a little less exact.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads of the network, and as many that decode; 0: all processors.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Judge radiographs, or CT: probability of pneumonia, or of each class, with its interval, the decision, or why one cannot be judged.

    Exit code: 0 every file was read, 3 some could not be read, 1 none could or the bundle was refused, 2 usage,
    130 stopped.
    """
    from pneumofed.common.model_bundle.predictor import Predictor
    from pneumofed.common.ops.progress import open_progress
    from pneumofed.inference.monitor.store import own_monitor
    from pneumofed.inference.predict.dicom_objects import ArchiveWriter
    from pneumofed.inference.predict.predict import PredictionSummary, find_images, judge_files

    opened = _open_bundle(bundle, trusted, operating_point)
    predictor = Predictor(opened, "int8" if int8 else "float32", threads)
    table = _clinical_table(clinical, predictor)
    recorder, summary = _recorder(monitor, opened), PredictionSummary.of(opened.manifest.classes)
    with exit_when_stopped(lambda: _describe_stopped(summary, csv, (sr, overlay), recorder)), ExitStack() as stack:
        if monitor:
            stack.enter_context(own_monitor(monitor, "pneumofed predict"))
        outputs = _open_outputs(stack, predictor, summary, csv, json_)
        progress = stack.enter_context(open_progress(quiet=quiet, results_piped=json_))
        results = judge_files(find_images(paths, predictor), predictor, threads, table)
        watched = recorder.pass_on(results) if recorder else results
        _run(watched, ArchiveWriter(predictor, sr, overlay), summary, outputs, progress)
    if table is not None:
        note(table.describe_use())
    raise typer.Exit(_exit_code(summary))


def _open_bundle(path: Path, trusted: list[Path] | None, point: Path | None, *, tell: bool = True) -> Bundle:
    """The bundle, at a hospital's own operating point if there is one; without keys that are trusted it is said who signed it, unless the
    command says so itself."""
    from pneumofed.common.model_bundle.bundle import open_trusted
    from pneumofed.common.release import use_site_point

    opened = open_trusted(path, trusted)
    if tell and not trusted:
        note(f"bundle signed by {opened.signer}; --trusted FILE takes no other signature", style="dim")
    return use_site_point(opened, point) if point else opened


def _clinical_table(path: Path | None, predictor: Predictor) -> ClinicalTable | None:
    """The table that was given; read as a whole before the first image, so that a value which does not fit ends nothing half done."""
    if path is None:
        return None
    if predictor.clinical is None:
        raise ConfigError(f"--clinical {path}: this model takes no clinical values; leave the option out")
    from pneumofed.inference.predict.clinical_table import ClinicalTable

    return ClinicalTable.read(path, predictor.clinical)


def _recorder(folder: Path | None, bundle: Bundle) -> Recorder | None:
    if folder is None:
        return None
    from pneumofed.inference.monitor.monitor import Monitor
    from pneumofed.inference.predict.outputs import Recorder

    return Recorder(Monitor.open(folder, bundle), note)


def _describe_stopped(
    summary: PredictionSummary, csv: Path | None, folders: tuple[Path | None, ...], recorder: Recorder | None
) -> str:
    """What there is of a run that the user ended."""
    told = [f"stopped after {counted(summary.files, 'file')}"]
    told += [f"{csv} was not written"] if csv else []
    told += [f"what was written into {folder} stays" for folder in folders if folder]
    told += [f"{counted(recorder.recorded, 'image')} recorded in the monitor"] if recorder else []
    return "; ".join(told)


def _open_outputs(
    stack: ExitStack, predictor: Predictor, summary: PredictionSummary, csv: Path | None, json_: bool
) -> list[Output]:
    from pneumofed.inference.predict.outputs import open_csv, open_json, open_table

    shown = open_json(sys.stdout, predictor, summary) if json_ else open_table(console, predictor, summary)
    outputs = [stack.enter_context(shown)]
    if csv:
        outputs.append(stack.enter_context(open_csv(csv, predictor)))
    return outputs


def _run(
    results: Iterator[FileResult], writer: ArchiveWriter, summary: PredictionSummary, outputs: list[Output], progress: Progress
) -> None:
    progress.show("files judged")  # of how many is not known: folders are read as the files are needed
    for result in map(writer.write, results):
        summary.add(result)
        progress.show("files judged", summary.files)
        for output in outputs:
            output.add(result)
    if not summary.files:
        raise ConfigError("no file found: give files, or folders that hold some (hidden files are left out)")


def _exit_code(summary: PredictionSummary) -> int:
    unreadable = summary.statuses["unreadable"]
    if unreadable == summary.files:
        return FAILURE
    return SOME_UNREADABLE if unreadable else 0


DetailName = Annotated[
    str, typer.Option(help="Of Grad-CAM and Grad-CAM++: last-layer, finer-layer, larger-input, several-sizes (recommended).")
]
TargetName = Annotated[
    str | None,
    typer.Option(help="What the evidence is for: one of the bundle's classes.", show_default="pneumonia, or any finding"),
]


def explain_command(
    paths: ImagePaths,
    bundle: BundlePath,
    out: Annotated[Path, typer.Option(help="Folder for pictures and maps. They show patients: keep it in the hospital.")],
    method: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(METHODS)}; may stand more than once.", show_default="grad-cam")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every method; minutes an image on a slow machine.")] = False,
    detail: DetailName = "last-layer",
    target: TargetName = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Find out whether the maps can be believed.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what SHAP and LIME draw.")] = 0,
    run_code: Annotated[
        bool, typer.Option("--run-bundle-code", help="Run the bundle's code, where the network is a study's own. Read it first.")
    ] = False,
    clinical: ClinicalFile = None,
    operating_point: PointFile = None,
    trusted: Trusted = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show where in a radiograph, or a CT volume, the model finds its evidence, and say whether the map can be believed.

    Exit code: 0 at least one image was explained, 1 none could be read, 130 stopped.
    """
    from pneumofed.common.model_bundle.predictor import Predictor
    from pneumofed.common.ops.progress import open_progress
    from pneumofed.inference.explain.files import RESULT_FILE, ExplanationRequest

    opened = _open_bundle(bundle, trusted, operating_point, tell=False)
    methods = _every_method(opened) if all_ else choose_methods(method or ["grad-cam"], "--method")
    chosen = choose_target(target, opened.manifest.classes, "--target")
    table = _clinical_table(clinical, Predictor(opened, threads=1)) if clinical else None
    request = ExplanationRequest(methods, chosen, seed, check, choose_detail(detail, methods, "--detail"), run_code, table)
    explained: list[str] = []
    with exit_when_stopped(lambda: f"stopped: pictures of {len(explained)} images are in {out}; {RESULT_FILE} was not written"):
        tell = explained.append if json_ or quiet else _saying(explained)
        with open_progress(quiet=quiet, results_piped=json_) as progress:
            report = _explainer(opened)(paths, opened, out, request, tell, progress)
    if json_:
        say((out / RESULT_FILE).read_text())
        return
    _tell_explained(report, opened, out)


def _every_method(bundle: Bundle) -> tuple[Method, ...]:
    return ACTIVATION_METHODS if bundle.manifest.preprocessing.slices else METHODS


def _explainer(bundle: Bundle) -> Callable[..., ExplanationReport]:
    """Of radiographs, or of CT volumes."""
    if bundle.manifest.preprocessing.slices:
        from pneumofed.inference.explain.volumes import explain_volumes

        return explain_volumes
    from pneumofed.inference.explain.files import explain_files

    return explain_files


def _tell_explained(report: ExplanationReport, opened: Bundle, out: Path) -> None:
    from pneumofed.inference.explain.files import RESULT_FILE

    for found in report.sanity.values():
        say(f"{found['method']}: {found['sentence']}")
    for reason, count in report.skipped.items():
        say(f"left out: {reason}: {count}")
    judged = sum(bool(image["maps"]) for image in report.images)
    if judged < len(report.images):
        say(f"{counted(len(report.images) - judged, 'image')} cannot be judged, so without a map; {RESULT_FILE} has the reasons")
    say(
        f"{counted(judged, 'image')} explained, pictures and {RESULT_FILE} in {out}; model {opened.digest[:12]}, signed by {opened.signer}"
    )


def _saying(told: list[str]) -> Callable[[str], None]:
    """Says each sentence, and keeps it in `told`."""

    def tell(text: str) -> None:
        told.append(text)
        say(text)

    return tell
