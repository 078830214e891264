"""Clinical values at prediction: of a table beside the images, of a DICOM file's own tags, or by name, as Python has them.

    ClinicalTable.read(path, schema)    values by image file
    values_of(given, schema)            of one patient, by name
    describe_values(values, schema)     in words

They are read by the rules of a site's manifest (`common.data.clinical`), with the same sentences where they do not fit.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np

from pneumofed.common.config.experiment import ClinicalConfig
from pneumofed.common.data.clinical import SourceColumn, Values, find_sources, read_values
from pneumofed.common.data.manifest import read_age, read_sex
from pneumofed.common.data.tables import describe_columns, plain_text, read_columns, read_rows
from pneumofed.common.errors import DataError


class StatedInFile(Protocol):
    """What an image file states of its patient, as `common.imaging.dicom_header.DicomHeader`."""

    @property
    def age_years(self) -> float | None: ...
    @property
    def sex(self) -> str: ...
    @property
    def view(self) -> str: ...


@dataclass(frozen=True)
class ClinicalTable:
    """Values of a table beside images, by file.

    Attributes:
        schema: of the model.
        by_path: by absolute path; a relative one is relative to the table's folder.
        by_name: by file name, of names that stand in one row only, so that a table may also lie elsewhere.
    """

    schema: ClinicalConfig
    by_path: Mapping[Path, Values]
    by_name: Mapping[str, Values]
    found: Counter[bool] = field(default_factory=Counter)
    """How many images had a row, and how many had none."""

    @classmethod
    def read(cls, path: Path, schema: ClinicalConfig) -> ClinicalTable:
        """Reads the table at `path`; see `read_clinical_table`.

        Raises:
            ConfigError, DataError: it cannot be used; the text says why.
        """
        rows = read_clinical_table(path, schema)
        names = Counter(PurePath(cell.replace("\\", "/")).name for cell in rows)
        by_name = {name: values for cell, values in rows.items() if names[name := PurePath(cell.replace("\\", "/")).name] == 1}
        return cls(schema, {Path(os.path.abspath(path.parent / cell)): values for cell, values in rows.items()}, by_name)  # noqa: PTH100

    def find(self, image: Path, header: StatedInFile | None = None) -> Values | None:
        """Returns the values of the file `image`, with age, sex and view as the file states them where the table does not.

        Args:
            image: the file.
            header: of a DICOM file.

        Returns:
            float32 [K]; None where no row is about it and it states nothing that the model takes.
        """
        values = self.by_path.get(Path(os.path.abspath(image)))  # noqa: PTH100 - resolve() would follow links
        values = self.by_name.get(image.name) if values is None else values
        self.found[values is not None] += 1
        return values if header is None else with_stated(values, header, self.schema)

    def describe_use(self) -> str:
        """Says how many of the images that were looked for had a row."""
        total = self.found.total()
        rest = "" if self.found[True] == total else f"; the other {self.found[False]} were judged by the image only"
        return f"{self.found[True]} of {total} images have a row in the table of clinical values ({len(self.by_path)} rows){rest}"


def read_clinical_table(path: Path, schema: ClinicalConfig, names: Mapping[str, str | None] | None = None) -> dict[str, Values]:
    """Reads a table of clinical values beside images.

    Args:
        path: CSV with a column `file` (or `path`, `image`, `filename`) and some of the schema's columns.
        schema: of the model bundle.
        names: the user's own spelling of columns.

    Returns:
        float32 [K] by what stands in the file's column.

    Raises:
        ConfigError: there is no such table.
        DataError: it names no file, none of the columns is there, a value does not fit, or a file stands twice.
    """
    present = read_columns(path)
    key = next((name for name in ("file", "path", "image", "filename") if name in present), None)
    if key is None:
        known = [*(column.name.lower() for column in schema.columns), *(name.lower() for name in (names or {}).values() if name)]
        raise DataError(f"{path}: no column 'file' says which image a row is about; {describe_columns(present, known)}")
    sources = find_sources(schema, [name for name in present if name != key], names or {}, str(path))
    if not sources:
        wanted = ", ".join(column.name for column in schema.columns)
        raise DataError(f"{path}: none of the model's clinical columns is there; it takes {wanted}")
    rows = list(read_rows(path, [key]))
    values = read_values([(row, _builtin_cells(cells)) for row, cells in rows], schema, sources, str(path))
    found: dict[str, Values] = {}
    for (row, cells), one in zip(rows, values, strict=True):
        if cells[key].strip() in found:
            raise DataError(f"{path}, row {row}: its file stands in an earlier row too; keep one row an image")
        found[cells[key].strip()] = one
    return found


def values_of(given: Mapping[str, Any] | None, schema: ClinicalConfig) -> Values:
    """Reads one patient's values by name.

    Args:
        given: number, text, bool, a list of codes, or None where one is not known; what is not named is not known.
        schema: of the model bundle.

    Returns:
        float32 [K].

    Raises:
        DataError: a name is no column, or a value does not fit.
    """
    cells = {plain_text(str(name)).lower(): _as_cell(value) for name, value in (given or {}).items()}
    found = find_sources(schema, list(cells), {}, "clinical values")
    unknown = [name for name in cells if name not in {source.name for source in found.values()}]
    if unknown:
        wanted = ", ".join(column.name for column in schema.columns)
        raise DataError(f"clinical values: '{unknown[0]}' is no column of this model; it takes {wanted}")
    return read_values([(0, _builtin_cells(cells))], schema, found, "clinical values")[0]


def describe_values(values: Values, schema: ClinicalConfig) -> dict[str, str]:
    """Words each known value, by column: `temperature 38.6 °C`, `cough yes`, `symptoms fever, chills`.

    Args:
        values: float32 [K], NaN where not known.
        schema: of the bundle.
    """
    found, slot = {}, 0
    for column in schema.columns:
        given = values[slot : slot + column.slots]
        slot += column.slots
        if np.isnan(given).any():
            continue
        if column.kind == "codes":
            word = ", ".join(code for code, there in zip(column.codes, given, strict=True) if there) or "none of the codes"
        else:
            word = ("yes" if given[0] else "no") if column.kind == "binary" else f"{given[0]:g}{column.unit_words}"
        found[column.name] = f"{column.name} {word}"
    return found


def with_stated(values: Values | None, header: StatedInFile, schema: ClinicalConfig) -> Values | None:
    """Adds age, sex and view as a file states them where they are not known; what does not fit there stays not known.

    Args:
        values: float32 [K]; None where none is known.
        header: of the file.
        schema: of the model.

    Returns:
        float32 [K]; None where still none is known.
    """
    age = "" if header.age_years is None else repr(header.age_years)
    stated = _builtin_cells({"age": age, "sex": header.sex, "view": header.view})
    found, slot = np.full(schema.slots, np.nan, dtype=np.float32) if values is None else values.copy(), 0
    for column in schema.columns:
        place = slice(slot, slot + column.slots)
        slot += column.slots
        if column.name not in stated or not np.isnan(found[place]).all():
            continue
        one = schema.model_copy(update={"columns": (column,)})
        with suppress(DataError):
            found[place] = read_values([(0, stated)], one, {column.name: SourceColumn(column.name)}, "the file")[0]
    return None if np.isnan(found).all() else found


def _builtin_cells(cells: Mapping[str, str]) -> dict[str, str]:
    """Ages and sexes as a manifest has them: `063Y` is 63, `female` is F."""
    found = dict(cells)
    if (age := read_age(found.get("age", ""))) is not None:
        found["age"] = repr(age)
    if (sex := read_sex(found.get("sex", ""))) is not None:
        found["sex"] = sex
    return found


def _as_cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    return ";".join(map(str, value)) if isinstance(value, list | tuple | set | frozenset) else str(value)
