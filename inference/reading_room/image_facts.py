"""What a viewer needs to know of a file's pixels besides the pixels: units of the grey values, size of a pixel, technical attributes.

They are read in the worker and kept as `facts.json` in the case's folder. Of the attributes only those in `SHOWN` are kept: how the image
was made and stored, in numbers and codes. None names the patient, a person or a place; the name is only handed back (`read_facts`), for
the page that sent the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, ValidationError

from pneumofed.common.imaging.types import Image

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

FACTS_FILE = "facts.json"
LONGEST_VALUE = 120
SpacingKind = Literal["patient", "calibrated", "detector", "film"]

SHOWN = (
    *("Modality", "SOPClassUID", "PresentationIntentType", "ViewPosition", "PatientOrientation", "ImageLaterality"),
    *("Manufacturer", "ManufacturerModelName", "DetectorType", "DetectorConfiguration", "FilterType", "Grid", "FocalSpots"),
    *("KVP", "XRayTubeCurrent", "ExposureTime", "Exposure", "ExposureInuAs", "ImageAndFluoroscopyAreaDoseProduct"),
    *("EntranceDoseInmGy", "ExposureIndex", "TargetExposureIndex", "DeviationIndex", "Sensitivity"),
    *("DistanceSourceToDetector", "DistanceSourceToPatient", "EstimatedRadiographicMagnificationFactor"),
    *("Rows", "Columns", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelSpacingCalibrationType"),
    *("PixelAspectRatio", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape"),
    *("SliceThickness", "SpacingBetweenSlices", "ConvolutionKernel", "ReconstructionDiameter", "GantryDetectorTilt"),
    *("PatientPosition", "SpiralPitchFactor", "CTDIvol"),
    *("BurnedInAnnotation", "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
"""By keyword, in the order of the page. No free text (Protocol Name, Image Comments, Body Part Examined), no date, no number of an
examination, no name of a place or device of the hospital: writers put names of patients into them."""


class GreyValues(BaseModel):
    """What the ends of the pixels' full range stand for, in `unit`; `low` is black before inversion, and the larger one of MONOCHROME1."""

    low: float
    high: float
    unit: str = Field(default="", description="Rescale Type, e.g. HU; empty where it is not stated.")


class PixelSize(BaseModel):
    """Of a pixel of the image as it is shown, in mm, and where that holds: `patient` in the patient (computed tomography), `calibrated`
    corrected for the magnification, `detector` at its front, where a projection is larger than what it shows, `film` of a scanned film."""

    row_mm: float
    column_mm: float
    kind: SpacingKind


class Attribute(BaseModel):
    """One attribute of the file."""

    tag: str
    name: str
    value: str


class SeriesFacts(BaseModel):
    """The slices of a CT series. They are numbered from 1 at the feet, and each is shown from below: the patient's right is on the left."""

    slices: int
    spacing_mm: float = Field(description="From one slice to the next.")
    first_mm: float | None = Field(
        description="Where slice 1 lies along the body, in the scanner's coordinates, toward the head."
    )
    strongest: int | None = Field(
        description="The slice with most of the map's weight; null where there is no map, or it is empty."
    )
    map_span: tuple[float, float] = Field(description="Start and length of what the map covers, in parts of the stack of slices.")
    notes: list[str] = Field(default=[], description="What was set aside when the series was read, in English.")


class FileFacts(BaseModel):
    """Of one file. `values` and `pixel` are None where it does not say, `series` where it is a radiograph."""

    values: GreyValues | None = None
    pixel: PixelSize | None = None
    attributes: list[Attribute] = []
    series: SeriesFacts | None = None


def read_facts(path: Path, image: Image, ends: tuple[float, float] | None) -> tuple[FileFacts, str]:
    """Reads the facts of the file `path`, and the patient's name, empty where there is none; never fails for what the file holds.

    Args:
        path: of the file.
        image: in it.
        ends: values that the ends of the pixels' range stand for, after the modality LUT; None where a VOI LUT lies between.
    """
    if image.info.format != "dicom":
        return FileFacts(values=GreyValues(low=0, high=2**image.info.bits - 1)), ""
    return _read_dicom_facts(path, image, ends)


def series_facts(
    path: Path, image: Image, pixel_mm: tuple[float, float], values: GreyValues, series: SeriesFacts
) -> tuple[FileFacts, str]:
    """Builds the facts of a CT series; attributes and the patient's name, empty where there is none, are those of its first file.

    Args:
        path: of its file, or the folder of its files.
        image: what the model saw of it.
        pixel_mm: between rows and between columns.
        values: what the ends of its pixels' range stand for.
        series: its slices.
    """
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    read = (_read_dicom_facts(file, image, None) for file in files) if image.info.format == "dicom" else ()
    found, name = next(((facts, name) for facts, name in read if facts.attributes), (FileFacts(), ""))
    pixel = PixelSize(row_mm=pixel_mm[0], column_mm=pixel_mm[1], kind="patient")
    return FileFacts(values=values, pixel=pixel, attributes=found.attributes, series=series), name


def _read_dicom_facts(path: Path, image: Image, ends: tuple[float, float] | None) -> tuple[FileFacts, str]:
    from pydicom import dcmread

    from pneumofed.common.imaging.dicom_pixels import check_inflated_size
    from pneumofed.common.imaging.dicom_tags import quiet_warnings, text_of

    keywords = [*SHOWN, "PatientName", "SpecificCharacterSet", "ModalityLUTSequence", "VOILUTSequence"]
    try:
        with quiet_warnings(), path.open("rb") as file:
            if file.read(132)[128:] == b"DICM":
                file.seek(0)
                check_inflated_size(file)
            file.seek(0)
            dataset = dcmread(file, stop_before_pixels=True, force=True, specific_tags=list(keywords))
            name = text_of(dataset, "PatientName").replace("^", " ").replace("=", " ").strip()
            return _describe(dataset, image, ends), " ".join(name.split())
    except Exception:  # a damaged attribute makes pydicom raise nearly any class; the image itself was read
        return FileFacts(), ""


def says_ct(path: Path) -> bool:
    """Says whether a file of several frames is one of CT by its own account; False where it is no DICOM."""
    from pydicom import dcmread

    from pneumofed.common.imaging.dicom_tags import code_of, quiet_warnings

    try:
        with quiet_warnings():
            return code_of(dcmread(path, stop_before_pixels=True, specific_tags=["Modality"]), "Modality") == "CT"
    except Exception:  # what is damaged makes pydicom raise nearly any class
        return False


def write_facts(folder: Path, facts: FileFacts) -> None:
    """Writes the facts into the case's `folder`.

    Args:
        folder: of the file.
        facts: of `read_facts`.
    """
    (folder / FACTS_FILE).write_text(facts.model_dump_json(), encoding="utf-8")


def stored_facts(folder: Path) -> FileFacts:
    """Reads what `write_facts` wrote; nothing is known of cases of earlier versions, or where the file is damaged."""
    try:
        return FileFacts.model_validate(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return FileFacts()


def _describe(dataset: Dataset, image: Image, ends: tuple[float, float] | None) -> FileFacts:
    from pneumofed.common.imaging.dicom_tags import text_of, value_of

    hidden = image.info.window is None and value_of(dataset, "VOILUTSequence")
    tables = value_of(dataset, "ModalityLUTSequence")
    unit = text_of(tables[0], "ModalityLUTType") if tables else text_of(dataset, "RescaleType")
    if not unit and image.info.modality == "CT":
        unit = "HU"  # PS3.3, C.8.2.1.1.2
    values = None if hidden or ends is None else GreyValues(low=ends[0], high=ends[1], unit="" if unit == "US" else unit[:16])
    return FileFacts(values=values, pixel=_pixel_size(dataset, image), attributes=_attributes(dataset))


def _pixel_size(dataset: Dataset, image: Image) -> PixelSize | None:
    """The size of a pixel and where it holds: PS3.3, 10.7.1.2 and 10.7.1.3."""
    from pneumofed.common.imaging.dicom_tags import code_of, numbers_of

    def of(keyword: str) -> list[float]:
        pair = numbers_of(dataset, keyword)
        usable = len(pair) == 2 and all(math.isfinite(side) and 0 < side < 100 for side in pair)
        return pair if usable else []

    spacing, imager, film = of("PixelSpacing"), of("ImagerPixelSpacing"), of("NominalScannedPixelSpacing")
    kind: SpacingKind
    if image.info.modality == "CT" and spacing:
        pair, kind = spacing, "patient"
    elif spacing and (code_of(dataset, "PixelSpacingCalibrationType") or (imager and spacing != imager)):
        pair, kind = spacing, "calibrated"
    elif imager or spacing:
        pair, kind = imager or spacing, "detector"  # a Pixel Spacing without more is that of the detector
    elif film:
        pair, kind = film, "film"
    else:
        return None
    sides = [float(value) for keyword in ("Rows", "Columns") for value in numbers_of(dataset, keyword)[:1]]
    if len(sides) != 2:
        return None
    return PixelSize(
        row_mm=pair[0] * sides[0] / image.info.height_px, column_mm=pair[1] * sides[1] / image.info.width_px, kind=kind
    )


def _attributes(dataset: Dataset) -> list[Attribute]:
    from pydicom.datadict import dictionary_description, tag_for_keyword
    from pydicom.tag import Tag

    from pneumofed.common.imaging.dicom_tags import all_texts_of

    found: list[Attribute] = []
    for keyword in SHOWN:
        number = tag_for_keyword(keyword)
        texts = _texts(all_texts_of(dataset, keyword))
        if texts and number is not None:
            tag = Tag(number)
            found.append(Attribute(tag=f"{tag.group:04X},{tag.element:04X}", name=dictionary_description(tag), value=texts))
    return found


def _texts(values: Sequence[str]) -> str:
    from pydicom.uid import UID

    named = [UID(value).name if value.startswith("1.2.840.10008.") else value for value in values if value]
    return ", ".join(named)[:LONGEST_VALUE]
