"""The pictures of a case for the viewer: the image through a window, its pixels, and the heat map in colour; of a CT series each of one
slice, so that the page asks for what it shows and the server holds one slice at a time.

They are made in threads, a few at a time, since each may take the memory of a large image.
"""

from __future__ import annotations

import asyncio
import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import PIL.Image
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse

from pneumofed.common.imaging.types import MAX_SIDE_PX, Window
from pneumofed.inference.reading_room import schema
from pneumofed.inference.reading_room.cases import Case
from pneumofed.inference.reading_room.errors import Refusal
from pneumofed.inference.reading_room.image_facts import SeriesFacts, stored_facts
from pneumofed.inference.reading_room.room import Room
from pneumofed.inference.reading_room.routes import CaseInPath, ReaderNow, RoomNow, find_case
from pneumofed.inference.reading_room.series import map_at, read_slice
from pneumofed.inference.reading_room.viewing import FULL_SCALE, MAP_FILE, PIXELS_FILE
from pneumofed.inference.reading_room.views import view_map

image_routes = APIRouter(prefix="/api/cases", tags=["pictures"])

MaxSide = Annotated[int, Query(ge=64, le=MAX_SIDE_PX, description="Scale down to so many pixels on the longer side.")]
Center = Annotated[float | None, Query(ge=-10, le=10, allow_inf_nan=False)]
Width = Annotated[float | None, Query(ge=1e-6, le=20, allow_inf_nan=False)]
SliceNumber = Annotated[
    int | None,
    Query(
        alias="slice",
        ge=1,
        le=100_000,
        description="Of a CT series, from 1 at the feet; without it the middle one, where a reader begins.",
    ),
]
BINARY_TYPE = "application/octet-stream"
_PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}}
_RAW: dict[int | str, dict[str, Any]] = {200: {"content": {BINARY_TYPE: {"schema": {"type": "string", "format": "binary"}}}}}

MAP_SIDE_PX = 512
MAP_MAX_ALPHA = 220
MAP_COLOURS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]], np.float64)
"""Five colours of matplotlib's `inferno`, whose lightness grows evenly, so that it is read rightly in grey and by the colour-blind."""


class _Stored(FileResponse):
    """A file of several megabytes in a few pieces; each piece waits for a thread."""

    chunk_size = 2**20


def _found(case: CaseInPath, reader: ReaderNow, room: RoomNow) -> Case:
    return find_case(room, case)


def _found_with_map(case: Annotated[Case, Depends(_found)]) -> Case:
    if not case.has_map:
        raise Refusal(404, "no_map")
    return case


@dataclass(frozen=True)
class ShownSlice:
    """A slice that is asked for: its series and its place in it, from 0."""

    series: SeriesFacts
    place: int


def _slice(case: Annotated[Case, Depends(_found)], room: RoomNow, number: SliceNumber = None) -> ShownSlice | None:
    """The slice of a series that is asked for; None of a radiograph.

    Raises:
        Refusal: there is no such slice, or there are none.
    """
    series = stored_facts(room.store.path(case.id)).series
    if series is None and number is None:
        return None
    wanted = number or (series and (series.slices + 1) // 2) or 0
    if series is None or not 1 <= wanted <= series.slices:
        raise Refusal(404, "no_slice")
    return ShownSlice(series, wanted - 1)


SliceNow = Annotated[ShownSlice | None, Depends(_slice)]
FoundCase = Annotated[Case, Depends(_found)]
CaseWithMap = Annotated[Case, Depends(_found_with_map)]


@image_routes.get("/{case}/image.png", response_class=Response, responses=_PNG)
async def image(
    case: FoundCase,
    room: RoomNow,
    shown: SliceNow,
    center: Center = None,
    width: Width = None,
    invert: bool = False,
    max_side: MaxSide = MAX_SIDE_PX,
) -> Response:
    """The image in 8 bits of grey through a window, by default the file's own."""
    window = Window(case.window_center if center is None else center, case.window_width if width is None else width)

    def draw() -> bytes:
        return render_image(_pixels(room, case, shown), window, invert=invert, max_side=max_side)

    async with room.rendering:
        return Response(await asyncio.to_thread(draw), media_type="image/png")


@image_routes.get("/{case}/pixels", response_class=Response, responses=_RAW)
async def pixels(case: FoundCase, request: Request, room: RoomNow, shown: SliceNow, max_side: MaxSide = MAX_SIDE_PX) -> Response:
    """uint16, little endian, row by row; X-Image-Width and X-Image-Height tell the shape."""
    zipped = "gzip" in request.headers.get("accept-encoding", "")
    if shown is not None:
        async with room.rendering:
            return await asyncio.to_thread(lambda: _send_slice(shrink(_pixels(room, case, shown), max_side), zipped))
    if max_side >= max(case.height, case.width) and zipped:
        headers = {"Content-Encoding": "gzip", **_shape(case.height, case.width)}  # as they lie on the disk
        return _Stored(room.store.path(case.id) / PIXELS_FILE, media_type=BINARY_TYPE, headers=headers)
    async with room.rendering:
        values = await asyncio.to_thread(lambda: shrink(_pixels(room, case, None), max_side))
        return Response(values.tobytes(), media_type=BINARY_TYPE, headers=_shape(*values.shape))


@image_routes.get("/{case}/map")
def heat_map(case: CaseWithMap, room: RoomNow, shown: SliceNow) -> schema.HeatMap:
    """Where the evidence lies, as numbers, and whether that is a place for it; of a series in one slice."""
    return view_map(_map(room, case, shown), case.map_area, case.map_warnings)


@image_routes.get("/{case}/map.png", response_class=Response, responses=_PNG)
def heat_map_picture(case: CaseWithMap, room: RoomNow, shown: SliceNow) -> Response:
    """Where the evidence lies, in colour, to be laid over the image."""
    return Response(render_map(_map(room, case, shown), case.map_area, case.height, case.width), media_type="image/png")


def _pixels(room: Room, case: Case, shown: ShownSlice | None) -> np.ndarray:
    folder = room.store.path(case.id)
    if shown is None:
        return read_pixels(folder, case.height, case.width)
    return read_slice(folder, shown.place, case.height, case.width)


def _map(room: Room, case: Case, shown: ShownSlice | None) -> np.ndarray:
    values = read_map(room.store.path(case.id))
    return values if shown is None else map_at(values, shown.series.map_span, shown.place, shown.series.slices)


def _send_slice(values: np.ndarray, zipped: bool) -> Response:
    """A slice, packed if the other side unpacks it: half the bytes for 20 ms."""
    data, headers = values.tobytes(), _shape(*values.shape)
    if zipped:
        data, headers = gzip.compress(data, 1, mtime=0), {**headers, "Content-Encoding": "gzip"}
    return Response(data, media_type=BINARY_TYPE, headers=headers)


def _shape(height: int, width: int) -> dict[str, str]:
    return {"X-Image-Width": str(width), "X-Image-Height": str(height)}


def read_pixels(folder: Path, height: int, width: int) -> np.ndarray:
    """Reads the pixels of a case, uint16 [height, width].

    Args:
        folder: of the case in the store.
        height: of the image, as the database has it.
        width: likewise.

    Raises:
        OSError: its files are damaged or gone.
    """
    with gzip.open(folder / PIXELS_FILE, "rb") as file:
        data = file.read(2 * height * width + 1)
    if len(data) != 2 * height * width:
        raise OSError("the pixels of a case are damaged")
    return np.frombuffer(data, "<u2").reshape(height, width)


def render_image(pixels: np.ndarray, window: Window, *, invert: bool, max_side: int) -> bytes:
    """Renders an image as PNG, 8 bits of grey.

    Args:
        pixels: uint16 [H, W].
        window: center and width in parts of the full range of `pixels`.
        invert: whether black and white change places.
        max_side: of the picture, in pixels; a larger image is scaled down.
    """
    values = np.arange(FULL_SCALE + 1) / FULL_SCALE
    grey = np.clip((values - window.center) / window.width + 0.5, 0, 1)
    table = np.rint(255 * (1 - grey if invert else grey)).astype(np.uint8)
    image = PIL.Image.fromarray(table[pixels])
    if max(image.size) > max_side:
        image = image.resize(_within(image.size, max_side), PIL.Image.Resampling.BILINEAR)
    return _png(image)


def shrink(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """Scales `pixels` down to `max_side` with the aspect ratio kept, uint16 [h, w].

    Args:
        pixels: uint16 [H, W]; returned as they are if they fit.
        max_side: in pixels.
    """
    height, width = pixels.shape
    if max(height, width) <= max_side:
        return pixels
    image = PIL.Image.fromarray(pixels.astype(np.float32))
    small = image.resize(_within((width, height), max_side), PIL.Image.Resampling.BILINEAR)
    return np.rint(np.clip(np.asarray(small), 0, FULL_SCALE)).astype("<u2")


def read_map(folder: Path) -> np.ndarray:
    """Reads the heat map of a case, float32 [h, w] in [0, 1], of a series [d, h, w].

    Raises:
        OSError: it has none.
        ValueError: the file is damaged.
    """
    found: np.ndarray = np.load(folder / MAP_FILE, allow_pickle=False)
    return found


def render_map(values: np.ndarray, area: Sequence[float], height: int, width: int) -> bytes:
    """Renders a heat map as PNG, RGBA, in the shape of its image.

    Args:
        values: float32 [h, w] in [0, 1].
        area: left, top, width and height of what the map covers, in parts of the image; may reach beyond it.
        height: of the image, in pixels; the picture's longer side is `MAP_SIDE_PX` at most.
        width: likewise.
    """
    columns, rows = _within((width, height), MAP_SIDE_PX)
    left, top, across, down = area
    size = (max(1, round(across * columns)), max(1, round(down * rows)))
    wide = PIL.Image.fromarray(values.astype(np.float32)).resize(size, PIL.Image.Resampling.BICUBIC)
    canvas = PIL.Image.new("F", (columns, rows))
    canvas.paste(wide, (round(left * columns), round(top * rows)))
    return _png(PIL.Image.fromarray(_coloured(np.clip(np.asarray(canvas), 0, 1))))


def _coloured(values: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4]: colour by value, opacity as well."""
    stops = np.linspace(0, 1, len(MAP_COLOURS))
    levels = np.linspace(0, 1, 256)
    table = np.stack([np.interp(levels, stops, channel) for channel in MAP_COLOURS.T] + [levels * MAP_MAX_ALPHA], axis=1)
    coloured: np.ndarray = np.rint(table).astype(np.uint8)[np.rint(values * 255).astype(np.uint8)]
    return coloured


def _within(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    scale = min(1.0, max_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
