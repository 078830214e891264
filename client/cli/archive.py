"""`pneumofed site data add` for images in the hospital's archive, and what every import shares: options, its report, its exit codes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pneumofed.common.errors import ArchiveError, ConfigError, DataError, EmptySiteError, PneumofedError
from pneumofed.common.ops.command_line import (
    FAILURE,
    UNREACHABLE,
    USAGE_ERROR,
    Json,
    Site,
    exit_on_error,
    print_json,
    read_pairs,
    say,
)

if TYPE_CHECKING:
    from pneumofed.client.archive.query import Archive, ArchiveQuery
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.common.data.label_words import LabelWords
    from pneumofed.common.data.manifest import DataReport, Manifest

LabelTable = Annotated[
    Path, typer.Option("--labels", help="CSV with a column label and AccessionNumber, StudyInstanceUID or SOPInstanceUID.")
]
WordOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--label", help="SITE'S WORD=LABEL, e.g. TB=tuberculosis. Beside label_words in site.yaml; may stand more than once."
    ),
]
AllViews = Annotated[bool, typer.Option("--all-views", help="Lateral and oblique views too.")]


def finish(
    site: SiteFolder, manifest: Manifest, report: DataReport, as_json: bool, stopped: PneumofedError | None = None
) -> None:
    """Merges the manifest and shows the report; what arrived before an import was stopped is added too."""
    from pneumofed.client.data.manifest_update import merge_images

    addition = merge_images(site, manifest, report).describe()
    if stopped is not None:
        addition["stopped"] = str(stopped)
    show_report(addition, as_json)
    if stopped is not None:
        raise stopped if not as_json else typer.Exit(_exit_code(stopped))
    if not report.used:
        raise typer.Exit(FAILURE)


def report_unknown_words(site: SiteFolder, table: Path, words: LabelWords, label_column: str | None = None) -> None:
    """Says on standard error which words of the import's table nobody mapped, and where their rows are listed."""
    from pneumofed.client.data.label_words import write_unknown_words

    if sentence := write_unknown_words(site, table, words, label_column):
        typer.echo(sentence, err=True)


def show_report(report: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report, indent=1)
        return
    say(f"{report['found']} images found, {report['used']} used, of {report['patients']} patients")
    for title in ("classes", "skipped", "warnings"):
        for name, count in report[title].items():
            say(f"  {title}: {name}: {count}")
    if "total" in report:
        changed = f"{report['added']} added, {report['updated']} updated, {report['unchanged']} unchanged"
        say(f"manifest: {changed}; {report['total']} images in all")


def exit_codes(as_json: bool) -> AbstractContextManager[None]:
    """Ends the command with one sentence and the code of its kind: 1 nothing usable, 2 wrong command or configuration, 3 archive."""
    return exit_on_error(_exit_code, as_json=as_json)


def _exit_code(error: PneumofedError) -> int:
    if isinstance(error, ArchiveError):
        return UNREACHABLE
    if isinstance(error, EmptySiteError):
        return FAILURE
    return USAGE_ERROR if isinstance(error, (ConfigError, DataError)) else FAILURE


archive_sources = typer.Typer()

Modality = Annotated[list[str] | None, typer.Option("--modality", help="May stand more than once.", show_default="CR, DX")]
BodyPart = Annotated[str | None, typer.Option(help="Body Part Examined, e.g. CHEST.")]
FirstDate = Annotated[datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="First day of the examinations.")]
LastDate = Annotated[datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="Last day of the examinations.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many images, for a first try.")]
KeepBurntIn = Annotated[
    bool, typer.Option("--keep-burnt-in", help="Keep images that are likely to have writing in their pixels.")
]
Timeout = Annotated[float, typer.Option(min=1.0, help="Seconds to wait for an answer of the archive.")]
Attempts = Annotated[int, typer.Option(min=1, help="How often to ask again when the archive or the network stumbles.")]
Authority = Annotated[Path | None, typer.Option("--ca", help="Certificate authority of the archive (PEM).")]
Password = Annotated[str | None, typer.Option(envvar="PNEUMOFED_ARCHIVE_PASSWORD", hidden=True)]
Token = Annotated[str | None, typer.Option(envvar="PNEUMOFED_ARCHIVE_TOKEN", hidden=True)]


@archive_sources.command("dicomweb")
def add_dicomweb(
    url: Annotated[str, typer.Argument(help="Address of the DICOMweb service, e.g. https://pacs.example/dicom-web")],
    labels: LabelTable,
    label: WordOptions = None,
    user: Annotated[
        str | None,
        typer.Option(
            help="Account; its password comes from the environment: PNEUMOFED_ARCHIVE_PASSWORD, or a token: PNEUMOFED_ARCHIVE_TOKEN."
        ),
    ] = None,
    ca: Authority = None,
    modality: Modality = None,
    body_part: BodyPart = None,
    first: FirstDate = None,
    last: LastDate = None,
    limit: Limit = None,
    all_views: AllViews = False,
    keep_burnt_in: KeepBurntIn = False,
    timeout: Timeout = 30.0,
    attempts: Attempts = 4,
    password: Password = None,
    token: Token = None,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Labelled images from the archive over DICOMweb, de-identified on arrival."""
    with exit_codes(as_json):
        from pneumofed.client.archive.dicomweb import DicomWebArchive, WebAddress
        from pneumofed.client.archive.query import RetryPolicy

        _require_file(ca, "--ca")
        address = WebAddress(url, user, password, token, str(ca) if ca else None)
        archive = DicomWebArchive(address, RetryPolicy(timeout, attempts))
        query = _query(modality, body_part, first, last, limit)
        words = read_pairs(label, "--label")
        _import(site, archive, (labels, words), query, {"frontal_only": not all_views, "keep_burnt_in": keep_burnt_in}, as_json)


@archive_sources.command("dimse")
def add_dimse(
    address: Annotated[str, typer.Argument(help="HOST:PORT of the archive.")],
    labels: LabelTable,
    called_ae_title: Annotated[str, typer.Option(help="The archive's AE title.")],
    label: WordOptions = None,
    ae_title: Annotated[str, typer.Option(help="This site's AE title, as the archive knows it.")] = "PNEUMOFED",
    retrieve: Annotated[Literal["get", "move"], typer.Option(help="C-GET, or C-MOVE to --listen.")] = "get",
    listen: Annotated[str, typer.Option(help="For C-MOVE: HOST:PORT where the archive sends images to.")] = "0.0.0.0:11112",
    tls: Annotated[bool, typer.Option("--tls", help="Encrypted connection.")] = False,
    ca: Authority = None,
    modality: Modality = None,
    body_part: BodyPart = None,
    first: FirstDate = None,
    last: LastDate = None,
    limit: Limit = None,
    all_views: AllViews = False,
    keep_burnt_in: KeepBurntIn = False,
    timeout: Timeout = 30.0,
    attempts: Attempts = 4,
    site: Site = Path(),
    as_json: Json = False,
) -> None:
    """Labelled images from the archive over the classic DICOM protocol, de-identified on arrival."""
    with exit_codes(as_json):
        from pneumofed.client.archive.dimse import DimseAddress, DimseArchive
        from pneumofed.client.archive.query import RetryPolicy

        _require_file(ca, "--ca")
        host, port = _split_address(address)
        listen_host, listen_port = _split_address(listen)
        place = DimseAddress(
            host,
            port,
            called_ae_title,
            ae_title,
            retrieve,
            listen_host,
            listen_port,
            tls or ca is not None,
            str(ca) if ca else None,
        )
        archive = DimseArchive(place, RetryPolicy(timeout, attempts))
        query = _query(modality, body_part, first, last, limit)
        words = read_pairs(label, "--label")
        _import(site, archive, (labels, words), query, {"frontal_only": not all_views, "keep_burnt_in": keep_burnt_in}, as_json)


def _import(
    site: Path,
    archive: Archive,
    labels: tuple[Path, Mapping[str, str]],
    query: ArchiveQuery,
    rules: Mapping[str, bool],
    as_json: bool,
) -> None:
    """`labels` are the label table, and the pairs of `--label`."""
    from pneumofed.client.archive.import_images import ImageStore, ImportRules, import_images
    from pneumofed.client.data.label_words import words_at_site
    from pneumofed.client.federation.site_data import site_log
    from pneumofed.client.site.folder import SiteFolder
    from pneumofed.common.data.sources.dicom import read_labels
    from pneumofed.common.imaging.dicom_header import load_pseudonyms
    from pneumofed.common.ops.progress import open_progress

    opened, table = SiteFolder.open(site), labels[0]
    words = words_at_site(opened, labels[1])
    store = ImageStore(opened.images, load_pseudonyms(opened.data), ImportRules(**rules))
    try:
        with site_log(opened.config), open_progress(results_piped=as_json) as progress:
            arrival = import_images(archive, query, read_labels(table, words), store, progress.show, words)
    finally:
        archive.close()
    report_unknown_words(opened, table, words)
    finish(opened, arrival.manifest, arrival.report, as_json, arrival.stopped)


def _query(
    modality: list[str] | None, body_part: str | None, first: datetime | None, last: datetime | None, limit: int | None
) -> ArchiveQuery:
    from pneumofed.client.archive.query import ArchiveQuery

    query = ArchiveQuery(
        body_part=body_part,
        first_date=first.date() if first else None,
        last_date=last.date() if last else None,
        limit=limit,
    )
    return query.model_copy(update={"modalities": tuple(name.strip().upper() for name in modality)}) if modality else query


def _split_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"'{text}': expected HOST:PORT, e.g. pacs.hospital.example:104")
    return host.strip("[]"), int(port)


def _require_file(path: Path | None, option: str) -> None:
    if path is not None and not path.is_file():
        raise ConfigError(f"{option} {path}: no such file")
