"""Where the images of virtual hospitals and of held-out sets come from, and that no held-out patient trains.

    read_source     a folder or table of any known layout
    gather          the hospitals and the held-out sets of a simulation
    keep_apart      takes out of the hospitals what a held-out set holds too

A source is recognised by what lies there: the Kaggle layout (the folder of train/ and test/, or one split with its class folders), the
tables of NIH ChestX-ray14, CheXpert and PadChest, a table with a row an image (a manifest, or columns by their usual names), a folder
with a labels.csv, or a folder of DICOM files with a labels.csv that names examinations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pneumofed.client.data.splits import split_by_patient
from pneumofed.common.data.cache import load_digests
from pneumofed.common.data.manifest import LABELS, ImageRecord, Manifest
from pneumofed.common.data.report import DataReport
from pneumofed.common.data.sources.dicom import read_dicom_folder
from pneumofed.common.data.sources.public_sets import is_kaggle, read_chexpert, read_kaggle, read_nih, read_padchest
from pneumofed.common.data.sources.table import find_columns, read_csv
from pneumofed.common.data.tables import read_columns, read_rows
from pneumofed.common.errors import ConfigError, DataError, SkipReason
from pneumofed.common.seeds import derive_seed
from pneumofed.simulation.hospitals.partition import partition
from pneumofed.simulation.hospitals.settings import SimulationConfig
from pneumofed.simulation.phantoms.image import is_phantom

TABLES = ("labels.csv", "manifest.csv", "data_entry_2017.csv", "data_entry_2017_v2020.csv", "train.csv")
"""Names, in lower case, of the table in a folder; the first that is there counts."""
DIVIDED = "test"
"""Under this name a share of the divided set is held out, and its own test split is judged."""


@dataclass(frozen=True)
class ImageSource:
    """Images of one origin.

    Attributes:
        manifest: the images.
        report: what was found and left out.
        namespace: within which equal patient names mean one patient.
        phantom: whether the images are drawn.
    """

    manifest: Manifest
    report: DataReport
    namespace: str
    phantom: bool


@dataclass(frozen=True)
class Hospital:
    """A virtual hospital: its name, its images, and within what its patients' names are unique."""

    name: str
    manifest: Manifest
    namespace: str


@dataclass(frozen=True)
class VirtualStudy:
    """All hospitals, the largest first, and the held-out sets by name.

    Attributes:
        hospitals: at least one.
        held_out: by name; each has the namespaces of its patients beside it.
        report: what all sources of training images found.
        phantom: whether the images are drawn; never some of them alone.
    """

    hospitals: tuple[Hospital, ...]
    held_out: Mapping[str, ImageSource]
    report: DataReport
    phantom: bool


def read_source(place: str | Path) -> ImageSource:
    """Reads the images in `place`, whatever known layout it has.

    Raises:
        ConfigError: it does not exist.
        DataError: it has no known layout, or lacks what its layout needs.
    """
    path = Path(place).resolve()
    if not path.exists():
        raise ConfigError(f"source {path} does not exist; expected a folder of images or a table")
    manifest, report, namespace = _read_folder(path) if path.is_dir() else _read_table(path, path.parent)
    if not manifest.records:
        raise DataError(f"source {path} holds no image that can be used: {report.public()['skipped'] or 'it is empty'}")
    return ImageSource(manifest, report, namespace, is_phantom(path))


def check_places(cfg: SimulationConfig) -> None:
    """Refuses sources that are not there or have no known layout, before anything heavy is loaded; no image is read.

    Raises:
        ConfigError: a place does not exist, or a key names a source that is not there.
        DataError: a folder has no known layout.
    """
    if cfg.external is not None and cfg.data is None and not cfg.sources:
        raise ConfigError("external: phantoms come with an external set of their own; give data or hospitals too")
    single = {"data": cfg.data, "external": cfg.external}
    places = {key: place for key, place in single.items() if place} | cfg.sources | cfg.held_out
    for name, place in places.items():
        if not Path(place).exists():
            raise ConfigError(f"{name}: {place} does not exist; expected a folder of images or a table")
        if Path(place).is_dir():
            _find_table(Path(place).resolve())
    unknown = sorted(set(cfg.hold_out) - set(cfg.groups) - ({DIVIDED} if cfg.divides else set()))
    if unknown:
        raise ConfigError(f"hold_out: {unknown[0]} is no source; there are {', '.join([*cfg.groups, DIVIDED])}")
    twice = sorted(set(cfg.hold_out) & set(cfg.held_out))
    if twice:
        raise ConfigError(f"hold_out: {twice[0]} is already a held-out set; choose another name for one of them")


def count_hospitals(cfg: SimulationConfig) -> int:
    """Counts the hospitals that `gather` will make; of the images only a table's column is read, where it names the hospital.

    Raises:
        ConfigError: the divided set is no table, or lacks the column.
    """
    divided = 0
    if cfg.divides:
        divided = len(set(_column(cfg).values())) if cfg.column else cfg.hospitals
    return divided + sum(cfg.groups.values())


def gather(cfg: SimulationConfig, data: Path | None, external: Path | None, seed: int) -> VirtualStudy:
    """Reads all sources and makes the hospitals and the held-out sets. Pure in its arguments and the sources' content.

    Args:
        cfg: which sources, and how they are divided.
        data: the set that is divided; None where all hospitals are given.
        external: the held-out set `external`; None for none.
        seed: of all draws.

    Raises:
        ConfigError: a source does not exist, there are more hospitals than patients, two hospitals have one name, or drawn images
            would be mixed with real ones.
        DataError: a source cannot be read.
    """
    held_out = {name: read_source(place) for name, place in cfg.held_out.items()}
    if external is not None:
        held_out["external"] = read_source(external)
    if data is not None and is_kaggle(data) and (data / "test").is_dir():
        held_out["test"] = read_source(data / "test")
    hospitals, reports, phantom = [], [], [source.phantom for source in held_out.values()]
    for name, (place, number) in _training_sources(cfg, data).items():
        source = read_source(place)
        reports.append(source.report)
        phantom.append(source.phantom)
        if name in cfg.hold_out:
            source, held_out[name] = _hold_out(source, cfg.hold_out[name], derive_seed(seed, name, "held out"))
        manifests = _divide(source, name, number, cfg, seed)
        hospitals += [Hospital(hospital, manifest, source.namespace) for hospital, manifest in manifests.items()]
    if any(phantom) and not all(phantom):
        raise ConfigError(
            "some of the sources are phantoms and some are not: results on drawn images are never mixed with real ones"
        )
    names = Counter(hospital.name for hospital in hospitals)
    if max(names.values()) > 1:
        raise ConfigError(f"hospitals: the name {names.most_common(1)[0][0]} is there more than once; each needs its own")
    order = sorted(hospitals, key=lambda hospital: -len(hospital.manifest))
    return VirtualStudy(tuple(order), held_out, sum(reports, DataReport()), any(phantom))


def keep_apart(study: VirtualStudy, caches: Mapping[str, Path]) -> VirtualStudy:
    """Takes out of the hospitals every image of a patient of a held-out set, and every image whose file is in one.

    Args:
        study: as `gather` made it.
        caches: where the digests of each hospital's and each held-out set's files are kept, by name.

    Returns:
        The study with what is left; its report counts what was taken out as `SkipReason.HELD_OUT`.

    Raises:
        ConfigError: nothing is left of a hospital.
    """
    held = {(source.namespace, patient) for source in study.held_out.values() for patient in source.manifest.patients}
    files = {
        digest
        for name, source in study.held_out.items()
        for digest in _digests(source.manifest, caches[name])
        if not isinstance(digest, SkipReason)
    }
    kept = []
    for hospital in study.hospitals:
        digests = _digests(hospital.manifest, caches[hospital.name])
        records = tuple(
            record
            for record, digest in zip(hospital.manifest.records, digests, strict=True)
            if (hospital.namespace, record.patient) not in held and digest not in files
        )
        if not records:
            raise ConfigError(f"hospital {hospital.name}: all its images are in a held-out set too; give it others")
        kept.append(replace(hospital, manifest=Manifest(records)))
    taken = sum(map(len, (one.manifest for one in study.hospitals))) - sum(map(len, (one.manifest for one in kept)))
    return replace(study, hospitals=tuple(kept), report=_without(study.report, kept, taken)) if taken else study


def _without(report: DataReport, kept: Sequence[Hospital], taken: int) -> DataReport:
    records = [record for hospital in kept for record in hospital.manifest.records]
    return replace(
        report,
        used=report.used - taken,
        skipped=report.skipped + Counter({SkipReason.HELD_OUT: taken}),
        classes=Counter(record.label for record in records),
        patients=len({(hospital.namespace, patient) for hospital in kept for patient in hospital.manifest.patients}),
    )


def _digests(manifest: Manifest, cache: Path) -> list[str | SkipReason]:
    return load_digests([record.path for record in manifest.records], cache, 1)


def _training_sources(cfg: SimulationConfig, data: Path | None) -> dict[str, tuple[str | Path, int]]:
    """Place and number of hospitals by name of the group; the divided set is called `DIVIDED`."""
    divided: dict[str, tuple[str | Path, int]] = {} if data is None else {DIVIDED: (data, cfg.hospitals)}
    return divided | {name: (cfg.source_of(name), number) for name, number in cfg.groups.items()}


def _divide(source: ImageSource, name: str, number: int, cfg: SimulationConfig, seed: int) -> dict[str, Manifest]:
    """The hospitals of one source by name."""
    if name == DIVIDED and cfg.column:
        return _by_column(source.manifest, _column(cfg), cfg.column)
    if name != DIVIDED and number == 1:
        return {name: source.manifest}
    kind = "dirichlet" if cfg.column else cfg.partition
    draw = derive_seed(seed, "partition") if name == DIVIDED else derive_seed(seed, "partition", name)
    parts = sorted(partition(source.manifest, number, kind, cfg.alpha, draw), key=lambda part: -len(part.records))
    prefix = "hospital" if name == DIVIDED else name
    return {numbered_name(prefix, rank, number): part for rank, part in enumerate(parts)}


def numbered_name(prefix: str, number: int, hospitals: int) -> str:
    """Returns the name of one of several hospitals: `hospital-07` of up to 100, `hospital-007` of more. Names sort as numbers do.

    Args:
        prefix: of all of them.
        number: from 0.
        hospitals: how many there are.
    """
    return f"{prefix}-{number:0{max(2, len(str(hospitals - 1)))}d}"


def _column(cfg: SimulationConfig) -> dict[Path, str]:
    """The hospital of each image file in the table `data`, by the column that names it."""
    table = Path(cfg.data or "")
    if not table.is_file():
        raise ConfigError(f"partition: column:{cfg.column} needs a table as data, and {cfg.data} is none")
    columns, base = find_columns(table, {}), table.resolve().parent
    if cfg.column not in read_columns(table):
        raise ConfigError(f"partition: {table} has no column '{cfg.column}'; there are {', '.join(read_columns(table))}")
    return {base / row[columns["path"]]: row[cfg.column].strip() for _, row in read_rows(table, [columns["path"], cfg.column])}


def _by_column(manifest: Manifest, hospital_of: Mapping[Path, str], column: str) -> dict[str, Manifest]:
    """A hospital for each value of the column; a patient who was in several is one patient of each of them."""
    parts: dict[str, list[ImageRecord]] = {}
    for record in manifest.records:
        parts.setdefault(hospital_of.get(record.path, ""), []).append(record)
    if "" in parts:
        raise ConfigError(f"partition: column '{column}' is empty for {len(parts[''])} images; each needs its hospital")
    return {_plain_name(value): Manifest(tuple(records)) for value, records in sorted(parts.items())}


def _plain_name(value: str) -> str:
    """A site's name from a table's cell: letters, digits, dot, dash and underscore."""
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in value)
    return (plain if plain[:1].isalnum() else f"site{plain}")[:64]


def _hold_out(source: ImageSource, share: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """The source without, and the source of, `share` of its patients, of each label alike."""
    labels = [LABELS.index(label) if label in LABELS else len(LABELS) for label in source.manifest.labels]
    parts = split_by_patient(source.manifest.patients, labels, share, seed)
    manifests = [Manifest(tuple(source.manifest.records[row] for row in rows)) for rows in parts]
    kept, held = (replace(source, manifest=manifest) for manifest in manifests)
    return kept, held


def _read_folder(path: Path) -> tuple[Manifest, DataReport, str]:
    table = _find_table(path)
    if table is not None:
        return _read_table(table, path)
    folder, splits = (path, ("train", "val")) if is_kaggle(path) else (path.parent, (path.name,))
    return *read_kaggle(folder, splits), str(folder)


def _find_table(path: Path) -> Path | None:
    """The table of the images in the folder `path`; None where it has the Kaggle layout."""
    if is_kaggle(path) or is_kaggle(path.parent, path.name):
        return None
    tables = {child.name.lower(): child for child in sorted(path.iterdir()) if child.suffix.lower() == ".csv"}
    found = next((tables[name] for name in TABLES if name in tables), None)
    if found is None:
        raise DataError(
            f"{path} has no known layout: expected the class folders NORMAL and PNEUMONIA, in train/ or at once, or a table of its "
            f"images ({', '.join(TABLES)})"
        )
    return found


def _read_table(table: Path, folder: Path) -> tuple[Manifest, DataReport, str]:
    columns = set(read_columns(table))
    if {"image index", "finding labels"} <= columns:
        return *read_nih(table, folder), "nih"
    if {"frontal/lateral", "no finding"} <= columns:
        return *read_chexpert(table, folder), "chexpert"
    if {"imageid", "projection", "labels"} <= columns:
        return *read_padchest(table, folder), "padchest"
    try:
        find_columns(table, {})
    except DataError:
        if "label" in columns:
            return *read_dicom_folder(folder, table), str(folder)
        raise
    return *read_csv(table), str(table.parent)
