"""Virtual scanners and their files: each hospital's radiographs look like its own device's (feature shift), and are DICOM files as the
archive of a hospital has them: Digital X-Ray (PS3.3, A.26).

A scanner's profile is drawn apart from its use, so one scanner treats every image alike and only the quantum noise differs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
from pydicom.valuerep import DSfloat
from scipy.ndimage import affine_transform, gaussian_filter

from pneumofed.common.seeds import numpy_generator
from pneumofed.simulation.phantoms.anatomy import Map, distance

LONGEST_SIDE_PX = 512
_SHARPENING_RADIUS = 0.012
_PENUMBRA = 0.004
MONOCHROME1_SHARE = 1 / 3
"""Share of the scanners that store bone as low values."""

STORED_BITS = 12
DETECTOR_MM = 350.0
"""Longer side of the detector, that of a usual 35 cm cassette."""
_WHITE = 2**STORED_BITS - 1


@dataclass(frozen=True)
class VirtualScanner:
    """How one device renders a chest. Lengths are shares of the picture's longer side, so that they hold at any resolution.

    Attributes:
        name: goes into the manifest's manufacturer column.
        zoom: magnification about the centre; above 1 crops the border, below 1 adds black around.
        blur: standard deviation of the detector's Gaussian blur.
        sharpening: strength of the edge enhancement (unsharp mask); 0 is none.
        gamma: exponent of the tone curve; above 1 is darker.
        contrast: bend of the film curve in [-2, 1]: above 0 steeper about middle grey, below 0 flatter.
        brightness: added to all grey values.
        vignetting: loss of light in the corners, in [0, 1].
        noise: standard deviation of the quantum noise at full brightness, where fewest quanta arrive.
        collimation: width of the black border of the collimator.
        bits: grey values are rounded to 2^bits steps.
        longest_side_px: resolution of the stored pictures.
        monochrome1: whether the files hold bone as low values and air as high ones; shown they look the same.
    """

    name: str
    zoom: float = 1.0
    blur: float = 0.0
    sharpening: float = 0.0
    gamma: float = 1.0
    contrast: float = 0.0
    brightness: float = 0.0
    vignetting: float = 0.0
    noise: float = 0.0
    collimation: float = 0.0
    bits: int = 8
    longest_side_px: int = LONGEST_SIDE_PX
    monochrome1: bool = False


_RANGES = {
    "zoom": (0.92, 1.12),
    "blur": (0.0, 0.012),
    "sharpening": (0.0, 1.2),
    "gamma": (0.65, 1.55),
    "contrast": (-0.8, 0.9),
    "brightness": (-0.08, 0.08),
    "vignetting": (0.0, 0.35),
    "noise": (0.003, 0.05),
    "collimation": (0.0, 0.05),
}


def draw_scanner(index: int, seed: int) -> VirtualScanner:
    """Draws the scanner of a hospital; pure in its arguments, every property uniform in a range that leaves a chest legible.

    Args:
        index: number of the hospital, from 0.
        seed: of all scanners.
    """
    rng = numpy_generator("scanner", seed, index)
    values = {name: float(rng.uniform(low, high)) for name, (low, high) in _RANGES.items()}
    bits, side = int(rng.choice((6, 7, 8))), int(rng.choice((256, 384, LONGEST_SIDE_PX)))
    inverted = bool(rng.random() < MONOCHROME1_SHARE)
    return VirtualScanner(f"virtual scanner {index}", **values, bits=bits, longest_side_px=side, monochrome1=inverted)


def apply(pixels: Map, scanner: VirtualScanner, rng: np.random.Generator) -> Map:
    """Renders a radiograph as a scanner shows it.

    Args:
        pixels: float32 [H, W] in [0, 1].
        scanner: the device.
        rng: draws only the noise.

    Returns:
        float32 [H, W] in [0, 1].
    """
    longer = max(pixels.shape)
    image = gaussian_filter(_magnify(pixels, scanner.zoom), scanner.blur * longer)
    image = image + scanner.sharpening * (image - gaussian_filter(image, _SHARPENING_RADIUS * longer))
    image = _tone(np.clip(image, 0.0, 1.0), scanner)
    radius, border = _geometry(*pixels.shape)
    image = image * (1.0 - scanner.vignetting * np.square(radius))
    quanta = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + scanner.noise * np.sqrt(np.maximum(image, 0.02)) * quanta
    image = image * np.clip((border - scanner.collimation) / _PENUMBRA + 1.0, 0.0, 1.0)
    steps = np.float32(2**scanner.bits - 1)
    return (np.round(np.clip(image, 0.0, 1.0) * steps) / steps).astype(np.float32)


def _magnify(pixels: Map, zoom: float) -> Map:
    centre = (np.asarray(pixels.shape) - 1.0) / 2.0
    return affine_transform(pixels, np.full(2, 1.0 / zoom), offset=centre * (1.0 - 1.0 / zoom), order=1, mode="constant")


def _tone(image: Map, scanner: VirtualScanner) -> Map:
    """Gamma, then v + c v (1 - v) (2 v - 1), monotone for c in [-2, 1] with slope 1 + c / 2 in the middle, then brightness."""
    curved = image**scanner.gamma
    curved = curved + scanner.contrast * curved * (1.0 - curved) * (2.0 * curved - 1.0)
    return np.clip(curved + scanner.brightness, 0.0, 1.0)


@lru_cache(maxsize=16)
def _geometry(height: int, width: int) -> tuple[Map, Map]:
    """Distance from the centre (1 in the corners) and from the nearest border (as a share of the longer side), each [H, W]."""
    row, column = (np.arange(height, dtype=np.float32) + 0.5)[:, None], (np.arange(width, dtype=np.float32) + 0.5)[None, :]
    radius = distance(2.0 * row / height - 1.0, 2.0 * column / width - 1.0) / np.float32(np.sqrt(2.0))
    border = np.minimum(np.minimum(row, height - row), np.minimum(column, width - column)) / max(height, width)
    return radius, border


@dataclass(frozen=True)
class Examination:
    """What the file of one radiograph says beside its pixels. What is not known stays empty, as its modules allow (type 2).

    Attributes:
        image: what makes the image unique; its UIDs are a hash of that.
        manufacturer: of the device, which says of a drawn image that it is drawn.
        is_drawn: whether it is a phantom; only such a one has a made-up name.
        monochrome1: whether low stored values are white.
        patient: the number of a drawn patient.
        view: projection, e.g. `PA`.
        sex: `M` or `F`.
        age_years: at the examination; months are kept below two years.
        lossy_ratio: how much smaller the lossy file was that the image comes from; 0 if there was none.
    """

    image: str
    manufacturer: str
    is_drawn: bool
    monochrome1: bool = False
    patient: str = ""
    view: str = ""
    sex: str = ""
    age_years: float | None = None
    lossy_ratio: float = 0.0

    @property
    def sop_uid(self) -> UID:
        """SOP Instance UID (0008,0018)."""
        return make_uid("image", self.image)


def encode_dicom(pixels: Map, examination: Examination) -> bytes:
    """Encodes a radiograph as an uncompressed DICOM file: 12 bits stored in 16, with a window over all of them.

    Guarantees:
        Pure in its arguments: the same bytes from the same version of pydicom.
        `common.imaging.images.read_image` gives `pixels` back within half a grey level, whichever way the values are stored.

    Args:
        pixels: float32 [H, W] in [0, 1], 0 is black as shown.
        examination: what the header says.
    """
    dataset = Dataset()
    set_patient(dataset, examination)
    _set_series(dataset, examination)
    _set_image(dataset, examination)
    _set_pixels(dataset, pixels, examination.monochrome1)
    return encode_examination(dataset)


def encode_examination(dataset: Dataset) -> bytes:
    """Encodes a data set as a DICOM file, uncompressed (PS3.10, 7.1); its file meta information is made anew."""
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = make_uid("pneumofed")
    dataset.file_meta.ImplementationVersionName = "PNEUMOFED"
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def make_uid(*parts: str) -> UID:
    """Makes a UID below 2.25 from a UUID (PS3.5, B.2) of version 8 (RFC 9562, 5.8); the same for the same `parts`."""
    digest = hashlib.sha256("\x1f".join(parts).encode("utf-8", errors="surrogateescape")).digest()
    bits = int.from_bytes(digest[:16], "big") & ~(0xF << 76) & ~(0x3 << 62) | (0x8 << 76) | (0x2 << 62)
    return UID(f"2.25.{bits}")


def make_patient_id(person: str) -> str:
    """Makes a Patient ID, the same for the same `person`, that discloses nothing of them."""
    return hashlib.sha256(person.encode("utf-8", errors="surrogateescape")).hexdigest()[:12].upper()


def set_patient(dataset: Dataset, examination: Examination) -> None:
    """Sets Patient (PS3.3, C.7.1.1), General Study (C.7.2.1) and Patient Study (C.7.2.2).

    A drawn name must not hold a word of the manufacturer, which de-identification would then remove with it.

    Args:
        dataset: of the image.
        examination: what the header says.
    """
    dataset.PatientName = f"DRAWN^{examination.patient}" if examination.is_drawn else None  # (0010,0010)
    dataset.PatientID = examination.patient  # (0010,0020)
    dataset.PatientBirthDate = None  # (0010,0030)
    dataset.PatientSex = examination.sex  # (0010,0040)
    if examination.age_years is not None:
        dataset.PatientAge = _age_string(examination.age_years)  # (0010,1010)
    dataset.StudyInstanceUID = make_uid("study", examination.image)  # (0020,000D)
    for keyword in ("StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber"):
        setattr(dataset, keyword, None)


def _age_string(years: float) -> str:
    """An Age String (PS3.5, 6.2)."""
    return f"{int(years * 12):03d}M" if years < 2 else f"{min(int(years), 999):03d}Y"


def _set_series(dataset: Dataset, examination: Examination) -> None:
    """General Series and DX Series (PS3.3, C.7.3.1 and C.8.11.1), General Equipment (C.7.5.1)."""
    dataset.Modality = "DX"  # (0008,0060)
    dataset.PresentationIntentType = "FOR PRESENTATION"  # (0008,0068)
    dataset.SeriesInstanceUID = make_uid("series", examination.image)  # (0020,000E)
    dataset.SeriesNumber, dataset.InstanceNumber = 1, 1
    dataset.Manufacturer = examination.manufacturer  # (0008,0070)


def _set_image(dataset: Dataset, examination: Examination) -> None:
    """General Image, DX Anatomy Imaged, DX Image, DX Positioning (PS3.3, C.7.6.1, C.8.11.2, C.8.11.3, C.8.11.5), SOP Common."""
    dataset.SOPClassUID = DigitalXRayImageStorageForPresentation  # (0008,0016)
    dataset.SOPInstanceUID = examination.sop_uid  # (0008,0018)
    dataset.ImageType = ["DERIVED", "PRIMARY"]  # (0008,0008): no device took it
    dataset.DerivationDescription = "drawn by a program" if examination.is_drawn else "passed through a virtual scanner"
    dataset.PatientOrientation = ["L", "F"] if examination.is_drawn else None  # (0020,0020)
    dataset.BodyPartExamined = "CHEST"  # (0018,0015)
    dataset.AnatomicRegionSequence = [_chest()]  # (0008,2218)
    dataset.ImageLaterality = "U"  # (0020,0062): unpaired
    dataset.ViewPosition = examination.view  # (0018,5101)
    # (0028,0301): what stands in another's image is not known, so the cautious answer is given.
    dataset.BurnedInAnnotation = "NO" if examination.is_drawn else "YES"
    dataset.LossyImageCompression = "01" if examination.lossy_ratio else "00"  # (0028,2110): once lossy, always so (C.7.6.1.1.5)
    if examination.lossy_ratio:
        dataset.LossyImageCompressionRatio = DSfloat(round(examination.lossy_ratio, 3))  # (0028,2112)
    dataset.DetectorType = None  # (0018,7004): DX Detector, C.8.11.4
    dataset.AcquisitionContextSequence = []  # (0040,0555): C.7.6.14


def _chest() -> Dataset:
    """PS3.16, CID 4009."""
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "51185008", "SCT", "Chest"
    return code


def _set_pixels(dataset: Dataset, pixels: Map, monochrome1: bool) -> None:
    """Image Pixel (PS3.3, C.7.6.3), the grey scale of DX Image (C.8.11.3) and VOI LUT (C.11.2)."""
    codes = np.rint(pixels * np.float32(_WHITE)).astype("<u2")
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, STORED_BITS, STORED_BITS - 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if monochrome1 else "MONOCHROME2"  # (0028,0004)
    dataset.PresentationLUTShape = "INVERSE" if monochrome1 else "IDENTITY"  # (2050,0020): C.8.11.3.1.2
    dataset.PixelIntensityRelationship = "LOG"  # (0028,1040)
    dataset.PixelIntensityRelationshipSign = 1 if monochrome1 else -1  # (0028,1041): 1 if low values are bone
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = 0, 1, "US"
    dataset.WindowCenter, dataset.WindowWidth = (
        2 ** (STORED_BITS - 1),
        2**STORED_BITS,
    )  # LINEAR: 0 is black and 4095 white (C.11.2.1.2.1)
    spacing = DSfloat(DETECTOR_MM / max(pixels.shape), auto_format=True)
    dataset.PixelSpacing = dataset.ImagerPixelSpacing = [spacing, spacing]  # (0028,0030), (0018,1164): equal, so at the detector
    dataset.PixelData = (_WHITE - codes if monochrome1 else codes).astype("<u2").tobytes()  # (7FE0,0010)
    dataset["PixelData"].VR = "OW"
