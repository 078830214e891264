"""`pneumofed site data add` for images that the site has as files.

`pneumofed site data`: a hospital's images, from folders, tables and the archive, into its manifest, and their check.

`pneumofed site compare`. Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pneumofed.client.cli import archive
from pneumofed.client.cli.archive import AllViews, LabelTable, WordOptions, exit_codes, finish, report_unknown_words, show_report
from pneumofed.common.errors import ConfigError, DataError, counted
from pneumofed.common.ops.command_line import FAILURE, NOT_FOUND, Json, Site, print_json, read_pairs, say

if TYPE_CHECKING:
    from pneumofed.common.data.manifest import DataReport, Manifest


file_sources = typer.Typer()

Uncertain = Annotated[Literal["ignore", "positive", "negative"], typer.Option(help="What a label marked uncertain counts as.")]


@file_sources.command("kaggle")
def add_kaggle(
    folder: Annotated[Path, typer.Argument(help="Holds train/NORMAL, train/PNEUMONIA, ...")],
    split: Annotated[list[str] | None, typer.Option(help="May stand more than once.", show_default="train, val")] = None,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """The Kaggle pediatric set."""
    with exit_codes(as_json):
        from pneumofed.common.data.sources.public_sets import read_kaggle

        _add(site, *read_kaggle(folder, split or ("train", "val")), as_json=as_json, pseudonymous=False)


@file_sources.command("table")
def add_table(
    file: Annotated[Path, typer.Argument(help="CSV with a row an image.")],
    images: Annotated[Path | None, typer.Option(help="What paths are relative to.", show_default="the table's folder")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="NAME=COLUMN for path, patient, label, view, sex, age, manufacturer.")
    ] = None,
    label: WordOptions = None,
    clinical: Annotated[
        list[str] | None,
        typer.Option(help="A clinical column to keep, e.g. temperature; may stand more than once."),
    ] = None,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Any CSV table of images."""
    with exit_codes(as_json):
        from pneumofed.client.data.label_words import words_at_site
        from pneumofed.client.site.folder import SiteFolder
        from pneumofed.common.data.sources.table import read_csv

        opened, columns = SiteFolder.open(site), read_pairs(column, "--column")
        words = words_at_site(opened, read_pairs(label, "--label"))
        found = read_csv(file, images, columns, words.own, keep=clinical or ())
        report_unknown_words(opened, file, words, columns.get("label"))
        _add(site, *found, as_json=as_json, pseudonymous=True)


@file_sources.command("dicom")
def add_dicom(
    folder: Annotated[Path, typer.Argument(help="Searched with all folders below it.")],
    labels: LabelTable,
    label: WordOptions = None,
    all_views: AllViews = False,
    ct: Annotated[bool, typer.Option("--ct", help="CT: each folder of files is one series.")] = False,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """A folder of DICOM files. They stay where they are, as they are."""
    with exit_codes(as_json):
        from pneumofed.client.data.label_words import words_at_site
        from pneumofed.client.site.folder import SiteFolder
        from pneumofed.common.data.sources.dicom import read_ct_folder, read_dicom_folder
        from pneumofed.common.ops.progress import open_progress

        opened = SiteFolder.open(site)
        words = words_at_site(opened, read_pairs(label, "--label"))
        with open_progress(results_piped=as_json) as progress:
            if ct:
                found = read_ct_folder(folder, labels, words, progress.show)
            else:
                found = read_dicom_folder(folder, labels, not all_views, words, progress.show)
        report_unknown_words(opened, labels, words)
        _add(site, *found, as_json=as_json, pseudonymous=True)


@file_sources.command("nih")
def add_nih(
    file: Annotated[Path, typer.Argument(help="Data_Entry_2017.csv")],
    images: Annotated[Path, typer.Argument(help="Searched with all folders below it.")],
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """NIH ChestX-ray14."""
    with exit_codes(as_json):
        from pneumofed.common.data.sources.public_sets import read_nih

        _add(site, *read_nih(file, images), as_json=as_json, pseudonymous=False)


@file_sources.command("chexpert")
def add_chexpert(
    file: Annotated[Path, typer.Argument(help="train.csv or valid.csv")],
    images: Annotated[Path, typer.Argument(help="The folder that holds train and valid, or the one above it.")],
    uncertain: Uncertain = "ignore",
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """CheXpert."""
    with exit_codes(as_json):
        from pneumofed.common.data.sources.public_sets import read_chexpert

        _add(site, *read_chexpert(file, images, uncertain), as_json=as_json, pseudonymous=False)


@file_sources.command("padchest")
def add_padchest(
    file: Annotated[Path, typer.Argument(help="The set's CSV table.")],
    images: Annotated[Path, typer.Argument(help="Searched with all folders below it.")],
    uncertain: Uncertain = "ignore",
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """PadChest."""
    with exit_codes(as_json):
        from pneumofed.common.data.sources.public_sets import read_padchest

        _add(site, *read_padchest(file, images, uncertain), as_json=as_json, pseudonymous=False)


def _add(site: Path, manifest: Manifest, report: DataReport, *, as_json: bool, pseudonymous: bool) -> None:
    from pneumofed.client.data.manifest_update import with_pseudonyms
    from pneumofed.client.site.folder import SiteFolder

    opened = SiteFolder.open(site)
    finish(opened, with_pseudonyms(opened, manifest) if pseudonymous else manifest, report, as_json)


app = typer.Typer(no_args_is_help=True, help="The site's images: add them to its manifest, remove them, and check them.")
add = typer.Typer(
    no_args_is_help=True, help="Add images to the site's manifest. Images that are there already are not added twice."
)
add.add_typer(file_sources)
add.add_typer(archive.archive_sources)
app.add_typer(add, name="add")


@app.command("check")
def data_check(
    task: Annotated[
        str,
        typer.Option(help="binary, three_class, or classes with commas between, the first normal: decides which labels count."),
    ] = "binary",
    size: Annotated[int, typer.Option(min=32, max=1024, help="Side in pixels, as the run will have it.")] = 128,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read and decode.")] = 1,
    ct: Annotated[
        bool, typer.Option("--ct", help="CT volumes: reads each, whatever --size, and writes down what was found.")
    ] = False,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Read and decode every image of the manifest as training would, and say what cannot be used and why."""
    with exit_codes(as_json):
        from pneumofed.client.federation.site_data import read_site_manifest
        from pneumofed.client.site.folder import SiteFolder
        from pneumofed.common.config.classes import parse_task
        from pneumofed.common.config.experiment import ImageConfig
        from pneumofed.common.data.dataset import SKIPPED_FILE, load_dataset
        from pneumofed.common.ops.progress import open_progress

        opened = SiteFolder.open(site)
        cache, manifest, classes = Path(opened.config.work_dir) / "cache", read_site_manifest(opened.config), parse_task(task)
        if ct:
            from pneumofed.client.data.volume_check import VOLUMES_FILE, check_volumes

            with open_progress(results_piped=as_json) as progress:
                report = check_volumes(manifest, classes, cache, workers, progress.show)
            show_report(report.public(), as_json)
            if not as_json:
                say(f"each in words: {cache / VOLUMES_FILE}")
            if not report.used:
                raise typer.Exit(FAILURE)
            return
        image = ImageConfig(size_px=size)
        with open_progress(results_piped=as_json) as progress:
            dataset = load_dataset(manifest, classes, image, cache, workers=workers, on_progress=progress.show)
        show_report(dataset.report.public(), as_json)
        if dataset.report.skipped and not as_json:
            say(f"which ones: {cache / SKIPPED_FILE}")


@app.command("clinical")
def data_clinical(
    experiment: Annotated[Path, typer.Argument(help="The run's configuration, whose `clinical:` is read.")],
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Check the manifest's clinical values as a run would read them, and count by column of how many images each is known."""
    with exit_codes(as_json):
        from pneumofed.client.site.folder import SiteFolder
        from pneumofed.common.config.reader import load_experiment
        from pneumofed.common.data.clinical import count_known
        from pneumofed.common.data.manifest import read_manifest

        schema, opened = load_experiment(experiment).clinical, SiteFolder.open(site)
        if schema is None:
            raise ConfigError(f"{experiment} uses no clinical values: it has no section `clinical`")
        manifest = read_manifest(opened.manifest)
        known = count_known(manifest.records, schema, opened.config.clinical_columns, opened.manifest.name)
        if as_json:
            print_json({"images": len(manifest), "known": known}, indent=1)
            return
        for name, count in known.items():
            say(f"  {name}: known of {count} of {len(manifest)} images")


@app.command("retry")
def data_retry(site: Site = Path(), as_json: Json = False) -> None:
    """Forget which images were refused, so that the next `data add` or run tries them again, as after a repair of the archive."""
    with exit_codes(as_json):
        from pneumofed.client.archive.refusals import forget_refusals
        from pneumofed.client.site.folder import SiteFolder
        from pneumofed.common.data.cache import forget_refused

        opened = SiteFolder.open(site)
        try:
            from_archive = forget_refusals(opened.images)
            decoded = forget_refused(Path(opened.config.work_dir) / "cache")
        except OSError as error:
            raise DataError(f"{opened.data} cannot be changed: {error.strerror}; check its owner and permissions") from None
        counts = {reason.value: count for reason, count in sorted(from_archive.items())}
        if as_json:
            print_json({"archive": counts, "decoded": decoded}, indent=1)
            return
        for reason, count in counts.items():
            say(f"  {reason}: {count}")
        say(
            f"{sum(counts.values())} refused images of the archive forgotten; give the same `data add` command to ask for them again"
        )
        say(f"{counted(decoded, 'image')} that could not be decoded forgotten; the next `data check` or run tries them again")


@app.command("remove")
def data_remove(
    patients: Annotated[
        Path, typer.Option("--patients", help="File with a patient number (the hospital's own) a line; - is the standard input.")
    ],
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Take out patients who have withdrawn: rows, copies and decoded images. They are not added again. Exit code 5 if one is not found."""
    with exit_codes(as_json):
        from pneumofed.client.data.manifest_update import read_list, remove_patients
        from pneumofed.client.site.folder import SiteFolder

        listed = read_list(_content(patients))
        if not listed:
            raise ConfigError("--patients: there is no patient number in it; give one a line")
        removal = remove_patients(SiteFolder.open(site), listed)
        if as_json:
            print_json(removal.describe(), indent=1)
        else:
            say(
                f"{counted(removal.patients, 'patient')} removed: {counted(removal.rows, 'row')}, "
                f"{counted(removal.files, 'copy', 'copies')} of images"
            )
            say(f"manifest: {counted(removal.total, 'image')} left. Models that were trained before still hold what they learnt.")
            for line, change in removal.not_found.items():
                say(
                    f"line {line}: no image of this patient" + (f"; {change} there would be one" if change else ""),
                    style="yellow",
                )
            if removal.not_found:
                say(f"{len(removal.not_found)} of {len(listed)} were not found. As written they are kept out of later imports.")
        if removal.not_found:
            raise typer.Exit(NOT_FOUND)


def _content(file: Path) -> bytes:
    """Patient numbers are no arguments: these would stay in the shell's history and show in the list of processes."""
    try:
        return sys.stdin.buffer.read() if file == Path("-") else file.read_bytes()
    except OSError:
        raise ConfigError("--patients: the file cannot be read; give one patient number a line") from None
