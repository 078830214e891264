"""Drawn and simulated radiographs as DICOM files, as the archive of a hospital has them: Digital X-Ray (PS3.3, A.26)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
from pydicom.valuerep import DSfloat

from pneumofed.simulation.phantoms.anatomy import Map

STORED_BITS = 12
DETECTOR_MM = 350.0
"""Longer side of the detector, that of a usual 35 cm cassette."""
_WHITE = 2**STORED_BITS - 1


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
    _set_patient(dataset, examination)
    _set_series(dataset, examination)
    _set_image(dataset, examination)
    _set_pixels(dataset, pixels, examination.monochrome1)
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


def _set_patient(dataset: Dataset, examination: Examination) -> None:
    """Patient (PS3.3, C.7.1.1), General Study (C.7.2.1) and Patient Study (C.7.2.2).

    A drawn name must not hold a word of the manufacturer, which de-identification would then remove with it.
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
