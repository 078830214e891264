"""What the sources share: walking a folder, and the manifest and report that each ends with."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

from common.data.manifest import ImageRecord, Manifest
from common.data.report import DataReport
from common.errors import ConfigError, DataError, SkipReason

UncertainPolicy = Literal["ignore", "positive", "negative"]
"""What a label that its authors marked uncertain counts as: left out, pneumonia, or no pneumonia (U-Ignore, U-Ones and U-Zeroes
of Irvin et al. 2019, section 3)."""

_NOT_FRONTAL = frozenset({"L", "LL", "RL", "LAT", "LATERAL", "RLO", "LLO", "LAO", "RAO", "LPO", "RPO"})


def collect(results: Iterable[ImageRecord | SkipReason]) -> tuple[Manifest, DataReport]:
    """The manifest of the records among `results`, and the report that counts all of them."""
    records: list[ImageRecord] = []
    skipped: Counter[SkipReason] = Counter()
    for result in results:
        if isinstance(result, SkipReason):
            skipped[result] += 1
        else:
            records.append(result)
    report = DataReport(
        found=len(records) + skipped.total(),
        used=len(records),
        skipped=skipped,
        classes=Counter(record.label for record in records),
        patients=len({record.patient for record in records}),
    )
    return Manifest(tuple(records)), report


def walk_files(folder: Path) -> Iterator[Path]:
    """All files below `folder`, in a fixed order; hidden files and folders are ignored, links to folders followed once.

    Raises:
        DataError: a folder does not exist or cannot be listed.
    """
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(parent)
        visible = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        folders[:] = visible
        if real not in seen:
            seen.add(real)
            yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def find_by_name(folder: Path) -> dict[str, Path]:
    """The files below `folder` by their name, which the public sets use once each.

    Raises:
        DataError: the folder does not exist or cannot be listed.
    """
    return {file.name: file for file in walk_files(folder)}


def is_frontal(view: str) -> bool:
    """False for lateral and oblique projections, e.g. `LL` (DICOM PS3.3, C.8.1.1) or `Lateral`; an unknown view passes."""
    return not view.strip() or view.upper().split()[0] not in _NOT_FRONTAL


def check_policy(policy: str) -> None:
    """Raises ConfigError unless `policy` is an UncertainPolicy."""
    if policy not in get_args(UncertainPolicy):
        raise ConfigError(f"policy for uncertain labels: expected one of {', '.join(get_args(UncertainPolicy))}, got '{policy}'")


def settle_uncertain(policy: UncertainPolicy, otherwise: str | SkipReason) -> str | SkipReason:
    """The label of an image whose pneumonia is uncertain; `otherwise` is the one that it has if the pneumonia does not count."""
    if policy == "negative":
        return otherwise
    return "pneumonia" if policy == "positive" else SkipReason.UNCERTAIN_LABEL


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"folder {error.filename} cannot be listed: {error.strerror}; check the path and its permissions") from None
