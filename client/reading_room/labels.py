"""Readers' findings as a manifest, for the next round of training: see `common.data.manifest`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from client.archive.pseudonyms import Pseudonyms, load_pseudonyms
from client.reading_room.cases import Cases
from client.reading_room.folder import RoomFolder
from client.reading_room.reading import ORIGINAL
from client.reading_room.store import Store
from client.reading_room.tables import Case
from common.data.atomic import atomic_write
from common.data.manifest import ImageRecord, Manifest, write_manifest


def labels_manifest(folder: RoomFolder, cases: Cases) -> Manifest:
    """The cases whose latest finding is a label, with the site's pseudonyms of their patients.

    A file without a patient's number counts as a patient of its own. Left out are cases that somebody read as `unsure`.

    Raises:
        ConfigError: the key of the pseudonyms cannot be used.
    """
    pseudonyms = load_pseudonyms(_pseudonym_folder(folder))
    store = Store(folder.store, folder.quarantine)
    return Manifest(tuple(_record(case, store.path(case.id) / ORIGINAL, pseudonyms) for case in cases.labelled()))


def labels_csv(folder: RoomFolder, cases: Cases) -> tuple[bytes, int]:
    """(the manifest as a CSV file with whole paths, its number of rows)."""
    manifest = labels_manifest(folder, cases)
    with TemporaryDirectory(dir=folder.quarantine) as name:
        path = Path(name) / "labels.csv"
        write_manifest(manifest, path)
        return path.read_bytes(), len(manifest)


def write_labels(folder: RoomFolder, cases: Cases, path: Path) -> int:
    """Writes the manifest as the file `path` and returns its number of rows.

    Raises:
        OSError: it cannot be written.
    """
    content, count = labels_csv(folder, cases)
    with atomic_write(path) as file:
        file.write(content)
    return count


def _pseudonym_folder(folder: RoomFolder) -> Path:
    """Where the key lies: the site folder's, so that a patient has one pseudonym whichever way the image came, or the room's own."""
    if folder.settings.site is None:
        return folder.keys
    from client.data_add import open_site

    return open_site(folder.inside(folder.settings.site)).data


def _record(case: Case, path: Path, pseudonyms: Pseudonyms) -> ImageRecord:
    return ImageRecord(
        path=path,
        patient=pseudonyms.patient(case.patient or f"file {case.sha256}"),
        label=case.finding or "",
        view=case.view,
        sex=case.sex,
        age_years=case.age_years,
        manufacturer=case.manufacturer,
    )
