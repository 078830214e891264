"""The hospitals and held-out sets of a simulated study, and that no held-out patient trains.

count_hospitals   how many there will be
gather            all sources read, divided and held out
keep_apart        takes out of the hospitals what a held-out set holds too
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pneumofed.client.data.splits import split_by_patient
from pneumofed.common.data.cache import load_digests
from pneumofed.common.data.manifest import LABELS, DataReport, ImageRecord, Manifest
from pneumofed.common.data.sources.public_sets import is_kaggle
from pneumofed.common.data.sources.table import find_columns
from pneumofed.common.data.tables import describe_columns, read_columns, read_rows
from pneumofed.common.errors import ConfigError, SkipReason, counted
from pneumofed.common.seeds import derive_seed
from pneumofed.simulation.hospitals.partition import partition
from pneumofed.simulation.hospitals.sources import DIVIDED, ImageSource, SimulationConfig, read_source
from pneumofed.simulation.phantoms.image import is_phantom


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


def count_hospitals(cfg: SimulationConfig) -> int:
    """Counts the hospitals that `gather` will make. Nothing is read but the divided set's table, where a column names the hospital.

    Raises:
        ConfigError: the divided set is no table, or its column does not name a hospital for each image.
        DataError: the table cannot be read.
    """
    divided = cfg.hospitals if cfg.divides else 0
    if cfg.column and cfg.data is not None:
        divided = len(_by_column(read_source(cfg.data).manifest, _column(cfg), cfg.column))
    return divided + sum(cfg.groups.values())


def gather(
    cfg: SimulationConfig,
    data: Path | None,
    external: Path | None,
    seed: int,
    classes: Sequence[str] = (),
    clinical: Sequence[str] = (),
) -> VirtualStudy:
    """Reads all sources and makes the hospitals and the held-out sets. Pure in its arguments and the sources' content.

    Args:
        cfg: which sources, and how they are divided.
        data: the set that is divided; None where all hospitals are given.
        external: the held-out set `external`; None for none.
        seed: of all draws.
        classes: of the task, which tables may name beside the words that every site knows.
        clinical: columns of clinical values that are kept of tables.

    Raises:
        ConfigError: a source does not exist, there are more hospitals than patients, two hospitals have one name, or drawn images
            would be mixed with real ones.
        DataError: a source cannot be read.
    """
    held_out = {name: read_source(place, classes, clinical) for name, place in cfg.held_out.items()}
    if external is not None:
        held_out["external"] = read_source(external, classes, clinical)
    if data is not None and _has_test(data):
        held_out["test"] = read_source(data / "test", classes, clinical)
    hospitals, reports, phantom = [], [], [source.phantom for source in held_out.values()]
    for name, (place, number) in _training_sources(cfg, data).items():
        source = read_source(place, classes, clinical)
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


def _has_test(data: Path) -> bool:
    """Whether the divided set has a test split of its own: in the Kaggle layout, and phantoms of own classes."""
    drawn = is_phantom(data) and (data / "labels.csv").is_file() and (data / "test" / "labels.csv").is_file()
    return (is_kaggle(data) and (data / "test").is_dir()) or drawn


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
    return load_digests([record.path for record in manifest.records], cache, 1, series=True)


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
    if cfg.column not in (present := read_columns(table)):
        raise ConfigError(f"partition: {table} has no column '{cfg.column}'; {describe_columns(present, columns.values())}")
    return {base / row[columns["path"]]: row[cfg.column].strip() for _, row in read_rows(table, [columns["path"], cfg.column])}


def _by_column(manifest: Manifest, hospital_of: Mapping[Path, str], column: str) -> dict[str, Manifest]:
    """A hospital for each value of the column; a patient who was in several is one patient of each of them."""
    parts: dict[str, list[ImageRecord]] = {}
    for record in manifest.records:
        parts.setdefault(hospital_of.get(record.path, ""), []).append(record)
    if "" in parts:
        raise ConfigError(
            f"partition: column '{column}' is empty for {counted(len(parts['']), 'image')}; each needs its hospital"
        )
    names = Counter(_plain_name(value) for value in parts)
    if max(names.values(), default=1) > 1:
        raise ConfigError(f"partition: two values of column '{column}' give one name, {names.most_common(1)[0][0]}; change one")
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
