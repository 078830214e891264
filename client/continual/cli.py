"""`pneumofed site compare`. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from client.data_output import Json, Site, exit_codes


def compare(
    old: Annotated[Path, typer.Argument(help="Bundle of the model that was released last.")],
    new: Annotated[Path, typer.Argument(help="Bundle of the new model.")],
    out: Annotated[Path | None, typer.Option(help="The signed verdict for the coordinator.  [default: verdict-NEW.json]")] = None,
    trusted: Annotated[
        list[Path] | None,
        typer.Option("--trusted", help="Public key of the coordinator; other bundles are refused.  [default: any]"),
    ] = None,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Judge two models on the site's own validation patients, and sign the numbers for the coordinator. No image leaves."""
    with exit_codes(as_json):
        from client.continual.compare import compare_at_site, default_output
        from client.folder import SiteFolder
        from common.audit_events import COMPARED
        from common.keys import read_private_key, read_public_key
        from common.model_bundle.bundle import open_bundle
        from common.release.verdict import write_verdict

        folder = SiteFolder.open(site)
        key = read_private_key(Path(folder.connection.key))
        keys = [read_public_key(file) for file in trusted or ()] or None
        models = open_bundle(old, keys), open_bundle(new, keys)
        verdict = compare_at_site(folder.config, *models)
        folder.audit.record(COMPARED, old=verdict.old, new=verdict.new, images=verdict.comparison.images)
        file = out or default_output(new)
        write_verdict(file, verdict, key)
        if as_json:
            typer.echo(json.dumps(verdict.model_dump(mode="json"), indent=1))
            return
        for name, bundle in zip(("old", "new"), models, strict=True):
            typer.echo(f"{name} model: {bundle.manifest.name}, signed by {bundle.signer}")
        patients, areas = verdict.comparison.patients, verdict.comparison.auroc
        shown = [f"{value:.3f}" if value is not None else "unknown" for value in (areas.old, areas.new)]
        typer.echo(
            f"validation: {patients[0]} patients with pneumonia, {patients[1]} without; AUROC {shown[0]} before, {shown[1]} now"
        )
        typer.echo(f"for the coordinator: {file}; it holds these numbers, their variances and counts, and no image")
