"""`pneumofed site data add` for images that the site has as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from client.data_output import AllViews, Json, LabelTable, Site, exit_codes, finish
from common.errors import ConfigError

if TYPE_CHECKING:
    from common.data.manifest import Manifest
    from common.data.report import DataReport

app = typer.Typer()

Uncertain = Annotated[Literal["ignore", "positive", "negative"], typer.Option(help="What a label marked uncertain counts as.")]


@app.command()
def kaggle(
    folder: Annotated[Path, typer.Argument(help="Holds train/NORMAL, train/PNEUMONIA, ...")],
    split: Annotated[list[str] | None, typer.Option(help="May stand more than once.  [default: train, val]")] = None,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """The Kaggle pediatric set."""
    with exit_codes(as_json):
        from common.data.sources.kaggle import read_kaggle

        _add(site, *read_kaggle(folder, split or ("train", "val")), as_json=as_json, pseudonymous=False)


@app.command()
def table(
    file: Annotated[Path, typer.Argument(help="CSV with a row an image.")],
    images: Annotated[Path | None, typer.Option(help="What paths are relative to.  [default: the table's folder]")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="NAME=COLUMN for path, patient, label, view, sex, age, manufacturer.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="TABLE'S WORD=LABEL, e.g. lobar=bacterial.")] = None,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Any CSV table of images."""
    with exit_codes(as_json):
        from common.data.sources.table import read_csv

        found = read_csv(file, images, _pairs(column, "--column"), _pairs(label, "--label"))
        _add(site, *found, as_json=as_json, pseudonymous=True)


@app.command()
def dicom(
    folder: Annotated[Path, typer.Argument(help="Searched with all folders below it.")],
    labels: LabelTable,
    all_views: AllViews = False,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """A folder of DICOM files. They stay where they are, as they are."""
    with exit_codes(as_json):
        from common.data.sources.dicom import read_dicom_folder

        _add(site, *read_dicom_folder(folder, labels, frontal_only=not all_views), as_json=as_json, pseudonymous=True)


@app.command()
def nih(
    file: Annotated[Path, typer.Argument(help="Data_Entry_2017.csv")],
    images: Annotated[Path, typer.Argument(help="Searched with all folders below it.")],
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """NIH ChestX-ray14."""
    with exit_codes(as_json):
        from common.data.sources.nih import read_nih

        _add(site, *read_nih(file, images), as_json=as_json, pseudonymous=False)


@app.command()
def chexpert(
    file: Annotated[Path, typer.Argument(help="train.csv or valid.csv")],
    images: Annotated[Path, typer.Argument(help="The folder that holds train and valid, or the one above it.")],
    uncertain: Uncertain = "ignore",
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """CheXpert."""
    with exit_codes(as_json):
        from common.data.sources.chexpert import read_chexpert

        _add(site, *read_chexpert(file, images, uncertain), as_json=as_json, pseudonymous=False)


@app.command()
def padchest(
    file: Annotated[Path, typer.Argument(help="The set's CSV table.")],
    images: Annotated[Path, typer.Argument(help="Searched with all folders below it.")],
    uncertain: Uncertain = "ignore",
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """PadChest."""
    with exit_codes(as_json):
        from common.data.sources.padchest import read_padchest

        _add(site, *read_padchest(file, images, uncertain), as_json=as_json, pseudonymous=False)


def _add(site: Path, manifest: Manifest, report: DataReport, *, as_json: bool, pseudonymous: bool) -> None:
    from client.data_add import with_pseudonyms
    from client.folder import SiteFolder

    opened = SiteFolder.open(site)
    finish(opened, with_pseudonyms(opened, manifest) if pseudonymous else manifest, report, as_json)


def _pairs(options: list[str] | None, name: str) -> dict[str, str]:
    for option in options or ():
        if "=" not in option:
            raise ConfigError(f"{name} {option}: expected NAME=VALUE")
    return dict(option.split("=", 1) for option in options or ())
