"""Draws `docs/images/architecture.png` from the code and writes what it shows to `architecture.json` beside it.

    .venv/bin/python docs/draw_architecture.py

An arrow is the number of pairs (module, module of ours that it imports) between two houses, from the import statements, function-level
ones included. A folder's colour says how many of its modules are in the app bundle: the code that a hospital approves by its hash.
`tests/test_architecture_picture.py` fails where the picture or `docs/architecture.md` no longer match the code.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pneumofed.common.ops.app_bundle import APPS, import_closure, imported_modules

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.png"
FACTS = PICTURE.with_suffix(".json")
HOUSES = {
    "pneumofed": "the Python API and the root of the command line",
    "server": "the coordinator",
    "simulation": "N virtual hospitals\non one machine",
    "client": "a hospital\nin the federation",
    "inference": "what a hospital does\nwith a finished model",
    "common": "what all sides must agree on; imports no other house",
}
OWN_FILES = "."
"""The folder of a house's own files, e.g. `client/app.py`."""

Box = tuple[float, float, float, float]
"""left, bottom, width, height."""
COLUMNS: dict[str, Box] = {
    "pneumofed": (0.3, 9.35, 12.9, 0.95),
    "server": (0.3, 2.75, 2.5, 5.6),
    "simulation": (3.6, 2.75, 2.5, 5.6),
    "client": (6.9, 2.75, 2.5, 5.6),
    "inference": (10.2, 2.75, 2.5, 5.6),
    "common": (0.3, 0.5, 12.9, 1.45),
}
ROUTES: dict[tuple[str, str], tuple[tuple[float, float], tuple[float, float]]] = {
    ("pneumofed", "server"): ((1.55, 9.35), (1.55, 8.35)),
    ("pneumofed", "simulation"): ((4.85, 9.35), (4.85, 8.35)),
    ("pneumofed", "client"): ((8.15, 9.35), (8.15, 8.35)),
    ("pneumofed", "inference"): ((11.45, 9.35), (11.45, 8.35)),
    ("pneumofed", "common"): ((12.85, 9.35), (12.85, 1.95)),
    ("simulation", "server"): ((3.6, 5.6), (2.8, 5.6)),
    ("simulation", "client"): ((6.1, 5.6), (6.9, 5.6)),
    ("inference", "client"): ((10.2, 3.6), (9.4, 3.6)),
    ("server", "common"): ((1.55, 2.75), (1.55, 1.95)),
    ("simulation", "common"): ((4.85, 2.75), (4.85, 1.95)),
    ("client", "common"): ((8.15, 2.75), (8.15, 1.95)),
    ("inference", "common"): ((11.45, 2.75), (11.45, 1.95)),
}
"""From where to where each arrow goes; an import between two houses that is not here needs a place in the picture first."""
INK, GREY = "#1f2933", "#7b8794"
COLOURS = {"whole": "#2f6f9f", "part": "#a9cbe3", "none": "#ffffff"}
MEANING = {"whole": "in the app bundle as a whole", "part": "in part", "none": "not in it"}


def modules() -> dict[str, tuple[str, str]]:
    """(house, folder) of each of our modules by its name; packages without code of their own are left out."""
    found = {}
    for house in HOUSES:
        for path in sorted((ROOT / house).rglob("*.py")):
            parts = path.relative_to(ROOT / house).parts
            if path.name == "__init__.py" and path.parent != ROOT / "pneumofed":
                continue
            if any((ROOT / house).joinpath(*parts[:depth]).is_symlink() for depth in range(1, len(parts))):
                continue  # the houses below pneumofed/
            name = ".".join((() if house == "pneumofed" else (house,)) + path.relative_to(ROOT / house).with_suffix("").parts)
            name = "pneumofed" if name == "__init__" else f"pneumofed.{name}"
            found[name] = house, parts[0] if len(parts) > 1 else OWN_FILES
    return found


def read_facts() -> dict[str, Any]:
    """What the picture shows, from the code: each house's folders with their share of the app bundle, and the imports between houses."""
    places = modules()
    bundle = import_closure(*APPS.values()) - {"pneumofed"}  # the bundle has an empty one of its own
    folders: dict[str, dict[str, str]] = {house: {} for house in HOUSES}
    for house, folder in sorted(set(places.values())):
        shares = {name in bundle for name, place in places.items() if place == (house, folder)}
        folders[house][folder] = "part" if len(shares) > 1 else "whole" if shares == {True} else "none"
    arrows = Counter(
        (places[name][0], places[other][0])
        for name in places
        for other in imported_modules(name)
        if other in places and places[other][0] != places[name][0]
    )
    imports = {f"{importer} -> {imported}": count for (importer, imported), count in sorted(arrows.items())}
    return {"folders": folders, "imports": imports}


def draw(facts: dict[str, Any], path: Path) -> None:
    """Draws `facts`, as `read_facts` gives them, as PNG at `path`, with the facts in its metadata.

    Raises:
        KeyError: there is an import between two houses that has no place in `ROUTES`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 10.6))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, 13.5), ylim=(0, 10.6))
    axes.set_axis_off()
    for name, count in facts["imports"].items():
        _draw_arrow(axes, *ROUTES[tuple(name.split(" -> "))], count)
    for house, box in COLUMNS.items():
        _draw_house(axes, house, box, facts["folders"][house])
    for number, (share, meaning) in enumerate(MEANING.items()):
        left = 0.3 + (0.0, 3.1, 4.3)[number]
        _draw_box(axes, (left, 0.1, 0.3, 0.2), COLOURS[share], GREY)
        axes.text(left + 0.4, 0.2, meaning, va="center", fontsize=10, color=INK)
    axes.text(13.2, 0.2, "arrow: who imports whom, with the number of imports", va="center", ha="right", fontsize=10, color=INK)
    figure.savefig(path, dpi=110, metadata={"Software": None, "Description": json.dumps(facts)})


def _draw_house(axes: Any, house: str, box: Box, folders: dict[str, str]) -> None:
    """A house with its name, what it is, and a box for each of its folders: in a row where it is wide, else below each other."""
    left, bottom, width, height = box
    _draw_box(axes, box, "#f4f6f8", INK)
    wide = width > height
    axes.text(left + 0.12, bottom + height - 0.24, f"{house}/", va="center", fontsize=14, weight="bold", color=INK)
    place = (left + 1.75, bottom + height - 0.25) if wide else (left + 0.12, bottom + height - 0.7)
    axes.text(*place, HOUSES[house], va="center", fontsize=10.5, color=INK, linespacing=1.2)
    step, across = 0.405 if wide else min(0.405, (height - 1.15) / len(folders)), 2.125
    tall = 0.815 * step  # all of a house's folders lie in it
    for number, (folder, share) in enumerate(sorted(folders.items())):
        if wide:
            row, column = divmod(number, 6)
            inner = (left + 0.12 + column * across, bottom + height - 0.83 - row * step, across - 0.1, tall)
        else:
            inner = (left + 0.12, bottom + height - 1.05 - tall - number * step, width - 0.24, tall)
        _draw_box(axes, inner, COLOURS[share], GREY)
        colour = "white" if share == "whole" else INK
        text = _own_files(house) if folder == OWN_FILES else folder
        axes.text(inner[0] + 0.1, inner[1] + 0.47 * tall, text, va="center", fontsize=10.5, color=colour)


def _own_files(house: str) -> str:
    """The names of a house's own files where they are few, else a word for them."""
    names = sorted(path.name for path in (ROOT / house).glob("*.py") if path.name != "__init__.py")
    return names[0] if len(names) == 1 else "(its own files)"


def _draw_box(axes: Any, box: Box, fill: str, edge: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, bottom, width, height = box
    axes.add_patch(
        FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.06", fc=fill, ec=edge, lw=1.0)
    )


def _draw_arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], count: int) -> None:
    """An arrow from the importing house to the imported one, broader for more imports, with their number beside it."""
    style = f"-|>,head_width={0.25 + count / 900},head_length=0.5"
    axes.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={"arrowstyle": style, "lw": 1.2 + count / 45, "color": GREY, "shrinkA": 3, "shrinkB": 0, "mutation_scale": 22},
    )
    upright = start[0] == end[0]
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    if upright:
        y = start[1] - 0.45  # near its beginning, since a long one passes houses
    place = (x + 0.16, y) if upright else (x, y + 0.22)
    axes.text(*place, str(count), va="center", ha="left" if upright else "center", fontsize=11, color=INK)


def main() -> None:
    """Draws the picture and writes its facts."""
    facts = read_facts()
    draw(facts, PICTURE)
    FACTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
