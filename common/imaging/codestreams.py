"""Compressed frames that other decoders read and ours would refuse: what stands behind the image's data, and one wrong parameter.

`mend_jpeg2000` and `mend_jpeg` give the decoder the same image data in the form that the standards ask for; `is_reversible` says whether a
JPEG 2000 codestream keeps every bit. None of them looks at the image data themselves.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

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
