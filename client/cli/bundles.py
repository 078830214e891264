"""`pneumofed site compare` and `pneumofed site operating-point`: model bundles on the hospital's own patients. No image leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pneumofed.client.cli.archive import exit_codes
from pneumofed.common.config.choices import ThresholdPolicyName
from pneumofed.common.errors import counted
from pneumofed.common.ops.command_line import Json, Quiet, Site, Trusted, console, print_json, say

if TYPE_CHECKING:
    from pneumofed.common.model_bundle.manifest import BundleManifest
    from pneumofed.common.model_bundle.population import IntervalEstimate
    from pneumofed.common.release import SitePoint


def compare(
    old: Annotated[Path, typer.Argument(help="Bundle of the model that was released last.")],
    new: Annotated[Path, typer.Argument(help="Bundle of the new model.")],
    out: Annotated[
        Path | None, typer.Option(help="The signed verdict for the coordinator.", show_default="verdict-NEW.json")
    ] = None,
    trusted: Trusted = None,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Judge two models on the site's own validation patients, and sign the numbers for the coordinator. No image leaves."""
    with exit_codes(as_json):
        from pneumofed.client.data.bundles import compare_at_site, default_output
        from pneumofed.client.site.folder import SiteFolder
        from pneumofed.common.audit.log import MODELS_COMPARED
        from pneumofed.common.config.classes import in_words
        from pneumofed.common.model_bundle.bundle import open_trusted
        from pneumofed.common.release import write_signed
        from pneumofed.common.wire.keys import read_private_key

        folder = SiteFolder.open(site)
        key = read_private_key(Path(folder.connection.key))
        models = open_trusted(old, trusted), open_trusted(new, trusted)
        verdict = compare_at_site(folder.config, *models)
        folder.audit.record(MODELS_COMPARED, old=verdict.old, new=verdict.new, images=verdict.comparison.images)
        file = out or default_output("verdict", new)
        write_signed(file, verdict, key)
        if as_json:
            print_json(verdict.model_dump(mode="json"), indent=1)
            return
        for name, bundle in zip(("old", "new"), models, strict=True):
            say(f"{name} model: {bundle.manifest.name}, signed by {bundle.signer}")
        patients, areas = verdict.comparison.patients, verdict.comparison.auroc
        shown = [f"{value:.3f}" if value is not None else "unknown" for value in (areas.old, areas.new)]
        noun = in_words("pneumonia", models[0].manifest.classes)
        say(f"validation: {patients[0]} patients with {noun}, {patients[1]} without; AUROC {shown[0]} before, {shown[1]} now")
        say(f"for the coordinator: {file}; it holds these numbers, their variances and counts, and no image")


def operating_point(
    bundle: Annotated[Path, typer.Argument(help="The model bundle: a folder or an archive.")],
    policy: Annotated[
        ThresholdPolicyName | None, typer.Option(help="What the threshold holds.", show_default="as the bundle's")
    ] = None,
    target: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Sensitivity or specificity to hold.", show_default="the bundle's")
    ] = None,
    took_no_part: Annotated[
        bool, typer.Option("--took-no-part", help="This site was not in the bundle's run: all of its patients count.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The signed file.", show_default="operating-point-BUNDLE.json")] = None,
    trusted: Trusted = None,
    site: Site = Path(),
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Choose a model's threshold on this hospital's own patients, and say what to expect at it. Nothing leaves the hospital.

    It is refused for too few patients, and for a model that does not tell them apart.
    """
    with exit_codes(as_json):
        from pneumofed.client.data.bundles import choose_at_site, default_output
        from pneumofed.client.site.folder import SiteFolder
        from pneumofed.common.audit.log import POINT_CHOSEN
        from pneumofed.common.model_bundle.bundle import open_trusted
        from pneumofed.common.ops.progress import open_progress
        from pneumofed.common.release import write_signed
        from pneumofed.common.wire.keys import read_private_key

        folder = SiteFolder.open(site)
        opened = open_trusted(bundle, trusted)
        with open_progress(quiet=quiet, results_piped=as_json) as progress:
            found = choose_at_site(folder.config, opened, policy, target, took_part=not took_no_part, progress=progress)
        file = out or default_output("operating-point", bundle)
        folder.audit.record(POINT_CHOSEN, bundle=found.bundle, images=found.images, threshold=found.point.value)
        write_signed(file, found, read_private_key(Path(folder.connection.key)))
        if as_json:
            print_json(found.model_dump(mode="json"))
        else:
            _tell_point(found, opened.manifest, file)


def _tell_point(found: SitePoint, manifest: BundleManifest, file: Path) -> None:
    from pneumofed.common.config.classes import in_words

    noun = in_words("pneumonia", manifest.classes)
    say(f"{found.patients[0]} patients with {noun}, {found.patients[1]} without; AUROC {_span(found.auroc)}")
    if found.refused:
        say(f"{counted(found.refused, 'image')} of {found.images + found.refused} could not be judged and do not count")
    table = Table("Threshold", "", "Sensitivity", "Specificity", box=None, pad_edge=False)
    for name, value, rates in (
        ("the bundle's", manifest.threshold.value, found.at_bundle),
        (f"of {found.site}", found.point.value, found.at_own),
    ):
        table.add_row(name, f"{100 * value:.1f} %", _span(rates["sensitivity"]), _span(rates["specificity"]))
    console.print(table)
    say(f"{file}: pneumofed predict --operating-point {file}, or operating_point in room.yaml")


def _span(estimate: IntervalEstimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
