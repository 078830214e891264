"""Where a map lies: its place on the picture, the lungs, the marks, and what the reader is told."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pneumofed.common.imaging.images import fit_square
from pneumofed.common.seeds import numpy_generator
from pneumofed.inference.explain.focus import LungField, Misplaced, find_lungs, find_markers, judge_focus
from pneumofed.inference.explain.pictures import place_on_image
from pneumofed.simulation.phantoms import image
from pneumofed.simulation.phantoms.anatomy import ADULT_RANGES, CHILD_RANGES, draw_anatomy
from pneumofed.simulation.phantoms.image import burn_in, draw_lungs, draw_opacity, draw_phantom, draw_text
from pneumofed.simulation.phantoms.phantom import LABEL_SHARES

SHAPES = st.tuples(st.integers(40, 90), st.integers(40, 90))


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.sampled_from(["pad", "crop"]))
def test_a_map_lies_on_the_picture_where_the_network_saw_it(shape: tuple[int, int], fit: Literal["pad", "crop"]) -> None:
    """A smooth picture fitted into the square and placed back is itself, where the network has seen it."""
    rows, columns = np.indices(shape)
    smooth = (0.25 + 0.5 * (rows / shape[0] + columns / shape[1]) / 2).astype(np.float32)
    placed = place_on_image(fit_square(smooth, 64, fit), shape, fit)
    seen = placed > 0
    assert placed.shape == shape
    assert seen.sum() == (min(shape) ** 2 if fit == "crop" else smooth.size)
    inner = np.s_[3:-3, 3:-3]
    assert np.abs(placed - smooth)[inner][seen[inner]].max() < 0.04


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def test_the_lungs_of_phantoms_are_found() -> None:
    """Six of both builds and all labels. Their lungs are plainer than real ones, and of the same family of shapes as the one fitted."""
    found = []
    for number in range(6):
        anatomy = draw_anatomy(ADULT_RANGES if number % 2 else CHILD_RANGES, numpy_generator("lungs", number))
        label = list(LABEL_SHARES)[number % len(LABEL_SHARES)]
        pixels = draw_phantom(anatomy, label, 128, numpy_generator("exposure", number))
        truth = draw_lungs(anatomy, 128, numpy_generator("exposure", number)) > 0.5
        estimate = find_lungs(pixels)
        assert estimate.lungs.shape == pixels.shape
        found.append(dice(estimate.lungs, truth) if estimate.found else 0.0)
    assert np.median(found) > 0.8 and min(found) > 0.5


@pytest.mark.parametrize("label", ["bacterial", "viral"])
def test_the_opacity_of_a_phantom_is_the_one_that_is_in_its_picture(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy, kept = draw_anatomy(CHILD_RANGES, numpy_generator("opacity", label)), []
    drawn = image._opacity

    def keep(*arguments: Any) -> np.ndarray:
        kept.append(drawn(*arguments))
        return kept[-1]

    monkeypatch.setattr(image, "_opacity", keep)
    draw_phantom(anatomy, label, 96, numpy_generator("at", label))
    found = draw_opacity(anatomy, label, 96, numpy_generator("at", label))
    np.testing.assert_array_equal(kept[0], kept[1])
    assert found.max() > 0.05 and (found <= kept[0]).all()
    lungs = draw_lungs(anatomy, 96, numpy_generator("at", label))
    assert (found[lungs == 0] == 0).all()


def test_lungs_are_not_found_where_there_are_none() -> None:
    rows, _ = np.indices((96, 80))
    assert not find_lungs((0.2 + rows / 200).astype(np.float32)).found


def test_marks_of_phantoms_are_found_and_little_else() -> None:
    """The word PHANTOM in the lower left corner and the letter R near the upper left, in each of six."""
    for number in range(6):
        pixels = burn_in(
            draw_phantom(
                draw_anatomy(CHILD_RANGES, numpy_generator("marks", number)), "normal", 224, numpy_generator("at", number)
            )
        )
        marks, word = find_markers(pixels), draw_text("PHANTOM", round(max(pixels.shape) / 18)).shape
        assert marks.shape == pixels.shape
        assert marks[-word[0] :, : word[1]].mean() > 0.5
        assert marks[:, pixels.shape[1] // 4 :].mean() < 0.12
        assert marks[: -word[0]][:, : pixels.shape[1] // 6].any()


def test_a_picture_without_marks_has_none() -> None:
    rows, columns = np.indices((200, 200))
    soft = 0.5 + 0.4 * np.sin(rows / 9) * np.cos(columns / 11)
    assert not find_markers(soft.astype(np.float32)).any()


def half(found: bool = True) -> LungField:
    """The lungs are the left half."""
    lungs = np.zeros((40, 40), bool)
    lungs[:, :20] = True
    return LungField(lungs, 1.0 if found else 0.0)


FINE = 20
NOWHERE = np.zeros((40, 40), bool)


def spot(row: int, column: int) -> np.ndarray:
    values = np.zeros((40, 40), np.float32)
    values[row - 2 : row + 2, column - 2 : column + 2] = 1.0
    return values


def test_weight_outside_the_lungs_is_told() -> None:
    assert judge_focus(spot(20, 35), half(), NOWHERE, 2, cells=FINE).warnings == (Misplaced.OUTSIDE,)
    inside = judge_focus(spot(20, 10), half(), NOWHERE, 2, cells=FINE)
    assert inside.warnings == () and inside.outside == 0.0 and inside.outside_area == pytest.approx(0.45)


def test_the_margin_is_not_held_against_a_coarse_map() -> None:
    assert judge_focus(spot(20, 23), half(), NOWHERE, 6, cells=FINE).outside == 0.0
    assert judge_focus(spot(20, 23), half(), NOWHERE, 0, cells=FINE).outside == 1.0


def test_a_map_of_few_cells_claims_nothing_of_its_place_but_its_shares_are_true() -> None:
    marks = spot(5, 35) > 0
    for cells in (4, 6.9, 7):
        found = judge_focus(spot(5, 35) + spot(20, 10), half(), marks, 5, cells=cells)
        assert (found.warnings == (Misplaced.TOO_COARSE,)) == (cells < 7)
        assert (found.beyond_lungs, found.beyond_lungs_area) == (0.5, 0.5), "of the lungs themselves, whatever the margin"
    assert judge_focus(spot(5, 35), half(), marks, 3, cells=7).warnings == (Misplaced.OUTSIDE, Misplaced.MARKS)
    assert judge_focus(-spot(5, 35), half(), marks, 3, cells=4).warnings == (Misplaced.EMPTY,)


def test_a_coarse_map_must_do_better_than_chance() -> None:
    """With its margin only a fifth of the picture is outside: a third of the weight there is too much."""
    values = spot(20, 10)
    values[18:22, 37:39] = 1.0
    found = judge_focus(values, half(), NOWHERE, 12.5, cells=FINE)
    assert found.outside == pytest.approx(1 / 3) and found.outside_area == pytest.approx(0.2)
    assert found.warnings == (Misplaced.OUTSIDE,)


def test_weight_on_marks_is_told() -> None:
    marks = spot(5, 5) > 0
    assert Misplaced.MARKS in judge_focus(spot(5, 5), half(), marks, 1, cells=FINE).warnings
    assert judge_focus(spot(30, 10), half(), marks, 1, cells=FINE).warnings == ()


def test_without_lungs_or_weight_nothing_is_claimed() -> None:
    lost = judge_focus(spot(20, 35), half(found=False), NOWHERE, 2, cells=FINE)
    assert lost.warnings == (Misplaced.NO_LUNGS,) and np.isnan(lost.outside)
    assert judge_focus(-spot(20, 10), half(), NOWHERE, 2, cells=FINE).warnings == (Misplaced.EMPTY,)
