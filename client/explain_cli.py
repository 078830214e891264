"""`pneumofed explain`: maps of evidence over radiographs, and whether to believe them. Nothing heavy at the top."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from client.explain.methods import METHODS, choose_methods, choose_target

INTERRUPTED = 130

console = Console(highlight=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False, soft_wrap=True)


def explain_command(
    paths: Annotated[list[Path], typer.Argument(help="JPEG, PNG and DICOM files, or folders of them.")],
    bundle: Annotated[Path, typer.Option(help="The model bundle: a folder or an archive.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures. They show patients: keep it in the hospital.")],
    method: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(METHODS)}; may stand more than once.  [default: grad-cam]")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every method; minutes an image on a slow machine.")] = False,
    target: Annotated[
        str, typer.Option(help="What the evidence is for: pneumonia, or one of the bundle's classes.")
    ] = "pneumonia",
    check: Annotated[bool, typer.Option("--check/--no-check", help="Find out whether the maps can be believed.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what SHAP and LIME draw.")] = 0,
    trusted: Annotated[
        list[Path] | None, typer.Option("--trusted", help="Public key whose signature is taken; may repeat.  [default: any]")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Show where in a radiograph the model finds its evidence, and say whether the map can be believed.

    Exit code: 0 at least one image was explained, 1 none could be read, 130 stopped.
    """
    from client.explain.files import RESULT, Request, explain_files
    from common.keys import read_public_key
    from common.model_bundle.bundle import open_bundle

    opened = open_bundle(bundle, [read_public_key(key) for key in trusted] if trusted else None)
    methods = METHODS if all_ else choose_methods(method or ["grad-cam"], "--method")
    request = Request(methods, choose_target(target, opened.manifest.classes, "--target"), seed, check)
    explained: list[str] = []
    try:
        report = explain_files(paths, opened, out, request, explained.append if json_ else _saying(explained))
    except KeyboardInterrupt:
        notes.print(
            f"stopped: pictures of {len(explained)} images are in {out}; {RESULT} was not written", style="yellow", markup=False
        )
        raise typer.Exit(INTERRUPTED) from None
    if json_:
        _say((out / RESULT).read_text())
        return
    for found in report.sanity.values():
        _say(f"{found['method']}: {found['sentence']}")
    for reason, count in report.skipped.items():
        _say(f"left out: {reason}: {count}")
    _say(
        f"{len(report.images)} images explained, pictures and {RESULT} in {out}; model {opened.digest[:12]}, signed by {opened.signer}"
    )


def _saying(told: list[str]) -> Callable[[str], None]:
    """Says each sentence, and keeps it in `told`."""

    def tell(text: str) -> None:
        told.append(text)
        _say(text)

    return tell


def _say(text: str) -> None:
    console.print(text, markup=False)
