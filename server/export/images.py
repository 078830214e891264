"""The images that an export needs at the coordinator: to check the graph, to quantise it, and as the reference of later use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pneumofed.common.config.experiment import ImageConfig
from pneumofed.common.config.parties import central_manifests
from pneumofed.common.data.cache import decode_for_cache
from pneumofed.common.data.dataset import load_dataset
from pneumofed.common.data.manifest import ImageRecord, read_manifest
from pneumofed.common.errors import BundleError, ConfigError, ImageError
from pneumofed.common.imaging.patient_groups import PatientGroups, groups_of
from pneumofed.common.seeds import numpy_generator
from pneumofed.server.export.source import Source

MOST_IMAGES_OF_A_SET = 2000
"""Of each set: more make no statistic of use better."""


@dataclass(frozen=True, eq=False)
class ExportImages:
    """Images of one set as the network sees them.

    Attributes:
        name: of a held-out set, or `reference`.
        pixels: uint8 [N, S, S].
        labels: int64 [N] of the task; None where nobody labelled them.
        records: manifest rows by the first 16 digits of their file's SHA-256, as in the run's predictions; empty without a manifest.
        patients: of each image; None where nobody knows.
        skipped: files that could not be used.
        groups: of the patient of each image; empty where nobody knows.
    """

    name: str
    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64] | None
    records: dict[str, ImageRecord]
    patients: tuple[str, ...] | None = None
    skipped: int = 0
    groups: tuple[PatientGroups, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def inputs(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Builds the graph's input for the images at `index`, float32 [n, 1, S, S] in [0, 1]."""
        return (self.pixels[index].astype(np.float32) / np.float32(255.0))[:, None]

    def draw(self, purpose: str, most: int = MOST_IMAGES_OF_A_SET) -> npt.NDArray[np.int64]:
        """Draws positions in random order, the same each time.

        Args:
            purpose: names the draw; each purpose has its own order.
            most: how many at most.

        Returns:
            int64 [n], n up to `most`.
        """
        return numpy_generator("export", purpose, self.name).permutation(len(self))[:most].astype(np.int64)


def load_central(source: Source) -> list[ExportImages]:
    """Loads the run's central sets through the coordinator's cache; those whose manifest is gone are left out."""
    if source.coordinator is None:
        return []
    settings, experiment = source.coordinator, source.experiment
    cache = Path(settings.cache_dir or Path(settings.run_dir) / "cache")
    found = []
    for name, manifest in central_manifests(settings).items():
        if Path(manifest).is_file():
            records = read_manifest(Path(manifest))
            dataset = load_dataset(records, experiment.task, experiment.image, cache / name, keep_duplicates=True)
            by_digest = {digest[:16]: record for digest, record in zip(dataset.digests, dataset.records, strict=True)}
            groups = tuple(groups_of(record.age_years, record.sex, record.view) for record in dataset.records)
            found.append(ExportImages(name, dataset.pixels, dataset.labels, by_digest, dataset.patients, groups=groups))
    return found


def load_folders(folders: Sequence[Path], image: ImageConfig) -> ExportImages:
    """Loads all images below `folders`, whatever their names. Files that cannot be read are counted in `skipped`.

    Args:
        folders: each a folder, or a manifest (.csv).
        image: how images are fitted into squares.

    Raises:
        ConfigError: a folder does not exist.
        BundleError: no image can be used.
    """
    known = {path: groups for folder in folders for path, groups in _files(folder).items()}
    paths = list(known)
    order = numpy_generator("export", "folders").permutation(len(paths))[:MOST_IMAGES_OF_A_SET]
    squares, groups, skipped = [], [], 0
    for position in sorted(order):
        try:
            squares.append(decode_for_cache(paths[position], image))
            groups.append(known[paths[position]] or _groups_in(paths[position]))
        except ImageError:
            skipped += 1
    if not squares:
        raise BundleError(
            f"none of the {len(paths)} files of --reference is an image that can be read; give a folder of radiographs"
        )
    return ExportImages("reference", np.stack(squares), None, {}, skipped=skipped, groups=tuple(groups))


def _files(folder: Path) -> dict[Path, PatientGroups | None]:
    """The files, with the groups that a manifest states."""
    if folder.is_dir():
        return dict.fromkeys(sorted(path for path in folder.rglob("*") if path.is_file()))
    if folder.suffix.lower() == ".csv" and folder.is_file():
        return {one.path: groups_of(one.age_years, one.sex, one.view) for one in read_manifest(folder).records}
    raise ConfigError(f"--reference {folder}: expected a folder of images or a manifest (.csv)")


def _groups_in(path: Path) -> PatientGroups:
    """The groups that a DICOM file states; nothing is known of others."""
    from pneumofed.common.imaging.dicom_header import read_header

    try:
        header = read_header(path)
    except ImageError:
        return PatientGroups()
    return groups_of(header.age_years, header.sex, header.view)
