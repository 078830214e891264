"""Where the updates of a round wait until it is known which of them count: a few in memory, all others in one file on the disk.

    spool = UpdateSpool(run folder)
    update = spool.keep(update)         the same; beyond the first `IN_MEMORY` its arrays are read from the file when they are asked for

What a strategy gives must be the same bits whatever the order of arrival, and the same as if all updates lay in memory. Both forbid adding
an update up when it arrives: a site's share of the mean is known only once all weights are, floating-point sums depend on their order, and
whether an update counts at all is decided by the median length of the round. So each update is written down as it arrives and read back
one by one, in the order of the sites' names, when the strategy adds: the arithmetic is that of updates in memory, and memory holds one
update at a time, not one a site. Strategies that need all updates for each weight (median, trimmed mean) read them some columns at a time
(`columns`). Krum's distances need all of them at once.

The file has no name: nothing of a hospital's update stays on the disk when the round is over or the process dies. Where the disk is full
the updates stay in memory.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array

from pneumofed.common.files import pass_if_disk_full
from pneumofed.common.wire.fields import array_values, pack_values, shared_record
from pneumofed.common.wire.messages import Update

logger = logging.getLogger(__name__)

IN_MEMORY = 4
"""Updates of a round that stay in memory: a small federation writes none to the disk."""
COLUMN_BYTES = 32 << 20
"""Of the updates of all sites together, how much `columns` gives at once."""


class DerivedArray(Array):
    """An array whose values are made each time they are asked for, so that a list of them costs no memory.

    Args:
        make: gives the values; the same at each call.
        like: an array of the same shape and number type.
    """

    def __init__(self, make: Callable[[], np.ndarray], like: Array) -> None:
        self.dtype, self.shape, self.stype = like.dtype, like.shape, like.stype
        self.make = make

    def numpy(self) -> np.ndarray:
        """Makes the values."""
        return self.make()

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The values as Flower's transport has them."""
        return pack_values(self.make()).data


class SpooledArray(DerivedArray):
    """A vector whose numbers lie in a file, from byte `offset` on."""

    def __init__(self, file: Any, offset: int, values: np.ndarray) -> None:
        self.dtype, self.shape, self.stype = str(values.dtype), tuple(values.shape), "numpy.ndarray"
        self._file, self._offset = file, offset
        self.make = lambda: self.part(0, self.shape[0])

    def part(self, start: int, stop: int) -> np.ndarray:
        """Reads the values from `start` up to `stop`.

        Raises:
            OSError: the file cannot be read.
        """
        values = np.empty(stop - start, self.dtype)
        self._file.seek(self._offset + start * values.itemsize)
        view = memoryview(values.data).cast("B")
        while len(view):
            read = self._file.readinto(view)
            if not read:
                raise OSError("the file of the round's updates has become shorter")
            view = view[read:]
        return values


class UpdateSpool:
    """The updates of one round; those beyond the first few in a file without a name, which goes when the last of them does.

    Args:
        folder: on a disk with room for one update a site; None takes the system's folder for temporary files.
        in_memory: how many updates stay in memory.
    """

    def __init__(self, folder: Path | None, in_memory: int = IN_MEMORY) -> None:
        self._folder, self._free = folder, in_memory
        self._file: Any = None

    def keep(self, update: Update) -> Update:
        """Takes one more update.

        Args:
            update: checked: its arrays are vectors of plain numbers.

        Returns:
            The same update, which may be read from the disk when its arrays are asked for.

        Raises:
            OSError: the file cannot be written for another reason than a full disk.
        """
        values = {name: array_values(array, name) for name, array in update.record.items()}
        if self._free:
            self._free -= 1
            return replace(update, record=shared_record({name: _in_place(update.record[name], values[name]) for name in values}))
        try:
            return replace(update, record=shared_record({name: self._write(values[name]) for name in values}))
        except OSError as error:
            pass_if_disk_full(error, self._folder or Path(tempfile.gettempdir()))
        return update

    def _write(self, values: np.ndarray) -> SpooledArray:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - lives as long as its arrays
        offset = self._file.seek(0, 2)
        view = memoryview(np.ascontiguousarray(values).data).cast("B")
        while len(view):
            view = view[self._file.write(view) :]
        return SpooledArray(self._file, offset, values)


def _in_place(array: Array, values: np.ndarray) -> DerivedArray:
    """The array, whose values are read where they lie: Flower's own reading copies them each time that it adds."""
    return DerivedArray(lambda: values, array)


def columns(arrays: Sequence[Array]) -> Iterator[np.ndarray]:
    """Reads vectors of one length some columns at a time.

    No block has a single column unless the vectors have: NumPy adds a single one pairwise, and several row by row, with other last bits.

    Args:
        arrays: at least one, [D] each.

    Yields:
        [number of arrays, up to all of D], in order; of `COLUMN_BYTES` or less, but for two columns at least.
    """
    length = int(arrays[0].shape[0])
    row = np.dtype(arrays[0].dtype).itemsize * len(arrays)
    blocks = max(1, min(-(-length * row // COLUMN_BYTES), length // 2))
    bounds = [length * number // blocks for number in range(blocks + 1)]
    for start, stop in pairwise(bounds):
        yield np.stack([_part(array, start, stop) for array in arrays])


def _part(array: Array, start: int, stop: int) -> np.ndarray:
    if isinstance(array, SpooledArray):
        return array.part(start, stop)
    values = array.numpy() if isinstance(array, DerivedArray) else array_values(array, "of an update")
    return values[start:stop]
