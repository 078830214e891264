"""How good outlines of lungs are: on phantoms, whose lungs are known, and as contact sheets of real images to look at.

    python -m benchmarks.lung_outlines --phantoms 60
    python -m benchmarks.lung_outlines --source children=chest_xray --source adults=nih_chest_xray14 --out runs/outlines

An outline is usable by the rule of `inference.explain.covers.is_usable`. The sheets show patients: keep them where the images may be.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from scipy.ndimage import binary_erosion

from pneumofed.common.data.manifest import ImageRecord
from pneumofed.common.imaging.images import fit_square, read_image
from pneumofed.common.seeds import numpy_generator
from pneumofed.inference.explain.covers import is_usable
from pneumofed.inference.explain.focus import find_lungs, find_markers
from pneumofed.simulation.hospitals.sources import read_source
from pneumofed.simulation.phantoms.anatomy import ADULT_RANGES, CHILD_RANGES, draw_anatomy
from pneumofed.simulation.phantoms.image import burn_in, draw_lungs, draw_phantom
from pneumofed.simulation.phantoms.phantom import LABEL_SHARES

SHEET, COLUMNS, TILE_PX = 40, 10, 150
PHANTOM_PX = 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phantoms", type=int, default=60, help="whose outlines are measured")
    parser.add_argument("--source", type=named_source, action="append", default=[], metavar="NAME=SOURCE", help="may repeat")
    parser.add_argument("--out", type=Path, help="folder of the sheets, one for each source")
    parser.add_argument("--seed", type=int, default=0, help="of the images on the sheets")
    options = parser.parse_args()
    if options.source and options.out is None:
        parser.error("--source: where do the sheets go? Give --out")
    print(outlines_of_phantoms(options.phantoms), flush=True)
    for name, place in options.source:
        options.out.mkdir(parents=True, exist_ok=True)
        sheet, unusable, shown = draw_sheet(read_source(place).manifest.records, options.seed)
        sheet.save(options.out / f"outlines-{name}.png")
        print(f"{name}: {unusable} of {shown} images without a usable outline", flush=True)


def outlines_of_phantoms(number: int) -> str:
    """The intersection over union of found and drawn lungs of so many phantoms, of both builds and all labels in turn."""
    found, unusable = [], 0
    for index in range(number):
        anatomy = draw_anatomy(ADULT_RANGES if index % 2 else CHILD_RANGES, numpy_generator("covered lungs", index))
        label, at = list(LABEL_SHARES)[index % len(LABEL_SHARES)], ("covered lungs, exposure", index)
        lungs = find_lungs(burn_in(draw_phantom(anatomy, label, PHANTOM_PX, numpy_generator(*at))))
        truth = draw_lungs(anatomy, PHANTOM_PX, numpy_generator(*at)) > 0.5
        found.append((lungs.lungs & truth).sum() / (lungs.lungs | truth).sum())
        unusable += not is_usable(lungs)
    low, middle = np.quantile(found, [0.1, 0.5])
    return (
        f"outlines of {number} phantoms: IoU {middle:.2f} in the median, {low:.2f} at the tenth percentile, {min(found):.2f} for the "
        f"worst; {unusable} unusable"
    )


def draw_sheet(records: Sequence[ImageRecord], seed: int) -> tuple[PIL.Image.Image, int, int]:
    """Forty images with their outline, green where it is usable and red where not, and marks in yellow; how many are red, of how many."""
    tiles, unusable = [], 0
    for row in numpy_generator("sheet", seed).permutation(len(records))[:SHEET]:
        pixels = read_image(records[row].path).pixels
        lungs, marks = find_lungs(pixels), find_markers(pixels)
        unusable += not is_usable(lungs)
        tile = np.repeat(fit_square(pixels, TILE_PX, "pad")[..., None], 3, axis=2)
        for place, colour in ((lungs.lungs, (0, 1, 0) if is_usable(lungs) else (1, 0, 0)), (marks, (1, 1, 0))):
            square = fit_square(place.astype(np.float32), TILE_PX, "pad") > 0.5
            tile[square & ~binary_erosion(square)] = colour
        tiles.append(tile)
    shown = len(tiles)
    tiles += [np.zeros((TILE_PX, TILE_PX, 3), np.float32)] * (-shown % COLUMNS)
    rows = [np.concatenate(tiles[start : start + COLUMNS], axis=1) for start in range(0, len(tiles), COLUMNS)]
    return PIL.Image.fromarray(np.rint(np.concatenate(rows) * 255).astype(np.uint8)), unusable, shown


def named_source(text: str) -> tuple[str, Path]:
    """Name and place of `NAME=SOURCE`; refused before the long work begins."""
    name, _, place = text.partition("=")
    if not name or not place or not Path(place).exists():
        raise argparse.ArgumentTypeError(f"expected NAME=SOURCE with a source that exists, got {text!r}")
    return name, Path(place)


if __name__ == "__main__":
    main()
