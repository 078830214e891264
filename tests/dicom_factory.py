"""Synthetic DICOM files for tests, as a hospital's would be: any pixel layout, any tag, many transfer syntaxes."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    generate_uid,
)

PATIENT_NAME = "Doe^Jane"
PATIENT_ID = "HOSPITAL-4711"


def draw_radiograph(dtype: str = "u2", bits: int = 12) -> np.ndarray:
    """Stored values [40, 36] of the type `dtype`: a smooth blob with noise that uses the whole range of `bits` bits."""
    rows, columns = np.indices((40, 36))
    blob = np.exp(-((rows - 20) ** 2 + (columns - 16) ** 2) / 200) + np.random.default_rng(0).random((40, 36)) / 20
    values = np.round(blob / blob.max() * (2**bits - 1)).astype(np.int64)
    return (values - 2 ** (bits - 1) if dtype.startswith("i") else values).astype(dtype)


def write_dicom(path: Path, stored: np.ndarray, **options: Any) -> Path:
    """Writes `dicom_bytes(stored, **options)` to `path` and returns it."""
    path.write_bytes(dicom_bytes(stored, **options))
    return path


def dicom_bytes(
    stored: np.ndarray,
    *,
    syntax: UID = ExplicitVRLittleEndian,
    text: Mapping[str, str] | None = None,
    preamble: bool = True,
    **tags: Any,
) -> bytes:
    """A DICOM file with the pixels `stored`, uint8, int8, uint16 or int16 [H, W].

    Args:
        stored: the stored values, before any modality LUT; colour as uint8 [H, W, 3].
        syntax: the transfer syntax; JPEG baseline is lossy, the others keep the values.
        text: tags written as this text whatever their type, as broken writers do; needs Implicit VR to be read as that type.
        preamble: False leaves out the 128 bytes, `DICM` and the file meta information.
        tags: any tag by keyword; None leaves it out.
    """
    dataset = make_dataset(stored, **tags)
    for keyword, value in (text or {}).items():
        dataset[keyword] = DataElement(Tag(keyword), "LO", value)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax if not syntax.is_compressed or syntax.is_deflated else ExplicitVRLittleEndian
    if not syntax.is_little_endian:
        dataset["PixelData"].value = stored.byteswap().tobytes()
    if syntax.is_encapsulated:
        _compress(dataset, stored, syntax)
    buffer = BytesIO()
    if preamble:
        dataset.save_as(buffer, enforce_file_format=True)
    else:
        del dataset.file_meta
        dataset.save_as(buffer, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    return buffer.getvalue()


def make_dataset(stored: np.ndarray, **tags: Any) -> Dataset:
    """A digital radiograph with the pixels `stored` and a patient's name and number; `tags` replace or (None) remove tags."""
    bits, is_grey = stored.dtype.itemsize * 8, stored.ndim == 2
    values = {
        "SOPClassUID": DigitalXRayImageStorageForPresentation,
        "SOPInstanceUID": generate_uid(),
        "PatientName": PATIENT_NAME,
        "PatientID": PATIENT_ID,
        "Modality": "DX",
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "SamplesPerPixel": 1 if is_grey else 3,
        "PlanarConfiguration": None if is_grey else 0,
        "PhotometricInterpretation": "MONOCHROME2" if is_grey else "RGB",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": (tags.get("BitsStored") or bits) - 1,
        "PixelRepresentation": int(stored.dtype.kind == "i"),
        **tags,
    }
    dataset = Dataset()
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    if "PixelData" not in tags:
        data = stored.tobytes() + b"\0" * (stored.nbytes % 2)
        dataset["PixelData"] = DataElement(Tag("PixelData"), "OW" if bits > 8 else "OB", data)
    return dataset


def lut_item(first: int, entries: np.ndarray, bits: int, word: str = "<u2") -> Dataset:
    """One item of a Modality or VOI LUT Sequence: `entries` for the inputs from `first` on, as bytes of the type `word`."""
    item = Dataset()
    item["LUTDescriptor"] = DataElement(Tag("LUTDescriptor"), "SS" if first < 0 else "US", [len(entries) % 65_536, first, bits])
    item["LUTData"] = DataElement(Tag("LUTData"), "OW", entries.astype(word).tobytes())
    return item


def _compress(dataset: Dataset, stored: np.ndarray, syntax: UID) -> None:
    if syntax == JPEGBaseline8Bit:
        frame = _encode_jpeg(stored)
    elif syntax in (JPEGLossless, JPEGLosslessSV1):
        frame = encode_jpeg_lossless(stored, dataset.BitsStored)
    else:
        dataset.compress(syntax, generate_instance_uid=False)
        return
    dataset["PixelData"] = DataElement(Tag("PixelData"), "OB", encapsulate([frame]), is_undefined_length=True)
    dataset.file_meta.TransferSyntaxUID = syntax


def _encode_jpeg(stored: np.ndarray) -> bytes:
    buffer = BytesIO()
    PIL.Image.fromarray(stored).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def encode_jpeg_lossless(stored: np.ndarray, bits: int) -> bytes:
    """JPEG process 14, selection value 1 (ITU-T T.81, annex H): the syntax of most radiographs in archives.

    Each pixel is predicted by its left neighbour; the bit length of the difference is coded in 5 bits, its value follows.
    """
    pixels = stored.astype(np.int64) & (2**bits - 1)
    predicted = np.full_like(pixels, 2 ** (bits - 1))
    predicted[:, 1:] = pixels[:, :-1]
    predicted[1:, 0] = pixels[:-1, 0]
    code = "".join(_code_difference(difference) for difference in (pixels - predicted).ravel().tolist())
    code += "1" * (-len(code) % 8)
    scan = int(code, 2).to_bytes(len(code) // 8, "big").replace(b"\xff", b"\xff\x00")
    rows, columns = (length.to_bytes(2, "big") for length in pixels.shape)
    frame_header = b"\xff\xc3\x00\x0b" + bytes([bits]) + rows + columns + b"\x01\x01\x11\x00"
    table = b"\xff\xc4\x00\x24\x00" + bytes([0, 0, 0, 0, 17, *[0] * 11]) + bytes(range(17))
    return b"\xff\xd8" + frame_header + table + b"\xff\xda\x00\x08\x01\x01\x00\x01\x00\x00" + scan + b"\xff\xd9"


def _code_difference(difference: int) -> str:
    difference = (difference + 32_767) % 65_536 - 32_767
    size = abs(difference).bit_length()
    extra = difference if difference >= 0 else difference + 2**size - 1
    return f"{size:05b}" + (f"{extra:0{size}b}" if 0 < size < 16 else "")
