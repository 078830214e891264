"""`pneumofed export`. Nothing heavy is imported before the command runs.

`pneumofed provision`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pneumofed.common.ops.command_line import Json, Quiet, note, print_json, say

if TYPE_CHECKING:
    from pneumofed.common.model_bundle.manifest import BundleManifest


CalibrationName = Literal["none", "temperature", "temperature_and_bias"]


def export_command(
    run: Annotated[Path, typer.Argument(help="Run folder of a run that succeeded.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the bundle; the archive lies beside it.", show_default="RUN/bundle")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help="Private key that signs (P-384, OpenSSH).", show_default="keys/release/node of the coordinator, made if missing"
        ),
    ] = None,
    reference: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of radiographs or manifest, in the place of the run's test set as the reference; may repeat."),
    ] = None,
    calibration: Annotated[CalibrationName, typer.Option(help="Fitted on the hospitals' validation statistics.")] = "temperature",
    ages: Annotated[
        list[str] | None,
        typer.Option(
            help="SET=GROUP,GROUP: age groups of a held-out set whose images state no age, e.g. test=infant,child; may repeat."
        ),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the model bundle of a run: weights, ONNX, int8, calibration, card and reference, signed, as a folder and an archive."""
    from pneumofed.common.ops.progress import open_progress, show_sentences
    from pneumofed.common.wire.keys import key_fingerprint, read_private_key
    from pneumofed.server.export.export import ExportPlan, export_run, release_key
    from pneumofed.server.export.populations import read_stated_ages
    from pneumofed.server.export.source import read_finished_run

    read_finished_run(run)  # before a key is made in its folder
    stated = read_stated_ages(ages or ())
    key_file = key or release_key(run, lambda text: note(text, style=None))
    signing = read_private_key(key_file)
    plan = ExportPlan(run, out or run / "bundle", signing, tuple(reference or ()), calibration, stated)
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
    if json_:
        print_json(told)
    else:
        _tell(told, manifest)


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


def provision_command(
    federation: Annotated[Path, typer.Argument(help="YAML file of the federation, e.g. configs/federation.example.yaml.")],
    out: Annotated[Path, typer.Option(help="Folder of the kits and of the federation's certificate authority.")] = Path("kits"),
    admit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Take the public key (node.pub) that hospital NAME sent; may repeat."),
    ] = None,
    with_keys: Annotated[
        bool,
        typer.Option(
            "--with-keys",
            help="Make the hospitals' private keys here: whoever holds this folder or a kit can act as the hospital.",
        ),
    ] = False,
) -> None:
    """Write a start-up kit for the coordinator, each hospital and each auditor. Run it again to add, admit, renew or revoke.

    A hospital makes its key itself (`pneumofed site init`) and sends the public half, which --admit takes.
    """
    from pneumofed.server.provisioning.provision import provision as write_kits
    from pneumofed.server.provisioning.schema import read_federation

    reports = write_kits(read_federation(federation), out, _named_files(admit or []), with_keys=with_keys)
    for report in reports:
        say(f"{report.name}: {report.outcome}{f'  {report.note}' if report.note else ''}")
    say(f"kits: {out}; hand each over on a way that nobody else reads, and keep {out / 'ca'} offline")
    if any(report.outcome == "revoked" for report in reports):
        say("revoked keys are refused as soon as the coordinator has its new kit and `pneumofed server start` ran again")


def _named_files(pairs: list[str]) -> dict[str, Path]:
    from pneumofed.common.errors import ConfigError

    split = [pair.partition("=") for pair in pairs]
    if wrong := [pair for pair, (name, _, file) in zip(pairs, split, strict=True) if not (name and file)]:
        raise ConfigError(f"--admit {wrong[0]}: expected NAME=FILE, e.g. north=north.pub")
    return {name: Path(file) for name, _, file in split}
