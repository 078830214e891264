"""Reads the stored pixel values of a DICOM file: parsing, checks before any memory is taken, decompression, bit alignment.

Some compressed frames are read by other decoders and refused by ours, for what stands behind the image's data or for one wrong parameter:
`mend_jpeg2000` and `mend_jpeg` give the decoder the same image data in the form that the standards ask for; `is_reversible` says whether a
JPEG 2000 codestream keeps every bit. None of them looks at the image data themselves.
"""

from __future__ import annotations

import logging
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.filereader import read_dataset, read_preamble
from pydicom.pixels import get_decoder
from pydicom.pixels.decoders.base import Decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEG2000TransferSyntaxes,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLETransferSyntaxes,
)

from pneumofed.common.errors import ImageError, SkipReason
from pneumofed.common.imaging.dicom_tags import ASPECT_TAGS, code_of, integer_of, value_of
from pneumofed.common.imaging.dicom_views import VIEW_TAGS
from pneumofed.common.imaging.types import MAX_FILE_BYTES, check_size

# pydicom logs the values of tags and the traceback of every damaged file; `ImageError` says what is needed.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

_TAGS = [
    *("Modality", "Manufacturer", "ManufacturerModelName", "PatientSex", "PatientAge", "PatientBirthDate", "StudyDate"),
    *VIEW_TAGS,
    *ASPECT_TAGS,
    "PresentationIntentType",
    *("SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored"),
    *("HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "RescaleIntercept", "RescaleSlope"),
    *("ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape"),
    "PixelData",
]
"""All that is parsed: a patient's name or number is not, and of the date of birth only the age group is kept."""
_PLUGIN = "pylibjpeg"
"""One decoder library for all compressed data, so that a site which has another one beside it decodes the same values."""
_PIXEL_DATA_TAGS = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")
"""Pixel Data (7FE0,0010) in little and in big endian order."""
_JPEG_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""SOF markers: ITU-T T.81, table B.1 (C4, C8 and CC mean other things), and T.87, C.1.1 for JPEG-LS."""

_MEMORY = re.compile(rf"{_PLUGIN}:\s*$|bad_alloc|MemoryError|Unable to allocate|out of memory", re.IGNORECASE)
"""What MemoryErrors say: Python's nothing, C++ bad_alloc, numpy how much it could not allocate."""
_LOSSLESS = frozenset({JPEG2000Lossless, JPEGLSLossless, JPEGLossless, JPEGLosslessSV1})


@dataclass(frozen=True)
class PixelLayout:
    """How pixels are stored: the Image Pixel module (PS3.3, C.7.6.3), checked."""

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    photometric: str

    def values_of(self, codes: np.ndarray) -> np.ndarray:
        """Converts `codes` of `read_codes` to the stored values that they stand for, float64."""
        return codes.astype(np.uint16).view(np.int16 if self.signed else np.uint16).astype(np.float64)


def parse(data: bytes) -> FileDataset:
    """Parses the tags of the DICOM file `data`, with or without preamble and file meta information.

    Raises:
        ImageError: no pixel data, or the file ends within them.
    """
    if DeflatedExplicitVRLittleEndian.encode() in data:
        check_inflated_size(BytesIO(data))
    dataset = dcmread(BytesIO(data), force=True, specific_tags=_TAGS)
    if not value_of(dataset, "PixelData"):
        ends_within = "PixelData" not in dataset and any(tag in data for tag in _PIXEL_DATA_TAGS)
        raise ImageError(SkipReason.CORRUPT if ends_within else SkipReason.NO_PIXEL_DATA)
    return dataset


def read_layout(dataset: Dataset) -> PixelLayout:
    """Reads and checks the layout of the one grey frame in `dataset`.

    Raises:
        ImageError: more than one frame, colour, more or fewer bits than 8 to 16, dimensions beyond the limits.
    """
    if integer_of(dataset, "NumberOfFrames", 1) > 1:
        raise ImageError(SkipReason.MULTI_FRAME)
    photometric = code_of(dataset, "PhotometricInterpretation")
    if not photometric:
        raise ImageError(SkipReason.CORRUPT, "no usable PhotometricInterpretation")
    if integer_of(dataset, "SamplesPerPixel", 1) != 1 or photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError(SkipReason.COLOUR)
    rows, columns = integer_of(dataset, "Rows"), integer_of(dataset, "Columns")
    check_size(rows, columns)
    allocated, stored, high = _read_bits(dataset)
    return PixelLayout(rows, columns, allocated, stored, high, integer_of(dataset, "PixelRepresentation", 0) == 1, photometric)


def read_codes(dataset: Dataset, layout: PixelLayout) -> np.ndarray:
    """Reads the stored values, decompressed and aligned.

    Args:
        dataset: of `parse`.
        layout: of `read_layout`; the decoders get their options from it, not from the file's tags.

    Returns:
        uint16 [rows, columns], negative values in two's complement (see `PixelLayout.values_of`).

    Raises:
        ImageError: the transfer syntax is not decoded here, or the compressed data have another size than declared. For
            damaged data the decoders raise other exceptions.
    """
    decoder = _find_decoder(dataset)
    element = dataset["PixelData"]
    if decoder.UID.is_encapsulated and decoder.UID not in RLETransferSyntaxes:
        frame = get_frame(element.value, 0, number_of_frames=1)
        _check_codestream(frame, decoder.UID, layout)
        is_wavelet = decoder.UID in JPEG2000TransferSyntaxes
        stored = _run(decoder, encapsulate([(mend_jpeg2000 if is_wavelet else mend_jpeg)(frame)]), layout)
        stored = _fit_bits(stored, layout, decoder.UID in _LOSSLESS or (is_wavelet and is_reversible(frame)))
    else:
        stored = _align(_run(decoder, element.value, layout, correct_unused_bits=False, pixel_vr=element.VR), layout)
    return stored.astype(np.int16 if layout.signed else np.uint16, copy=False).view(np.uint16)


def check_inflated_size(stream: BinaryIO) -> None:
    """Refuses a deflated data set (PS3.5, A.5) that grows beyond `MAX_FILE_BYTES`, which pydicom would not stop.

    Raises:
        ImageError: it does. On damaged bytes pydicom and zlib may raise other exceptions.
    """
    read_preamble(stream, force=True)
    meta = read_dataset(stream, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        inflater.decompress(stream.read(MAX_FILE_BYTES), MAX_FILE_BYTES)
        if inflater.unconsumed_tail:
            raise ImageError(SkipReason.TOO_LARGE, f"deflated data set of more than {MAX_FILE_BYTES} bytes")


def _read_bits(dataset: Dataset) -> tuple[int, int, int]:
    """Reads (Bits Allocated, Bits Stored, High Bit); an impossible High Bit is replaced by Bits Stored - 1 (PS3.5, 8.1.1)."""
    allocated = integer_of(dataset, "BitsAllocated")
    stored = integer_of(dataset, "BitsStored", allocated)
    if allocated not in (8, 16) or not 8 <= stored <= allocated:
        raise ImageError(SkipReason.UNSUPPORTED_BITS, f"{stored} of {allocated}")
    high = integer_of(dataset, "HighBit", stored - 1)
    return allocated, stored, high if stored <= high + 1 <= allocated else stored - 1


def _find_decoder(dataset: Dataset) -> Decoder:
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not syntax:
        implicit, little_endian = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little_endian else ExplicitVRBigEndian
        syntax = ImplicitVRLittleEndian if implicit else explicit
    try:
        decoder = get_decoder(UID(syntax))
    except NotImplementedError:
        raise ImageError(SkipReason.UNSUPPORTED_COMPRESSION) from None
    if decoder.UID.is_encapsulated and _PLUGIN not in decoder.available_plugins:
        raise ImageError(SkipReason.NO_DECODER, f"{_PLUGIN} has no decoder for {decoder.UID.name} here")
    return decoder


def _run(decoder: Decoder, data: bytes, layout: PixelLayout, **options: Any) -> np.ndarray:
    """The first frame in `data`, as the decoder gives it. Its options come from `layout`, so no malformed tag reaches it."""
    options |= {
        "rows": layout.rows,
        "columns": layout.columns,
        "bits_allocated": layout.bits_allocated,
        "bits_stored": layout.bits_stored,
        "pixel_representation": int(layout.signed),
        "photometric_interpretation": layout.photometric,
        "samples_per_pixel": 1,
        "number_of_frames": 1,
        "pixel_keyword": "PixelData",
    }
    plugin = _PLUGIN if decoder.UID.is_encapsulated else ""
    try:
        return decoder.as_array(data, index=0, raw=True, decoding_plugin=plugin, **options)[0]
    except RuntimeError as error:
        # pydicom makes every exception of a decoder a RuntimeError, whose text is all that is left of it.
        if _MEMORY.search(str(error)):
            raise MemoryError from None
        raise
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # the RLE decoder panics in Rust: no subclass of Exception, nor importable
            raise ImageError(SkipReason.CORRUPT, "PanicException") from None
        raise


def _check_codestream(frame: bytes, syntax: UID, layout: PixelLayout) -> None:
    """Refuses compressed data of another size than declared: the decoders take memory for what the codestream says."""
    *size, bits = (_read_jpeg2000_header if syntax in JPEG2000TransferSyntaxes else _read_jpeg_header)(frame)
    if size != [layout.rows, layout.columns, 1] or bits > layout.bits_allocated:
        raise ImageError(SkipReason.CORRUPT, f"codestream of {' x '.join(map(str, size))} with {bits} bits")


def _read_jpeg2000_header(frame: bytes) -> tuple[int, int, int, int]:
    """(rows, columns, components, bits) of the SIZ segment that follows the start of codestream (ITU-T T.800, A.5.1)."""
    start = frame.find(b"\xff\x4f\xff\x51")
    if start < 0 or start + 43 > len(frame):
        raise ImageError(SkipReason.CORRUPT, "no header in the JPEG 2000 data")
    right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
    components, depth = struct.unpack_from(">HB", frame, start + 40)
    return bottom - top, right - left, components, (depth & 0x7F) + 1


def _read_jpeg_header(frame: bytes) -> tuple[int, int, int, int]:
    """(rows, columns, components, bits) of the first frame header in a JPEG or JPEG-LS codestream (ITU-T T.81, B.2.2)."""
    position = 2
    while position + 10 <= len(frame) and frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker in _JPEG_FRAME_HEADERS:
            _, bits, rows, columns, components = struct.unpack_from(">HBHHB", frame, position + 2)
            return rows, columns, components, bits
        is_fill = marker == 0xFF
        position += 1 if is_fill else 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
    raise ImageError(SkipReason.CORRUPT, "no frame header in the JPEG data")


def _fit_bits(stored: np.ndarray, layout: PixelLayout, is_lossless: bool) -> np.ndarray:
    """`stored` of a codestream without what lies above Bits Stored, which is not part of the value (PS3.5, 8.1.1).

    Where compression has lost nothing the bits above are cut off; where it has, values beyond the range are errors of the compression
    at its ends, and become the end.
    """
    if layout.bits_stored == layout.bits_allocated:
        return stored
    least, most = (
        (-(2 ** (layout.bits_stored - 1)), 2 ** (layout.bits_stored - 1) - 1) if layout.signed else (0, 2**layout.bits_stored - 1)
    )
    wide = stored.astype(np.int32)
    return (wide - least & (2**layout.bits_stored - 1)) + least if is_lossless else np.clip(wide, least, most)


def _align(stored: np.ndarray, layout: PixelLayout) -> np.ndarray:
    """`stored` with the value at the low end of each word and its sign extended.

    Bits outside of (High Bit - Bits Stored, High Bit] are not part of the value: PS3.5, 8.1.1.
    """
    stored = np.left_shift(stored, layout.bits_allocated - 1 - layout.high_bit)
    return np.right_shift(stored, layout.bits_allocated - layout.bits_stored)


_EOC, _SOT, _COD, _SIZ = b"\xff\xd9", b"\xff\x90", b"\xff\x52", b"\xff\x51"
_LAST_COEFFICIENT = 63
"""End of spectral selection of every sequential scan (ITU-T T.81, table B.3)."""


def mend_jpeg2000(frame: bytes) -> bytes:
    """Ends a codestream right after its last tile-part with the EOC marker (ITU-T T.800, A.4.4).

    Comments, padding or nothing at all stand there in some archives' files, and OpenJPEG refuses the frame. The length of a tile-part is
    Psot of its SOT segment (A.4.2). A frame that is cut within a tile-part stays as it is, so that it is refused.
    """
    position = next((offset for marker, offset in _main_header(frame) if marker == _SOT), -1)
    if position < 0:
        return frame
    while frame[position : position + 2] == _SOT and position + 12 <= len(frame):
        (length,) = struct.unpack_from(">I", frame, position + 6)
        if length == 0:  # up to the end
            return frame if _EOC in frame[-4:] else frame + _EOC
        if length < 14 or position + length > len(frame):
            return frame
        position += length
    return frame if frame[position : position + 2] == _EOC else frame[:position] + _EOC


def is_reversible(frame: bytes) -> bool:
    """Whether a JPEG 2000 codestream uses the reversible 5-3 wavelet (ITU-T T.800, table A.20: transformation 1)."""
    start = next((offset for marker, offset in _main_header(frame) if marker == _COD), len(frame))
    return frame[start + 13 : start + 14] == b"\x01"


def mend_jpeg(frame: bytes) -> bytes:
    """Sets the end of spectral selection, Se, of a sequential JPEG scan to 63 where it is 0.

    Some writers of JPEG Extended give 0, as is right for lossless scans; it then stands for "DC coefficients only", and the data of the
    others would be refused. Progressive and lossless frames stay as they are.
    """
    is_sequential, position = False, 2
    while position + 4 <= len(frame) and frame[position] == 0xFF:
        marker, length = frame[position + 1], int.from_bytes(frame[position + 2 : position + 4], "big")
        if marker == 0xFF:
            position += 1
            continue
        is_sequential = is_sequential or marker in (0xC0, 0xC1)
        if marker == 0xDA:
            end = position + length  # of the segment's last three bytes: Ss, Se, Ah and Al
            is_wrong = is_sequential and frame[end - 1 : end + 1] == b"\0\0"
            return frame[:end] + bytes([_LAST_COEFFICIENT]) + frame[end + 1 :] if is_wrong else frame
        position += 2 + length
    return frame


def _main_header(frame: bytes) -> Iterator[tuple[bytes, int]]:
    """(marker, offset) of each segment of a JPEG 2000 main header, up to the first SOT."""
    position = frame.find(b"\xff\x4f" + _SIZ) + 2
    while position >= 2 and position + 4 <= len(frame):
        marker = frame[position : position + 2]
        yield marker, position
        if marker == _SOT:
            return
        position += 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
