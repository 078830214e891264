"""Radiographs as greyscale arrays: `read_image` for DICOM, JPEG, PNG, TIFF, BMP and WebP, `fit_square` for the model's input size.

Whatever is in a file, `read_image` gives an `Image` or raises an `ImageError`, so that one bad file costs a site one file. The
text of that error holds kinds and numbers of pixels, never a path or the value of another tag.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
from PIL import ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, TILELENGTH, TILEWIDTH, TiffImageFile

from pneumofed.common.errors import ConfigError, ImageError, PneumofedError, SkipReason
from pneumofed.common.imaging.dicom_tags import quiet_warnings
from pneumofed.common.imaging.types import MAX_FILE_BYTES, Format, Image, ImageInfo, RasterFormat, Window, check_size

COLOUR_SIDE_PX = 64
"""Pixels of the shorter side, at least, that colour is measured on."""


def read_image(path: str | PathLike[str], *, window: Window | None = None) -> Image:
    """Reads the radiograph in the file `path`, whose format is found by its content.

    DICOM is brought to display values as in `common.imaging.dicom_decode`. The others keep their values: 8 bits are divided by 255,
    16 bits by 65535, or by the largest value of the fewer bits that they use (`_depth_of`); colour becomes luma (ITU-R BT.601),
    transparent parts become black, the EXIF orientation is applied. A TIFF whose 0 is white is turned round. Files of several pages or
    frames, and TIFF of floating point or 32 bits, whose black and white nobody states, are refused.

    Args:
        path: the file.
        window: for DICOM only: replaces the file's own window or VOI LUT.

    Raises:
        ImageError: the file is missing, damaged, without contrast, too small, too large or of a kind that is not read; its
            `reason` says which. Sizes are checked before anything is decoded.
    """
    return decode_image(read_bytes(Path(path)), window=window)


def decode_image(data: bytes, *, window: Window | None = None) -> Image:
    """Decodes the radiograph in the content of a file, as `read_image` does.

    Args:
        data: all bytes of the file.
        window: for DICOM only: replaces the file's own window or VOI LUT.

    Raises:
        ImageError: as `read_image`.
    """
    with only_image_errors():
        return _decode(data, window)


def convert_picture(
    picture: PIL.Image.Image, kind: RasterFormat = "png", significant_bits: int = 0, *, white_is_zero: bool = False
) -> Image:
    """Converts a Pillow picture, with the values that a file of `kind` with this content has.

    Args:
        picture: of a mode that a file of `kind` can have; it is left as it is.
        kind: what stands in `ImageInfo.format`.
        significant_bits: that the file states (sBIT of PNG); 0 where it states none.
        white_is_zero: 16 bits whose 0 is white.

    Raises:
        ImageError: too small, too large, or without contrast.
    """
    check_size(picture.height, picture.width)
    picture.load()
    colour = _measure_colour(picture)
    grey, levels = _to_grey(ImageOps.exif_transpose(picture), significant_bits)
    pixels = np.asarray(grey, np.float32) / np.float32(levels)
    return from_grey(1 - pixels if white_is_zero else pixels, levels.bit_length(), kind, colour)


def from_grey(pixels: np.ndarray, bits: int, kind: Format, colour: float = 0.0) -> Image:
    """Wraps `pixels` that no header describes as an image.

    Args:
        pixels: float32 [H, W] in [0, 1]; 0 is black.
        bits: of the values that they were made from.
        kind: what stands in `ImageInfo.format`.
        colour: as `ImageInfo.colour`.

    Raises:
        ImageError: too small, too large, or without contrast.
    """
    check_size(*pixels.shape)
    if pixels.min() == pixels.max():
        raise ImageError(SkipReason.CONSTANT)
    return Image(pixels, ImageInfo(kind, pixels.shape[0], pixels.shape[1], bits, colour=colour))


def read_bytes(path: Path) -> bytes:
    """Reads the file `path` of at most `MAX_FILE_BYTES`.

    Raises:
        ImageError: it is missing, empty, no file, too large or cannot be opened.
    """
    try:
        if not path.is_file():  # a named pipe would block for ever
            raise ImageError(SkipReason.UNREADABLE if path.exists() else SkipReason.MISSING)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ImageError(SkipReason.TOO_LARGE, f"file of more than {MAX_FILE_BYTES} bytes")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageError(SkipReason.MISSING) from None
    except OSError as error:
        raise ImageError(SkipReason.UNREADABLE, type(error).__name__) from None
    if not data:
        raise ImageError(SkipReason.EMPTY)
    return data


@contextmanager
def only_image_errors() -> Iterator[None]:
    """Silences warnings inside, and turns whatever is raised there into an `ImageError` that quotes no value of the file.

    Raises:
        ImageError: anything was raised that is none of ours.
    """
    try:
        with quiet_warnings():
            yield
    except PneumofedError:
        raise
    except MemoryError:
        raise ImageError(SkipReason.OUT_OF_MEMORY) from None
    except PIL.Image.DecompressionBombError:
        raise ImageError(SkipReason.TOO_LARGE) from None
    except Exception as error:  # hostile bytes make the parsers raise nearly any class
        # Its text may quote tag values, so only the name of its class is kept.
        raise ImageError(SkipReason.CORRUPT, type(error).__name__) from None


@cache
def decoder_version() -> str:
    """Names all that decides whether an image can be read: this package and the decoders, with their versions.

    What was refused by another version is worth another try.
    """
    names = ("pneumofed", "pillow", "pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle")
    return ", ".join(f"{name} {_find_version(name)}" for name in names)


def _find_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def fit_square(pixels: np.ndarray, size_px: int, fit: Literal["pad", "crop"]) -> np.ndarray:
    """Scales an image to a square, with the aspect ratio kept.

    Scaling is bilinear, with a kernel as wide as the reduction so that nothing aliases (a triangle filter, as
    `torch.nn.functional.interpolate(..., antialias=True)`). Deterministic; a constant stays constant.

    Args:
        pixels: float32 [H, W] in [0, 1].
        size_px: side of the square.
        fit: `pad` scales the longer side to `size_px` and puts black on both sides of the shorter one; `crop` cuts the longer side at
            both ends and scales what is left.

    Returns:
        float32 [size_px, size_px] in [0, 1].

    Raises:
        ConfigError: `size_px` or `fit` is none of the above, or `pixels` is not an image.
    """
    if fit not in ("pad", "crop") or size_px < 1 or pixels.ndim != 2 or not pixels.size:
        raise ConfigError(f"fit_square: expected [H, W], a size and pad or crop, got {pixels.shape}, {size_px}, {fit!r}")
    if fit == "crop":
        side = min(pixels.shape)
        top, left = ((length - side) // 2 for length in pixels.shape)
        return _resize(pixels[top : top + side, left : left + side], size_px, size_px)
    scale = size_px / max(pixels.shape)
    height, width = (max(1, round(length * scale)) for length in pixels.shape)
    top, left = (size_px - height) // 2, (size_px - width) // 2
    square = np.zeros((size_px, size_px), np.float32)
    square[top : top + height, left : left + width] = _resize(pixels, height, width)
    return square


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    image = PIL.Image.fromarray(np.ascontiguousarray(pixels, np.float32))
    resized = image.resize((width, height), PIL.Image.Resampling.BILINEAR)
    return np.clip(np.asarray(resized), 0.0, 1.0)


def _find_format(data: bytes) -> Literal["dicom"] | RasterFormat:
    """Finds the format by the first bytes. DICOM: `DICM` after 128 bytes (PS3.10, 7.1), or a first tag of group 0002 or 0008."""
    if data[128:132] == b"DICM":
        return "dicom"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):  # TIFF 6.0, section 2, and BigTIFF
        return "tiff"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":  # RFC 9649, 2.4
        return "webp"
    if data[:2] == b"BM" and data[15:18] == b"\0\0\0":  # two letters are no sign: a header of 12 to 124 bytes comes after them
        return "bmp"
    if data.startswith((b"\x02\x00", b"\x08\x00", b"\x00\x08\x00")):
        return "dicom"
    raise ImageError(SkipReason.UNKNOWN_FORMAT)


def _decode(data: bytes, window: Window | None) -> Image:
    kind = _find_format(data)
    if kind != "dicom":
        return _decode_raster(data, kind)
    # Imported here, since pydicom takes a third of a second to import: only those who have DICOM pay.
    from pneumofed.common.imaging.dicom_decode import decode_dicom

    return decode_dicom(data, window)


def _decode_raster(data: bytes, kind: RasterFormat) -> Image:
    with PIL.Image.open(BytesIO(data), formats=[kind]) as image:
        check_size(image.height, image.width)
        white_is_zero = isinstance(image, TiffImageFile) and _check_tiff(image)
        if _has_second_frame(image):
            raise ImageError(SkipReason.MULTI_FRAME)
        return convert_picture(image, kind, _read_significant_bits(data) if kind == "png" else 0, white_is_zero=white_is_zero)


def _check_tiff(image: TiffImageFile) -> bool:
    """Whether 0 is white and Pillow leaves it so, as it does with 16 bits; it turns fewer bits round itself.

    Raises:
        ImageError: the grey values have no range that the file states, or a tile is larger than an image may be.
    """
    if image.mode in ("F", "I"):
        raise ImageError(SkipReason.UNSUPPORTED_BITS, f"mode {image.mode}")
    if image.mode in ("LAB", "CMYK"):
        raise ImageError(SkipReason.COLOUR)
    height, width = (image.tag_v2.get(tag) for tag in (TILELENGTH, TILEWIDTH))
    if isinstance(height, int) and isinstance(width, int):
        check_size(height, width)  # memory for a whole tile is taken, however small the image
    return image.mode.startswith("I;16") and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0


def _has_second_frame(image: PIL.Image.Image) -> bool:
    """Without counting the frames, of which a hostile file may have millions."""
    if isinstance(image, TiffImageFile):
        try:
            image.seek(1)
        except EOFError:
            return False
        return True
    return image.format == "WEBP" and getattr(image, "is_animated", False)


def _measure_colour(image: PIL.Image.Image) -> float:
    if image.mode in ("L", "LA") or image.mode.startswith("I"):
        return 0.0
    small = image.convert("RGB").reduce(max(1, min(image.size) // COLOUR_SIDE_PX))
    return float(np.ptp(np.asarray(small, np.float32), axis=2).mean() / 255)


def _read_significant_bits(data: bytes) -> int:
    """The first value of the sBIT chunk, which stands before the image's data (PNG, 11.3.2.7); 0 where there is none."""
    start = data.find(b"sBIT", 0, max(data.find(b"IDAT"), 0))
    return data[start + 4] if start >= 0 else 0


def _depth_of(most: int, significant_bits: int) -> int:
    """Bits that the values of a 16-bit picture fill, by the largest of them.

    PNG asks for values that are scaled to the whole range, whatever sBIT says. Many writers store those of a detector of 10, 12 or 14
    bits as they are: then the largest lies below 2^bits of sBIT, or where there is none of the smallest usual depth that holds it.
    """
    depths = (significant_bits,) if 8 <= significant_bits < 16 else (8, 10, 12, 14)
    return next((depth for depth in depths if most < 2**depth), 16)


def _to_grey(image: PIL.Image.Image, significant_bits: int) -> tuple[PIL.Image.Image, int]:
    """(image of one channel, its largest possible value)."""
    if image.mode.startswith("I"):
        return image, 2 ** _depth_of(int(np.max(np.asarray(image))), significant_bits) - 1
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "black"), image)
    return image.convert("L"), 255  # Pillow's L is the luma of ITU-R BT.601-2: 0.299 R + 0.587 G + 0.114 B
