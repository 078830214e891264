"""Conversion of whatever holds a radiograph (file, array, Pillow picture, pydicom data set) to pneumofed's own `Image`."""

from __future__ import annotations

import sys
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, Union

import numpy as np
import numpy.typing as npt
import PIL.Image

from pneumofed.common.errors import ArgumentError as ArgumentError
from pneumofed.common.errors import PneumofedError as PneumofedError
from pneumofed.common.imaging.images import convert_picture, decode_image, from_grey, only_image_errors
from pneumofed.common.imaging.images import read_image as read_image
from pneumofed.common.imaging.types import Image as Image
from pneumofed.common.imaging.types import Window
from pneumofed.common.imaging.volumes import Volume as Volume
from pneumofed.common.imaging.volumes import read_volume as read_volume

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

    from pneumofed.common.imaging.volumes import Volume


ImageLike: TypeAlias = Union[str, PathLike[str], npt.NDArray[Any], PIL.Image.Image, "Dataset", "Volume", Image]

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601-2, as Pillow has it
_ROUNDING = 1e-6
"""How far a float array may leave [0, 1]: float32 after a resize. It is cut off."""
_TWELVE_BITS = 4095
_PICTURE_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16L", "I;16B", "I;16N"})
"""Of Pillow: those that JPEG and PNG files have. I and F are taken as arrays."""


def to_image(value: ImageLike, window: Window | None = None) -> Image:
    """Converts `value` to a radiograph, with the grey values that a file of the same content has.

    Args:
        value: path of a file that `read_image` reads; array uint8 or uint16 or float in [0, 1], grey [H, W] or RGB [H, W, 3], 0 is black;
            Pillow picture; pydicom data set; or an `Image`, which is taken as it is.
        window: replaces the window of a DICOM file or data set.

    Raises:
        ArgumentError: the value is of another kind, or the array of another shape, type or range.
        ImageError: the image is missing, damaged, too small, too large or without contrast.
    """
    if isinstance(value, Image):
        return value
    if isinstance(value, str | PathLike):
        if Path(value).is_dir():
            raise ArgumentError(
                "image: expected the path of a file, got a folder; give a list of its files, e.g. sorted(folder.rglob('*.dcm'))"
            )
        return read_image(value, window=window)
    if isinstance(value, np.ndarray):
        return _from_array(value)
    if isinstance(value, PIL.Image.Image):
        return _from_picture(value)
    if _is_dataset(value):
        from pneumofed.common.imaging.dicom_decode import encode_dataset

        with only_image_errors():
            data = encode_dataset(value)
        return decode_image(data, window=window)
    raise ArgumentError(
        f"image: expected a path, a numpy array, a Pillow picture or a pydicom data set, got {type(value).__name__}; "
        "several images are given as a list"
    )


def _is_dataset(value: object) -> TypeGuard[Dataset]:
    """Without importing pydicom, which takes a third of a second: who has a data set has imported it."""
    module = sys.modules.get("pydicom.dataset")
    return module is not None and isinstance(value, module.Dataset)


def _from_picture(picture: PIL.Image.Image) -> Image:
    if picture.mode in ("I", "F"):
        array = np.asarray(picture)
        fits = picture.mode == "I" and array.size and array.min() >= 0 and array.max() <= np.iinfo(np.uint16).max
        return _from_array(array.astype(np.uint16) if fits else array)
    if picture.mode not in _PICTURE_MODES:
        raise ArgumentError(
            f"Pillow picture: expected a grey or colour mode, got {picture.mode}; convert it, e.g. picture.convert('L')"
        )
    with only_image_errors():
        return convert_picture(picture)


def _from_array(array: npt.NDArray[Any]) -> Image:
    _check_shape(array)
    if array.dtype == np.uint8 and array.ndim == 3:  # the way of a file, so that the greys are the same to the last bit
        with only_image_errors():
            return convert_picture(PIL.Image.fromarray(np.ascontiguousarray(array)))
    pixels, bits = _scale(array)
    if pixels.ndim == 2:
        return from_grey(pixels, bits, "png")
    coarse = convert_picture(PIL.Image.fromarray(np.rint(pixels * 255).astype(np.uint8)))
    return from_grey(np.clip(pixels @ _LUMA, 0.0, 1.0), bits, "png", coarse.info.colour)


def _check_shape(array: npt.NDArray[Any]) -> None:
    wanted = "image array: expected grey [H, W] or RGB [H, W, 3]"
    if not array.size:
        raise ArgumentError(f"{wanted}, got an empty array of shape {list(array.shape)}; check how it was cut or loaded")
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3):
        return
    advice = "give several images as a list of arrays" if array.ndim > 2 else "reshape it to rows and columns"
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        advice = "drop the channel axis, e.g. array[0] or array[..., 0]"
    elif array.ndim == 3 and array.shape[0] == 3:
        advice = "put the channels last, e.g. array.transpose(1, 2, 0)"
    elif array.ndim == 3 and array.shape[2] == 4:
        advice = "drop the transparency, e.g. array[..., :3]"
    raise ArgumentError(f"{wanted}, got the shape {list(array.shape)}; {advice}")


def _scale(array: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], int]:
    """(float32 in [0, 1] of the same shape, bits of the values)."""
    if array.dtype == np.uint8:
        return array.astype(np.float32) / np.float32(255), 8
    if array.dtype == np.uint16:
        highest = int(array.max())
        if array.min() < highest <= _TWELVE_BITS:  # read as 16 bits it would be nearly black, and judged all the same
            raise ArgumentError(
                f"image array: expected uint16 values that use 0 to 65535, got none above {highest}, as of a detector with 12 bits; "
                "give the pydicom data set or the path, or divide by the largest possible value: (array / 4095).astype('float32')"
            )
        return array.astype(np.float32) / np.float32(65535), 16
    if not np.issubdtype(array.dtype, np.floating):
        raise ArgumentError(
            f"image array: expected uint8, uint16 or a float type, got {array.dtype}; convert it, e.g. to float32 in [0, 1]"
        )
    if not np.isfinite(array).all():
        raise ArgumentError("image array: expected finite values, got NaN or infinity; replace them, e.g. by 0, which is black")
    low, high = float(array.min()), float(array.max())
    if low < -_ROUNDING or high > 1.0 + _ROUNDING:
        raise ArgumentError(
            f"image array: expected float values in [0, 1], got {low:g} to {high:g}; scale it, e.g. (array - low) / (high - low)"
        )
    return np.clip(np.ascontiguousarray(array, np.float32), 0.0, 1.0), 32
