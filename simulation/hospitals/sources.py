"""Where the images of virtual hospitals and of held-out sets come from: a folder or table of any known layout.

A source is recognised by what lies there: the Kaggle layout (the folder of train/ and test/, or one split with its class folders), the
tables of NIH ChestX-ray14, CheXpert and PadChest, a table with a row an image (a manifest, or columns by their usual names), a folder
with a labels.csv, or a folder of DICOM files with a labels.csv that names examinations. `simulation.hospitals.study` makes hospitals and
held-out sets of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pneumofed.common.data.manifest import DataReport, Manifest
from pneumofed.common.data.sources.public_sets import is_kaggle, read_chexpert, read_kaggle, read_nih, read_padchest
from pneumofed.common.data.sources.table import find_columns, read_csv
from pneumofed.common.data.tables import read_columns
from pneumofed.common.errors import ConfigError, DataError
from pneumofed.simulation.hospitals.settings import DIVIDED, SimulationConfig

TABLES = ("labels.csv", "manifest.csv", "data_entry_2017.csv", "data_entry_2017_v2020.csv", "train.csv")
"""Names, in lower case, of the table in a folder; the first that is there counts."""


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
    from pneumofed.simulation.phantoms.image import is_phantom

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
    if cfg.partition == "scanner" and cfg.sources:
        raise ConfigError("partition: scanner gives every hospital a scanner of its own, so it goes with no given hospitals")
    if DIVIDED in cfg.hold_out and cfg.divides and (cfg.data is None or is_kaggle(Path(cfg.data), "test")):
        raise ConfigError(f"hold_out: {cfg.data or 'the set of phantoms'} has a test/ of its own; leave out {DIVIDED}")
    unknown = sorted(set(cfg.hold_out) - set(cfg.groups) - ({DIVIDED} if cfg.divides else set()))
    if unknown:
        raise ConfigError(f"hold_out: {unknown[0]} is no source; there are {', '.join([*cfg.groups, DIVIDED])}")
    twice = sorted(set(cfg.hold_out) & set(cfg.held_out))
    if twice:
        raise ConfigError(f"hold_out: {twice[0]} is already a held-out set; choose another name for one of them")


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
            from pneumofed.common.data.sources.dicom import read_dicom_folder  # pydicom, which only such a folder needs

            return *read_dicom_folder(folder, table), str(folder)
        raise
    return *read_csv(table), str(table.parent)
