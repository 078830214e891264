"""Groups of the patients of a central set, to see whom a model serves less well: by cause of the pneumonia, view, age and sex."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pneumofed.common.data.manifest import ImageRecord

LEAST_IN_SUBGROUP = 20
"""Images; of fewer no metric says anything."""
AGE_GROUPS = ((0, 18), (18, 40), (40, 65), (65, 200))
"""Years, from and below; 18 is the border of paediatrics."""
CAUSES = ("bacterial", "viral")
"""Labels that name the cause of a pneumonia. A group of one cause has no image without pneumonia, so sensitivity alone."""


def find_subgroups(records: Sequence[ImageRecord | None]) -> dict[str, NDArray[np.int64]]:
    """Finds the groups of a set that its manifest knows and that are neither all of it nor smaller than `LEAST_IN_SUBGROUP`.

    Args:
        records: manifest row of each image; None where it is not known.

    Returns:
        By name (`cause viral`, `sex F`, `age 18 to 39`, `view AP`), the positions of the group's images, ascending. An image may be in
        several groups, and in none.
    """
    found = {}
    for name, belongs in _groups([record for record in records if record is not None]).items():
        rows = np.flatnonzero([record is not None and belongs(record) for record in records]).astype(np.int64)
        if LEAST_IN_SUBGROUP <= len(rows) < len(records):
            found[name] = rows
    return found


def _groups(records: Sequence[ImageRecord]) -> dict[str, Callable[[ImageRecord], bool]]:
    groups: dict[str, Callable[[ImageRecord], bool]] = {}
    for cause in CAUSES:
        groups[f"cause {cause}"] = lambda record, cause=cause: record.label == cause  # type: ignore[misc]
    for sex in sorted({record.sex for record in records if record.sex}):
        groups[f"sex {sex}"] = lambda record, sex=sex: record.sex == sex  # type: ignore[misc]
    for low, high in AGE_GROUPS:
        name = f"age {low} to {high - 1}" if high < 200 else f"age {low} and over"
        groups[name] = lambda record, low=low, high=high: record.age_years is not None and low <= record.age_years < high  # type: ignore[misc]
    for view in sorted({record.view for record in records if record.view}):
        groups[f"view {view}"] = lambda record, view=view: record.view == view  # type: ignore[misc]
    return groups
