"""Tables of patients that may leave a hospital without noise: rounded to tens, small cells left out so that nobody can work them out.

    choose_table(counts, stream, earlier)   a table that may leave, beside those that left before; None where there is none
    is_safe, stays_open                     whether it may, from what is told and the numbers of patients only

Cells of fewer than ten patients are left out, zero like nine. Every other count is rounded at random to the ten below or above, unbiased
(random rounding: Hundepool et al. 2012, "Statistical Disclosure Control", chapter 5; after controlled rounding, Cox 1987, JASA 82:520),
and is never exact. Roundings are drawn until they keep each left out cell open, that is, until each number from 0 to 9 is possible in it
for somebody who knows the number of patients exactly and this module; where none does the table is withheld. What is judged are numbers
that this person has anyway, so that the choice tells nothing more (Wong et al. 2007, "Minimality attack in privacy preserving data
publishing"): each table of counts that fits what was told might have led to it.

Of two answers about the same field the same holds, for who knows too that patients only joined in between, or only left.
What it does not hold against: three answers taken together, as of evaluations, and knowledge of how two fields of the patients hang
together (that all women have a frontal view would round one number twice). Noise does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pneumofed.common.privacy.randomness import RandomStream
from pneumofed.common.wire.survey import SMALL_CELL

TRIES = 256
"""Roundings that are drawn at most."""
LEAST_CHANGE = 20
"""Two answers are about the same patients, or about sets that differ by as many at least."""
_LARGEST = SMALL_CELL - 1
Range = tuple[int, int]
"""Smallest and largest number of patients that a cell may hold."""


@dataclass(frozen=True)
class ToldTable:
    """What was told of one field, with the number of patients that it is about, which others may know.

    Attributes:
        patients: in all cells.
        cells: of the table, in order.
        shown: cell -> a multiple of ten, 10 at least; the other cells are hidden.
    """

    patients: int
    cells: tuple[str, ...]
    shown: Mapping[str, int]

    @property
    def hidden(self) -> list[str]:
        return [cell for cell in self.cells if cell not in self.shown]

    def possible(self, cell: str) -> Range:
        """The patients that `cell` may hold by what was told of it."""
        if cell not in self.shown:
            return 0, _LARGEST
        return max(SMALL_CELL, self.shown[cell] - _LARGEST), self.shown[cell] + _LARGEST


def choose_table(counts: Mapping[str, int], stream: RandomStream, earlier: Sequence[ToldTable] = ()) -> ToldTable | None:
    """Makes a table that may leave.

    Law: whoever knows the sum of all cells, one of `earlier` and this function finds every number from 0 to 9 possible in each hidden
    cell.

    Args:
        counts: patients of each cell, those of none too.
        stream: of this table only.
        earlier: what was told of the same field before.

    Returns:
        None where nothing can be told.
    """
    shown = {cell: patients for cell, patients in counts.items() if patients >= SMALL_CELL}
    for _ in range(TRIES):
        up = stream.uniform(len(shown)) < [(count % SMALL_CELL) / SMALL_CELL for count in shown.values()]
        rounded = {
            cell: SMALL_CELL * (count // SMALL_CELL + int(raised))
            for (cell, count), raised in zip(shown.items(), up, strict=True)
        }
        table = ToldTable(sum(counts.values()), tuple(counts), rounded)
        if is_safe(table) and all(stays_open(table, before) for before in earlier):
            return table
    return None


def is_safe(table: ToldTable) -> bool:
    """Whether each hidden cell may hold any number from 0 to 9 by what is told in `table`; one without any count tells nothing."""
    if not table.shown:
        return False
    ranges = [table.possible(cell) for cell in table.cells]
    low, high = sum(least for least, _ in ranges), sum(most for _, most in ranges)
    # A hidden cell may hold x if the others can hold the rest; the ends decide, since all numbers between are sums too.
    return not table.hidden or (low + _LARGEST <= table.patients <= high - _LARGEST)


def stays_open(one: ToldTable, other: ToldTable) -> bool:
    """Whether each hidden cell of both tables may hold any number from 0 to 9, for who knows that patients only joined between the
    two, or only left.

    Where the tables contradict that, or differ by fewer than `LEAST_CHANGE` patients, nobody can know it, and each is judged by itself.

    Args:
        one: of a field.
        other: of the same field.
    """
    before, after = sorted((one, other), key=lambda table: table.patients)
    if after.patients - before.patients < LEAST_CHANGE:
        return True
    ranges = {cell: (before.possible(cell), after.possible(cell)) for cell in before.cells}
    totals = before.patients, after.patients
    if not _may_grow(list(ranges.values()), totals):
        return True
    for cell in {*before.hidden, *after.hidden}:
        small, large = ranges[cell]
        others = [both for name, both in ranges.items() if name != cell]
        for number in range(SMALL_CELL):
            fixed = [((number, number), large)] * (cell in before.hidden) + [(small, (number, number))] * (cell in after.hidden)
            if not all(_may_grow([*others, both], totals) for both in fixed):
                return False
    return True


def _may_grow(ranges: Sequence[tuple[Range, Range]], totals: tuple[int, int]) -> bool:
    """Whether there are whole numbers x <= y in the two ranges of each cell whose sums are `totals`.

    The pairs of a cell are the points of a polygon whose edges run along (1, 0), (0, 1) and (1, 1). Any two of these directions have
    determinant 1 or -1, so that the sums of points are all the whole points of the sum of the polygons, whose edges run along them too:
    the smallest and largest x, y and x - y, each summed over the cells, decide.
    """
    least, most = [0, 0, 0], [0, 0, 0]
    for (small, large), (least_after, most_after) in ranges:
        high, low = min(large, most_after), max(small, least_after)  # of x, and of y
        if small > high or low > most_after:
            return False
        ends = (small, high), (low, most_after), (small - most_after, min(0, large - least_after))
        for axis, (start, end) in enumerate(ends):
            least[axis] += start
            most[axis] += end
    values = (*totals, totals[0] - totals[1])
    return all(start <= value <= end for start, value, end in zip(least, values, most, strict=True))
