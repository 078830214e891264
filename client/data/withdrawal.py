"""Patients who withdraw: their rows, readings, copies of their images and the decoded cache go, and they are not added again.

What the site did not copy (folders that it was pointed to, the archive) stays as it is. Models that were trained before stay trained on
them: what a model may have kept of one patient is bounded only by differential privacy.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pneumofed.client.data import readings
from pneumofed.client.data.manifest_update import Withdrawals
from pneumofed.client.federation import site_data
from pneumofed.client.site.folder import SiteFolder
from pneumofed.common.data.manifest import Manifest, read_manifest, write_manifest
from pneumofed.common.errors import DataError
from pneumofed.common.files import exclusive


@dataclass(frozen=True)
class Removal:
    """What a removal changed, in counts: patients found, rows taken out, copies deleted, rows left."""

    patients: int
    rows: int
    files: int
    total: int

    def describe(self) -> dict[str, int]:
        return asdict(self)


def remove_patients(site: SiteFolder, patients: Iterable[str]) -> Removal:
    """Removes the patients and keeps them out; each is given by the hospital's own number or by the manifest's name for him.

    The list of the withdrawn is written first, then copies and cache go, then the rows: a removal that was interrupted is completed by
    the same command.

    Args:
        site: the site's folder.
        patients: numbers or names; spaces around them do not count.

    Raises:
        ConfigError: the key of the pseudonyms cannot be used.
        DataError: the manifest is missing or damaged, or a file cannot be deleted.
    """
    withdrawals = Withdrawals.of(site.data).extended(patients)
    try:
        site_data.forget_split(Path(site.config.work_dir), withdrawals.cover)
        with exclusive(site.data):
            withdrawals.write(site.data)
            readings.forget_readings(site.data, withdrawals.cover)
            rows = read_manifest(site.manifest).records
            gone = [record for record in rows if withdrawals.cover(record.patient)]
            files = sum(site.delete_copy(record) for record in gone)
            cache = Path(site.config.work_dir) / "cache"
            if cache.exists():
                shutil.rmtree(cache)
            left = tuple(record for record in rows if not withdrawals.cover(record.patient))
            write_manifest(Manifest(left), site.manifest)
    except OSError as error:
        raise DataError(f"{site.data} cannot be changed: {error.strerror}; fix that and give the same command again") from None
    return Removal(len({record.patient for record in gone}), len(gone), files, len(left))
