"""Covers: what they blacken, what they leave, and that lungs of phantoms lie where a cover takes them to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pneumofed.common.seeds import numpy_generator
from pneumofed.inference.explain.covers import COVERS, LUNG_MARGIN, Cover, apply_cover, find_place, is_usable
from pneumofed.inference.explain.focus import LungField, find_lungs, find_markers
from pneumofed.simulation.phantoms.anatomy import CHILD_RANGES, draw_anatomy
from pneumofed.simulation.phantoms.image import burn_in, draw_lungs, draw_phantom

SEEDS = st.integers(0, 2**31)
PLACED: tuple[Cover, ...] = tuple(cover for cover in COVERS if cover != "outline")
quick = settings(max_examples=30, deadline=None)


def picture(seed: int) -> tuple[np.ndarray, NDArray[np.bool_], NDArray[np.bool_]]:
    """Grey without black, two boxes for lungs, and scattered marks."""
    generator = np.random.default_rng(seed)
    height, width = generator.integers(40, 90, 2)
    lungs = np.zeros((height, width), np.bool_)
    top, bottom = generator.integers(4, height // 3), generator.integers(height // 2, height - 4)
    lungs[top:bottom, width // 6 : width // 3] = lungs[top:bottom, width // 2 : width - width // 5] = True
    return generator.uniform(0.1, 1.0, (height, width)).astype(np.float32), lungs, generator.random((height, width)) < 0.1


@quick
@given(SEEDS, st.sampled_from(PLACED))
def test_a_cover_blackens_its_place_and_leaves_every_other_pixel(seed: int, cover: Cover) -> None:
    pixels, lungs, marks = picture(seed)
    before, place = pixels.copy(), find_place(cover, lungs, marks)
    covered = apply_cover(cover, pixels, place)
    assert (covered[place] == 0).all() and np.array_equal(covered[~place], pixels[~place])
    assert covered.dtype == pixels.dtype and np.array_equal(pixels, before)
    assert np.array_equal(apply_cover(cover, covered, place), covered)


@quick
@given(SEEDS)
def test_the_lungs_are_wholly_left_or_wholly_covered(seed: int) -> None:
    pixels, lungs, marks = picture(seed)
    assert np.array_equal(find_place("only_lungs", lungs, marks), ~lungs)
    grown, box = find_place("lungs", lungs, marks), find_place("lung_box", lungs, marks)
    assert grown[lungs].all() and box[grown].all() and not find_place("none", lungs, marks).any()
    rows, columns = np.nonzero(grown)
    assert box.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    far = LUNG_MARGIN * max(pixels.shape)
    inside = np.argwhere(lungs)
    for row, column in np.argwhere(grown & ~lungs)[::37]:
        assert np.hypot(*(inside - (row, column)).T).min() <= far


@quick
@given(SEEDS)
def test_borders_and_markers_lie_along_the_edges_and_markers_outside_the_lungs(seed: int) -> None:
    pixels, lungs, marks = picture(seed)
    height, width = pixels.shape
    row, column = np.indices(pixels.shape)
    edge = np.minimum(np.minimum(row, height - 1 - row) / height, np.minimum(column, width - 1 - column) / width)
    borders, markers = find_place("borders", lungs, marks), find_place("markers", lungs, marks)
    assert borders[0].all() and borders[:, -1].all() and edge[borders].max() < 0.12 and edge[~borders].min() > 0.08
    assert not (markers & lungs).any() and not (markers & ~marks).any()
    assert markers[marks & ~lungs & (edge < 0.22)].all() and not markers[edge > 0.28].any()


@quick
@given(SEEDS)
def test_the_outline_tells_nothing_but_its_shape(seed: int) -> None:
    pixels, lungs, marks = picture(seed)
    place = find_place("outline", lungs, marks)
    shape = apply_cover("outline", pixels, place)
    assert np.array_equal(shape, lungs.astype(np.float32))
    assert np.array_equal(apply_cover("outline", (pixels * 255).astype(np.uint8), place), np.where(lungs, 255, 0))


def test_covers_of_a_phantom_leave_or_take_its_lungs_and_its_word() -> None:
    kept, left, written = [], [], []
    for number in range(4):
        anatomy = draw_anatomy(CHILD_RANGES, numpy_generator("covers", number))
        plain = draw_phantom(anatomy, "normal", 160, numpy_generator("at", number))
        pixels = burn_in(plain)
        truth = draw_lungs(anatomy, 160, numpy_generator("at", number)) > 0.5
        lungs, marks = find_lungs(pixels), find_markers(pixels)
        assert is_usable(lungs)
        kept.append((~find_place("only_lungs", lungs.lungs, marks))[truth].mean())
        left.append((~find_place("lungs", lungs.lungs, marks))[truth].mean())
        written.append(find_place("markers", lungs.lungs, marks)[pixels - plain > 0.3].mean())
    assert min(kept) > 0.5 and max(left) < 0.12 and min(written) > 0.8  # the outline is rather too small; docs/explanations.md


@pytest.mark.parametrize(
    ("share", "contrast", "usable"), [(0.2, 0.2, True), (0.2, 0.1, False), (0.5, 0.2, False), (0.05, 0.2, False)]
)
def test_an_outline_is_usable_by_contrast_and_size(share: float, contrast: float, usable: bool) -> None:
    lungs = np.zeros((100, 100), np.bool_)
    lungs[: round(100 * share)] = True
    assert is_usable(LungField(lungs, contrast)) is usable
