"""What virtual hospitals are made of: the settings of a simulated study (`SimulationConfig`), and the sources of its images.

A source is a folder or table of any known layout, recognised by what lies there: the Kaggle layout (the folder of train/ and test/, or one
split with its class folders), the tables of NIH ChestX-ray14, CheXpert and PadChest, a table with a row an image (a manifest, or columns by
their usual names), a folder with a labels.csv, or a folder of DICOM files with a labels.csv that names examinations.
`simulation.hospitals.study` makes hospitals and held-out sets of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from pneumofed.common.config.experiment import Section
from pneumofed.common.config.parties import SetName
from pneumofed.common.data.label_words import LabelWords
from pneumofed.common.data.manifest import DataReport, Manifest
from pneumofed.common.data.sources.public_sets import is_kaggle, read_chexpert, read_kaggle, read_nih, read_padchest
from pneumofed.common.data.sources.table import find_columns, read_csv
from pneumofed.common.data.tables import read_columns
from pneumofed.common.errors import ConfigError, DataError

PartitionKind = Literal["iid", "dirichlet", "quantity", "scanner"]
COLUMN = "column:"
"""Before the name of a table's column that holds the hospital of each image."""

DIVIDED = "test"
"""Under this name a share of the divided set is held out, and its own test split is judged."""


def _number_of(value: object) -> object:
    """A number in text, as the command line gives it; anything else as it is, for the check that follows."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


GroupName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,47}(:[1-9][0-9]{0,3})?$")]
"""NAME, or NAME:N for N hospitals among which the source is divided."""
Share = Annotated[float, Field(gt=0.0, lt=1.0), BeforeValidator(_number_of)]

TABLES = ("labels.csv", "manifest.csv", "data_entry_2017.csv", "data_entry_2017_v2020.csv", "train.csv")
"""Names, in lower case, of the table in a folder; the first that is there counts."""


def check_partition(kind: str) -> str:
    """Returns `kind` where it is a way to divide a set, or names a column.

    Raises:
        ValueError: it is neither; names the nearest.
    """
    kinds = get_args(PartitionKind)
    if kind in kinds or kind.removeprefix(COLUMN).strip() not in ("", kind):
        return kind
    near = difflib.get_close_matches(kind, kinds, n=1, cutoff=0.4)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise ValueError(f"expected one of {', '.join(kinds)}, or {COLUMN}NAME for a table's column{hint}")


class SimulationConfig(Section):
    """What makes the virtual hospitals: the data, how it is dealt out, and what each hospital may use of the machine."""

    data: str | None = None
    """A set that is divided among `hospitals`, as `read_source` reads it; a test/ in the Kaggle layout is the
    coordinator's. Unset and without `sources`, phantoms are drawn into the run folder, and their external set is used."""
    phantom_patients: Annotated[int, Field(ge=3, le=100_000)] = 240
    """Training patients of the phantom set."""
    external: str | None = None
    """The held-out external set."""
    hospitals: Annotated[int, Field(ge=1, le=10_000)] = 5
    """Among how many `data` is divided."""
    partition: Annotated[str, AfterValidator(check_partition)] = "dirichlet"
    """How `data` is divided: by a draw (`simulation.hospitals.partition`), or `column:NAME` where a table names the hospital."""
    alpha: Annotated[float, Field(gt=0.0)] = 0.5
    """Concentration of the Dirichlet draws: 0.1 is very uneven, 100 nearly even. Only of `dirichlet` and `quantity`."""
    sources: dict[GroupName, str] = Field(default_factory=dict)
    """Given hospitals: the place of each one's images by its name; of `NAME:N` they are divided among N as `data` is."""
    held_out: dict[SetName, str] = Field(default_factory=dict)
    """Further held-out sets: the place of each by its name."""
    hold_out: dict[str, Share] = Field(default_factory=dict)
    """Share of the patients of a source, by its name without N, that becomes the held-out set of that name; `test` is of `data`."""
    slow: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default_factory=dict)
    """By hospital, how many times as long as the others it takes to train, by the virtual clock (`server.federation.asynchronous`)."""
    threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of each hospital's training; part of what makes a run repeat bit for bit."""
    device: str = "auto"

    @property
    def divides(self) -> bool:
        """Whether there is a set that is divided: `data`, or phantoms."""
        return self.data is not None or not self.sources

    @property
    def column(self) -> str:
        """The column that names the hospital, in lower case as tables are read; empty where patients are dealt by a draw."""
        return self.partition.removeprefix(COLUMN).strip().lower() if self.partition.startswith(COLUMN) else ""

    @property
    def groups(self) -> dict[str, int]:
        """Number of hospitals of each given source by its name."""
        return {name.partition(":")[0]: int(name.partition(":")[2] or 1) for name in self.sources}

    def source_of(self, group: str) -> str:
        """Returns the place of a given source's images."""
        return next(place for name, place in self.sources.items() if name.partition(":")[0] == group)


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


def read_source(place: str | Path, classes: Sequence[str] = (), clinical: Sequence[str] = ()) -> ImageSource:
    """Reads the images in `place`, whatever known layout it has.

    Args:
        place: a folder or table.
        classes: of the task; labels of tables that are one of them are taken beside the words that every site knows.
        clinical: columns of clinical values that are kept of a table with a row an image.

    Raises:
        ConfigError: it does not exist.
        DataError: it has no known layout, or lacks what its layout needs.
    """
    path = Path(place).resolve()
    words = LabelWords.of_classes(classes)
    if not path.exists():
        raise ConfigError(f"source {path} does not exist; expected a folder of images or a table")
    manifest, report, namespace = (
        _read_folder(path, words, clinical) if path.is_dir() else _read_table(path, path.parent, words, clinical)
    )
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


def _read_folder(path: Path, words: LabelWords, clinical: Sequence[str]) -> tuple[Manifest, DataReport, str]:
    table = _find_table(path)
    if table is not None:
        return _read_table(table, path, words, clinical)
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


def _read_table(table: Path, folder: Path, words: LabelWords, clinical: Sequence[str]) -> tuple[Manifest, DataReport, str]:
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

            return *read_dicom_folder(folder, table, words=words), str(folder)
        raise
    return *read_csv(table, label_map=words.own, keep=clinical), str(table.parent)
