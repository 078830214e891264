"""What makes the virtual hospitals: the data, how it is dealt out, and what each hospital may use of the machine."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field

from pneumofed.common.config.experiment import Section
from pneumofed.common.config.parties import SetName

PartitionKind = Literal["iid", "dirichlet", "quantity", "scanner"]
COLUMN = "column:"
"""Before the name of a table's column that holds the hospital of each image."""

DIVIDED = "test"
"""Under this name a share of the divided set is held out, and its own test split is judged."""

GroupName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,47}(:[1-9][0-9]{0,3})?$")]
"""NAME, or NAME:N for N hospitals among which the source is divided."""
Share = Annotated[float, Field(gt=0.0, lt=1.0)]


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
    """A set that is divided among `hospitals`, as `simulation.hospitals.sources` reads it; a test/ in the Kaggle layout is the
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
