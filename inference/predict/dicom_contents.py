"""What a DICOM object for the archive is filled with, besides its judgement: the patient it names, and the heat map as a picture.

`copy_as_utf8` writes text of the judged file's header in UTF-8, whatever character set and mistakes its writer had. `draw_heat` draws the
heat map over the image, `draw_slice_heat` over slices of a CT series, with a band below that says what it is and is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont
from pydicom import charset
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.valuerep import PersonName

from pneumofed.common.config.classes import positive_word
from pneumofed.common.imaging.ct_series import CtSlice, order_ct_slices
from pneumofed.common.imaging.types import LUNG_WINDOW
from pneumofed.common.imaging.volumes import Volume, apply_ct_window
from pneumofed.common.model_bundle.population import PopulationFinding
from pneumofed.common.model_bundle.predictor import Predictor
from pneumofed.common.model_bundle.suitability import Judgement, Prediction

UTF8 = "ISO_IR 192"
"""The one character set that holds all others (PS3.3, C.12.1.1.2)."""
_MISNAMED = {"GB2312": "GB18030", "GB18030-2000": "GB18030", "ISO_IR 58": "GB18030", "UTF-8": UTF8, "UTF8": UTF8}
"""Names that writers use for sets of the standard: GB 2312 and GBK are parts of GB 18030."""
_SEXES = ("M", "F", "O")

SIDES_PX = 512, 1024
"""Least and greatest longer side of the picture: words can be read at the first, and at the second it is a twentieth of a detector's
pixels to store."""
STATEMENT = "AI result, not for primary diagnosis"
_TILES, _TILE_PX = 3, 340
"""To a row of a picture of slices, and the width of one: three fill `SIDES_PX[1]`."""
_OPACITY = 0.55
_HOT, _WARM = np.array([0.85, 0.0, 0.0], np.float32), np.array([1.0, 0.8, 0.0], np.float32)


def copy_as_utf8(dataset: Dataset, keywords: Iterable[str]) -> None:
    """Rewrites attributes of type 2 in place so that they can be written in UTF-8; what cannot be read or is no such value is left empty.

    Args:
        dataset: as read from a file; its Specific Character Set becomes `UTF8`.
        keywords: the attributes, of VR LO, SH, PN, CS, DA or TM; made where missing.
    """
    encodings = _encodings(dataset)
    values = {keyword: _read(dataset, keyword, encodings) for keyword in keywords}
    dataset.SpecificCharacterSet = UTF8
    for keyword, value in values.items():
        if keyword in dataset:
            del dataset[keyword]
        setattr(dataset, keyword, value or None)


def _encodings(dataset: Dataset) -> list[str]:
    try:
        names = dataset.get("SpecificCharacterSet") or ""
        names = [names] if isinstance(names, str) else list(names)
        return charset.convert_encodings([_MISNAMED.get(str(name).strip().upper(), str(name).strip()) for name in names])
    except Exception:  # a name that pydicom does not know
        return charset.convert_encodings("")


def _read(dataset: Dataset, keyword: str, encodings: list[str]) -> str:
    representation = dictionary_VR(keyword)
    try:
        raw = getattr(dataset.get_item(keyword), "value", None)
        if isinstance(raw, bytes):
            raw = _decode(raw, representation, encodings)
        text = str(raw if raw is not None else "").rstrip("\0").strip()
    except Exception:  # pydicom raises whatever its decoders meet
        return ""
    if representation == "DA":
        return _date(text)
    if representation == "TM":
        return _time(text)
    if representation == "CS":
        return text.upper() if text.upper() in _SEXES else ""
    return "" if "\ufffd" in text or not text.isprintable() else text


def _decode(raw: bytes, representation: str, encodings: list[str]) -> str:
    if representation == "PN":
        return str(PersonName(raw, encodings).decode(encodings))
    return charset.decode_bytes(raw, encodings, {ord("\\")})


def _date(text: str) -> str:
    """YYYYMMDD, also of the form YYYY.MM.DD that ACR-NEMA had (PS3.5, 6.2); empty for what is no day."""
    digits = re.sub(r"[.\-/]", "", text)
    try:
        return datetime.strptime(digits, "%Y%m%d").strftime("%Y%m%d") if re.fullmatch("[0-9]{8}", digits) else ""
    except ValueError:
        return ""


def _time(text: str) -> str:
    """HHMMSS.FFFFFF or its beginning, also with the colons that ACR-NEMA had (PS3.5, 6.2); empty for what is no time."""
    compact = text.replace(":", "")
    return compact if re.fullmatch(r"([01]\d|2[0-3])([0-5]\d(([0-5]\d|60)(\.\d{1,6})?)?)?", compact) else ""


def draw_heat(pixels: np.ndarray, judgement: Judgement, predictor: Predictor) -> np.ndarray:
    """Draws `pixels` float32 [H, W] in [0, 1] with the heat over it and the words in a band below, uint8 [H + band, W, 3].

    The band covers no anatomy. Warm is what speaks for pneumonia, relative to the strongest place of the map in either direction, so
    that an image in which everything speaks against it stays nearly grey.

    Args:
        pixels: of the whole image.
        judgement: of the same image.
        predictor: that judged it.

    Raises:
        ValueError: the image cannot be judged, or the network has no activation map.
    """
    found = judgement.prediction
    if found is None or found.activation_map is None:
        raise ValueError("there is no activation map")
    grey = _resize(pixels)
    picture = _colour(grey, place_map(found.activation_map, grey.shape, predictor.manifest.preprocessing.fit))
    return np.concatenate([picture, _band(words(found, predictor, judgement.population), grey.shape[1])])


def _colour(grey: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] of `grey` and `heat` in [0, 1]."""
    opacity = _OPACITY * heat[..., None]
    colour = _WARM + (_HOT - _WARM) * heat[..., None]
    return np.rint(255 * (grey[..., None] * (1 - opacity) + colour * opacity)).astype(np.uint8)


def draw_slice_heat(
    volume: Volume, numbers: Sequence[int], judgement: Judgement, predictor: Predictor
) -> tuple[np.ndarray, list[int]]:
    """Draws the slices of a CT volume in which most speaks for pneumonia, three to a row, each with its number below, and the words of
    `draw_heat` in a band below all.

    Args:
        volume: as it was read.
        numbers: of its slices in the archive; empty where it has none.
        judgement: of the same volume.
        predictor: that judged it.

    Returns:
        The picture, uint8 [H, W, 3], and the slices that it shows, from 0.

    Raises:
        ValueError: the volume cannot be judged, or the network has no activation map.
    """
    from pneumofed.inference.explain.pictures import choose_slices, name_slice, place_on_slices

    found = judgement.prediction
    if found is None or found.activation_map is None:
        raise ValueError("there is no activation map")
    shown = choose_slices(found.activation_map, predictor.manifest.preprocessing.slices, volume)
    largest = max(float(np.abs(found.activation_map).max()), 1e-12)
    strength = (np.maximum(found.activation_map, 0.0) / largest).astype(np.float32)
    tiles = []
    for place, heat in zip(shown, place_on_slices(strength, volume, shown), strict=True):
        grey, warm = (_tile(values, volume) for values in (apply_ct_window(volume.hounsfield[place], LUNG_WINDOW) / 255, heat))
        name = _band((name_slice(place, len(volume.hounsfield), numbers),), grey.shape[1])
        tiles.append(np.concatenate([_colour(grey, warm), name]))
    rows = [tiles[at : at + _TILES] for at in range(0, len(tiles), _TILES)]
    rows[-1] += [np.zeros_like(tiles[0])] * (_TILES - len(rows[-1]))
    picture = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    return np.concatenate([picture, _band(words(found, predictor, judgement.population), picture.shape[1])]), shown


def _tile(values: np.ndarray, volume: Volume) -> np.ndarray:
    """A slice in the proportions of the body, `_TILE_PX` wide."""
    (rows, columns), (_, down, across) = values.shape, volume.spacing_mm
    size = _TILE_PX, max(1, round(_TILE_PX * rows * down / (columns * across)))
    image = PIL.Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.clip(np.asarray(image.resize(size, PIL.Image.Resampling.BILINEAR)), 0, 1)


def list_axial_slices(path: Path) -> list[CtSlice]:
    """Lists the slices of an axial DICOM series from the feet to the head, as `read_volume` has them; none of another series.

    Raises:
        ImageError: the series cannot be used.
    """
    slices, _, _ = order_ct_slices(path)
    return sorted(slices, key=lambda one: float(one.position[2])) if abs(slices[0].normal).argmax() == 2 else []


def slice_numbers(slices: Sequence[CtSlice]) -> tuple[int, ...]:
    """Returns the number by which an archive shows each of `slices`: Instance Number (0020,0013), of a multi-frame object that of the
    frame; none where they do not tell slices apart."""
    numbers = tuple(one.frame + 1 if one.frames > 1 else round(one.number) for one in slices)
    return numbers if len(set(numbers)) == len(numbers) else ()


def place_map(activation_map: np.ndarray, shape: tuple[int, ...], fit: str) -> np.ndarray:
    """Places `activation_map` over the image that the network's square was made of, float32 [H, W] in [0, 1].

    The inverse of `fit_square`: what lay over black padding is left out, what was cropped away is 0. What speaks against pneumonia is
    0, and 1 is the largest absolute value of the map.

    Args:
        activation_map: float32 [h, w] over the square; above zero speaks for pneumonia.
        shape: (H, W) of the image.
        fit: how the square was made, `pad` or `crop`.
    """
    strength = np.maximum(activation_map, 0) / max(float(np.abs(activation_map).max()), 1e-12)
    side = max(shape) if fit == "pad" else min(shape)
    square = np.asarray(
        PIL.Image.fromarray(strength.astype(np.float32)).resize((side, side), PIL.Image.Resampling.BILINEAR), np.float32
    )
    height, width = shape
    if fit == "pad":
        top, left = (side - height) // 2, (side - width) // 2
        return np.clip(square[top : top + height, left : left + width], 0, 1)
    placed = np.zeros(shape, np.float32)
    top, left = (height - side) // 2, (width - side) // 2
    placed[top : top + side, left : left + side] = np.clip(square, 0, 1)
    return placed


def words(found: Prediction, predictor: Predictor, population: PopulationFinding) -> tuple[str, ...]:
    """Words what stands below the picture; of the patient no more than a group that the model was not judged for.

    Args:
        found: for the image in the picture.
        predictor: that it comes from.
        population: whether the model was judged for such a patient; a line of its own warns where it was not.
    """
    side = "at or above" if found.decision != "normal" else "below"
    positive = positive_word(predictor.manifest.classes)
    word = "a finding" if positive == "finding" else positive
    others = [(name, value) for name, value in found.classes.items() if name != "normal"] if positive == "finding" else []
    phantom = " (trained on PHANTOMS: says nothing about patients)" if predictor.manifest.card.phantom else ""
    return (
        STATEMENT,
        *(f"not judged for this population: {one}" for one in population.outside_words),
        f"{positive} {_percent(found.probability)}, 95 % interval {_percent(found.low)} to {_percent(found.high)}",
        f"{side} the threshold {_percent(predictor.manifest.threshold.value)}; warm: speaks for {word}",
        *(", ".join(f"{name} {_percent(value)}" for name, value in others[at : at + 3]) for at in range(0, len(others), 3)),
        f"{predictor.manifest.name} {predictor.bundle.digest[:16]}{phantom}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _resize(pixels: np.ndarray) -> np.ndarray:
    longer = max(pixels.shape)
    target = min(max(longer, SIDES_PX[0]), SIDES_PX[1])
    height, width = (max(1, round(length * target / longer)) for length in pixels.shape)
    image = PIL.Image.fromarray(np.ascontiguousarray(pixels, np.float32))
    return np.clip(np.asarray(image.resize((width, height), PIL.Image.Resampling.BILINEAR)), 0, 1)


def _band(lines: tuple[str, ...], width: int) -> np.ndarray:
    """White words on black, uint8 [h, width, 3], as large as the longest line allows."""
    longest = max(ImageFont.load_default(100).getlength(line) for line in lines)
    size = max(5, min(24, int(96 * width / longest)))
    font, step = ImageFont.load_default(size), round(1.3 * size)
    band = PIL.Image.new("RGB", (width, step * len(lines) + size // 2), "black")
    draw = ImageDraw.Draw(band)
    for number, line in enumerate(lines):
        draw.text((size // 3, number * step + size // 6), line, "white", font)
    return np.asarray(band)
